"""The exact top share, and shards of equal size."""

import numpy as np
import pytest

from clip_jax.prepare import buckets, settle
from clip_jax.prepare.layout import Layout, PrepareConfig
from clip_jax.prepare.stages import CANDIDATE, ROWS


def write_rows(layout, orders):
    layout.work.mkdir(exist_ok=True)
    for number in range(layout.reads):
        rows = [(i, orders[i], i % 7) for i in layout.indices(number)]
        buckets.write_one(layout.file(number, "rows"), np.array(rows, ROWS).tobytes())


@pytest.mark.parametrize(("samples", "per_task", "size"), [(100, 7, 5), (100, 30, 8), (3, 1, 9)])
def test_groups_hold_each_pair_once_in_shards_of_equal_size(samples, per_task, size, tmp_path):
    rng = np.random.default_rng(samples)
    orders = rng.integers(0, 2**64, samples, np.uint64)
    layout = Layout(tmp_path, samples, per_task)
    write_rows(layout, orders)
    verdicts = (rng.random(samples) < 0.7).astype(np.uint8) * CANDIDATE
    config = PrepareConfig(source="x", destination=tmp_path, samples_per_shard=size, shuffle=True)
    groups = settle.groups(layout, config, verdicts)
    survivors = np.flatnonzero(verdicts == CANDIDATE)
    wanted = survivors[np.argsort(orders[survivors])].tolist()
    bits = layout.pair_buckets.bit_length() - 1
    got, shards = [], []
    for group in groups:
        low, high = group.buckets
        inside = [i for i in wanted if low <= int(orders[i]) >> (64 - bits) < high]
        got += inside[group.skip : group.skip + group.pairs]
        shards += range(group.first, group.last)
    assert got == wanted
    assert shards == list(range(-(-len(wanted) // size)))
    assert not settle.groups(layout, config, np.zeros(samples, np.uint8))


def test_ties_at_the_edge_of_the_top_share_go_to_the_earlier(tmp_path):
    layout = Layout(tmp_path, 30, 4)
    write_rows(layout, np.arange(30, dtype=np.uint64))
    for share, count in (("0.07", 3), ("0.1", 3), ("0.3", 9), ("0.5", 15)):
        config = PrepareConfig(
            source="x", destination=tmp_path, score_column="s", top_share=float(share)
        )
        verdicts = settle.settle(layout, config, np.full(30, CANDIDATE, np.uint8))
        best = sorted(range(30), key=lambda i: (-(i % 7), i))[:count]
        assert np.flatnonzero(verdicts == CANDIDATE).tolist() == sorted(best)
        assert layout.verdicts.read_bytes() == verdicts.tobytes()
