"""Every data set of the suite: its classes and names; and each layout that it may have on disk."""

import io
import itertools
import json
import re
import shutil
from typing import Any

import pytest
import tensorflow_datasets as tfds

from clip_jax.data.images import decode
from clip_jax.data.sources import SampleError
from clip_jax.evals import catalog, prompts
from clip_jax.evals.datasets import Labelled, Missing, Tagged
from tests.data.conftest import write_tar
from tests.evals.conftest import png, write_folder

BY_NAME = catalog.ROWS
VOC = BY_NAME["voc2007_multilabel"]
LABELLED = [row for row in catalog.SUITE if row.classes and row is not VOC]


def prepare(root, row, features, example, splits=("test",)):
    """Write what TFDS would: a builder of that name with one example in each split."""

    class StandIn(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        __module__ = "stand_in"  # TFDS would look for files of its own in the package `tests`
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = root

        def _info(self):
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {name: iter([(0, example | {"image": io.BytesIO(png())})]) for name in splits}

        _generate_examples = None  # abstract in TFDS; the splits above bring their examples

    builder = StandIn(data_dir=str(root / "prepared"), file_format="array_record")
    builder.download_and_prepare()
    (root / row.tfds).mkdir(parents=True)
    shutil.move(builder.data_dir, root / row.tfds / "1.0.0")


def real_features(row):
    """The features of TFDS's own builder, which needs no data to say them."""
    return tfds.builder(row.tfds, data_dir="nowhere").info.features


@pytest.mark.parametrize("row", LABELLED, ids=lambda row: row.name)
def test_published_and_tfds_names_are_as_many_as_the_classes(row):
    assert row.prompts in prompts._published()
    names = prompts.class_names(row.name)
    if names and row.named_like == "":
        assert len(names) == row.classes
    if row.tfds:
        assert len(real_features(row)["label"].names) == row.classes


def test_a_data_set_that_is_missing_says_how_to_get_it(tmp_path):
    for row in catalog.SUITE:
        with pytest.raises(Missing, match=rf"^{row.name}( is not in|: put) "):
            catalog.open_data_set(row, tmp_path)


def test_a_folder_of_classes(tmp_path):
    row, folder = BY_NAME["dtd"], tmp_path / "dtd" / "test"
    write_folder(folder, [f"class_{i:04d}" for i in range(row.classes)])
    data = catalog.open_data_set(row, tmp_path)
    assert isinstance(data, Labelled)
    assert len(data.names) == data.count == row.classes
    assert data.load(1)[1] == 1
    assert data.names[1] == "class 0001"
    with pytest.raises(Missing, match=r"dtd in .* has no train split"):
        catalog.open_data_set(row, tmp_path, "train")
    (folder / "one_more").mkdir()
    with pytest.raises(ValueError, match=f"dtd has {row.classes} classes"):
        catalog.open_data_set(row, tmp_path)


@pytest.mark.parametrize("folder", ["cars", "wds_vtab-cars"])
def test_clip_benchmarks_tars(folder, tmp_path):
    row, path = BY_NAME["cars"], tmp_path / folder
    names = [f"name {i}" for i in range(row.classes)]
    (path / "test").mkdir(parents=True)
    labels = (b"1", b"196", b"x")
    members = [[(f"{i}.png", png()), (f"{i}.cls", label)] for i, label in enumerate(labels)]
    write_tar(path / "test" / "0.tar", itertools.chain(*members))
    (path / "classnames.txt").write_text("\n".join(names))
    (path / "zeroshot_classification_templates.txt").write_text("a {c}, seen.")
    data = catalog.open_data_set(row, tmp_path)
    assert (list(data.names), data.templates, data.load(0)[1]) == (names, ["a {c}, seen."], 1)
    for i, label in ((1, "196"), (2, "x")):
        with pytest.raises(SampleError, match=f"cls is '{label}', not a number below 196"):
            data.load(i)
    with pytest.raises(Missing, match="has no train split"):
        catalog.open_data_set(row, tmp_path, "train")
    (path / "classnames.txt").write_text("\n".join(names[1:]))
    with pytest.raises(ValueError, match=f"cars has {row.classes} classes"):
        catalog.open_data_set(row, tmp_path)


@pytest.mark.parametrize("name", ["sun397", "food101", "eurosat", "pets"])
def test_a_prepared_tfds_builder(name, tmp_path):
    row = BY_NAME[name]
    names = real_features(row)["label"].names
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=names)}
    splits = list(dict.fromkeys(("train", row.split)))
    prepare(tmp_path, row, features, {"label": 1}, splits)
    data = catalog.open_data_set(row, tmp_path)
    assert (data.count, data.load(0)[1], len(data.names)) == (1, 1, row.classes)
    assert decode(data.load(0)[0]).size == (5, 6)
    assert not any("_" in name for name in data.names)
    assert list(data.templates) == prompts.templates(row.prompts)
    if name == "sun397":
        assert {"abbey", "apse indoor"} <= set(data.names)
    if row.published:
        assert list(data.names) == prompts.class_names(name)
    if row.split == "train":  # TFDS has no other: the test would be trained on
        with pytest.raises(Missing, match="no train split apart from its test"):
            catalog.open_data_set(row, tmp_path, "train")
    else:
        assert catalog.open_data_set(row, tmp_path, "train").count == 1


@pytest.mark.parametrize("name", ["pets", "flowers", "caltech101", "eurosat", "imagenet1k"])
def test_tfds_has_the_order_of_the_published_names(name):
    row = BY_NAME[name]
    theirs = real_features(row)["label"].names
    published = prompts.class_names(row.named_like or row.prompts)
    if name == "imagenet1k":
        assert theirs == prompts.imagenet_wnids()
        return

    def stems(words):
        spaced = re.sub("([a-z])([A-Z])", r"\1 \2", words)
        return {word[:4] for word in re.split("[ _-]", spaced.lower()) if len(word) > 2}

    strange = [
        pair for pair in zip(theirs, published, strict=True) if not stems(pair[0]) & stems(pair[1])
    ]
    assert len(strange) <= 1, strange  # reworded altogether


@pytest.mark.parametrize(
    ("name", "folders", "called"),
    [
        (
            "country211",
            ["AD", *(f"B{chr(65 + i // 26)}{chr(65 + i % 26)}" for i in range(209)), "ZW"],
            "Andorra",
        ),
        ("fer2013", ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"], "angry"),
        ("gtsrb", [f"{i:05d}" for i in range(43)], "red and white circle 20 kph speed limit"),
        ("clevr_count_all", [str(i) for i in range(3, 11)], "three"),
        ("flowers", [str(i) for i in range(1, 103)], "pink primrose"),
        ("hateful_memes", ["0", "1"], "meme"),
    ],
)
def test_folders_that_stand_for_published_names(name, folders, called, tmp_path):
    write_folder(tmp_path / name / "test", folders)
    data = catalog.open_data_set(BY_NAME[name], tmp_path)
    assert data.names[data.load(0)[1]] == called
    assert list(data.names) == prompts.class_names(name)


def test_other_folders_keep_their_own_names(tmp_path):
    """Caltech-101's published names stand in the order of its own folders, capitals first."""
    middle = [f"m{i:03d}" for i in range(99)]
    lower = sorted(["accordion", "background_google", *middle, "yin_yang"])
    write_folder(tmp_path / "caltech101", lower)
    data = catalog.open_data_set(BY_NAME["caltech101"], tmp_path)
    assert (data.names[0], data.names[1]) == ("accordion", "background google")


def test_voc_from_tfds(tmp_path):
    names = real_features(VOC)["labels"].feature.names
    assert len(names) == VOC.classes
    labels = tfds.features.Sequence(tfds.features.ClassLabel(names=names))
    features = {"image": tfds.features.Image(), "labels": labels, "labels_no_difficult": labels}
    prepare(tmp_path, VOC, features, {"labels": [2, 7], "labels_no_difficult": [7]})
    data = catalog.open_data_set(VOC, tmp_path)
    assert isinstance(data, Tagged)
    truth = data.load(0)[1]
    assert (list(data.names), truth[2], truth[7], truth.sum()) == (names, 0, 1, 1 - 18)


COCO = {
    "images": [{"id": 0, "file_name": "a.png"}],
    "annotations": [{"image_id": 0, "caption": "noise"}],
}
PAIR = ("a dog", "a cat")  # the right caption, and the wrong one
ARO: dict[str, Any] = dict(zip(("true_caption", "false_caption"), PAIR, strict=True))
ARO |= {"image_path": "a.png", "relation_name": "on"}
ARO |= {f"bbox_{side}": 4 for side in "xywh"}
SUGAR_CREPE = {"filename": "a.png", "caption": PAIR[0], "negative_caption": PAIR[1]}


@pytest.mark.parametrize(
    ("name", "file", "content", "images", "texts"),
    [
        ("mscoco_captions", "mscoco_captions/x_test_karpathy.json", COCO, "val2014", ["noise"]),
        ("flickr30k", "flickr30k/x_test_karpathy.json", COCO, "images", ["noise"]),
        ("flickr30k", "flickr30k/x_test_karpathy.json", COCO, "", ["noise"]),
        ("aro_relation", "aro_relation/visual_genome_relation.json", [ARO], "images", PAIR),
        ("aro_attribution", "aro/visual_genome_attribution.json", [ARO], "images", PAIR),
        ("sugar_crepe", "sugar_crepe/swap_obj.json", {"7": SUGAR_CREPE}, "val2017", PAIR),
    ],
)
def test_images_with_texts(name, file, content, images, texts, tmp_path):
    image = (tmp_path / file).parent / images / "a.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(png())
    (tmp_path / file).write_text(json.dumps(content))
    data = catalog.open_data_set(BY_NAME[name], tmp_path)
    assert data.load(0)[1] == texts
    assert data.key(0) == str(image)
    with pytest.raises(Missing, match="has no train split"):
        catalog.open_data_set(BY_NAME[name], tmp_path, "train")


def test_captions_in_tars(tmp_path):
    folder = tmp_path / "wds_mscoco_captions"
    (folder / "test").mkdir(parents=True)
    (folder / "dataset_type.txt").write_text("retrieval")
    write_tar(folder / "test" / "0.tar", [("0.png", png()), ("0.txt", b"one\ntwo\n")])
    data = catalog.open_data_set(BY_NAME["mscoco_captions"], tmp_path)
    assert data.load(0) == (png(), ["one", "two"])


def test_published_numbers_are_one_for_each_model():
    counts = {len(row.openai) for row in catalog.SUITE}
    assert counts == {0, len(catalog.OPENAI_MODELS)}
    assert BY_NAME["imagenet1k"].openai == [0.5982, 0.6332, 0.6834, 0.7554, 0.7656]
