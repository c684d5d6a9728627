"""Tiny ladders, with runs that are written without training."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_jax.config_files import load_config
from clip_jax.evals.held_out_pairs import PairsEvalConfig
from clip_jax.scaling import fit, forecast
from clip_jax.scaling.collect import CollectConfig, collect
from clip_jax.scaling.grid import grid
from clip_jax.scaling.ladder import BranchesConfig, LadderConfig
from clip_jax.scaling.laws import Runs
from clip_jax.scaling.uncertainty import Fit, Form, Procedure, fit_law
from clip_jax.serialize import to_dict
from tests.conftest import ROOT, tiny_digits

POINTS = ROOT / "tests/golden/scaling_points.csv"
SPEC = """\
from clip_jax.scaling.ladder import (
    BranchesConfig, HardwareConfig, RulesConfig, SweepConfig,
)
from tests.scaling.conftest import tiny_ladder

def get_ladder():
    return tiny_ladder({})
"""


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use few bootstrap draws, which take most of the time of a fit."""

    def few(
        form: Form, runs: Runs, procedure: Procedure = "all", *, draws: int, **options: Any
    ) -> Fit:
        draws = 20 if procedure in ("all", "frontier") else 100
        return fit_law(form, runs, procedure, draws=draws, **options)

    monkeypatch.setattr(fit, "fit_law", few)
    monkeypatch.setattr(forecast, "fit_law", few)


def tiny_ladder(**changes: Any) -> LadderConfig:
    """Return a ladder of two models, each with one run of ten steps."""
    base = tiny_digits(evals=(PairsEvalConfig(pairs=32, pool=16, every_steps=100),))
    wide = replace(base.model, vision=replace(base.model.vision, width=32))
    values = {"base": base, "models": {"w16": base.model, "w32": wide}, "samples": (160,)}
    return LadderConfig(**(values | changes))


def write_spec(folder: Path, arguments: str = "") -> Path:
    """Write a spec of `tiny_ladder` with these arguments."""
    (folder / "tiny.py").write_text(SPEC.format(arguments))
    return folder / "tiny.py"


def write_ladder(root: Path) -> list[str]:
    """Write a ladder's run directories: two models, three numbers of samples, two seeds, branches.

    Of its 16 runs, one has failed, one was killed and one has not started. Returns their names.
    """
    ladder = tiny_ladder(samples=(1_600, 3_200, 6_400), seeds=(0, 1), branches=BranchesConfig())
    points, rng = grid(ladder, root), np.random.default_rng(0)
    for point in points:
        config, workdir, until = point.config, point.workdir, point.config.steps
        workdir.mkdir(parents=True)
        (workdir / "config.json").write_text(json.dumps(to_dict(config)))
        if point.name == "w16@6.4K-seed1":
            continue
        if point.name in ("w32@6.4K-seed0", "w32@6.4K-seed1"):
            until -= 10
            ends = "clip-jax: step 391: loss nan" if point.name.endswith("1") else "step 390"
            (workdir / "log.txt").write_text(f"going on\n{ends}\n")
        error = 20 * (2e-3 * config.model.vision.width) ** -0.2 * (until * 16) ** -0.3
        error *= np.exp(0.01 * rng.standard_normal())
        lines = [
            {"step": step, "samples_seen": 16 * step, "loss": 30 * (16 * step) ** -0.3}
            for step in range(point.first_step + 1, until + 1)
        ]
        result = lines[-1] | {"seconds/total": 36.0, "goodput": 0.5}
        if config.evals and until == config.steps:
            lines.append({"step": until, "info_nce": error})
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        (workdir / "result.json").write_text(json.dumps(result | lines[-1]))
        (workdir / "checkpoints").mkdir()
    return [point.name for point in points]


def train_all(source, at_a_time, environment, say, *, most: int = 1_000) -> list[str]:
    """Replace `scaling.jobs.run`: write the files of a finished run for each job.

    The loss is the learning rate. Returns the names of the runs in the order of training.
    """
    names = []
    while len(names) < most and (job := source.take()):
        assert job.is_ready()
        assert not job.is_done()
        assert job.command[1:4] == ["-m", "clip_jax", "train"]
        assert job.command[5:] == ["--workdir", str(job.workdir)]
        config = load_config(Path(job.command[4]))
        row = {"step": config.end} | dict.fromkeys(("loss", "info_nce"), config.optim.learning_rate)
        with (job.workdir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        result = row | {"samples_seen": config.end * config.batch_size}
        (job.workdir / "result.json").write_text(json.dumps(result))
        for step in (*config.checkpoint.also, config.end):
            (job.workdir / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
        assert job.is_done()
        names.append(job.name)
        source.release(job, "done")
        job.unlock()
    return names


def collected(root: Path) -> list[dict[str, str]]:
    """Collect the runs below a folder; return the rows of the table."""
    collect(CollectConfig(paths=(root,), output=root / "all.csv"))
    return list(csv.DictReader((root / "all.csv").read_text().splitlines()))


def stamps(folder: Path) -> dict[Path, int]:
    """Return when each file below a folder was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
