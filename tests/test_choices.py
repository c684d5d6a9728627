"""Every choice by a metric of a model: NaN and infinity never win, and a tie has a known winner.

A choice takes one metric per candidate, larger is better, and returns the index of the winner.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Float

from clip_jax.checkpoints.manager import CheckpointConfig, Checkpoints
from clip_jax.checkpoints.retention import WATCH, WATCHED, named_step
from clip_jax.errors import InputError
from clip_jax.evals import linear_probe
from clip_jax.inference import average
from clip_jax.inference.average import AverageConfig
from clip_jax.scaling import run_table
from clip_jax.scaling.choose import ChooseConfig, choose
from clip_jax.scaling.run_table import RunTable
from clip_jax.storage import files
from tests.conftest import types_unchecked
from tests.evals.conftest import mesh_of

Values = Sequence[float]
STATE = {"x": jnp.zeros(2)}
ROWS = 10  # images by which a probe's λ is chosen


# ------------------------------------------------------------------ checkpoints


def write_config(folder: Path, **checkpoint: Any) -> CheckpointConfig:
    files.write_whole(folder / "config.json", json.dumps({"checkpoint": checkpoint}))
    return CheckpointConfig(keep=1, every_steps=10, **checkpoint)


def save_each(folder: Path, values: Values, config: CheckpointConfig) -> None:
    """Save a checkpoint for each value, from step 10 on, and one without a result after them."""
    checkpoints = Checkpoints(folder / "checkpoints", config)
    for number, value in enumerate([*values, None], 1):
        results = {} if value is None else {"acc": value}
        checkpoints.save(10 * number, STATE, {}, results)
        checkpoints.wait()
    checkpoints.close()


def best_of_run(folder: Path, values: Values) -> int:
    """What is kept, and what RUN@best names, by results that the run stores with checkpoints."""
    save_each(folder, values, write_config(folder, best="acc"))
    return named_step(folder, "best") // 10 - 1


def lowest_of_run(folder: Path, values: Values) -> int:
    losses = [-value for value in values]
    save_each(folder, losses, write_config(folder, best="acc", best_mode="min"))
    return named_step(folder, "best") // 10 - 1


def best_of_watcher(folder: Path, values: Values) -> int:
    """What is kept, and what RUN@best names, by the rows of a watcher."""
    (folder / WATCH).mkdir(parents=True)
    rows = [{"step": 10 * number, "acc": value} for number, value in enumerate(values, 1)]
    files.write_whole(folder / WATCHED, "".join(json.dumps(row) + "\n" for row in rows))
    save_each(folder, values, write_config(folder, best="acc", best_of="watcher"))
    return named_step(folder, "best") // 10 - 1


def saved_at_once(folder: Path, values: Values) -> int:
    """The last step that a run saves since it sets a new best; it is resumed before each."""
    config, saved = write_config(folder, best="acc"), []
    for index, value in enumerate(values):
        checkpoints = Checkpoints(folder / "checkpoints", config)
        if checkpoints.is_best({"acc": value}):
            checkpoints.save(index + 1, STATE, {}, {"acc": value})
            saved.append(index)
        checkpoints.close()
    if not saved:
        raise InputError("no step has set a new best")
    return saved[-1]


# ------------------------------------------------------------------ weights


def greedy_soup(folder: Path, values: Values) -> int:
    """The model that a soup begins with."""

    def alone(models: Any, weights: Any, base: Any = None) -> Any:
        """An average is as good as its last model."""
        return models[-1]

    def measure(metric: str | None, evaluator: Any, model: Any) -> tuple[str, dict[str, float]]:
        return measured(values[int(model)])

    rows = run_average(folder, alone, measure, len(values), greedy=True)["rows"]
    kept = [int(Path(row["model"]).name) for row in rows if row["kept"]]
    assert all(math.isfinite(values[i]) for i in kept)
    return kept[0]


def curve(folder: Path, values: Values) -> int:
    """The best α, of which there is one for each value."""
    alphas = [i / 10 for i in range(len(values))]

    def measure(metric: str | None, evaluator: Any, alpha: Any) -> tuple[str, dict[str, float]]:
        return measured(values[round(10 * alpha)])

    def combine(models: Any, weights: Any, base: Any = None) -> Any:
        return weights[1]

    result = run_average(folder, combine, measure, 2, curve=tuple(alphas))
    return alphas.index(result["best_alpha"])


def measured(value: float) -> tuple[str, dict[str, float]]:
    """A result, or none, as of a model whose embeddings are NaN."""
    return ("", {}) if math.isnan(value) else ("set/acc1", {"set/acc1": value})


def run_average(
    folder: Path, combine: Callable[..., Any], measure: Callable[..., Any], count: int, **how: Any
) -> dict[str, Any]:
    """Average models that are their own numbers."""
    paths = tuple(folder / str(i) for i in range(count))
    config = AverageConfig(models=paths, output=folder / "out", dataset=("folder:x",), **how)
    doubles = mock.patch.multiple(
        average,
        combine=combine,
        _measure=measure,
        data_sets=mock.Mock(return_value={}),
        read_weights=lambda path, ema: int(path.name),
        fitting=lambda models, paths: models,
        card=mock.Mock(FACTS_NAME="training.json"),
        write_weights=mock.Mock(),
    )
    with doubles, types_unchecked():
        return average.average(config)


# ------------------------------------------------------------------ λ of probes


def logits_of(value: float) -> Float[np.ndarray, "B classes"]:
    """Logits of this accuracy on images of class 0, or with this NaN or infinity."""
    logits = np.zeros((ROWS, 2), np.float32)
    if not math.isfinite(value):
        logits[0] = value
        return logits
    right = round(value * ROWS)
    logits[:right, 0] = logits[right:, 1] = 1
    return logits


def strength(folder: Path, values: Values) -> int:
    """The λ of a probe, which is its own number here."""
    fitted = [mock.Mock(logits=mock.Mock(return_value=logits_of(value))) for value in values]
    problem = mock.Mock(fit=fitted.__getitem__)
    images = np.zeros((ROWS, 1), np.float32), np.zeros(ROWS, np.int64)
    with mock.patch.object(linear_probe, "Problem", autospec=True, return_value=problem):
        return int(linear_probe.search(images, images, mesh_of(1), lambdas=range(len(values))))


# ------------------------------------------------------------------ sweeps and laws


def write_table(folder: Path, values: Values) -> Path:
    """Trials whose learning rates fall from row to row."""
    point = {"arch": "w16", "width": 16, "samples_seen": 1_024, "gmacs_per_sample": 1, "seed": 0}
    trial = {"global_batch": 16, "warmup": 1, "weight_decay": 0.1, "other": 0.5}
    rows = [
        point | trial | {"name": i, "lr": 0.1 / (i + 1), "acc": value, "loss": -value}
        for i, value in enumerate(values)
    ]
    path = folder / "trials.csv"
    run_table.write(RunTable(rows), path)
    return path


def sweep(folder: Path, values: Values, choose_by: str = "acc", **how: Any) -> int:
    """The best trial of a point."""
    table, output = write_table(folder, values), folder / "best.csv"
    choose(ChooseConfig(table=table, choose_by=choose_by, report="other", output=output, **how))
    (row,) = run_table.read(output).rows
    return int(row["name"])


def sweep_of_losses(folder: Path, values: Values) -> int:
    return sweep(folder, values, "loss", best="min")


def sweep_of_scores(folder: Path, values: Values) -> int:
    return sweep(folder, values, "acc", best="max")


# ------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Choice:
    """A choice, and which of two equal candidates it takes: 0, the first, or 2, the second."""

    choose: Callable[[Path, Values], int]
    of_a_tie: int


CHOICES = (
    Choice(best_of_run, 2),  # the newer checkpoint
    Choice(lowest_of_run, 2),
    Choice(best_of_watcher, 2),
    Choice(saved_at_once, 0),  # an equal result is no new best
    Choice(greedy_soup, 0),  # as they are named
    Choice(curve, 0),  # the smaller α
    Choice(strength, 2),  # the larger λ
    Choice(sweep_of_losses, 2),  # the lower learning rate
    Choice(sweep_of_scores, 2),
)
BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.choose.__name__)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_value_that_is_not_finite_is_never_chosen(choice, is_first, tmp_path):
    """Each alone would win where it is not left out, or spoil what it is compared with."""
    finite = [0.2, 0.5, 0.3]
    values = [*BAD, *finite] if is_first else [*finite, *BAD]
    assert choice.choose(tmp_path, values) == values.index(0.5)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.choose.__name__)
def test_of_no_finite_value_none_is_chosen(choice, tmp_path):
    with pytest.raises(InputError):
        choice.choose(tmp_path, [*BAD, math.nan])


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.choose.__name__)
def test_a_tie_has_one_winner(choice, tmp_path):
    assert choice.choose(tmp_path, [0.5, 0.2, 0.5, 0.3]) == choice.of_a_tie


@pytest.mark.parametrize("bad", BAD)
def test_a_law_is_fitted_to_finite_values_alone(bad, tmp_path):
    """The runs of a ladder are compared by their laws; no run is chosen by its metric."""
    table = run_table.read(write_table(tmp_path, [0.2, bad, 0.5]))
    with pytest.raises(InputError, match="must be finite in every row"):
        table.runs("acc", is_score=True)
