"""Layouts on disk, each with a small stand-in."""

import json

import pytest

from clip_jax.data.digits import DigitsConfig
from clip_jax.data.images import decode
from clip_jax.evals.datasets import open_captions, open_digits, open_folder, split_folder
from tests.evals.conftest import png


def write_folder(path, classes, per_class=2):
    for name in classes:
        (path / name).mkdir(parents=True)
        for i in range(per_class):
            (path / name / f"{i}.png").write_bytes(png())


def test_a_folder_is_named_by_its_folders(tmp_path):
    write_folder(tmp_path, ["red_fox", "arctic_fox", ".hidden"])
    data = open_folder(tmp_path, name="food101")
    assert list(data.names) == ["arctic fox", "red fox"]
    assert list(data.templates) == ["a photo of {c}, a type of food."]
    assert [label for _, label in data] == [0, 0, 1, 1]
    assert {decode(image).size for image, _ in data} == {(5, 6)}


def test_imagenets_folders_are_named_as_openai_did(tmp_path):
    write_folder(tmp_path / "a", ["n02007558", "n01440764"], 1)
    assert list(open_folder(tmp_path / "a").names) == ["tench", "flamingo"]
    write_folder(tmp_path / "v2", map(str, range(1_000)), 0)
    (tmp_path / "v2" / "130" / "x.png").write_bytes(png())
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


def test_splits_lie_in_a_folder_or_are_it(tmp_path):
    assert split_folder(tmp_path, "test") == tmp_path
    assert split_folder(tmp_path, "train") is None
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    assert split_folder(tmp_path, "test") == tmp_path / "val"  # as ImageNet's
    assert split_folder(tmp_path, "validation") is None
    (tmp_path / "test").mkdir()
    found = [split_folder(tmp_path, split) for split in ("train", "validation", "test")]
    assert found == [tmp_path / "train", tmp_path / "val", tmp_path / "test"]


def test_a_splits_names_may_stand_beside_it(tmp_path):
    write_folder(tmp_path / "test", ["a", "b"], 1)
    (tmp_path / "classnames.txt").write_text("ant\nbee\n")
    assert list(open_folder(tmp_path / "test").names) == ["ant", "bee"]
    write_folder(tmp_path / "other", ["a", "b"], 1)
    assert list(open_folder(tmp_path / "other").names) == ["a", "b"]


def test_the_digits_are_a_data_set():
    config = DigitsConfig(digits=1)
    train, validation, test = (
        open_digits(config, split, per_number=2, image_size=12)
        for split in ("train", "validation", "test")
    )
    assert list(test.names[:3]) == ["zero", "one", "two"]
    for data in (train, validation, test):
        assert sorted(label for _, label in data) == sorted(2 * list(range(10)))
    assert len({image.tobytes() for data in (train, validation, test) for image, _ in data}) == 60
