"""The approaches of Hoffmann et al. find the best division of tables drawn from a law."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from clip_jax.cli import commands
from clip_jax.errors import InputError
from clip_jax.scaling import chinchilla
from clip_jax.scaling.chinchilla import Approach, DivideConfig, describe, divide
from clip_jax.scaling.laws import Additive, Runs

LAWS = (Additive(0.35, 0.28, 0.8, 50.0, 0.1), Additive(0.3, 0.4, 1.0, 200.0, 0.3))


def grid(law: Additive, noise: float = 0.0) -> Runs:
    """Runs of ten sizes, each of twelve numbers of samples."""
    axes = np.meshgrid(np.geomspace(0.5, 500, 10), np.geomspace(1e6, 1e11, 12))
    return measured(law, *(x.ravel() for x in axes), noise)


def profiles(law: Additive, noise: float = 0.0) -> Runs:
    """Runs of seven sizes around the best one, at each of nine computes."""
    compute = np.repeat(np.geomspace(1e7, 1e12, 9), 7)
    size = best_size(law, compute) * np.tile(np.geomspace(1 / 6, 6, 7), 9)
    return measured(law, size, compute / size, noise)


def measured(law: Additive, size: np.ndarray, samples: np.ndarray, noise: float) -> Runs:
    scatter = np.exp(noise * np.random.default_rng(1).standard_normal(len(size)))
    return Runs(size, samples, np.asarray(law(size, samples)) * scatter)


def best_size(law: Additive, compute: np.ndarray) -> np.ndarray:
    return np.asarray(law.optimum(compute, (0.0, np.inf)).size)


def write(runs: Runs, path: Path) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["arch", "gmacs_per_sample", "samples_seen", "info_nce"])
        for size, samples, error in zip(*runs[:3], strict=True):
            table.writerow((f"m{size:.4g}", size, samples, error))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(
    ("approach", "runs", "tolerance"),
    [
        ("envelope", grid, 0.02),
        ("isoflop", grid, 0.02),
        ("isoflop", profiles, 0.005),
        ("parametric", grid, 1e-4),
        ("parametric", profiles, 1e-4),
    ],
)
def test_each_approach_recovers_a_law(law: Additive, approach: Approach, runs, tolerance: float):
    line = chinchilla.METHODS[approach](runs(law))
    assert line.slope == pytest.approx(float(law.size_exponent), abs=tolerance)
    true = float(np.log(best_size(law, np.array(1e10))))
    assert line.at(1e10) == pytest.approx(true, abs=10 * tolerance)


@pytest.mark.parametrize("make", [grid, profiles])
def test_intervals_hold_the_law(make, tmp_path):
    law = LAWS[0]
    write(make(law, noise=0.01), tmp_path / "runs.csv")
    config = DivideConfig(table=tmp_path / "runs.csv", metric="info_nce", budget=6e21, draws=60)
    result = divide(config)
    answers = [x for x in result["approaches"] if not x["lacking"]]
    assert len(answers) == (3 if make is grid else 2)
    true_size = float(best_size(law, np.array(1e12)))
    truth = {
        "size_exponent": float(law.size_exponent),
        "samples_exponent": 1 - float(law.size_exponent),
        "size": true_size,
        "samples": 1e12 / true_size,
    }
    for answer in answers:
        for name, true in truth.items():
            low, high = answer[name]["interval"]
            assert low < true < high
            assert low < answer[name]["value"] < high
    assert result["training_flops"] == 6e21
    assert not result["extrapolates"]


def test_intervals_are_not_narrower_than_the_answers_scatter():
    """Nor much wider: a parabola through fewer sizes errs by its form, too."""
    widths, slopes = [], []
    for noise in (0.01, 0.001):
        answer = chinchilla._division("isoflop", profiles(LAWS[0], noise), 1e12, 200)
        low, high = answer["size_exponent"]["interval"]
        widths.append((high - low) / 2 / 1.96)
    assert widths[0] > 4 * widths[1]
    rng = np.random.default_rng(0)
    exact = profiles(LAWS[0])
    for _ in range(200):
        error = exact.error * np.exp(0.01 * rng.standard_normal(len(exact.error)))
        slopes.append(chinchilla.isoflop(exact._replace(error=error)).slope)
    assert 1 < widths[0] / np.std(slopes) < 3


def test_the_robust_loss_ignores_a_run_that_failed():
    runs = grid(LAWS[0])
    error = runs.error.copy()
    error[50] *= 3
    law = chinchilla.huber_law(runs._replace(error=error))
    for name, value in LAWS[0].parameters.items():
        assert law.parameters[name] == pytest.approx(value, rel=2e-3)
    again = chinchilla.huber_law(runs._replace(error=error), start=law)
    assert again.size_alpha == pytest.approx(law.size_alpha, rel=1e-3)


def test_what_a_table_does_not_determine_is_said(tmp_path):
    runs = grid(LAWS[0])
    two = runs.where(runs.size < 2)
    write(two, tmp_path / "two.csv")
    with pytest.raises(
        InputError, match=r"no division of compute. envelope: runs of at least five"
    ):
        divide(DivideConfig(table=tmp_path / "two.csv", metric="info_nce"))
    write(profiles(LAWS[0]), tmp_path / "profiles.csv")
    config = DivideConfig(table=tmp_path / "profiles.csv", metric="info_nce", budget=1e23, draws=20)
    text = describe(divide(config))
    assert "envelope   not determined; it takes runs of at least five sizes" in text
    assert "best for 1e+23 training FLOPs; EXTRAPOLATES:" in text
    with pytest.raises(InputError, match="approaches is empty"):
        DivideConfig(approaches=())


def test_the_command_prints_text_or_json(tmp_path, capsys):
    write(profiles(LAWS[0]), tmp_path / "runs.csv")
    args = ["scale", "divide", str(tmp_path / "runs.csv"), "--metric", "info_nce"]
    args += ["--approaches", "isoflop", "--draws", "20"]
    assert commands.main(args) == 0
    assert (
        "isoflop    N grows as C^0.44 (95%: 0.44 to 0.45), D as C^0.56" in capsys.readouterr().out
    )
    assert commands.main([*args, "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["approaches"]
    assert answer["size_exponent"]["value"] == pytest.approx(0.444, abs=2e-3)
