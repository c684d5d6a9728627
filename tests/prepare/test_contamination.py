"""Decontamination: an evaluation's images are taken out of the pairs, and counted by set."""

import numpy as np
import pytest

from clip_jax.prepare import near
from clip_jax.prepare.contamination import EvaluationImages, named
from clip_jax.prepare.layout import PrepareConfig
from clip_jax.prepare.writer import describe, prepare
from tests.data.conftest import FORMATS
from tests.prepare.conftest import captions, cropped, jpeg, recompressed, resized, scene


def test_test_images_are_taken_out_and_counted_by_set(tmp_path):
    """Copies of five test images, one of them twice and one of both sets, among 19 pairs."""
    for name in ("in", "flowers", "birds"):
        (tmp_path / name).mkdir()
    for i in range(100, 106):
        scene(i).save(tmp_path / f"flowers/{i}.png")
    (tmp_path / "flowers/broken.png").write_bytes(b"broken")
    birds = [(f"{i}.jpg", jpeg(scene(i)), "a bird") for i in (200, 201, 102)]
    birds = FORMATS["parquet"](tmp_path / "birds", birds).path
    copies = [recompressed(scene(100)), resized(scene(101)), cropped(scene(102))]
    copies += [scene(101, things=1), resized(scene(100)), scene(200), cropped(scene(201))]
    images = [*(scene(i) for i in range(12)), *copies]
    pairs = [(f"{i:02d}.jpg", jpeg(x), f"text {i}") for i, x in enumerate(images)]
    source = FORMATS["tar"](tmp_path / "in", pairs).path
    sets = (str(tmp_path / "flowers"), f"birds={birds}")
    how = {"destination": tmp_path / "out", "samples_per_shard": 7, "decontaminate": sets}
    report = prepare(PrepareConfig(source=source, **how))
    assert report["found"] == {
        "birds": {"pairs": 3, "images": 3, "of": 3},
        "flowers": {"pairs": 4, "images": 3, "of": 7},
    }
    assert report["counts"]["kept"] == 13
    assert sum(report["counts"].values()) == 19
    assert "3 of 7 images of flowers (42.86%) have near-duplicates: 4 pairs" in describe(report)
    assert "near duplicate of its image 0, " in report["examples"]["in flowers"]
    assert captions(tmp_path / "out") == [[f"text {i}"] for i in range(12)] + [["text 15"]]
    assert {"prepare.json", "_SUCCESS"} < {path.name for path in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out/work").exists()


def test_the_nearest_set_comes_first():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, (8, 4), np.uint64)
    hashes[5] = hashes[2] ^ np.array([1, 0, 0, 0], np.uint64)
    hashes[7] = hashes[2] ^ np.array([0, 7, 0, 1], np.uint64)
    sets = np.array([0, 0, 0, 0, 1, 1, 1, 1], np.uint64)
    images = EvaluationImages(("a", "b"), hashes, sets, np.arange(8, dtype=np.uint64), 3)
    assert images.matches(hashes[2]) == [("a", 2, 0), ("b", 5, 1)]
    assert not images.matches(~hashes[2])
    assert near.distances(hashes[7:], hashes[2]).tolist() == [4]


def test_names_of_sets():
    sets = ("imagenet=/data/val", "/data/flowers/", "gs://x/coco/{0..3}.tar", "/data/birds.csv")
    names = ["imagenet", "flowers", "coco", "birds"]
    assert list(named(sets)) == names
    for wrong in (("a=x", "a=y"), ("=x",), ("a=",)):
        with pytest.raises(ValueError, match="give NAME=SOURCE, each name once"):
            named(wrong)
