"""Layouts on disk, each with a small stand-in."""

import json
from unittest import mock

import numpy as np
import pytest

from clip_jax.data.digits import DigitsConfig, evaluation_set
from clip_jax.data.images import decode
from clip_jax.errors import InputError
from clip_jax.evals import datasets
from clip_jax.evals.datasets import (
    Contrasted,
    Labelled,
    open_captions,
    open_digits,
    open_folder,
    open_webdataset,
    split_folder,
    spread,
)
from tests.evals.conftest import png, write_folder


def test_a_folder_is_named_by_its_folders(tmp_path):
    write_folder(tmp_path, ["red_fox", "arctic_fox", ".hidden"], 2)
    data = open_folder(tmp_path, name="food101")
    assert list(data.names) == ["arctic fox", "red fox"]
    assert list(data.templates) == ["a photo of {c}, a type of food."]
    assert [label for _, label in data] == [0, 0, 1, 1]
    assert {decode(image).size for image, _ in data} == {(5, 6)}
    write_folder(tmp_path / "digits", ["²", "1"])  # of which Python reads one as a number
    assert list(open_folder(tmp_path / "digits").names) == ["1", "²"]


def test_imagenets_folders_are_named_as_openai_did(tmp_path):
    write_folder(tmp_path / "a", ["n02007558", "n01440764"])
    assert list(open_folder(tmp_path / "a").names) == ["tench", "flamingo"]
    write_folder(tmp_path / "v2", map(str, range(1_000)), 0)
    (tmp_path / "v2" / "130" / "x.png").write_bytes(png())
    data = open_folder(tmp_path / "v2")
    assert [data.names[label] for _, label in data] == ["flamingo"]


def test_names_are_in_a_file_that_must_fit_or_beside_a_split(tmp_path):
    write_folder(tmp_path / "test", ["0", "1", "2"])
    write_folder(tmp_path / "other", ["a", "b"])
    for folder, name in (("test", "in"), (".", "beside")):
        (tmp_path / folder / "classnames.txt").write_text(f"zero {name}\none\ntwo\n", "utf-8-sig")
    assert list(open_folder(tmp_path / "test").names) == ["zero in", "one", "two"]
    (tmp_path / "test/classnames.txt").unlink()
    assert list(open_folder(tmp_path / "test").names) == ["zero beside", "one", "two"]
    assert list(open_folder(tmp_path / "other").names) == ["a", "b"]
    (tmp_path / "classnames.txt").write_text("zero\none\n")
    for folder, says in (
        ("test", "has 2 lines for 3 class folders"),
        ("nowhere", "there is no folder"),
        ("test/0", "has 0 folders"),
    ):
        with pytest.raises(ValueError, match=says):
            open_folder(tmp_path / folder)


def test_cocos_format(tmp_path):
    images = [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}]
    texts = [{"image_id": i, "caption": text} for i, text in ((3, "one"), (7, "two"), (3, "three"))]
    path = tmp_path / "coco_test_karpathy.json"
    path.write_text(json.dumps({"images": images, "annotations": texts}))
    expected = [(tmp_path / "a.png", ["one", "three"]), (tmp_path / "b.png", ["two"])]
    assert list(open_captions(path, tmp_path)) == expected
    for content, says in (
        ([], "not in COCO's format"),
        ({"images": images[:1], "annotations": texts}, "of 1 images .* such as image_id=3"),
        ({"images": [], "annotations": [texts[0] | {"caption": None}]}, "caption is missing"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=says):
            open_captions(path, tmp_path)


def test_the_kind_of_a_webdataset_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test/0.tar").touch()
    (tmp_path / "dataset_type.txt").write_bytes(b"\xe9")
    with pytest.raises(InputError, match=r"dataset_type\.txt cannot be read as text"):
        open_webdataset(tmp_path)


def test_splits_lie_in_a_folder_or_are_it(tmp_path):
    assert split_folder(tmp_path, "test") == tmp_path
    assert split_folder(tmp_path, "train") is None
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    assert split_folder(tmp_path, "test") == tmp_path / "val"  # as ImageNet's
    assert split_folder(tmp_path, "validation") is None
    (tmp_path / "test").mkdir()
    folders = [split_folder(tmp_path, split) for split in ("train", "validation", "test")]
    assert folders == [tmp_path / "train", tmp_path / "val", tmp_path / "test"]


def test_a_class_may_be_called_like_a_split(tmp_path):
    for name in ("bus", "test", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.PNG").touch()
    assert split_folder(tmp_path, "test") == tmp_path
    assert split_folder(tmp_path, "train") is None
    (tmp_path / "test/1.PNG").rename(tmp_path / "test/._1.PNG")  # as macOS writes it
    assert split_folder(tmp_path, "test") == tmp_path / "test"


@mock.patch.object(datasets, "_PER_NUMBER", 4)
def test_the_digits_are_a_data_set():
    """Test images are those that a run's evaluator draws."""
    splits = {split: open_digits(split) for split in ("train", "validation", "test")}
    images, each = set(), datasets._PER_NUMBER
    for data in splits.values():
        assert list(data.names[:3]) == ["zero zero", "zero one", "zero two"]
        assert [label for _, label in data] == data.labels == sorted(each * list(range(100)))
        images |= {image.tobytes() for image, _ in data}
    assert len(images) == 3 * 100 * each
    drawn, _ = evaluation_set(DigitsConfig(), [42], each, 16)
    found = [splits["test"].load(42 * each + i)[0] for i in range(each)]
    np.testing.assert_array_equal(drawn, found)


COUNTS = [10, 3, 7]  # images of each class


@pytest.mark.parametrize(
    ("most", "counts"),
    [(2, [1, 1, 0]), (3, [1, 1, 1]), (7, [3, 2, 2]), (12, [5, 3, 4]), (99, COUNTS)],
)
def test_a_few_images_are_spread_over_the_classes(most, counts):
    """They were the first by path: of folders of classes one class."""
    labels = np.repeat(range(3), COUNTS).tolist()
    data = Labelled(20, lambda i: (str(i), labels[i]), ["a", "b", "c"], [], labels, key=str)
    some = spread(data, most)
    images, of_images = zip(*some, strict=True)
    assert np.bincount(of_images, minlength=3).tolist() == counts
    assert list(images) == [some.key(i) for i in range(some.count)]
    assert list(some.labels or ()) == list(of_images)


def test_without_labels_they_are_spread_over_the_order():
    data = Contrasted(10, lambda i: (str(i), ("", "")), list("abcdefghij"))
    some = spread(data, 4)
    assert [image for image, _ in some] == ["0", "2", "5", "7"]
    assert list(some.groups) == ["a", "c", "f", "h"]
