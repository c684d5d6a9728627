"""The evaluators of training on finished weights, and the CLIP paper's data sets: `clip-jax
evaluate MODEL`."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import jax

from clip_jax import sharding
from clip_jax.evals import datasets, measure, prompts, report, suite
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.load import Model, load


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate a model on what ships inside, on the CLIP paper's data sets, or on a folder."""

    model: Path  # a run's work directory, a model folder, or a foreign file
    suite: Literal["digits", "clip"] = "digits"  # digits ship inside; clip: the CLIP paper's
    dataset: str = ""  # one instead of a suite: folder:PATH, webdataset:PATH, or a name of clip's
    data_dir: Path = Path("data")  # where the suite's data sets lie
    templates: Path | None = None  # file with one prompt a line, {c} for the class
    digits: DigitsEvalConfig = field(default_factory=lambda: DigitsEvalConfig(per_number=100))
    mesh: sharding.MeshConfig = field(default_factory=sharding.MeshConfig)
    output: Path | None = None  # folder for result.json, tables and pictures; None: print only


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Return numbers by name; those of the digits have the names of `result.json`.

    A data set of the suite that is not on disk is named on standard error with how to get it, and
    the others run. Raises ValueError where none is there and for a data set that cannot be read.
    """
    chosen = _data_sets(config)
    model = load(config.model)
    mesh = sharding.make_mesh(config.mesh)
    params = jax.device_put(model.params, sharding.replicated(mesh))
    if not chosen:
        return _digits(config, model, params, mesh)

    values: dict[str, float] = {}
    outcomes: dict[str, measure.Outcome] = {}
    encoder = measure.Encoder(
        model.clip, params, mesh, model.image_preprocess, lambda texts: model.tokenize(texts, True)
    )
    for name, data in chosen.items():
        if isinstance(data, datasets.Captioned):
            outcome = measure.retrieve(data, encoder)
        else:
            if config.templates:
                data = replace(data, templates=prompts.read_templates(config.templates))
            outcome = measure.classify(data, encoder)
            if config.output and jax.process_index() == 0:
                report.draw(config.output / name, data, outcome)
        outcomes[name] = outcome
        values |= {f"{name}/{metric}": value for metric, value in outcome.values.items()}
        for line in outcome.skipped[:3]:
            _say(f"{name}: {line}")
        if len(outcome.skipped) > 3:
            _say(f"{name}: {len(outcome.skipped)} images in all could not be read")
    if config.output and jax.process_index() == 0:
        report.write(config.output, values, outcomes, config.model.name)
    return values


def _data_sets(config: EvaluateConfig) -> dict[str, datasets.Labelled | datasets.Captioned]:
    """Open what was asked for, by name; nothing for the digits."""
    kind, _, path = config.dataset.partition(":")
    if config.dataset and path:
        where, name = Path(path), Path(path).absolute().name
        if kind == "folder":
            return {name: datasets.open_folder(where, name=name)}
        if kind == "webdataset":
            return {name: datasets.open_webdataset(where)}
        raise ValueError(f"--dataset {config.dataset} is of no known kind; say folder:PATH or "
                         "webdataset:PATH.")  # fmt: skip
    rows = [row for row in suite.SUITE if config.dataset in ("", row.name)]
    if not rows:
        raise ValueError(
            f"no data set {config.dataset!r}; say folder:PATH, webdataset:PATH or one of "
            f"{', '.join(row.name for row in suite.SUITE)}."
        )
    if not config.dataset and config.suite == "digits":
        return {}
    found, missing = {}, []
    for row in rows:
        try:
            found[row.name] = suite.open_data_set(row, config.data_dir)
        except datasets.Missing as error:
            missing.append(str(error))
    if not found:
        raise ValueError(
            f"none of the suite's {len(rows)} data sets is in {config.data_dir} (--data-dir). "
            f"The first: {missing[0]}"
        )
    for line in missing:
        _say(f"left out: {line}")
    return found


def _digits(
    config: EvaluateConfig, model: Model, params: dict, mesh: jax.sharding.Mesh
) -> dict[str, float]:  # fmt: skip
    evaluator = config.digits.make()
    values = dict(evaluator.run(model.clip, params, mesh))
    if config.output and jax.process_index() == 0:
        report.write(config.output, values, {}, config.model.name)
        evaluator.draw(model.clip, params, mesh, config.output)
    return values


def _say(line: str) -> None:
    print(line, file=sys.stderr)
