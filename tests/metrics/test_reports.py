"""Reports of a run on the terminal and in its files."""

import json
import math
import re
from unittest import mock

import pytest
from etils import epath

from clip_jax.metrics import reports as reports_module
from clip_jax.metrics.reports import Reports, bucket_rates
from clip_jax.metrics.timers import Timers
from tests.clock import HandClock
from tests.conftest import rows, tiny_digits


def test_a_report_tells_how_long_it_compiled_and_when_the_run_ends(tmp_path, capsys):
    clock, config = HandClock(), tiny_digits(steps=1_000, stop_after=100)
    timers = Timers(clock)
    reports = Reports(epath.Path(tmp_path), timers, config, 0, 1, math.inf)
    reports.begin()
    with reports.compiling():
        clock.advance(12.3)
    clock.advance(10)  # ten steps
    with timers.measure("evaluation"):
        clock.advance(5)
    metrics = {"loss": 4.5, "image_to_text_accuracy": 0.25}
    reports.report(10, metrics)
    reports.close(None)
    assert capsys.readouterr().err.splitlines() == [
        "compiling the training step …",
        "compiled in 12.3 s",
        # 90 steps of a second, and an evaluation of 5 s every 10 steps
        "step 10/100  loss 4.5  in-batch accuracy 25.0%  16 images/s  ETA 2 min 15 s",
    ]


def test_speeds_are_those_of_the_seconds_of_training(tmp_path, capsys):
    """Two seconds a step, of which input takes a half, on four devices; evaluation aside."""
    clock = HandClock()
    timers = Timers(clock)
    with mock.patch.object(reports_module, "peak_flops", autospec=True, return_value=1e9):
        reports = Reports(epath.Path(tmp_path), timers, tiny_digits(steps=100), 20, 4, math.inf)
    reports.begin()
    for step in (25, 35):
        count = step - reports._reported
        with timers.measure("input"):
            clock.advance(0.5 * count)
        clock.advance(1.5 * count)
        with timers.measure("evaluation"):
            clock.advance(5)
        reports.read({"patches": 80, "valid_patches": 60, "requests": 7, "bytes_read": 50})
        reports.report(step, {"loss": 4.5})
    reports.close(None)
    # In all, evaluation takes one second a step until step 25 and two thirds until step 35.
    left = re.findall("ETA (.*)", capsys.readouterr().err)
    assert left == ["3 min 45 s", "2 min 53 s"]
    for step, count, values in zip((25, 35), (5, 10), rows(tmp_path), strict=True):
        assert values["step"] == step
        assert values["samples_seen"] == 16 * step
        assert values["images_per_second"] == pytest.approx(16 / 2)
        assert values["images_per_second_per_device"] == pytest.approx(16 / 2 / 4)
        assert values["mfu"] == pytest.approx(values["model_flops_per_step"] / 2 / 4e9)
        assert values["valid_share"] == pytest.approx(60 / 80)
        assert values["mfu_valid"] == pytest.approx(values["mfu"] * 60 / 80)
        assert values["input_wait"] == pytest.approx(0.5 / 2)
        assert values["bucket_requests_per_second"] == pytest.approx(7 / 2 / count)
        assert values["bucket_bytes_per_second"] == pytest.approx(50 / 2 / count)


def test_a_failed_evaluation_is_one_of_its_step(tmp_path, capsys):
    """Otherwise a run that recovers would be left out of tables."""
    reports = Reports(
        epath.Path(tmp_path), Timers(HandClock()), tiny_digits(steps=100), 0, 1, math.inf
    )
    reports.evaluated(2, {"failed": "3 of 4 rows"})
    reports.evaluated(2, {"top1": 0.5})
    assert reports.result["failed"] == "3 of 4 rows"
    reports.evaluated(4, {"top1": 0.25})
    assert "failed" not in reports.result
    reports.close(None)
    assert "step 2  failed 3 of 4 rows" in capsys.readouterr().err
    assert rows(tmp_path)[0] == {"step": 2, "failed": "3 of 4 rows"}


def test_result_json_has_the_values_of_one_step_over_all_starts(tmp_path):
    """Otherwise the table of a study has results of earlier steps as if the run ended with them."""
    clock, config = HandClock(), tiny_digits(steps=100)

    def start(step: int) -> Reports:
        reports = Reports(epath.Path(tmp_path), Timers(clock), config, step, 1, math.inf)
        clock.advance(1)
        reports.facts["unique_samples"] = 50
        return reports

    def written(reports: Reports) -> dict[str, float]:
        reports.write_down()
        values = json.loads((tmp_path / "result.json").read_text())
        return {x: value for x, value in values.items() if x != "goodput" and "seconds/" not in x}

    first = start(0)
    first.report(10, {"loss": 3.0})
    first.evaluated(10, {"retrieval": 0.5})
    first.evaluated(10, {"zero_shot": 0.25})
    of_ten = {"step": 10, "samples_seen": 160, "unique_samples": 50, "loss": 3.0}
    assert written(first) == of_ten | {"retrieval": 0.5, "zero_shot": 0.25}
    first.evaluated(15, {"zero_shot": 0.75})
    of_fifteen = {"step": 15, "samples_seen": 240, "unique_samples": 50}
    assert written(first) == of_fifteen | {"zero_shot": 0.75}
    first.close(None)
    resumed = start(5)  # from an older checkpoint, with other evaluators
    assert resumed.result["step"] == 15  # still what the file has
    resumed.report(15, {"loss": 2.0})
    resumed.evaluated(15, {"retrieval": 0.125})
    assert written(resumed) == of_fifteen | {"loss": 2.0, "retrieval": 0.125}
    resumed.close(None)


def test_reading_from_buckets_is_reported_a_second():
    counts = {"requests": 6, "bytes_read": 300, "bytes_used": 200, "seconds_waited": 4}
    assert bucket_rates(counts, seconds=2) == {
        "bucket_requests_per_second": 3,
        "bucket_bytes_per_second": 150,
        "bytes_read_per_byte_used": 1.5,
        "bucket_wait": 2,
    }
    assert not bucket_rates(counts | {"requests": 0}, seconds=2)
