"""Layouts on disk, each with a small stand-in; and every row of the suite against its names."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.images import decode
from clip_jax.evals import prompts, suite
from clip_jax.evals.datasets import Captioned, Missing, open_captions, open_folder


def encoded(seed=0, size=(20, 14)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_folder(path, classes, per_class=2):
    for number, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for i in range(per_class):
            (path / name / f"{i}.png").write_bytes(encoded(number * per_class + i))


def write_tars(path, members, shards=2):
    (path / "test").mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(path / "test" / f"{shard}.tar", "w") as file:
            for key, (kind, text) in list(members.items())[shard::shards]:
                for name, content in ((f"{key}.png", encoded()), (f"{key}.{kind}", text.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))


def test_a_folder_is_named_by_its_folders(tmp_path):
    write_folder(tmp_path, ["red_fox", "arctic_fox", ".hidden"])
    data = open_folder(tmp_path, name="food101")
    assert list(data.names) == ["arctic fox", "red fox"]
    assert list(data.templates) == ["a photo of {c}, a type of food."]
    assert [label for _, label in data] == [0, 0, 1, 1]
    assert {decode(image).size for image, _ in data} == {(14, 20)}


def test_imagenets_folders_are_named_as_openai_did(tmp_path):
    write_folder(tmp_path / "a", ["n02007558", "n01440764"], 1)
    assert list(open_folder(tmp_path / "a").names) == ["tench", "flamingo"]
    write_folder(tmp_path / "v2", map(str, range(1_000)), 0)
    (tmp_path / "v2" / "130" / "x.png").write_bytes(encoded())
    data = open_folder(tmp_path / "v2")
    assert [data.names[label] for _, label in data] == ["flamingo"]


def test_a_names_file_must_fit(tmp_path):
    write_folder(tmp_path, ["0", "1", "2"], 1)
    (tmp_path / "classnames.txt").write_text("zero\none\ntwo\n")
    assert list(open_folder(tmp_path).names) == ["zero", "one", "two"]
    (tmp_path / "classnames.txt").write_text("zero\none\n")
    with pytest.raises(ValueError, match=r"has 2 names, but .* has 3 folders"):
        open_folder(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has 0 folders"):
        open_folder(tmp_path / "0")


def test_cocos_format(tmp_path):
    content = {
        "images": [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}],
        "annotations": [
            {"image_id": 3, "caption": "one"}, {"image_id": 7, "caption": "two"},
            {"image_id": 3, "caption": "three"},
        ],
    }  # fmt: skip
    path = tmp_path / "coco_test_karpathy.json"
    path.write_text(json.dumps(content))
    data = open_captions(path, tmp_path)
    assert [(image.name, texts) for image, texts in data] == [
        ("a.png", ["one", "three"]), ("b.png", ["two"])
    ]  # fmt: skip
    path.write_text("[]")
    with pytest.raises(ValueError, match="not in COCO's format"):
        open_captions(path, tmp_path)


@pytest.mark.parametrize("row", suite.SUITE, ids=lambda row: row.name)
def test_every_data_set_opens_and_its_classes_are_counted(row, tmp_path):
    """A stand-in where the suite looks for it, as many classes as the data set has."""
    with pytest.raises(Missing, match=row.name):
        suite.open_data_set(row, tmp_path)
    folder = tmp_path / row.name
    if not row.classes:
        (folder / "images").mkdir(parents=True)
        (folder / "images" / "a.png").write_bytes(encoded())
        content = {"images": [{"id": 0, "file_name": "a.png"}],
                   "annotations": [{"image_id": 0, "caption": "noise"}]}  # fmt: skip
        (folder / "x_test_karpathy.json").write_text(json.dumps(content))
        data = suite.open_data_set(row, tmp_path)
        assert isinstance(data, Captioned)
        assert [texts for _, texts in data] == [["noise"]]
        return
    names = prompts.class_names(row.prompts)
    if names and row.prompts == row.name:
        assert len(names) == row.classes
    assert prompts.templates(row.prompts)
    write_folder(folder / "test", [f"class_{i:04d}" for i in range(row.classes)], 0)
    (folder / "test" / "class_0001" / "x.png").write_bytes(encoded())
    data = suite.open_data_set(row, tmp_path)
    assert (len(data.names), data.count) == (row.classes, 1)
    assert [label for _, label in data] == [1]
    (folder / "test" / "one_more").mkdir()
    with pytest.raises(ValueError, match=f"{row.name} has {row.classes} classes"):
        suite.open_data_set(row, tmp_path)
