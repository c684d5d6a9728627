"""Training and evaluation read the same classes, labels and names from a folder."""

from pathlib import Path

import pytest

from clip_jax.data import class_folders
from clip_jax.data.class_folders import class_names, read_classes
from clip_jax.data.sources.image_folder import FolderConfig
from clip_jax.errors import InputError
from clip_jax.evals.datasets import open_folder

NUMBERS = [str(number) for number in range(12)]
NAMES = [f"name {number}" for number in NUMBERS]
GTSRB = class_names("gtsrb") or []


def write(root, path, folders, **names):
    """An image in each class folder; `classnames.txt` in the folder or beside it."""
    for folder in folders:
        (root / path / folder).mkdir(parents=True)
        (root / path / folder / "0.png").write_bytes(b"x")
    for parent, lines in names.items():
        file = (root / path if parent == "inside" else root) / "classnames.txt"
        file.write_text("".join(f"{line}\n" for line in lines), "utf-8-sig")
    return root / path


@pytest.mark.parametrize(
    ("path", "folders", "names", "expected"),
    [
        ("any", NUMBERS, {"inside": NAMES}, dict(zip(NUMBERS, NAMES, strict=True))),
        ("any", ["b", "a"], {"beside": ["x", "y"]}, {"a": "a", "b": "b"}),  # it is no split
        ("train", ["b", "a"], {"beside": ["x", "y"]}, {"a": "x", "b": "y"}),
        ("val", ["b", "a"], {"beside": ["x"], "inside": ["u", "v"]}, {"a": "u", "b": "v"}),
        ("any", ["a_b", "a b"], {"inside": ["one", "one"]}, {"a b": "one", "a_b": "one"}),
        ("any", ["cat", "red_fox", ".thumbs"], {}, {"cat": "cat", "red_fox": "red fox"}),
        ("any", ["n02007558", "n01440764"], {}, {"n01440764": "tench", "n02007558": "flamingo"}),
        ("any", ["n04008634", "n03773504"], {}, {"n03773504": "missile", "n04008634": "missile"}),
        ("gtsrb", [f"{i:05d}" for i in range(43)], {}, {"00002": GTSRB[2], "00010": GTSRB[10]}),
        ("gtsrb/train", [f"{i}" for i in range(43)], {}, {"2": GTSRB[2], "10": GTSRB[10]}),
        ("other", [f"{i}" for i in range(43)], {}, {"2": "2", "10": "10"}),
        ("any", ["²", "1"], {}, {"1": "1", "²": "²"}),  # of which Python reads one as a number
    ],
)
def test_training_names_the_classes_as_evaluation_does(path, folders, names, expected, tmp_path):
    """Else a model learns other captions, or labels in another order, than it is measured by."""
    folder = write(tmp_path, path, folders, **names)
    data = open_folder(folder)
    keys = [Path(data.key(index)).parent.name for index in range(data.count)]
    labels = dict(zip(keys, data.labels or (), strict=True))
    source = FolderConfig(path=str(folder), templates=("{}",)).open()
    records = [source.record(index) for index in range(len(source))]
    assert source.classes == tuple(data.names)
    assert {record.key.split("/")[0]: record.label for record in records} == labels
    captions = {record.key.split("/")[0]: record.captions() for record in records}
    assert captions == {folder: [data.names[label]] for folder, label in labels.items()}
    assert {folder: data.names[labels[folder]] for folder in expected} == expected
    assert labels.keys() == {folder for folder in folders if not folder.startswith(".")}


def test_a_class_without_images_keeps_its_label(tmp_path):
    """Else the labels of training and of evaluation differ where one split lacks a class."""
    folder = write(tmp_path, "train", ["a", "c"])
    (folder / "b").mkdir()
    assert read_classes(folder) == {"a": "a", "b": "b", "c": "c"}
    source = FolderConfig(path=str(folder), templates=("{}",)).open()
    assert [source.record(index).label for index in range(2)] == [0, 2]


@pytest.mark.parametrize(
    ("folders", "lines", "message"),
    [
        (["a_b", "c", "a b"], None, r"equal names .* as a space: a b, a_b; rename or join them"),
        (["tench", "n01440764"], None, "equal names .*: tench; rename"),
        (["a", "b"], "tabby\n", r"classnames\.txt has 1 lines for 2 class folders of .*any; list"),
        (["a", "b"], "caf\xe9\nth\xe9\n", r"classnames\.txt .* byte 3 is not UTF-8; save .* UTF-8"),
    ],
)
def test_training_and_evaluation_refuse_a_folder_by_one_message(folders, lines, message, tmp_path):
    """Latin-1 was a traceback; of two folders with one name, each image has two right classes."""
    folder = write(tmp_path, "any", folders)
    if lines is not None:
        (folder / "classnames.txt").write_bytes(lines.encode("latin-1"))
    config = FolderConfig(path=str(folder), templates=("{}",))
    for read in (lambda: open_folder(folder), lambda: config.open()):
        with pytest.raises(InputError, match=message):
            read()


@pytest.mark.parametrize(("name", "edges"), class_folders._PUBLISHED_ORDER.items())
def test_the_published_order_is_that_of_sorted_folders(name, edges):
    """A name that the published list lacks, or folders in another order, would go unnoticed."""
    assert class_names(name)
    assert sorted(edges) == list(edges)
