"""The length of a kernel's schedule."""

from clip_jax.pods import schedule

# As the compiler writes it: two bundles, a loop over 4 programs (and two turns more, which only
# start and end copies) of two bundles and one, in it a loop of 3 turns, of which each takes two of
# six steps; empty ones wait.
TEXT = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov 0 }
   0x1   :  { %s2 = smov 0 }
   0x2 LB: > { %s3 = sadd.s32 1, %s2 }
   0x3   :  {}
   0x4 LB: >> { %v1 = vld [vmem:%s4]  ;;  %s5 = sadd.s32 2, %s9 /* copy for cssa */ }
   0x5   : >> { %p1 = scmp.ge.s32.totalorder %s5, 6 /* loop exit test */  ;;  %v2 = vadd %v1, %v1 }
   0x6 PF: > { %p2 = scmp.ge.s32.totalorder %s3, 6 /* loop exit test */ }
   0x7   :  { %9 = sbr.rel (!%p2) target = $region82 }
"""


def test_bundles_count_as_often_as_their_loop_runs(tmp_path):
    assert schedule.count(TEXT) == 2 + 4 * (2 + 3 * 2 + 1) + 1 == 39
    (tmp_path / "17-my_kernel.3-72-final_bundles.txt").write_text(TEXT)
    (tmp_path / "17-my_kernel.3-71-schedule-analysis_final_bundles.txt").write_text("no bundles")
    assert schedule.cycles(tmp_path, "my_kernel.3") == 39
    assert schedule.cycles(tmp_path, "kernel.3") is None


def test_a_loop_may_end_late_or_be_of_unknown_length():
    """Its end may stand behind a bundle of the one around it."""
    late = "   0x6   : > { %s8 = smov 0 }\n   0x7   : >> { %v3 = vpop.f32 }\n   0x6 PF:"
    assert schedule.count(TEXT.replace("   0x6 PF:", late)) == 39 + 4 * (1 + 3)
    assert schedule.count("     0 LB:  { %s1 = smov 0 }\n") == 1  # not a loop of its own
    assert schedule.count(TEXT.replace("%s5, 6 ", "%s5, %s6 ")) is None
