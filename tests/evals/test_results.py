"""Tables and pictures of a classification: the worst classes first, and what they are taken for."""

import csv
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clip_jax.display import plain
from clip_jax.evals import results
from clip_jax.evals.datasets import Labelled
from clip_jax.evals.reader import Outcome

NAMES = [f"class ${i}" for i in range(30)]  # of several dollars matplotlib makes a formula


@pytest.fixture
def drawn(tmp_path: Path) -> tuple[Path, mock.Mock, mock.Mock]:
    """Four images of each class; of class i, i % 5 are taken for the next class."""
    labels = np.repeat(np.arange(30), 4)
    wrong = np.tile(np.arange(4), 30) < labels % 5
    logits = 5.0 * np.eye(30)[np.where(wrong, (labels + 1) % 30, labels)]
    images = [np.full((4, 4, 3), i, np.uint8) for i in range(240)]  # every second one was readable
    data = Labelled(240, lambda i: (images[i], int(labels[i // 2])), NAMES, ["{c}"], [])
    outcome = Outcome(
        "zero_shot", {}, names=NAMES, logits=logits, labels=labels, indices=2 * np.arange(120)
    )
    with (
        mock.patch.object(results, "save", autospec=True) as save,
        mock.patch.object(results, "contact_sheet", autospec=True) as sheet,
        mock.patch.object(results, "center_crop", autospec=True, side_effect=lambda x, _: x),
        mock.patch.object(results, "decode", autospec=True, side_effect=lambda x: x),
    ):
        results.draw(tmp_path, data, outcome)
    return tmp_path, save, sheet


def test_classes_are_listed_by_their_accuracy_the_worst_first(drawn):
    rows = list(csv.DictReader((drawn[0] / "classes.csv").read_text().splitlines()))
    classes = [*range(4, 30, 5), *range(3, 30, 5), *range(2, 30, 5), *range(1, 30, 5)]
    assert [row["class"] for row in rows] == [NAMES[i] for i in (*classes, *range(0, 30, 5))]
    assert [float(row["acc1"]) for row in rows] == [x / 4 for x in range(5) for _ in range(6)]


def test_every_image_is_listed_with_the_class_that_was_predicted(drawn):
    rows = list(csv.DictReader((drawn[0] / "images.csv").read_text().splitlines()))
    assert [row["image"] for row in rows] == [f"image {i}" for i in range(0, 240, 2)]
    assert [row["class"] for row in rows] == [NAMES[i // 4] for i in range(120)]
    for row in rows:
        assert float(row["acc1"]) == (row["class"] == row["predicted"])
    assert sum(float(row["acc1"]) for row in rows) == 60
    assert float(rows[4]["acc5"]) > 0  # one of 29 equal classes, after the one predicted


@given(
    values=st.dictionaries(st.sampled_from([*results.COLUMNS, "a", "lp_acc1", "z"]), st.floats())
)
def test_results_have_clip_benchmarks_columns_first_whatever_was_measured(values):
    """As in its published tables, so that both can be joined line by line."""
    columns = (
        "acc1,acc5,mean_per_class_recall,dataset,model,pretrained,task,mean_average_precision,"
        "image_retrieval_recall@5,text_retrieval_recall@5,model_fullname,language"
    )
    outcome = Outcome("zeroshot_classification", values)
    header = results.to_csv([("colours", outcome)], "m").splitlines()[0]
    others = sorted(values.keys() - {*columns.split(",")})
    assert header == ",".join([columns, *others])


def test_the_confusion_matrix_has_the_twelve_worst_classes(drawn):
    folder, save, _ = drawn
    figure, path = save.call_args.args
    assert path == folder / "confusion.png"
    (axis,) = figure.axes
    names = {plain(name): name for name in NAMES}
    rows = [names[label.get_text()] for label in axis.get_yticklabels()]
    columns = [names[label.get_text()] for label in axis.get_xticklabels()]
    worst = [*range(4, 30, 5), *range(3, 30, 5)]
    assert rows == [NAMES[i] for i in worst]
    taken_for = {i for i in worst if i % 5 != 4} | {(i + 1) % 30 for i in worst}
    assert columns == [NAMES[i] for i in sorted(taken_for)]
    counts = np.zeros((12, len(columns)), int)
    for row, name in enumerate(rows):
        number = NAMES.index(name)
        counts[row, columns.index(NAMES[(number + 1) % 30])] = number % 5
        if number % 5 != 4:
            counts[row, columns.index(name)] = 4 - number % 5
    np.testing.assert_array_equal(axis.images[0].get_array(), counts)
    shown = {(int(x.get_position()[1]), int(x.get_position()[0])): x for x in axis.texts}
    assert {at: int(x.get_text()) for at, x in shown.items()} == {
        at: value for at, value in np.ndenumerate(counts) if value
    }
    assert {shown[at].get_color() for at in zip(*np.where(counts > 2), strict=True)} == {"white"}


@pytest.mark.parametrize(
    ("classes", "wrong", "title"),
    [
        (3, 0, "No errors"),
        (30, 0, "No errors: 12 of the classes"),
        (3, 1, "The 3 classes with the lowest accuracy"),
        (30, 1, "The 12 classes with the lowest accuracy"),
    ],
)
def test_the_title_of_the_confusion_matrix_speaks_of_errors_only_if_there_are_any(
    classes, wrong, title, tmp_path
):
    labels = np.arange(classes)
    logits = np.eye(classes)[np.where(labels < wrong, labels + 1, labels)]
    data = Labelled(classes, lambda i: (None, int(labels[i])), NAMES[:classes], ["{c}"], [])
    outcome = Outcome(
        "zero_shot", {}, names=NAMES[:classes], logits=logits, labels=labels, indices=labels
    )
    with (
        mock.patch.object(results, "save", autospec=True) as save,
        mock.patch.object(results, "contact_sheet", autospec=True),
        mock.patch.object(results, "center_crop", autospec=True),
        mock.patch.object(results, "decode", autospec=True),
    ):
        results.draw(tmp_path, data, outcome)
    assert save.call_args.args[0].axes[0].get_title() == title


def test_models_of_openai_are_columns_only_beside_a_data_set_that_they_have_results_of():
    mine = Outcome("zeroshot_classification", {"acc1": 0.5})
    probe = Outcome("linear_probe", {"linear_probe/acc1": 0.8})
    alone = [("shapes", mine), ("cifar10", probe)]
    assert results.to_markdown(alone, "mine").splitlines() == [
        "| data set | metric | mine |",
        "| --- | --- | --- |",
        "| shapes | acc1 | 50.0 |",
        "| cifar10 | linear_probe/acc1 | 80.0 |",
    ]
    beside = results.to_markdown([*alone, ("cifar10", mine)], "mine").splitlines()
    assert {line.count("|") for line in beside} == {9}


def test_errors_are_spread_over_the_classes_with_what_they_were_taken_for(drawn):
    folder, _, sheet = drawn
    (path, images, lines), options = sheet.call_args
    assert path == folder / "errors.png"
    assert options["right"] == [False] * 30  # of 60 errors
    labels = np.repeat(np.arange(30), 4)
    wrong = np.flatnonzero(np.tile(np.arange(4), 30) < labels % 5)[::2][:32]
    assert [image[0, 0, 0] for image in images] == [2 * i for i in wrong]
    for i, (first, *_, last) in zip(wrong, lines, strict=True):
        assert first.rpartition("  ")[0] == NAMES[(labels[i] + 1) % 30]
        assert last == f"true: {NAMES[labels[i]]}"


@pytest.mark.parametrize("crop", [True, False])
def test_errors_of_a_naflex_model_are_drawn_with_complete_images(crop, tmp_path):
    stripes = np.zeros((60, 20, 3), np.uint8)
    stripes[20:40] = 200  # the middle square
    data = Labelled(2, lambda i: (Image.fromarray(stripes), 0), ["a", "b"], ["{c}"], [])
    outcome = Outcome(
        "zero_shot",
        {},
        names=["a", "b"],
        logits=np.eye(2)[[1, 1]],
        labels=np.zeros(2, int),
        indices=np.arange(2),
    )
    with (
        mock.patch.object(results, "save", autospec=True),
        mock.patch.object(results, "contact_sheet", autospec=True) as sheet,
        mock.patch.object(results, "decode", autospec=True, side_effect=lambda x: x),
    ):
        results.draw(tmp_path, data, outcome, crop=crop)
    image = sheet.call_args.args[1][0]
    black = (image[:, image.shape[1] // 2] < 50).all(axis=1).mean()
    assert black == (0 if crop else pytest.approx(2 / 3, abs=0.1))
