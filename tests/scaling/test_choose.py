"""The best of a sweep's trials, and the rule for learning rates: on tables of a known law."""

import csv
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from clip_jax.cli.commands import main
from clip_jax.errors import InputError
from clip_jax.scaling import run_table
from clip_jax.scaling.choose import ChooseConfig, choose, describe, fit_rule, learning_rate, vertex

WIDTHS = (16, 32, 64, 128)
RATES = [2.0**-n for n in range(5, 13)]


def best_rate(width, batch):
    return 4e-3 * (width / 32) ** -0.7 * (batch / 64) ** 0.5


def write(path, *, batches=(64,), widths=WIDTHS, diverged=()):
    """A table of trials whose loss is a parabola in the rate's logarithm, but where it
    diverged."""
    rng, rows = np.random.default_rng(0), []
    for width, batch, rate, seed in itertools.product(widths, batches, RATES, range(3)):
        away = math.log(rate / best_rate(width, batch)) + 0.02 * rng.standard_normal()
        loss = 1 + 0.1 * away**2 + 0.01 * math.log2(batch / 64) ** 2
        loss = math.nan if rate in diverged else loss
        rows.append(
            {
                "arch": f"w{width}",
                "samples_seen": 24_576,
                "gmacs_per_sample": width,
                "lr": rate,
                "global_batch": batch,
                "warmup": 38,
                "weight_decay": 0.1,
                "width": width,
                "seed": seed,
                "loss": loss,
                "accuracy": 1 / loss,
            }
        )
    run_table.write(run_table.RunTable(rows), path)
    return path


def test_the_rule_is_estimated_and_predicts_the_largest_width(tmp_path):
    trials, output = write(tmp_path / "trials.csv", batches=(32, 64, 128)), tmp_path / "best.csv"
    config = ChooseConfig(table=trials, choose_by="loss", report="accuracy", output=output)
    best = choose(config)
    assert [point["width"] for point in best["points"]] == list(WIDTHS)
    for point in best["points"]:
        assert point["global_batch"] == 64
        assert abs(math.log2(point["lr"] / best_rate(point["width"], 64))) < 0.55
        assert not point["edges"]
        assert (point["trials"], point["seeds"]) == (3 * len(RATES), 3)
    rule = best["rule"]
    assert rule["width_exponent"] == pytest.approx(-0.7, abs=0.05)
    (check,) = rule["checks"]
    assert check["width"] == 128
    assert check["grid_steps"] < 0.1
    assert check["interval"][0] < check["measured"] < check["interval"][1]
    chosen = csv.DictReader(output.read_text().splitlines())
    assert [row["global_batch"] for row in chosen] == ["64"] * len(WIDTHS) * 3


def test_an_optimum_at_the_edge_is_reported(tmp_path, capsys):
    trials = write(tmp_path / "trials.csv", widths=(16, 2_048), batches=(32, 64))
    command = ["scale", "choose", str(trials), "--choose-by", "loss", "--report", "accuracy"]
    assert main([*command, "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    edges = [["batch: highest"], ["learning rate: lowest", "batch: highest"]]
    assert [point["edges"] for point in points] == edges
    assert main(command) == 0
    text = capsys.readouterr().out
    assert text.count("AT THE EDGE of the grid, learning rate: lowest") == 1
    assert "chosen by loss" in text
    assert "rule: learning rate = " not in text  # one width below the largest


def test_one_batch_says_nothing_of_its_exponent_and_columns_must_be_there(tmp_path):
    trials = write(tmp_path / "trials.csv")
    best = choose(ChooseConfig(table=trials, choose_by="loss", report="accuracy"))
    assert "batch_exponent" not in best["rule"]
    assert "batch /" not in describe(best)
    with pytest.raises(InputError, match="no column 'top1'; it has arch, "):
        choose(ChooseConfig(table=trials, choose_by="loss", report="top1"))
    with pytest.raises(InputError, match="choose_by and report are both 'loss'"):
        ChooseConfig(table=trials, choose_by="loss", report="loss")


def test_a_trial_without_a_finite_loss_is_not_chosen(tmp_path):
    trials = write(tmp_path / "trials.csv", diverged=RATES[:2])
    config = ChooseConfig(table=trials, choose_by="loss", report="accuracy")
    for point in choose(config)["points"]:
        assert abs(math.log2(point["lr"] / best_rate(point["width"], 64))) < 0.55
    write(trials, diverged=RATES)
    with pytest.raises(InputError, match="samples has a finite loss with every seed"):
        choose(config)


def test_a_trial_that_diverged_with_some_seed_is_not_judged_by_the_others(tmp_path):
    rows, kept = run_table.read(write(tmp_path / "trials.csv")).rows, []
    for row in rows:
        is_lucky = (row["arch"], float(row["lr"])) == ("w16", RATES[0])
        if not is_lucky or int(row["seed"]) < 2:  # with seed 2 it diverged
            kept.append(row | ({"loss": 0.5} if is_lucky else {}))
    run_table.write(run_table.RunTable(kept), tmp_path / "trials.csv")
    config = ChooseConfig(table=tmp_path / "trials.csv", choose_by="loss", report="accuracy")
    assert abs(math.log2(choose(config)["points"][0]["lr"] / best_rate(16, 64))) < 0.55


@pytest.mark.parametrize("column", ["lr", "width", "samples_seen", "accuracy", "loss"])
def test_a_cell_without_a_number_is_named(column, tmp_path):
    trials = write(tmp_path / "trials.csv")
    rows = [row | {column: "-" if column == "loss" else ""} for row in run_table.read(trials).rows]
    run_table.write(run_table.RunTable(rows), trials)
    with pytest.raises(InputError, match=f"{column} of w16 is '-?', not a number: correct the"):
        choose(ChooseConfig(table=trials, choose_by="loss", report="accuracy"))


def test_a_parabola_estimates_the_rate_between_those_of_the_grid():
    assert vertex([1, 2, 4], [1.0, 0.5, 1.0]) == pytest.approx(2)
    values = [(math.log(rate / 3)) ** 2 for rate in (1, 2, 4, 8)]
    assert vertex([1, 2, 4, 8], values) == pytest.approx(3)
    assert vertex([1, 2, 4], [3.0, 2.0, 1.0]) == 4


def test_the_rule_and_its_intervals_are_those_of_linear_regression():
    """The textbook's: Student's t, and for one more run its own scatter as well."""
    widths, batches = (np.repeat(x, 3) for x in ([16, 32, 64, 16, 32], [64, 64, 64, 128, 128]))
    noise = 0.3 * np.random.default_rng(1).standard_normal(15)
    rates = best_rate(widths, batches) * np.exp(noise)
    rule = fit_rule([*zip(widths.tolist(), batches.tolist(), rates.tolist(), strict=True)])
    assert rule
    x, y = np.stack([np.ones(15), np.log(widths), np.log(batches)], axis=1), np.log(rates)
    inverse = np.linalg.inv(x.T @ x)
    solution = inverse @ x.T @ y
    variance = np.square(y - x @ solution).sum() / 12
    reach = stats.t.ppf([0.5, 0.025, 0.975], 12) * np.sqrt(variance)
    for i in (1, 2):
        value, half = rule.coefficient(i)
        wanted = solution[i] + reach * np.sqrt(inverse[i, i])
        np.testing.assert_allclose([value, value - half, value + half], wanted, rtol=1e-9)
    new = np.array([1, np.log(128), np.log(128)])
    wanted = np.exp(new @ solution + reach * np.sqrt(1 + new @ inverse @ new))
    np.testing.assert_allclose(learning_rate(rule, 128, 128), wanted, rtol=1e-9)


@pytest.mark.parametrize(
    ("column", "value"),
    [("global_batch", 0), ("width", math.nan), ("lr", -1e-3), ("lr", math.inf), ("warmup", -1)],
)
def test_no_trial_has_such_settings(column: str, value: float, tmp_path):
    """A batch of 0 ends in a traceback of NumPy; NaN makes a trial of each seed."""
    path = write(tmp_path / "trials.csv")
    first, *others = run_table.read(path).rows
    run_table.write(run_table.RunTable([first | {column: value}, *others]), path)
    with pytest.raises(InputError, match=f"{column} of w16 is {value:g}, but must be from"):
        choose(ChooseConfig(table=path, choose_by="loss", report="accuracy"))


def test_runs_that_differ_in_what_is_not_swept_are_no_seeds_of_one_trial(tmp_path):
    """Trials of two teachers in one table were averaged as if they were seeds."""
    path = write(tmp_path / "trials.csv", widths=(16, 32))
    rows = run_table.read(path).rows
    both = [row | {"teacher": teacher} for row in rows for teacher in ("none", "large")]
    run_table.write(run_table.RunTable(both), path)
    config = ChooseConfig(table=path, choose_by="loss", report="accuracy")
    with pytest.raises(InputError, match=r"2 runs of w16 .* have the seed 0, .* differ in teacher"):
        choose(config)
    assert choose(dataclasses.replace(config, where=("teacher=large",)))["points"]


def test_the_deviation_of_a_metric_is_that_of_a_sample(tmp_path):
    path = write(tmp_path / "trials.csv", widths=(16, 32))
    point = choose(ChooseConfig(table=path, choose_by="loss", report="accuracy"))["points"][0]
    chosen = [f"arch={point['arch']}", f"lr={point['lr']}"]
    values = run_table.read(path).select("loss", chosen).numbers("loss")
    assert len(values) == 3
    assert point["metrics"]["loss"]["sd"] == pytest.approx(np.std(values, ddof=1))
