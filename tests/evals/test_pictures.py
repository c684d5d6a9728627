"""Pictures show everything they are given, inside their borders."""

from pathlib import Path

import numpy as np
from PIL import Image

from clip_jax.evals.pictures import contact_sheet, similarity_matrix


def test_similarity_matrix_has_a_column_for_each_image_and_room_for_long_texts(tmp_path: Path):
    images = [np.full((16, 16, 3), (255, 0, 0), np.uint8)] * 12
    similarity = np.linspace(-0.5, 1, 144).reshape(12, 12)
    text = "a text that is much longer than its room " * 20
    similarity_matrix(tmp_path / "long.png", similarity, images, [text] * 12)
    picture = np.asarray(Image.open(tmp_path / "long.png").convert("RGB"))
    red = (picture == (255, 0, 0)).all(-1).any(0)
    assert (np.diff(red.astype(int)) == 1).sum() == 12  # side by side
    assert (picture[:, 0] == 255).all()  # no text is cut off at the left


def test_dollars_are_letters(tmp_path: Path):
    images, text = [np.zeros((32, 32, 3), np.uint8)] * 2, "$x^$"  # no formula
    contact_sheet(tmp_path / "sheet.png", images, [[text] * 2] * 2, title=text)
    similarity_matrix(tmp_path / "matrix.png", np.eye(2), images, [text] * 2, title=text)


def test_long_lines_of_neighbours_do_not_meet(tmp_path: Path):
    images = [np.zeros((32, 32, 3), np.uint8)] * 8
    for name, text in (("short", "seven  5%"), ("long", "two thousand and seventy-seven  5%")):
        contact_sheet(tmp_path / f"{name}.png", images, [[text] * 4] * 8, right=[True] * 8)
    widths = []
    for name in ("short", "long"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            widths.append(picture.width)
    assert widths[1] < widths[0] + 10
