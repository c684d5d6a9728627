"""Images of a data set: each process's own rows of every batch, kept in memory up to a budget."""

from unittest import mock

import numpy as np
import pytest

from clip_jax import processes, sharding
from clip_jax.data.images import ImageError, Preprocess
from clip_jax.evals import reader
from clip_jax.evals.datasets import Labelled
from clip_jax.evals.reader import ImageCache, read_batches
from tests.evals.conftest import mesh_of

COUNT, BROKEN = 19, 7  # of images: no mesh divides them


def data(loads=None):
    """Image i is of level i, and its answer is 2i; one cannot be read."""

    def load(index):
        if loads is not None:
            loads.append(index)
        if index == BROKEN:
            raise ImageError("truncated", "in the middle")
        return np.full((9, 9, 3), index, np.uint8), 2 * index

    return Labelled(COUNT, load, ["a", "b"], [])


@pytest.mark.parametrize("parts", [1, 2])
def test_the_parts_of_all_processes_are_every_image_in_its_row(parts, monkeypatch):
    monkeypatch.setattr(reader, "_BATCH", 8 // parts)
    local = []
    for part in range(parts):
        with mock.patch.object(sharding, "data_part", autospec=True, return_value=(part, parts)):
            local.append(list(read_batches(data(), Preprocess(image_size=8), mesh_of(4))))
    assert len({len(x) for x in local}) == 1  # batches of each process
    batches = [
        np.concatenate([part.images for part in batch]) for batch in zip(*local, strict=True)
    ]
    assert {len(batch) for batch in batches} == {8}
    levels = np.concatenate(batches)[:, 4, 4, 0]
    expected = [i if i != BROKEN else 0 for i in range(COUNT)]
    np.testing.assert_array_equal(levels, expected + [0] * (24 - COUNT))
    answers = [batch.answers | batch.skipped for part in local for batch in part]
    together = {index: answer for some in answers for index, answer in some.items()}
    assert sum(map(len, answers)) == len(together) == COUNT
    assert together.pop(BROKEN) == f"image {BROKEN}: truncated: in the middle"
    assert together == {i: 2 * i for i in range(COUNT) if i != BROKEN}


def test_what_each_process_knows_comes_together_in_order():
    of_others = [({2: [5], 3: [7]}, {}), ({4: [1]}, {1: "torn"})]

    def gather(mine):
        return [mine, *([list(x.items()) for x in other] for other in of_others)]

    with mock.patch.object(processes, "gather", autospec=True, side_effect=gather):
        answers, skipped = reader._of_all(({0: np.array([9]), 6: np.array([8])}, {5: "gone"}))
    assert [*answers.items()] == [(0, [9]), (2, [5]), (3, [7]), (4, [1]), (6, [8])]
    assert [*skipped.items()] == [(1, "torn"), (5, "gone")]


def test_images_are_decoded_once_and_kept_within_the_budget():
    loads = []
    preprocess, mesh = Preprocess(image_size=8), mesh_of(8)
    for budget, times in ((1 << 20, 1), (8 * 8 * 3 * 10, 2)):
        loads.clear()
        cache = ImageCache(budget)
        first, second = (
            list(cache.read("name", read_batches(data(loads), preprocess, mesh))) for _ in range(2)
        )
        assert sorted(loads) == sorted(list(range(COUNT)) * times)
        np.testing.assert_array_equal(first[0].images, second[0].images)
        assert [len(batch.answers) + len(batch.skipped) for batch in first] == [COUNT]
