"""What the compiler of a plan's step complains of. tests/mesh has the step that it compiles."""

from clip_jax.pods import compile as pod


def test_what_a_step_needs_is_read_from_the_compilers_complaint():
    for power, unit in enumerate("KMGT", 1):
        early = f"the memory required for HLO temporaries (22.99{unit}) exceeds HBM (15.75{unit})."
        late = f"Ran out of memory in memory space hbm. Used 17.5{unit} of 15.75G hbm. Exceeded"
        assert pod.needed_bytes(early, 5) == int(22.99 * 1024**power) + 5
        assert pod.needed_bytes(late, 5) == int(17.5 * 1024**power)
    assert pod.needed_bytes("something else", 5) is None
