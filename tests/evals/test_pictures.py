"""Pictures show everything they are given, inside their borders."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from clip_jax.evals import pictures
from clip_jax.evals.pictures import attention_sheet, contact_sheet, with_probabilities


def test_dollars_are_letters(tmp_path: Path):
    images, text = [np.zeros((32, 32, 3), np.uint8)] * 2, "$x^$"  # no formula
    contact_sheet(tmp_path / "sheet.png", images, [[text] * 2] * 2, title=text)


def test_long_lines_of_neighbours_do_not_meet(tmp_path: Path):
    images = [np.zeros((32, 32, 3), np.uint8)] * 8
    for name, text in (("short", "seven  5%"), ("long", "two thousand and seventy-seven  5%")):
        contact_sheet(tmp_path / f"{name}.png", images, [[text] * 4] * 8, right=[True] * 8)
    widths = []
    for name in ("short", "long"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            widths.append(picture.width)
    assert widths[1] < widths[0] + 10


def test_an_answer_is_bold_green_where_it_is_right_and_red_where_it_is_wrong():
    images = [np.full((8, 8, 3), value, np.uint8) for value in (10, 20, 30)]
    lines = [["cat", "not a dog"], ["dog"], ["a very long name of a class"]]
    with mock.patch.object(pictures, "save", autospec=True) as save:
        contact_sheet(Path("x.png"), images, lines, right=[True, False, True], columns=2)
        (figure, path), _ = save.call_args
        contact_sheet(Path("x.png"), images[:1], [["cat"]])
        plain, _ = save.call_args.args
    assert path == Path("x.png")
    shown = [
        [(text.get_text(), text.get_color(), text.get_fontweight()) for text in axis.texts]
        for axis in figure.axes
    ]
    green, red = ("#1a7f37", "bold"), ("tab:red", "bold")
    assert shown == [
        [("cat", *green), ("not a dog", "black", "normal")],
        [("dog", *red)],
        [("a very l…of a class", *green)],
        [],
    ]
    drawn = [axis.images[0].get_array() for axis in figure.axes[:3]]
    np.testing.assert_array_equal(drawn, images)
    assert [text.get_color() for axis in plain.axes for text in axis.texts] == ["black"]


def test_an_attention_map_covers_its_image():
    """Also that of a tall image, in the same proportions."""
    images = [np.zeros((24, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)]
    maps = [np.eye(6, 2), np.eye(2)]
    with mock.patch.object(pictures, "save", autospec=True) as save:
        attention_sheet(Path("maps.png"), images, maps, ["cat", "$dog"])
    figure, _ = save.call_args.args
    for axis, image, shares in zip(figure.axes, images, maps, strict=True):
        left, grey, over = axis.images
        np.testing.assert_array_equal(left.get_array(), image)
        np.testing.assert_array_equal(over.get_array(), shares)
        assert grey.get_extent() == over.get_extent()
        x0, x1, y0, y1 = over.get_extent()
        assert left.get_extent()[1] <= x0
        assert (x1 - x0) / (y1 - y0) == pytest.approx(image.shape[1] / image.shape[0])
    assert [axis.get_title() for axis in figure.axes] == ["cat", r"\$dog"]


def test_probabilities_are_a_softmax_over_all_names():
    logits = np.log([0.2, 0.5, 0.05, 0.25])
    assert with_probabilities(logits, "abcd") == ["b  50%", "d  25%", "a  20%"]
    assert with_probabilities(logits, "abcd", top=1) == ["b  50%"]
