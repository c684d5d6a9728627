"""The CLIP paper's data sets, and anybody's own, as one evaluator: in training and afterwards."""

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from clip_jax import processes
from clip_jax.errors import InputError, check_ranges
from clip_jax.evals import compositions, datasets, languages, measure, prompts, suite, supervised
from clip_jax.evals.alignment import POOL
from clip_jax.evals.evaluator import Encoder
from clip_jax.evals.reader import Kept
from clip_jax.models.generation import GenerationConfig
from clip_jax.storage import files
from clip_jax.storage.files import Place

Task = Literal[
    "zero-shot", "templates", "probe", "few-shot", "neighbours", "alignment", "captions",
    "likelihood",
]  # fmt: skip
Open = Callable[[datasets.Split], datasets.Data]

_KINDS = ("folder", "webdataset", "aro", "sugar_crepe", "languages")


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """What is measured, and on what."""

    # Names of the CLIP paper's; folder:PATH, one folder a class, maybe below train/, val/ and
    # test/; webdataset:PATH, CLIP_benchmark's tars; aro:FILE.json with images/ beside;
    # sugar_crepe:PATH. In many languages: babel_imagenet, xtd10, xtd200, flickr30k-200,
    # crossmodal3600; languages:PATH, captions as they have them. None: the CLIP paper's.
    dataset: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()  # of data sets in many, by their own codes; None: all
    data_dir: str = "data"  # where the suite's data sets lie; local or in a bucket
    # zero-shot: classify by names, or retrieve. templates: each alone, and a subset chosen on
    # validation images. probe: logistic regression on features. few-shot: the same on --shots of
    # each class. neighbours: the vote of the nearest. alignment: how images and captions lie.
    # The middle four need a training split. captions: BLEU and CIDEr of what a decoder writes.
    # likelihood: classify by how probable it finds each class's first prompt.
    tasks: tuple[Task, ...] = ("zero-shot",)
    templates: Path | None = None  # file with one prompt a line, {c} for the class
    images: int | None = None  # images of each split, spread evenly over its classes; None: all
    shots: tuple[int, ...] = supervised.SHOTS  # training images of each class, for few-shot
    neighbours: int = 20  # how many vote
    generation: GenerationConfig = GenerationConfig()  # how captions are written
    pool: int = POOL  # pairs that compete in info_nce; results to be compared must share it
    seed: int = 0  # draws few-shot samples, and validation images where a data set has none

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InputError("tasks is empty; name one at least, such as zero-shot.")
        check_ranges(
            self, images="[1, inf)", shots="[1, inf)", neighbours="[1, inf)", pool="[2, inf)",
            seed="[0, inf)",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SuiteEvalConfig(TasksConfig):
    """The same while training: `clip-jax evaluate` of the run gives the same numbers."""

    missing: Literal["error", "skip"] = "error"  # data sets that are not there; skip names them
    memory_mib: int = 4_096  # of decoded images that each process keeps between evaluations
    every_steps: int = 5_000  # steps between evaluations; the last step always counts

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "evals.", memory_mib="[0, inf)", every_steps="[1, inf)")

    def make(self) -> "TasksEvaluator":
        opened = data_sets(self, skip=self.missing == "skip")
        return TasksEvaluator(self, opened, self.every_steps, self.memory_mib << 20)


class TasksEvaluator:
    """Yields `DATASET/METRIC`, CLIP_benchmark's names of both."""

    def __init__(
        self, config: TasksConfig, opened: dict[str, Open], every_steps: int = 1, memory: int = 0
    ) -> None:
        """`opened` gives a data set's splits by its name (see `data_sets`)."""
        self.every_steps, self._config, self._opened = every_steps, config, opened
        self._kept = Kept(memory)
        self._templates = prompts.read_templates(config.templates) if config.templates else None

    @property
    def names(self) -> tuple[str, ...]:
        """The data sets that there are."""
        return tuple(self._opened)

    def run(self, encoder: Encoder) -> Iterator[tuple[str, float]]:
        """Do all tasks on all data sets that allow them."""
        for splits, outcome in self.outcomes(encoder):
            for metric, value in outcome.values.items():
                yield f"{splits.name}/{metric}", value

    def outcomes(self, encoder: Encoder) -> Iterator[tuple[measure.Splits, measure.Outcome]]:
        """Yield what each task finds; a data set that cannot be read is named and left out.

        Raises InputError where it is the only one.
        """
        for name, open_split in self._opened.items():
            splits = measure.Splits(
                name, self._with_templates(open_split), encoder, most=self._config.images,
                kept=self._kept,
            )  # fmt: skip
            try:
                found = list(_outcomes(splits, self._config))
            except InputError as error:
                if len(self._opened) == 1:
                    raise
                say(f"left out: {name}: {error}")
                continue
            for outcome in found:
                for line in outcome.skipped[:3]:
                    say(f"{name}: {line}")
                if len(outcome.skipped) > 3:
                    say(f"{name}: {len(outcome.skipped)} images in all could not be read")
                yield splits, outcome

    def _with_templates(self, open_split: Open) -> Open:
        """Put the templates of the config, if any, in the place of a data set's own."""

        def opened(split: datasets.Split) -> datasets.Data:
            data = open_split(split)
            if self._templates and isinstance(data, datasets.Translated) and data.names:
                raise InputError("--templates are of one language, these classes of several.")
            if self._templates and isinstance(data, datasets.Labelled | datasets.Tagged):
                return replace(data, templates=self._templates)
            return data

        return opened


def _outcomes(splits: measure.Splits, config: TasksConfig) -> Iterator[measure.Outcome]:
    """Run the tasks on one data set; say which it has no data for."""
    encoder, test, tasks = splits.encoder, splits.open("test"), config.tasks
    if "zero-shot" in tasks:
        yield measure.zero_shot(test, splits.embedded("test"), encoder)
    if "alignment" in tasks:
        if isinstance(test, datasets.Captioned):
            yield measure.align(splits.embedded("test"), encoder, config.pool)
        else:
            say(f"{splits.name}: alignment is for images with captions of their own.")
    for name, task in (
        ("captions", lambda: measure.describe(splits, config.generation)),
        ("likelihood", lambda: measure.classify_by_likelihood(splits)),
    ):
        if name in tasks:
            try:
                yield task()
            except datasets.Missing as error:
                say(str(error))
    if "templates" in tasks:
        try:
            yield measure.select_templates(splits)
        except datasets.Missing as error:
            say(f"templates left out: {error}")
    labelled: list[supervised.Task] = [x for x in supervised.TASKS if x in tasks]
    if labelled:
        try:
            outcome = supervised.supervised(
                splits, labelled, shots=config.shots, neighbours=config.neighbours, seed=config.seed
            )
        except datasets.Missing as error:
            say(f"{', '.join(labelled)} left out: {error}")
            return
        for k in config.shots if "few-shot" in labelled else ():
            if f"few_shot/{k}" not in outcome.values:
                say(f"{splits.name}: few-shot of {k} left out: a class has fewer training images")
        yield outcome


def data_sets(config: TasksConfig, skip: bool = False) -> dict[str, Open]:
    """Return what opens the splits of each data set asked for, by name.

    Of the whole suite those that are there; the others are named with how to get them. Raises
    InputError for one that is asked for and not there, and where none is, unless `skip` says to go
    on without.
    """
    found: dict[str, Open] = {}
    rows = {row.name: row for row in suite.SUITE}
    for name in config.dataset or rows:
        kind, _, path = name.partition(":")
        if not path and name not in (*rows, *languages.NAMES):
            raise InputError(
                f"no data set {name!r}; say {', '.join(f'{k}:PATH' for k in _KINDS)} or one of "
                f"{', '.join((*rows, *languages.NAMES))}."
            )
        where = files.place(path or config.data_dir)
        if path:
            opened: Open = functools.cache(
                functools.partial(_open_own, kind, where, config.languages)
            )
            name = _name(where) if where.is_dir() else where.stem
        elif name in rows:
            row = rows[name]
            opened = functools.cache(functools.partial(suite.open_data_set, row, where))
        else:
            opened = functools.cache(
                functools.partial(_open_languages, name, where, config.languages)
            )
        try:
            opened("test")  # wrong use is said before a model is loaded
        except datasets.Missing as error:
            if config.dataset and not skip:
                raise InputError(str(error)) from error
            say(f"left out: {error}")
            continue
        if name in found:
            raise InputError(f"two data sets are called {name}; rename a folder, or measure one.")
        found[name] = opened
    if not found and not skip:
        raise InputError(
            f"none of the suite's {len(rows)} data sets is in {config.data_dir} (--data-dir)."
        )
    return found


def _open_languages(
    name: str, root: Place, chosen: tuple[str, ...], split: datasets.Split
) -> datasets.Data:
    if split != "test":
        raise datasets.Missing(f"{name} has no {split} split.")
    return languages.open_languages(name, root, chosen)


def _open_own(
    kind: str, path: Place, chosen: tuple[str, ...], split: datasets.Split
) -> datasets.Data:
    """Open somebody's own data of a kind. Missing where it has no such split."""
    if kind not in _KINDS:
        raise InputError(
            f"--dataset {kind}:{path} is of no known kind; say {', '.join(_KINDS)}, as in "
            "folder:PATH."
        )
    if kind in ("aro", "sugar_crepe", "languages"):
        if split != "test":
            raise datasets.Missing(f"{path} has no {split} split.")
        if kind == "aro":
            return compositions.open_aro(path, path.parent / "images")
        if kind == "languages":
            return languages.open_translated(path, chosen)
        return compositions.open_sugar_crepe(path)
    part = datasets.split_folder(path, split)
    if part is None:
        raise datasets.Missing(f"{path} has no {split} split; put it in {path / split}.")
    if kind == "folder":
        return datasets.open_folder(part, name=_name(path))
    return datasets.open_webdataset(path, split="test" if part == path else part.name)


def _name(folder: Place) -> str:
    return folder.absolute().name if isinstance(folder, Path) else folder.name


def say(line: str) -> None:
    """Say on standard error, once for all processes, what is left out and why."""
    if processes.is_lead():
        print(line, file=sys.stderr)
