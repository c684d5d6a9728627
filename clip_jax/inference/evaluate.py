"""The evaluators of training on finished weights, the CLIP paper's data sets, and anybody's own:
`clip-jax evaluate MODEL`."""

import functools
import json
import tempfile
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from clip_jax import processes, sharding
from clip_jax.checkpoints.retention import split_name
from clip_jax.config import Config, of_run
from clip_jax.data.pipeline import DataConfig
from clip_jax.errors import InputError
from clip_jax.evals import datasets, measure, report
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.evals.evaluator import Encoder
from clip_jax.evals.pairs import PairsEvalConfig
from clip_jax.evals.tasks import Open, SuiteEvalConfig, TasksConfig, TasksEvaluator, data_sets, say
from clip_jax.inference.loading import load_on_mesh
from clip_jax.models.layers import DType
from clip_jax.storage import files
from clip_jax.storage.files import Place


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TasksConfig):
    """Evaluate a model as its run did, on the bundled digits, on the CLIP paper's data sets, or on
    your own."""

    # A run's work directory, a model folder, or a foreign file. Of a run the newest checkpoint, or
    # the one of RUN@20000 or RUN@best.
    model: Place
    # run: the evaluators of the run's own config, with the options given here; digits: the bundled
    # digits data set; clip: the CLIP paper's data sets. By default run, where the run has
    # evaluators and neither --dataset, --data-dir nor --digits is given; else digits.
    suite: Literal["run", "digits", "clip"] | None = None
    digits: DigitsEvalConfig = field(default_factory=lambda: DigitsEvalConfig(per_number=100))
    dtype: DType | None = None  # of the computation; None: a run's own, else float32
    mesh: sharding.MeshConfig = field(default_factory=sharding.MeshConfig)
    output: Place | None = None  # folder for result.json, tables and pictures; None: print only
    watch: bool = False  # each checkpoint of a run as it is finished, into its evals/watch.jsonl


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Return numbers by name, as in a run's `result.json`: of a data set `DATASET/METRIC`.

    A data set of the suite that is not on disk is named on standard error with how to get it, and
    the others run; so is one whose images cannot be read, and a task that a data set lacks a split
    for. Raises InputError where nothing is left and for files of another shape. `output` is written
    after each data set. Where there are several processes, all call this alike.
    """
    files.check_destination(config.output, "--output")
    run = run_of(config.model)
    return Measures(config, run).of(open_encoder(config, run), config.output)


class Measures:
    """What a command measures, opened once for any number of checkpoints."""

    def __init__(self, config: EvaluateConfig, run: Config | None) -> None:
        self._suite = _suite(config, run)
        self._config = config = _with_digits_of(run, config)
        self._opened = data_sets(config) if self._suite == "clip" else {}
        self._own = [x.make() for x in _own(config, run)] if self._suite == "run" else []
        self._tasks = list(dict.fromkeys(config.tasks))
        if self._suite == "digits":
            _warn_of_other_numbers(config, run)
            # As a data set they also have templates and pictures, for those who want them.
            more = config.templates or config.output
            done = {"alignment"} if more else {"alignment", "zero-shot"}
            self._tasks = [task for task in self._tasks if task not in done]
        memory = SuiteEvalConfig.memory_mib << 20 if config.watch else 0
        wanted = replace(config, tasks=tuple(self._tasks) or config.tasks)
        self._sets = TasksEvaluator(wanted, self._opened, memory=memory)

    def of(self, encoder: Encoder, output: Place | None) -> dict[str, float]:
        """Measure one model; write tables and pictures to `output`."""
        config, values = self._config, {}
        if self._suite == "run":
            for evaluator in self._own:
                values |= dict(evaluator.run(encoder))
                _draw(output, evaluator, encoder)
            _write(config, output, values, [])
            return values
        if self._suite == "digits":
            values |= _digits(config, output, encoder)
            if self._tasks:
                self._opened["digits"] = _open_digits(config, encoder)

        outcomes: list[tuple[str, measure.Outcome]] = []
        for splits, outcome in self._sets.outcomes(encoder):
            name = splits.name
            outcomes.append((name, outcome))
            values |= {f"{name}/{metric}": value for metric, value in outcome.values.items()}
            if outcome.task == "templates":
                values |= {f"{name}/template/{t}": x for t, x in outcome.of_template.items()}
                say(f"{name}: chosen on validation images: " + "; ".join(outcome.templates))
            data = splits.open("test")
            if output and processes.is_lead() and isinstance(data, datasets.Labelled):
                with files.written_whole(output / name) as folder:
                    report.draw(folder, data, outcome)
            _write(config, output, values, outcomes)
        if not values:
            raise InputError(f"nothing could be measured with --tasks {' '.join(config.tasks)}.")
        _write(config, output, values, outcomes)
        return values


def run_of(path: Place) -> Config | None:
    """Return the config of a run's work directory; None where it is none, or an older one's."""
    path, _ = split_name(path)
    try:
        return of_run(json.loads((path / "config.json").read_text()))
    except (OSError, ValueError):
        return None


def open_encoder(config: EvaluateConfig, run: Config | None) -> Encoder:
    """Load the model to the mesh, where the training step would have it."""
    mesh = sharding.make_mesh(config.mesh)
    dtype = config.dtype or (run.model.dtype if run else "float32")
    model = load_on_mesh(config.model, mesh, dtype=dtype)
    return Encoder(
        model.clip, model.params, mesh, model.image_preprocess,
        lambda texts: model.tokenize(texts, True),
    )  # fmt: skip


def _suite(config: EvaluateConfig, run: Config | None) -> Literal["run", "digits", "clip"]:
    if config.suite == "run" and not (run and run.evals):
        raise InputError(
            f"--suite run: {config.model} is no run with evaluators of its own (evals in its "
            "config); say --suite digits, --suite clip or --dataset."
        )
    if config.suite:
        return config.suite
    usual = EvaluateConfig(model=config.model)
    if config.dataset or config.data_dir != usual.data_dir:
        return "clip"
    if run is None and (split_name(config.model)[0] / "checkpoints").is_dir():
        raise InputError(
            f"{config.model} is a run whose config.json cannot be read, so that its evaluators are "
            "not known; say --suite digits, --suite clip or --dataset."
        )
    if config.digits != usual.digits or not (run and run.evals):
        return "digits"
    untaken = _options(config).keys() - {name for own in run.evals for name in vars(own)}
    if untaken and any(isinstance(own, DigitsEvalConfig) for own in run.evals):
        return "digits"
    if untaken:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(untaken))
        raise InputError(
            f"{flags}: the evaluators of {config.model} have no such option; say --suite digits, "
            "--suite clip or --dataset."
        )
    return "run"


def _options(config: EvaluateConfig) -> dict[str, Any]:
    """Options of the tasks that differ from their defaults."""
    usual = EvaluateConfig(model=config.model)
    names = {x.name for x in fields(TasksConfig)} - {"dataset", "data_dir"}
    return {x: getattr(config, x) for x in names if getattr(config, x) != getattr(usual, x)}


def _own(config: EvaluateConfig, run: Config | None) -> list[Any]:
    """The evaluators of a run, with the options that are given, for those that have them."""
    options = _options(config)
    return [
        replace(own, **{name: options[name] for name in options.keys() & vars(own).keys()})
        for own in (run.evals if run else ())
    ]


def _with_digits_of(run: Config | None, config: EvaluateConfig) -> EvaluateConfig:
    """Ask for the numbers that the run had, unless others are asked for."""
    found = [own.source for own in (run.evals if run else ()) if isinstance(own, DigitsEvalConfig)]
    if not found or config.digits != EvaluateConfig(model=config.model).digits:
        return config
    return replace(config, digits=replace(config.digits, source=found[0]))


def _write(
    config: EvaluateConfig, output: Place | None, values: dict[str, float],
    outcomes: list[tuple[str, measure.Outcome]],
) -> None:  # fmt: skip
    if output and processes.is_lead() and values:
        report.write(output, values, outcomes, config.model.name)


def _draw(output: Place | None, evaluator: Any, encoder: Encoder) -> None:
    """Let an evaluator that can draw do so; all processes compute, one keeps."""
    if output and hasattr(evaluator, "draw"):
        with tempfile.TemporaryDirectory() as scratch:
            evaluator.draw(encoder, Path(scratch))
            if processes.is_lead():
                files.copy_tree(Path(scratch), output)


def _open_digits(config: EvaluateConfig, encoder: Encoder) -> Open:
    return functools.partial(
        datasets.open_digits,
        config.digits.source,
        per_number=config.digits.per_number,
        image_size=encoder.model.config.vision.image_size,
    )


def _digits(config: EvaluateConfig, output: Place | None, encoder: Encoder) -> dict[str, float]:
    """Run the evaluators of training; draw what the model says of the scans."""
    values: dict[str, float] = {}
    if "zero-shot" in config.tasks:
        evaluator = config.digits.make()
        values |= evaluator.run(encoder)
        _draw(output, evaluator, encoder)
    if "alignment" in config.tasks:
        source = replace(config.digits.source, split="test")
        pairs = PairsEvalConfig(
            data=DataConfig(source=source, crop="center"), pairs=config.pool, pool=config.pool
        )
        values |= pairs.make().run(encoder)
    return values


def _warn_of_other_numbers(config: EvaluateConfig, run: Config | None) -> None:
    """Say so where a run has learned other numbers than those that it is asked about."""
    if run is None:
        return
    for name in ("digits", "split_seed"):
        asked = getattr(config.digits.source, name)
        if (learned := getattr(run.data.source, name, asked)) != asked:
            say(
                f"the run was trained with data.source.{name}={learned}, this measures "
                f"--digits.source.{name.replace('_', '-')} {asked}"
            )
