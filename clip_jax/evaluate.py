"""The evaluators of training on finished weights, the CLIP paper's data sets, and anybody's own:
`clip-jax evaluate MODEL`."""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import jax

from clip_jax import sharding
from clip_jax.data.pipeline import DataConfig
from clip_jax.evals import compositions, datasets, measure, prompts, report, suite, supervised
from clip_jax.evals.alignment import POOL
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.evals.pairs import PairsEvalConfig
from clip_jax.load import load

Task = Literal["zero-shot", "templates", "probe", "few-shot", "neighbours", "alignment"]

_KINDS = ("folder", "webdataset", "aro", "sugar_crepe")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate a model on what ships inside, on the CLIP paper's data sets, or on your own."""

    model: Path  # a run's work directory, a model folder, or a foreign file
    suite: Literal["digits", "clip"] = "digits"  # digits ship inside; clip: the CLIP paper's
    # One instead of a suite: a name of clip's; folder:PATH, one folder a class, maybe below train/,
    # val/ and test/; webdataset:PATH, CLIP_benchmark's tars; aro:FILE.json with images/ beside;
    # sugar_crepe:PATH.
    dataset: str = ""
    data_dir: Path = Path("data")  # where the suite's data sets lie
    # zero-shot: classify by names, or retrieve. templates: each alone, and a subset chosen on
    # validation images. probe: logistic regression on features. few-shot: the same on --shots of
    # each class. neighbours: the vote of the nearest. alignment: how images and captions lie.
    # The middle four need a training split.
    tasks: tuple[Task, ...] = ("zero-shot",)
    templates: Path | None = None  # file with one prompt a line, {c} for the class
    shots: tuple[int, ...] = supervised.SHOTS  # training images of each class, for few-shot
    neighbours: int = 20  # how many vote
    pool: int = POOL  # pairs that compete in info_nce; results to be compared must share it
    seed: int = 0  # draws few-shot samples, and validation images where a data set has none
    digits: DigitsEvalConfig = field(default_factory=lambda: DigitsEvalConfig(per_number=100))
    mesh: sharding.MeshConfig = field(default_factory=sharding.MeshConfig)
    output: Path | None = None  # folder for result.json, tables and pictures; None: print only

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks is empty; name one at least, such as zero-shot.")
        if min(self.shots, default=1) < 1 or self.neighbours < 1:
            raise ValueError(f"shots={self.shots} and neighbours={self.neighbours} must be >= 1.")
        if self.pool < 2:
            raise ValueError(f"pool={self.pool} must be at least 2 pairs.")


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Return numbers by name, `DATASET/METRIC`; those of the digits as in `result.json`.

    A data set of the suite that is not on disk is named on standard error with how to get it, and
    the others run; so is one whose images cannot be read, and a task that a data set lacks a split
    for. Raises ValueError where nothing is left and for files of another shape. `output` is written
    after each data set.
    """
    templates = prompts.read_templates(config.templates) if config.templates else None
    chosen = _data_sets(config)
    model = load(config.model)
    mesh = sharding.make_mesh(config.mesh)
    params = jax.device_put(model.params, sharding.replicated(mesh))
    encoder = measure.Encoder(
        model.clip, params, mesh, model.image_preprocess, lambda texts: model.tokenize(texts, True)
    )
    values: dict[str, float] = {}
    outcomes: list[tuple[str, measure.Outcome]] = []
    lead = jax.process_index() == 0
    tasks: list[Task] = list(dict.fromkeys(config.tasks))
    if not chosen:
        _warn_of_other_numbers(config)
        values |= _digits(config, encoder)
        # As a data set they also have templates and pictures, for those who want them.
        done = {"alignment"} if templates or config.output else {"alignment", "zero-shot"}
        tasks = [task for task in tasks if task not in done]
        opened = functools.partial(
            datasets.open_digits,
            config.digits.source,
            per_number=config.digits.per_number,
            image_size=model.config.vision.image_size,
        )
        chosen = {"digits": opened}

    for name, open_split in chosen.items():
        splits = measure.Splits(name, _with_templates(open_split, templates), encoder)
        try:
            found = list(_outcomes(splits, tasks, config))
        except ValueError as error:
            if len(chosen) == 1:
                raise
            _say(f"left out: {name}: {error}")
            continue
        for outcome in found:
            outcomes.append((name, outcome))
            values |= {f"{name}/{metric}": value for metric, value in outcome.values.items()}
            if outcome.task == "templates":
                values |= {f"{name}/template/{t}": x for t, x in outcome.of_template.items()}
                _say(f"{name}: chosen on validation images: " + "; ".join(outcome.templates))
            for line in outcome.skipped[:3]:
                _say(f"{name}: {line}")
            if len(outcome.skipped) > 3:
                _say(f"{name}: {len(outcome.skipped)} images in all could not be read")
            data = splits.open("test")
            if config.output and lead and isinstance(data, datasets.Labelled):
                report.draw(config.output / name, data, outcome)
        if config.output and lead and values:
            report.write(config.output, values, outcomes, config.model.name)
    if not values:
        raise ValueError(f"nothing could be measured with --tasks {' '.join(config.tasks)}.")
    return values


def _outcomes(
    splits: measure.Splits, tasks: Sequence[Task], config: EvaluateConfig
) -> Iterator[measure.Outcome]:
    """Run the tasks on one data set; say which it has no data for."""
    encoder, test = splits.encoder, splits.open("test")
    if "zero-shot" in tasks:
        yield measure.zero_shot(test, splits.embedded("test"), encoder)
    if "alignment" in tasks:
        if isinstance(test, datasets.Captioned):
            yield measure.align(splits.embedded("test"), encoder, config.pool)
        else:
            _say(f"{splits.name}: alignment is for images with captions of their own.")
    if "templates" in tasks:
        try:
            yield measure.select_templates(splits)
        except datasets.Missing as error:
            _say(f"templates left out: {error}")
    labelled: list[supervised.Task] = [x for x in supervised.TASKS if x in tasks]
    if labelled:
        try:
            outcome = supervised.supervised(
                splits, labelled, shots=config.shots, neighbours=config.neighbours, seed=config.seed
            )
        except datasets.Missing as error:
            _say(f"{', '.join(labelled)} left out: {error}")
            return
        for k in config.shots if "few-shot" in labelled else ():
            if f"few_shot/{k}" not in outcome.values:
                _say(f"{splits.name}: few-shot of {k} left out: a class has fewer training images")
        yield outcome


def _data_sets(config: EvaluateConfig) -> dict[str, Callable[[datasets.Split], datasets.Data]]:
    """Return what opens the splits of each data set asked for, by name; nothing for the digits."""
    kind, _, path = config.dataset.partition(":")
    if path:
        where = Path(path)
        opened = functools.cache(functools.partial(_open_own, kind, where))
        try:
            opened("test")  # wrong use is said before a model is loaded
        except datasets.Missing as error:
            raise ValueError(str(error)) from error
        return {where.absolute().name if where.is_dir() else where.stem: opened}
    rows = [row for row in suite.SUITE if config.dataset in ("", row.name)]
    if not rows:
        raise ValueError(
            f"no data set {config.dataset!r}; say {', '.join(f'{k}:PATH' for k in _KINDS)} or one "
            f"of {', '.join(row.name for row in suite.SUITE)}."
        )
    if not config.dataset and config.suite == "digits":
        return {}
    found, missing = {}, []
    for row in rows:
        opened = functools.cache(functools.partial(suite.open_data_set, row, config.data_dir))
        try:
            opened("test")
        except datasets.Missing as error:
            missing.append(str(error))
        else:
            found[row.name] = opened
    if config.dataset and missing:
        raise ValueError(missing[0])
    if not found:
        raise ValueError(
            f"none of the suite's {len(rows)} data sets is in {config.data_dir} (--data-dir). "
            f"The first: {missing[0]}"
        )
    for line in missing:
        _say(f"left out: {line}")
    return found


def _with_templates(
    open_split: Callable[[datasets.Split], datasets.Data], templates: Sequence[str] | None
) -> Callable[[datasets.Split], datasets.Data]:
    """Put the templates of `--templates`, if any, in the place of a data set's own."""

    def opened(split: datasets.Split) -> datasets.Data:
        data = open_split(split)
        if templates and isinstance(data, datasets.Labelled | datasets.Tagged):
            return replace(data, templates=templates)
        return data

    return opened


def _open_own(kind: str, path: Path, split: datasets.Split) -> datasets.Data:
    """Open somebody's own data of a kind. Missing where it has no such split."""
    if kind not in _KINDS:
        raise ValueError(
            f"--dataset {kind}:{path} is of no known kind; say {', '.join(_KINDS)}, as in "
            "folder:PATH."
        )
    if kind in ("aro", "sugar_crepe"):
        if split != "test":
            raise datasets.Missing(f"{path} has no {split} split.")
        if kind == "aro":
            return compositions.open_aro(path, path.parent / "images")
        return compositions.open_sugar_crepe(path)
    part = datasets.split_folder(path, split)
    if part is None:
        raise datasets.Missing(f"{path} has no {split} split; put it in {path / split}.")
    if kind == "folder":
        return datasets.open_folder(part, name=path.absolute().name)
    return datasets.open_webdataset(path, split="test" if part == path else part.name)


def _digits(config: EvaluateConfig, encoder: measure.Encoder) -> dict[str, float]:
    """Run the evaluators of training; draw what the model says of the scans."""
    model, params, mesh = encoder.model, encoder.params, encoder.mesh
    values: dict[str, float] = {}
    if "zero-shot" in config.tasks:
        evaluator = config.digits.make()
        values |= evaluator.run(model, params, mesh)
        if config.output and jax.process_index() == 0:
            evaluator.draw(model, params, mesh, config.output)
    if "alignment" in config.tasks:
        source = replace(config.digits.source, split="test")
        pairs = PairsEvalConfig(
            data=DataConfig(source=source, crop="center"), pairs=config.pool, pool=config.pool
        )
        values |= pairs.make().run(model, params, mesh)
    return values


def _warn_of_other_numbers(config: EvaluateConfig) -> None:
    """Say so where a run has learned other numbers than those that it is asked about."""
    try:
        learned = json.loads((config.model / "config.json").read_text())["data"]["source"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # no run
    for name in ("digits", "split_seed"):
        asked = getattr(config.digits.source, name)
        if learned.get(name, asked) != asked:
            _say(
                f"the run was trained with data.source.{name}={learned[name]}, this measures "
                f"--digits.source.{name.replace('_', '-')} {asked}"
            )


def _say(line: str) -> None:
    print(line, file=sys.stderr)
