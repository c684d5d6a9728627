"""What `clip-jax bench` prints."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from clip_jax import bench, chips
from clip_jax.bench import InputBench, describe_input, describe_step, measure_input
from clip_jax.cli import commands
from clip_jax.cli.commands import main
from clip_jax.clock import Clock
from clip_jax.data.images import read_crops
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.text_table import TableConfig
from clip_jax.errors import InputError
from clip_jax.models.images import Patches
from clip_jax.pods import compile as pod
from clip_jax.pods.compile import Facts
from clip_jax.pods.plan import BOUNDS
from clip_jax.pods.work import Work
from tests.clock import HandClock
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
    texts = result["texts"]
    assert (texts["mean_tokens"], texts["most_tokens"], texts["context_length"]) == (4, 4, 77)
    assert texts["text_lengths"]["tokens"][0] == 8
    assert 8 <= texts["padded_tokens"] < 77
    assert "with text_lengths=TextLengths(tokens=(8, " in describe_input(result)
    result["cores"] = 1_000
    with mock.patch.dict(bench.BENCHES, input=(InputBench, lambda _: result, describe_input)):
        assert main(command) == 0
    assert "limit: decode and crop; cores are idle: raise --data.threads" in capsys.readouterr().out


@pytest.mark.usefixtures("unchecked_types")
def test_rates_of_a_pipeline_are_those_of_the_measured_seconds():
    """Here a batch takes 5 s at first, then half a second in the warmup, then a quarter."""
    clock, seconds = HandClock(), itertools.chain([5.0, *[0.5] * 4], itertools.repeat(0.25))
    reading = SimpleNamespace(requests=3, bytes_read=500, bytes_used=400, seconds_waited=0.125)
    image = Patches(np.zeros((2, 6, 1)), np.array([[2, 3], [1, 3]]), np.array([6, 3]))

    def batches() -> Iterator[Any]:
        for each in seconds:
            clock.advance(each)
            yield SimpleNamespace(reading=reading, image=image)

    pipeline: Any = SimpleNamespace(batches=batches, order="blocks")
    with mock.patch.object(bench, "CLOCK", clock):
        result = bench._pipeline(InputBench(batch_size=8, seconds=3.0, warmup=2.0), pipeline)
    assert result == {
        "samples_per_second": 32.0,
        "seconds_to_first_batch": 5.0,
        "order": "blocks",
        "padding": 0.25,
        "bucket_requests_per_second": 12.0,
        "bucket_bytes_per_second": 2_000.0,
        "bytes_read_per_byte_used": 1.25,
        "bucket_wait": 0.5,
    }


def test_input_that_cannot_be_read(tmp_path):
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "gone.jpg,a photo\n" * 9)
    source = TableConfig(path=str(tmp_path / "pairs.csv"))
    with pytest.raises(ValueError, match=r"none of 1024 samples of data\.source"):
        measure_input(InputBench(data=DataConfig(source=source), seconds=0.1))


@pytest.mark.usefixtures("small_steps")
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
    assert ", mesh data=8 fsdp=1 tensor=1, batch 16\n" in describe_step(result)
    assert "MFU" in describe_step(result)
    assert "MFU" not in describe_step(result | {"mfu": None})  # no peak of a CPU is known
    assert "tokens" not in result


@pytest.fixture
def written(tmp_path, monkeypatch, capsys):
    """Write what `plan --json` prints of the digits' step on eight chips, with other values."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    work = Work(
        name="x",
        opcode="fusion",
        part="MLP",
        times=2,
        flops=1e9,
        bytes=4_000_000,
        cycles=3_000_000,
        schedule=1_000_000,
    )
    facts = Facts(
        mesh=(8, 1, 1),
        form="dense",
        versions="none",
        compile_seconds=1.0,
        parameters=10,
        optimizer=20,
        batch=10,
        loss=20,
        fits=True,
        peak_bytes=2_000_000,
        works=(work,),
    )
    with mock.patch.object(pod, "compile_step", autospec=True, return_value=facts):
        assert main(["plan", str(DIGITS), *FLAGS, "--topology", "v5e:2x4", "--json"]) == 0
    values, path = json.loads(capsys.readouterr().out), tmp_path / "plan.json"

    def write(**changes: Any) -> str:
        path.write_text(json.dumps(values | changes))
        return str(path)

    return write


QUICK_STEP = [str(DIGITS), *FLAGS, "--warmup", "0", "--rounds", "1", "--calls", "1"]


@pytest.mark.usefixtures("small_steps")
def test_a_step_is_measured_beside_its_plan(written, capsys):
    planned = json.loads(Path(written(step_seconds_of_tomorrow=None)).read_text())
    path = written(batch_size=32, step_seconds_bound=9.0, lengths=[planned])  # one of two
    with mock.patch.object(bench, "peak_flops", autospec=True, return_value=1e12):
        assert main(["bench", "step", *QUICK_STEP, "--against-plan", path, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    beside = {(x["quantity"], x["estimate"]): x for x in result["against_plan"]}
    memory = beside["peak memory per device, GB", "compiled step"]
    assert memory["planned"] == planned["bytes_per_device"]["total"] / 1e9
    assert memory["measured"] == result["peak_bytes"] / 1e9
    for name, (label, _) in BOUNDS.items():
        seconds, mfu = beside["step, s", label], beside["MFU", label]
        assert (seconds["planned"], seconds["measured"]) == (
            planned[f"step_seconds_{name}"],
            result["seconds"],
        )
        assert (mfu["planned"], mfu["measured"]) == (planned[f"mfu_{name}"], result["mfu"])
    assert len(beside) == 1 + 2 * (len(BOUNDS) + 1)
    for x in beside.values():
        assert x["ratio"] == (x["planned"] and x["measured"] / x["planned"])
    table = describe_step(result)
    assert "plan for v5e:2x4:" in table
    assert re.search(rf"step, s +overlapped bound +\d\S+ +{result['seconds']:.4f} +\d", table)
    assert re.search(rf"step, s +of_tomorrow +– +{result['seconds']:.4f} +–", table)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 32}, r"the plan of another step: batch_size=32 \(here 16\)\. Plan and"),
        ({"devices": 4}, r"step: devices=4 \(here 8\)\."),
        ({"remat": "full"}, r"step: remat=full \(here \w+\)\."),
        ({"model_flops_per_step": 1}, r"model_flops_per_step=1 \(here \d+\)"),
        ({"name": "v6e:2x4"}, r"chip=TPU v6e \(here TPU v5e\)"),
        ({"fits": False}, "the step does not fit into memory"),
    ],
)
def test_a_plan_of_another_step_is_refused(changes, message, written):
    command = ["bench", "step", *QUICK_STEP, "--against-plan", written(**changes)]
    with (
        mock.patch.object(bench, "find", autospec=True, return_value=chips.table()["TPU v5e"]),
        pytest.raises(InputError, match=message),
    ):
        commands._run(command)


def test_a_file_that_is_no_plan_is_refused(written, tmp_path):
    command = ["bench", "step", *QUICK_STEP, "--against-plan"]
    with pytest.raises(
        InputError, match=r"gone\.json does not exist. Write it with: clip-jax plan"
    ):
        commands._run([*command, str(tmp_path / "gone.json")])
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(InputError, match=r"not a JSON object with .*lengths.*Write it with"):
        commands._run([*command, str(tmp_path / "list.json")])


@pytest.mark.usefixtures("small_steps")
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
