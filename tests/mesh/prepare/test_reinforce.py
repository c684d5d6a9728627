"""Synthetic captions and teachers' embeddings that `prepare` adds to pairs: they equal those of the
models, and a run that was stopped ends with the same files."""

import dataclasses
import itertools
import json
import re
import shutil
import tarfile
from typing import Any

import numpy as np
import pytest

from clip_jax.cli.commands import main
from clip_jax.data.augment import AugmentationsConfig, replay
from clip_jax.data.reinforced import from_features, from_members
from clip_jax.data.sources.array_record import ArrayRecordConfig, ArrayRecordSource
from clip_jax.data.sources.tar import TarConfig, TarSource
from clip_jax.errors import InputError
from clip_jax.inference.loading import load, unit
from clip_jax.inference.predict import PredictConfig, predict
from clip_jax.models.generation import GenerationConfig
from clip_jax.prepare import reinforce
from clip_jax.prepare.layout import PrepareConfig
from clip_jax.prepare.writer import describe, prepare
from tests.conftest import TINY
from tests.data.conftest import FORMATS
from tests.prepare.conftest import (
    assert_same_content,
    digests,
    records,
    tiny_pairs,
    write_reinforcers,
)

NUMBER = 150
SAMPLE = GenerationConfig(method="sample", max_length=6)


@pytest.fixture(scope="module")
def pairs():
    return tiny_pairs(NUMBER)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_reinforcers(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def how(models, pairs, tmp_path_factory) -> dict[str, Any]:
    """Return the settings: two teachers of different widths and resolutions, and a captioner."""
    return {
        "source": FORMATS["tar"](tmp_path_factory.mktemp("in"), pairs).path,
        "reinforce": (models / "small", models / "large"),
        "captions": models / "captioner",
        "generation": SAMPLE,
        "augmentations": AugmentationsConfig(size=16, flip=0.5),
        "samples_per_shard": 70,
        "batch_size": 8,
    }


@pytest.fixture(scope="module")
def written(how, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "all"
    prepare(PrepareConfig(**how, destination=folder))
    return folder


def test_a_stopped_run_leaves_complete_shards_and_ends_with_the_same_bytes(
    how, written, tmp_path, capsys
):
    config, calls = PrepareConfig(**how, destination=tmp_path / "out"), itertools.count()

    def stopping(*args):
        if next(calls) == 200:  # in the second of three shards
            raise KeyboardInterrupt
        return replay(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reinforce, "replay", stopping)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    (first,) = (tmp_path / "out").glob("*.array_record")
    before = first.stat().st_mtime_ns
    report = prepare(config)
    assert first.stat().st_mtime_ns == before
    assert digests(tmp_path / "out") == digests(written) != {}
    features = records(written)
    names = ("image_emb", "text_emb", "syn_text_emb")
    size = sum(len(row) for x in features for name in names for row in x[name])
    line = capsys.readouterr().err
    assert f"{NUMBER} samples x (2 images + 2 captions) x 80 bytes" in line
    (stated,) = {float(x) * 1e9 for x in re.findall(r"= (\S+) GB", line)}
    assert stated == pytest.approx(size, rel=0.01)
    assert [x.get("embed_dim") for x in report["models"]] == [None, 16, 24]
    assert "StoredTeacher(embed_dim=24, logit_scale=10, logit_bias=-3)" in describe(report)


def test_each_caption_is_the_one_that_predict_writes_with_its_seed(
    how, models, written, pairs, tmp_path
):
    """Compared with the library in batches, and for two images with `predict`."""
    features = records(written)
    seeds = np.array([int(x["synthetic_seed"][0]) for x in features], np.uint32)
    assert len({*seeds.tolist()}) > NUMBER - 5
    captioner = load(models / "captioner")
    images = np.concatenate([captioner.image_preprocess.batch(x["image"][0]) for x in features])
    captions = captioner.caption(images, SAMPLE, batch_size=64, seeds=seeds)
    assert [x["synthetic"][0].decode() for x in features] == captions
    assert len({*captions}) > NUMBER // 2
    for i in (0, NUMBER - 1):
        (tmp_path / f"{i}.png").write_bytes(pairs[i][1])
        config = PredictConfig(
            model=models / "captioner",
            images=(tmp_path / f"{i}.png",),
            caption=True,
            generation=dataclasses.replace(SAMPLE, seed=int(seeds[i])),
        )
        (row,) = predict(config)
        assert row["caption"] == captions[i]


def test_embeddings_are_the_teachers_of_replayed_images_and_of_captions(how, models, written):
    features = records(written)[:20]
    stored = [from_features(x, 1) for x in features]
    teachers = [load(models / "small"), load(models / "large")]
    specs = [x.image_preprocess.image_spec for x in teachers]
    assert [spec.side for spec in specs] == [16, 32]
    for x, more in zip(features, stored, strict=True):
        views = [replay(x["image"][0], one, specs, more.size) for one in more.augmentations]
        expected = np.concatenate(
            [
                unit(teacher.encode_image(np.stack([view[i] for view in views])))
                for i, teacher in enumerate(teachers)
            ],
            axis=1,
        )
        np.testing.assert_allclose(more.image, expected, atol=1e-3)
        texts = [x["caption"][0].decode(), more.synthetic[0]]
        expected = np.concatenate(
            [unit(y.encode_text(y.tokenize(texts, truncate=True))) for y in teachers], axis=1
        )
        np.testing.assert_allclose([more.text[0], more.synthetic_text[0]], expected, atol=1e-3)
    assert len({one for more in stored for one in more.augmentations}) == 40


def few(how, tmp_path, **fields) -> dict[str, Any]:
    """Return settings with 50 pairs in shards of 30 and 20."""
    source = FORMATS["tar"](tmp_path, tiny_pairs(50)).path
    return how | {"source": source, "samples_per_shard": 30, "batch_size": 8} | fields


def test_bytes_depend_neither_on_the_batch_nor_on_other_shards(how, tmp_path):
    """The order of a shuffle makes no difference either."""
    (tmp_path / "in").mkdir()
    base = few(how, tmp_path / "in")
    changes = ({}, {"shuffle": True}, {"samples_per_shard": 7})
    by_key = []
    for number, fields in enumerate(changes):
        prepare(PrepareConfig(**base | fields, destination=tmp_path / str(number)))
        by_key.append({x["key"][0]: x for x in records(tmp_path / str(number))})
    assert by_key[0] == by_key[1] == by_key[2]
    assert len(by_key[0]) == 50


def test_a_tar_has_the_released_layout_and_the_same_content(how, tmp_path):
    (tmp_path / "in").mkdir()
    base = few(how, tmp_path / "in", captions_per_image=2)
    for name, shards in (("a", "array_record"), ("b", "tar"), ("c", "tar")):
        prepare(PrepareConfig(**base, shards=shards, destination=tmp_path / name))
    paths = sorted((tmp_path / "b").glob("*.tar"))
    assert [path.name for path in paths] == ["pairs-00000-of-00002.tar", "pairs-00001-of-00002.tar"]
    for path in paths:
        assert path.read_bytes() == (tmp_path / "c" / path.name).read_bytes()
    samples: dict[str, dict[str, bytes]] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                key, _, suffix = member.name.partition(".")
                samples.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    ours = ArrayRecordSource(ArrayRecordConfig(path=str(tmp_path / "a/*.array_record")))
    tars = TarSource(TarConfig(path=str(tmp_path / "b/*.tar")))
    assert len(samples) == len(ours) == len(tars) == 50
    for i, members in enumerate(samples.values()):
        assert list(members) == ["png", "txt", "paug.json", "syn.json", "npz"]
        one = ours.record(i)
        assert [members["png"], members["txt"]] == [one.image(), one.captions()[0].encode()]
        stored = dataclasses.replace(one.more(), widths=(), origins=())  # which tars do not store
        assert_same_content(stored, from_members(members, 1))
        assert_same_content(stored, tars.record(i).more())
        assert len(json.loads(members["syn.json"])["synthetic_seed"]) == 2


def test_captions_first_and_teachers_later(how, tmp_path):
    """Teachers embed the synthetic captions that the source has. Without models, `prepare` copies
    all that the source has, including the teachers' widths."""
    (tmp_path / "in").mkdir()
    base = few(how, tmp_path / "in")
    only = {name: base[name] for name in base if name not in ("reinforce", "augmentations")}
    prepare(PrepareConfig(**only, destination=tmp_path / "a"))
    later = {name: base[name] for name in ("reinforce", "augmentations", "batch_size")}
    source = str(tmp_path / "a/*.array_record")
    prepare(PrepareConfig(source=source, **later, destination=tmp_path / "b"))
    first, second = records(tmp_path / "a"), records(tmp_path / "b")
    assert [x["synthetic"] for x in second] == [x["synthetic"] for x in first]
    assert all(len(x["syn_text_emb"]) == 1 for x in second)
    source = str(tmp_path / "b/*.array_record")
    prepare(PrepareConfig(source=source, destination=tmp_path / "c"))
    for x, y in zip(second, records(tmp_path / "c"), strict=True):
        assert_same_content(from_features(x, 1), from_features(y, 1))
        assert from_features(y, 1).widths == (16, 24)
    for fields, message in (
        ({"resize": 8}, "but resize=8 changes the image; leave that out, or add reinforce"),
        ({"encode": "webp", "resize": 8}, "but encode=webp changes the image; leave that out"),
        (
            {"captions": base["captions"], "generation": SAMPLE},
            "new captions would have no embeddings; leave out captions, or add reinforce",
        ),
    ):
        with pytest.raises(InputError, match=message):
            prepare(PrepareConfig(source=source, **fields, destination=tmp_path / "d"))
        shutil.rmtree(tmp_path / "d")
    again = {"captions": base["captions"], "generation": SAMPLE, **later}
    prepare(PrepareConfig(source=source, **again, destination=tmp_path / "e"))
    assert all(x.keys() >= {"paug", "syn_text_emb"} for x in records(tmp_path / "e"))


def test_invalid_settings_are_one_message_before_anything_is_read(
    how, models, written, tmp_path, capsys
):
    for fields, message in (
        ({"reinforce": (), "augmentations_per_image": 3}, "no meaning without reinforce"),
        ({"captions": None}, "generation has no meaning without captions"),
        (
            {"generation": GenerationConfig(method="sample", seed=3)},
            "generation.seed has no effect",
        ),
        (
            {"generation": GenerationConfig(), "captions_per_image": 2},
            "method=sample",
        ),
        ({"shards": "tar", "embedding_type": "int8"}, "no embedding_type=int8"),
    ):
        with pytest.raises(InputError, match=message):
            PrepareConfig(**how | fields)
    missing = {"source": str(tmp_path / "nothing/*.tar"), "destination": tmp_path / "out"}
    for fields, message in (
        ({"captions": models / "small"}, "no decoder"),
        ({"reinforce": (tmp_path / "absent",)}, "absent"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(PrepareConfig(**how | missing | fields))
    flags = ["--reinforce", f"{tmp_path}/absent", "--embedding-type", "int8"]
    assert main(["prepare", str(tmp_path), str(tmp_path / "out"), *flags]) == 2
    assert "absent" in capsys.readouterr().err
    other = write_reinforcers(tmp_path, small=dataclasses.replace(TINY, embed_dim=8))
    changed = how | {"reinforce": (other / "small", models / "large"), "destination": written}
    with pytest.raises(InputError, match=r"other settings: .*models"):
        prepare(PrepareConfig(**changed))
