"""`clip-jax evaluate MODEL`: run the evaluators of training, or data sets, on saved weights."""

import itertools
import json
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from clip_jax import parts, processes, sharding
from clip_jax.checkpoints.retention import split_name
from clip_jax.checkpoints.run_config import VERSION
from clip_jax.config import Config
from clip_jax.config_files import of_run
from clip_jax.data.digits import DigitsConfig
from clip_jax.errors import InputError, check_ranges
from clip_jax.evals.catalog import data_sets
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.evals.evaluator import (
    Encoder,
    Evaluator,
    check_distinct,
    folders_of,
    length_of,
)
from clip_jax.evals.suite import SuiteConfig, SuiteEvalConfig, SuiteEvaluator
from clip_jax.inference.loading import load_on_mesh
from clip_jax.models.layers import DType
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import check_version, content_of, parse


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SuiteConfig):
    """Evaluate a model by its run's evaluators or on data sets."""

    # Run directory, model folder, weights in another format, or icons, the bundled model. RUN
    # is the newest checkpoint of a run, RUN@20000 that of a step, RUN@best the best.
    model: AnyPath
    # Evaluators. run: those of the run's config, changed by the options used here; clip: the CLIP
    # paper's data sets. None: clip with --dataset or --data-dir, else run. A model without
    # evaluators is measured on the bundled digits, as `clip-jax train digits` does.
    suite: Literal["run", "clip"] | None = None
    dtype: DType | None = None  # Data type of the computation. None: a run's own, else float32.
    # Patches per image of a NaFlex model (sequence length). None: the model's own.
    tokens: int | None = None
    # Number of first channels of embeddings, for a model trained for it (Matryoshka). Several: the
    # model is evaluated with each, and results are DIM/NAME. Empty: all channels.
    dim: tuple[int, ...] = ()
    mesh: sharding.MeshConfig = field(default_factory=sharding.MeshConfig)
    output: AnyPath | None = None  # Folder for result.json, tables and pictures. None: print only.
    # Model to compare with: adds its results, original/NAME, and differences, change/NAME.
    beside: AnyPath | None = None
    watch: bool = False  # Evaluate each checkpoint of a run once saved, to evals/watch.jsonl.

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, tokens="[1, inf)", dim="[1, inf)")
        if self.watch and self.beside is not None:
            raise InputError("watch evaluates the checkpoints of one run; omit --beside.")
        if self.watch and len(self.dim) > 1:
            raise InputError(f"watch evaluates one width, not dim={self.dim}; choose one.")


def evaluate(config: EvaluateConfig) -> dict[str, float | int]:
    """Return metrics by name, as in a run's `result.json`; data sets have `DATASET/METRIC`.

    Results of a NaFlex model also have `tokens`, its sequence length, and those of several widths
    begin with `DIM/`. Data sets of the suite that
    are missing or unreadable, and tasks for which a data set lacks a split, are skipped with a
    message on standard error. Raises InputError if nothing is left, or if files have another
    layout. `output` is written after each data set. In a multi-process run, all processes call
    this.
    """
    files.check_destination(config.output, "--output")
    run = config_of_run(config.model)
    evaluators, output = Evaluators(config, run), config.output
    values = _at_each_width(config, run, evaluators, output)
    if config.beside is not None:
        beside = replace(config, model=config.beside)
        other = _at_each_width(beside, run, evaluators, output and output / "original")
        change = {f"change/{name}": values[name] - x for name, x in other.items() if name in values}
        values |= {f"original/{name}": x for name, x in other.items()} | change
        if output and processes.is_lead():
            files.write_whole(output / "result.json", json.dumps(values, indent=1))
    return values


def _at_each_width(
    config: EvaluateConfig, run: Config | None, evaluators: "Evaluators", output: AnyPath | None
) -> dict[str, float | int]:
    """Evaluate a model; if `dim` has several widths, with each, into a folder of its own."""
    if len(config.dim) < 2:
        return evaluators.run(open_encoder(config, run), output)
    values = {}
    for dim in sorted(config.dim, reverse=True):  # a width that the model lacks fails at once
        encoder = open_encoder(replace(config, dim=(dim,)), run)
        of_width = evaluators.run(encoder, output and output / str(dim))
        values |= {f"{dim}/{name}": x for name, x in of_width.items()}
    if output and processes.is_lead():
        files.write_whole(output / "result.json", json.dumps(values, indent=1))
    return values


class Evaluators:
    """Evaluators of a command, created once for any number of checkpoints."""

    def __init__(self, config: EvaluateConfig, run: Config | None) -> None:
        self._config = config
        self._evaluators: list[Evaluator]
        if _suite(config, run) == "clip":
            opened = data_sets(config.dataset, config.data_dir, config.languages)
            memory = SuiteEvalConfig.memory_mib << 20 if config.watch else 0
            self._evaluators = [SuiteEvaluator(config, opened, memory=memory)]
        else:
            self._evaluators = [evaluator.make() for evaluator in _of_run(config, run)]

    def run(self, encoder: Encoder, output: AnyPath | None) -> dict[str, float | int]:
        """Evaluate one model; write tables and pictures to `output`."""
        values: dict[str, float | int] = {}
        folders = folders_of(self._evaluators, output)
        for evaluator, folder in zip(self._evaluators, folders, strict=True):
            rows = evaluator.run(encoder, folder)
            for _, of_data_set in itertools.groupby(rows, lambda row: row[0].partition("/")[0]):
                values |= length_of(encoder.preprocess) | dict(of_data_set)
                if output and processes.is_lead():
                    files.write_whole(output / "result.json", json.dumps(values, indent=1))
        if not values:
            tasks = " ".join(self._config.tasks)
            raise InputError(f"nothing could be measured with --tasks {tasks}; choose others.")
        return values


def config_of_run(path: AnyPath) -> Config | None:
    """Return the config of a run directory; None if there is none that can be read.

    Raises InputError if it is of a newer format, or needs users' modules that were not imported.
    """
    path, _ = split_name(path)
    try:
        content = parse(content_of(path / "config.json"))
    except (OSError, ValueError):
        return None
    check_version(content or {}, VERSION, path / "config.json")
    parts.check(content, path / "config.json")
    try:
        return of_run(content)
    except ValueError:
        return None


def open_encoder(config: EvaluateConfig, run: Config | None) -> Encoder:
    """Load the model to the mesh, sharded as in training."""
    mesh = sharding.make_mesh(config.mesh)
    dtype = config.dtype or (run.model.dtype if run else "float32")
    dim = config.dim[0] if config.dim else None
    model = load_on_mesh(config.model, mesh, dtype=dtype, tokens=config.tokens, dim=dim)
    return model.encoder(mesh, config.model.name)


def _suite(config: EvaluateConfig, run: Config | None) -> Literal["run", "clip"]:
    if config.suite == "run" and not (run and run.evals):
        raise InputError(
            f"--suite run: {config.model} is no run with evaluators (evals in its config); use "
            "--suite clip or --dataset."
        )
    if config.suite:
        return config.suite
    usual = EvaluateConfig(model=config.model)
    if config.dataset or config.data_dir != usual.data_dir:
        return "clip"
    if run is None and (split_name(config.model)[0] / "checkpoints").is_dir():
        file = split_name(config.model)[0] / "config.json"
        if not file.exists():
            raise InputError(
                f"{config.model} has checkpoints but no config.json, so its model is unknown; "
                "evaluate the run directory of clip-jax train, or a model folder."
            )
        raise InputError(
            f"{config.model} is a run whose config.json cannot be read, so its evaluators are "
            "unknown; use --suite clip or --dataset."
        )
    return "run"


def _options(config: EvaluateConfig) -> dict[str, Any]:
    """Return the options of tasks that differ from their defaults."""
    usual = EvaluateConfig(model=config.model)
    names = {x.name for x in fields(SuiteConfig)} - {"dataset", "data_dir"}
    return {x: getattr(config, x) for x in names if getattr(config, x) != getattr(usual, x)}


def _of_run(config: EvaluateConfig, run: Config | None) -> list[Any]:
    """Return a run's evaluators, changed by the options of the command that they have.

    A model without evaluators has that of the bundled digits, with the numbers of its run if it
    was trained on digits. Raises InputError for an option that no evaluator has.
    """
    source = run.data.source if run else None
    usual = DigitsEvalConfig(source=source if isinstance(source, DigitsConfig) else DigitsConfig())
    evaluators = (run.evals if run else ()) or (usual,)
    options = _options(config)
    if ignored := options.keys() - {name for evaluator in evaluators for name in vars(evaluator)}:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(ignored))
        raise InputError(
            f"{flags}: the evaluators of {config.model} have no such option; use --suite clip or "
            "--dataset, such as --dataset digits."
        )
    changed = [
        replace(evaluator, **{name: x for name, x in options.items() if hasattr(evaluator, name)})
        for evaluator in evaluators
    ]
    check_distinct(changed)
    return changed
