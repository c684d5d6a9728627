"""The sample data: what is written, and that its three forms hold the same pairs."""

from dataclasses import replace

import numpy as np
import pytest

from clip_jax.cli.commands import main
from clip_jax.data.shapes import SampleDataConfig, draw, write
from clip_jax.data.sources.any import PathConfig, open_single
from clip_jax.data.sources.image_folder import FolderSource
from clip_jax.errors import InputError
from clip_jax.evals.datasets import open_folder

RNG = np.random.default_rng(0)
SHAPES = SampleDataConfig(output="shapes")


def test_folders_table_and_tars_hold_the_same_pairs(tmp_path):
    config = SampleDataConfig(output=str(tmp_path / "shapes"), train=11, test=2, size=16)
    counts = write(config)
    assert (counts["train"], counts["test"]) == (220, 48)
    root = tmp_path / "shapes"
    folders, table, tars = (
        open_single(PathConfig(path=str(root / name), templates=templates), 16)
        for name, templates in (
            ("folders/train", ("a {}",)),
            ("pairs.csv", ()),
            ("tars/{00000..00001}.tar", ()),
        )
    )
    assert isinstance(folders, FolderSource)
    pairs = [table.load(i, RNG) for i in range(len(table))]
    assert sorted(pairs) == sorted(tars.load(i, RNG) for i in range(len(tars)))
    assert sorted(image for image, _ in pairs) == sorted(folders.image(i) for i in range(220))
    for i in range(0, 220, 30):
        name = folders.load(i, RNG)[1].removeprefix("a ")
        caption = next(text for image, text in pairs if image == folders.image(i))
        assert name in caption
    test, train = open_folder(root / "folders/test"), open_folder(root / "folders/train")
    assert len(test.names) == 24
    unseen = {*test.names} - {*train.names}
    assert unseen == {"red star", "yellow triangle", "green circle", "blue square"}


def test_a_drawing_is_what_its_caption_says():
    for number in range(20):
        image, caption = draw("blue", "circle", SHAPES, np.random.default_rng(number))
        pixels = np.asarray(image).astype(int)
        inside = pixels[..., 0] < 120  # the background is light
        radius = np.sqrt(inside.mean() / np.pi)
        assert ("small" in caption) == (radius < 0.32)
        middle = np.nonzero(inside)[1].mean() / 64
        side = "left" if middle < 0.4 else "right" if middle > 0.6 else ""
        assert side in caption
        assert pixels[inside].mean(0).argmax() == 2


def test_shapes_on_long_canvases_are_not_distorted():
    ratios = []
    for number in range(40):
        rng = np.random.default_rng(number)
        image, caption = draw("blue", "circle", replace(SHAPES, aspect=3.0), rng)
        ratios.append(image.width / image.height)
        assert image.width * image.height == pytest.approx(64 * 64, rel=0.02)
        rows, columns = np.nonzero(np.asarray(image)[..., 0] < 120)
        assert abs(np.ptp(rows) - np.ptp(columns)) <= 2
        radius = np.sqrt(len(rows) / np.pi) / min(image.size)
        assert ("small" in caption) == (radius < 0.32)
    assert 1 / 3.1 < min(ratios) < 1 / 2.5
    assert 2.5 < max(ratios) < 3.1


def test_dark_drawings_are_the_same_shapes_in_dim_light_of_all_classes(tmp_path):
    for number in range(8):
        bright, dark = (
            draw("blue", "circle", replace(SHAPES, dark=dark), np.random.default_rng(number))
            for dark in (False, True)
        )
        assert bright[1] == dark[1]
        assert 90 <= np.asarray(dark[0]).max() < 156 < np.asarray(bright[0]).max()
    config = SampleDataConfig(output=str(tmp_path / "dark"), train=2, test=1, size=8, dark=True)
    assert write(config) | {"output": ""} == {
        "output": "",
        "train": 48,
        "test": 24,
        "classes": 24,
        "unseen_classes": 0,
    }


def test_an_output_that_exists_is_kept(tmp_path, capsys):
    config = SampleDataConfig(output=str(tmp_path / "shapes"), train=1, test=1, size=8)
    write(config)
    with pytest.raises(InputError, match="exists already"):
        write(config)
    assert main(["sample-data", str(tmp_path / "other"), "--train", "1", "--test", "1"]) == 0
    assert "20 training and 24 test images of 24 classes" in capsys.readouterr().out
