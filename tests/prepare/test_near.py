"""Near duplicates: what is found of changed copies, and that nothing else is."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_jax.prepare import near
from clip_jax.prepare.filters import FilterConfig
from tests.prepare.conftest import CHANGES, jpeg, scene

DISTANCE = FilterConfig().near_distance


def near_pairs(hashes, distance=DISTANCE, bits=12):
    """Pairs (later, earlier) of all bands."""
    rows = np.array([(i, image_hash) for i, image_hash in enumerate(hashes)], near.ROW)
    return {
        (int(later), int(earlier))
        for band in range(near.BANDS)
        for later, earlier in zip(*near.near_earlier(rows, band, bits, distance), strict=True)
    }


@pytest.fixture(scope="module")
def hashes():
    """Of scenes, of scenes that look alike, and of changed copies of the first."""
    kinds = {
        "scenes": [scene(i) for i in range(40)],
        "alike": [scene(i, things=1) for i in range(40)],
    }
    kinds |= {name: [change(x) for x in kinds["scenes"]] for name, change in CHANGES.items()}
    return {
        name: np.array([near.perceptual_hash(x) for x in images]) for name, images in kinds.items()
    }


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found_and_look_alikes_are_not(change, hashes):
    """At the default distance: recall at least 0.95 and precision at least 0.98."""
    count = len(hashes["scenes"])
    all_of_them = [*hashes["scenes"], *hashes["alike"], *hashes[change]]
    dropped = {later for later, _ in near_pairs(all_of_them)}
    copies = set(range(2 * count, 3 * count))
    assert len(dropped & copies) / count >= 0.95
    assert len(dropped & copies) / len(dropped) >= 0.98


@pytest.mark.parametrize("bits", [12, 20])
def test_a_bands_value_tells_all_its_bits_apart(bits):
    """Else more pairs would be compared than have a band in common."""
    hashes = np.random.default_rng(0).integers(0, 2**64, (2_000, 4), np.uint64)
    unpacked = np.unpackbits(hashes.view(np.uint8), axis=-1)
    for values, chosen in zip(near.bands(hashes, bits), near._places(bits), strict=True):
        assert len(np.unique(values)) == len(np.unique(unpacked[:, chosen], axis=0)) > 1_000


@pytest.mark.parametrize("bits", [12, 20])
def test_all_pairs_with_a_band_in_common_are_compared(bits):
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2**64, (40, 4), np.uint64)
    hashes = np.concatenate([first, first, first, first[:9]])
    for i in range(40, 120):  # the last nine stay as they are
        for bit in rng.choice(256, rng.integers(0, 30), replace=False).tolist():
            hashes[i, bit // 64] ^= np.uint64(1 << (bit % 64))
    bands = near.bands(hashes, bits)
    wanted = {
        (later, int(earlier))
        for later in range(1, len(hashes))
        for earlier in np.flatnonzero(near.distances(hashes[:later], hashes[later]) <= 20)
        if (bands[:, earlier] == bands[:, later]).any()
    }
    pairs = near_pairs(hashes, 20, bits)
    assert pairs <= wanted
    assert {later for later, _ in pairs} == {later for later, _ in wanted}
    assert len(wanted) > 60


def test_thousands_of_equal_ones_are_not_compared_and_bands_grow_with_the_set():
    one: Any = near.perceptual_hash(scene(0))
    hashes = np.tile(one, (20_000, 1))
    rows = np.array([(i, image_hash) for i, image_hash in enumerate(hashes)], near.ROW)
    later, earlier = near.near_earlier(rows, 0, 15, DISTANCE)
    assert later.tolist() == list(range(1, 20_000))
    assert not earlier.any()
    empty = near.near_earlier(rows[:0], 0, 15, DISTANCE)
    assert [len(x) for x in empty] == [0, 0]
    assert [near.band_bits(n) for n in (0, 10, 2**16, 10**6, 10**10)] == [12, 12, 16, 20, 28]


def test_plain_images_look_like_nothing():
    assert (
        near.perceptual_hash(Image.open(io.BytesIO(jpeg(Image.new("RGB", (90, 70), "red")))))
        is None
    )
    assert near.perceptual_hash(Image.linear_gradient("L")) is not None


def test_without_the_package_it_says_which(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imagehash", None)
    with pytest.raises(ValueError, match=r"pip install 'clip-jax-pods\[prepare\]'"):
        near.check()
