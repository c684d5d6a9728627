"""Teachers' embeddings beside pairs. What a captioner writes, and whole runs: see tests/mesh."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clip_jax.convert.formats import write_weights
from clip_jax.data.augment import Augmentation, AugmentationsConfig, replay
from clip_jax.data.images import decode
from clip_jax.data.reinforced import Reinforcement, from_features
from clip_jax.data.sources.array_record import decode_example
from clip_jax.data.sources.tar import TarConfig, TarSource
from clip_jax.errors import InputError
from clip_jax.inference.loading import unit
from clip_jax.prepare import reinforce, stages
from clip_jax.prepare.filters import Pair
from clip_jax.prepare.layout import PrepareConfig
from clip_jax.prepare.writer import prepare
from tests.convert.conftest import DINO, tower_weights
from tests.data.conftest import FORMATS
from tests.prepare.conftest import (
    assert_same_content,
    jpeg,
    records,
    scene,
    tiny_pairs,
    write_reinforcers,
)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two of other widths and resolutions, as settings."""
    folder = write_reinforcers(tmp_path_factory.mktemp("models"))
    return {
        "reinforce": (folder / "small", folder / "large"),
        "augmentations": AugmentationsConfig(size=16, flip=0.5),
        "batch_size": 8,
    }


def test_embeddings_of_several_captions_follow_their_captions(
    teachers: dict[str, Any], tmp_path: Path
):
    """A tar has the first caption and its embedding; a filter of captions is an error."""
    lines = []
    for name, image, text in tiny_pairs(3):
        (tmp_path / name).write_bytes(image)
        lines.append(json.dumps({"image": name, "caption": [text, f"the second {text}"]}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    one = teachers | {"reinforce": teachers["reinforce"][:1]}
    source = str(tmp_path / "pairs.jsonl")
    prepare(PrepareConfig(source=source, **one, destination=tmp_path / "a"))
    source = str(tmp_path / "a/*.array_record")
    prepare(PrepareConfig(source=source, shards="tar", destination=tmp_path / "b"))
    tars = TarSource(TarConfig(path=str(tmp_path / "b/*.tar")))
    for i, x in enumerate(records(tmp_path / "a")):
        stored = from_features(x, 2)
        in_tar = dataclasses.replace(stored, text=stored.text[:1], widths=(), origins=())
        assert_same_content(in_tar, tars.record(i).more())
    for fields, message in (
        ({"max_caption": 9}, "embeddings of 2 captions, of which the filters keep 1; leave out"),
        ({"max_caption": 9, "shards": "tar"}, "embeddings of 2 captions, of which"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(PrepareConfig(source=source, **fields, destination=tmp_path / "c"))
        shutil.rmtree(tmp_path / "c")


@pytest.mark.parametrize("shards", ["array_record", "tar"])
@given(count=st.integers(1, 5), embedded=st.booleans(), width=st.integers(1, 3))
def test_a_record_has_an_embedding_for_each_of_its_captions_or_none(shards, count, embedded, width):
    image, captions = jpeg(scene(0)), [f"text {i}" for i in range(count)]
    text = np.arange(count * width, dtype=np.float32).reshape(count, width)
    more = Reinforcement(text=text, widths=(width,)) if embedded else None
    pair = Pair(image, decode(image), captions, math.nan, None, "key", more)
    config = PrepareConfig(source="x", destination=Path("y"), shards=shards)
    features = decode_example(stages._record(pair, config))
    written = 1 if shards == "tar" else count  # tars have the first caption alone
    assert features["caption"] == [x.encode() for x in captions[:written]]
    stored = from_features(features)
    assert (stored is not None) == embedded
    if stored is not None:
        np.testing.assert_array_equal(stored.text, text[:written])


def test_an_image_that_a_tar_does_not_take_loses_no_embeddings(
    teachers: dict[str, Any], tmp_path: Path
):
    """The message names the tar, where neither resize nor encode is set."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.bmp")
    (tmp_path / "pairs.csv").write_text("image,caption\na.bmp,red\n")
    one = teachers | {"reinforce": teachers["reinforce"][:1]}
    source = str(tmp_path / "pairs.csv")
    prepare(PrepareConfig(source=source, **one, destination=tmp_path / "a"))
    source = str(tmp_path / "a/*.array_record")
    with pytest.raises(InputError, match="but shards=tar, which takes JPEG, PNG and WebP only, "):
        prepare(PrepareConfig(source=source, shards="tar", destination=tmp_path / "b"))


def test_a_tower_alone_has_rows_of_its_own_side_without_augmentations(tmp_path: Path):
    """The row of an image is that of its central square; the image itself is not written."""
    write_weights(tower_weights(DINO["dinov2"]), tmp_path / "tower", "hugging-face")
    Image.new("RGB", (40, 24), "red").save(tmp_path / "a.png")
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,red\n")
    how: dict[str, Any] = {
        "source": str(tmp_path / "pairs.csv"),
        "destination": tmp_path / "a",
        "reinforce": (tmp_path / "tower",),
        "augmentations_per_image": 0,
        "batch_size": 1,
    }
    with pytest.raises(InputError, match=r"holds the image tower .* set --reinforce-towers image"):
        prepare(PrepareConfig(**how))
    how |= {"reinforce_towers": ("image",), "embedding_type": "float32", "encode": "none"}
    report = prepare(PrepareConfig(**how))
    assert report["models"][0]["teacher"] == "embeddings of the image tower, for --stored image"
    (record,) = records(tmp_path / "a")
    assert record.keys() == {"caption", "emb", "image_emb", "key", "paug"}
    stored = from_features(record, 1)
    assert stored is not None
    tower = reinforce.teacher(tmp_path / "tower", "float32")
    squashes = tower.image_preprocess.resize_mode != "shortest"
    box = None if squashes else (0, 8, 24, 24)
    assert stored.augmentations == (Augmentation(box),)
    assert stored.origins[0]["image"]["resolution"] == tower.config.vision.image_size
    spec = tower.image_preprocess.image_spec
    pixels = replay((tmp_path / "a.png").read_bytes(), stored.augmentations[0], [spec])[0]
    expected = unit(tower.encode_image(spec.pack(pixels[None]), batch_size=8))
    np.testing.assert_allclose(stored.image, expected, atol=1e-6)
    for changes, message in (
        ({"shards": "tar", "embedding_type": "float16"}, "shards=tar needs images"),
        ({"shards": "tar"}, "shards=tar has no embedding_type=float32"),
        ({"reinforce_towers": ()}, "reinforce_towers is empty"),
    ):
        with pytest.raises(InputError, match=message):
            PrepareConfig(**how | changes)


def test_int8_rows_are_near_the_float16_rows(teachers: dict[str, Any], tmp_path: Path):
    (tmp_path / "in").mkdir()
    source = FORMATS["tar"](tmp_path / "in", tiny_pairs(20)).path
    rows = []
    for name in ("float16", "int8"):
        prepare(
            PrepareConfig(
                source=source, **teachers, embedding_type=name, destination=tmp_path / name
            )
        )
        rows.append([from_features(x, 1).image for x in records(tmp_path / name)])
    for at in (slice(0, 16), slice(16, 40)):
        some = [unit(np.concatenate(x)[:, at]) for x in rows]
        cosines = np.einsum("nd,nd->n", *some)
        assert cosines.min() > 0.999
