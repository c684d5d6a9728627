"""The cycles of schedules, as the TPU compiler writes them."""

import pytest

from clip_jax.pods import schedule

# Two bundles, a loop over 4 programs (and two turns more, which only start and end copies: the body
# tests for them) of two bundles and one, in it a loop of 3 turns, of which each takes two of six
# steps; empty ones wait. The inner loop multiplies 16 rows of bfloat16, and twice 8 others.
TEXT = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov 0 }
   0x1   :  { %s2 = smov 0 }
   0x2 LB: > { %s3 = sadd.s32 1, %s2  ;;  %p3 = scmp.lt.s32.totalorder %s2, 1 }
   0x3   :  {}
   0x4 LB: >> { %9 = vmatmul.bf16.gmra.mxu0 %v1  ;;  %s5 = sadd.s32 2, %s9 /* copy for cssa */ }
   0x5   : >> { %p1 = scmp.ge.s32.totalorder %s5, 6 /* loop exit test */  ;;  MATMULS }
   0x6 PF: > { EXIT  ;;  %p4 = scmp.lt.s32.totalorder %s2, 5 }
   0x7   :  { %9 = sbr.rel (!%p2) target = $region82 }
""".replace("MATMULS", "vmatmul.f32.gmra.mxu1 %v1  ;;  vmatmul.lmr.bf16.gmra.16.mxu2 %v1").replace(
    "EXIT", "%p2 = scmp.ge.s32.totalorder %s3, 6 /* loop exit test */"
)


CYCLES = 2 + 4 * (2 + 3 * 2 + 1) + 1


def test_bundles_count_as_often_as_their_loop_runs(tmp_path):
    """The matrix units, four of a core, each take a row per cycle."""
    assert schedule.count(TEXT, 4) == (CYCLES, 4 * 3 * (16 + 8 + 8) // 4)
    assert CYCLES == 39
    (tmp_path / "17-my_kernel.3-72-final_bundles.txt").write_text(TEXT)
    (tmp_path / "17-copy.1-72-final_bundles.txt").write_text("     0   :  { %s1 = smov 0 }\n")
    (tmp_path / "17-my_kernel.3-71-schedule-analysis_final_bundles.txt").write_text("")
    (tmp_path / "17-unknown.4-72-final_bundles.txt").write_text(
        TEXT.replace("%s5, 6 ", "%s5, %s6 ")
    )
    schedules = {name: x.cycles for name, x in schedule.read(tmp_path, 4).items()}
    assert schedules == {"my_kernel.3": CYCLES, "copy.1": 1}


@pytest.mark.parametrize(
    ("old", "new", "turns"),
    [
        ("%s2, 5 }", "%s2, 4 }", 5),  # another test than for the last turn
        ("scmp.lt.s32.totalorder %s2, 1 ", "scmp.ge.s32.totalorder %s2, 1 ", 4),
        ("%s2, 1 }", "%s2, 2 }", 5),
        ("%s2, 1 }", "%s7, 1 }", 5),  # of another loop
    ],
)
def test_turns_that_only_copy_are_those_that_the_body_tests_for(old, new, turns):
    assert old in TEXT
    [cycles, _] = schedule.count(TEXT.replace(old, new), 4) or (0, 0)
    assert cycles == 2 + turns * (2 + 3 * 2 + 1) + 1


def test_a_loop_may_end_late_or_be_of_unknown_length():
    """Its end may stand behind a bundle of the one around it."""
    late = "   0x6   : > { %s8 = smov 0 }\n   0x7   : >> { %v3 = vpop.f32 }\n   0x6 PF:"
    assert schedule.count(TEXT.replace("   0x6 PF:", late), 4) == (CYCLES + 4 * (1 + 3), 96)
    assert schedule.count("     0 LB:  { %s1 = smov 0 }\n", 4) == (1, 0)  # not a loop of its own
    assert schedule.count(TEXT.replace("%s5, 6 ", "%s5, %s6 "), 4) is None
