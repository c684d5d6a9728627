"""The batch that doubles."""

from clip_jax.data.growth import batch_after, phases, samples_after


def test_sizes_and_sums_of_a_batch_that_doubles():
    doubled = (3, 5)
    sizes = [batch_after(8, doubled, step) for step in range(7)]
    assert sizes == [8, 8, 8, 16, 16, 32, 32]
    for steps in range(8):
        assert samples_after(8, doubled, steps) == sum(sizes[:steps])
    assert phases(8, doubled, 7) == [(8, 3), (16, 2), (32, 2)]
    assert phases(8, doubled, 4) == [(8, 3), (16, 1)]
    assert phases(8, (), 7) == [(8, 7)]
