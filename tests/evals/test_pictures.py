"""Pictures show everything they are given, inside their borders."""

from pathlib import Path

import numpy as np
from PIL import Image

from clip_jax.evals.pictures import contact_sheet


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
