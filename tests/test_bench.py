"""What `clip-jax bench` prints."""

import itertools
import json
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from clip_jax import bench
from clip_jax.bench import InputBench, describe_input, describe_step, measure_input
from clip_jax.cli.commands import main
from clip_jax.clock import Clock
from clip_jax.data.images import read_crops
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.text_table import TableConfig
from tests.conftest import DIGITS, FLAGS, ROOT

QUICK = ["--seconds", "0.1", "--warmup", "0", "--batch-size", "8"]


class CallsClock(Clock):
    """A second for every call of a function, and milliseconds for all else."""

    def __init__(self) -> None:
        self.calls, self._looks = 0, itertools.count()

    def now(self) -> float:
        return self.calls + next(self._looks) / 1000

    thread_cpu = now


def test_input_says_how_long_each_stage_takes_and_what_limits(tmp_path, capsys):
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "a.jpg,a photo\n" * 9)
    flags = ["--data.source.path", str(tmp_path / "pairs.csv"), "--data.augment.flip", "0.5"]
    command = ["bench", "input", str(ROOT / "configs/pairs.py"), *QUICK, *flags]
    clock = CallsClock()

    def slow(*args: Any, **kwargs: Any) -> Any:
        clock.calls += 1
        return read_crops(*args, **kwargs)

    with (
        mock.patch.object(bench, "read_crops", autospec=True, side_effect=slow),
        mock.patch.object(bench, "CLOCK", clock),
    ):
        assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["samples_per_second"] > 0
    assert list(result["stages"]) == ["read", "decode and crop", "augment", "tokenize"]
    assert result["limit"] == "decode and crop"
    assert all(0 < s["computing"] < 1.1 for s in result["stages"].values())
    result["cores"] = 1_000
    with mock.patch.dict(bench.BENCHES, input=(InputBench, lambda _: result, describe_input)):
        assert main(command) == 0
    assert "limit: decode and crop; cores are idle: raise --data.threads" in capsys.readouterr().out


def test_input_that_cannot_be_read(tmp_path):
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "gone.jpg,a photo\n" * 9)
    source = TableConfig(path=str(tmp_path / "pairs.csv"))
    with pytest.raises(ValueError, match=r"none of 1024 samples of data\.source"):
        measure_input(InputBench(data=DataConfig(source=source), seconds=0.1))


def test_a_step_is_timed(capsys):
    command = ["bench", "step", str(DIGITS), *FLAGS, "--warmup", "0", "--rounds", "2"]
    with mock.patch.object(bench, "peak_flops", autospec=True, return_value=1e12):
        assert main([*command, "--calls", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["samples_per_second"] == pytest.approx(16 / result["seconds"])
    assert result["devices"] == 8
    assert result["mfu"] == result["model_flops"] / (result["seconds"] * 8 * 1e12)
    assert result["peak_bytes"] > 0
    assert result["seconds_fastest"] <= result["seconds"]
    assert "MFU" in describe_step(result)
    assert "MFU" not in describe_step(result | {"mfu": None})  # no peak of a CPU is known
    assert "tokens" not in result


def test_a_step_of_naflex_has_no_padding_and_its_input_says_how_much(tmp_path, capsys):
    """A step takes full sequences, also of 7 patches; the input's padding is that of its images."""
    naflex = ["--model.vision.max-patches", "7", "--model.vision.patch-size", "8"]
    naflex += ["--model.vision.image-size", "32"]
    command = ["bench", "step", str(DIGITS), *FLAGS, *naflex, "--warmup", "0", "--rounds", "1"]
    drawn = []

    def made_up(config: Any) -> Any:
        drawn.append(made(config)["image"])
        return made(config)

    made = bench._made_up
    with mock.patch.object(bench, "_made_up", autospec=True, side_effect=made_up):
        assert main([*command, "--calls", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 7
    assert " at 7 tokens" in describe_step(result)
    assert drawn[0].pixels.shape == (16, 7, 3 * 8**2)
    np.testing.assert_array_equal(drawn[0].length, 7)

    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "a.jpg,a photo\n" * 9)
    flags = ["--data.source.path", str(tmp_path / "pairs.csv"), *naflex, "--json"]
    assert main(["bench", "input", str(ROOT / "configs/pairs.py"), *QUICK, *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["padding"] == pytest.approx(1 / 7)  # 3 x 2 patches
    assert "padding: 14.3% of all patches" in describe_input(result)
