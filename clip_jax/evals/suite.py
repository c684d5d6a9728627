"""Evaluate tasks on data sets, the CLIP paper's or one's own, in training and afterwards."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clip_jax import processes
from clip_jax.errors import InputError, check_ranges
from clip_jax.evals import captioning, linear_probe, prompts, results, segmentation
from clip_jax.evals.catalog import data_sets, names_of
from clip_jax.evals.datasets import Missing, OpenSplit, Segmented
from clip_jax.evals.evaluator import Encoder, EvaluatorConfig
from clip_jax.evals.ranks import NotFinite
from clip_jax.evals.reader import ImageCache, Outcome, Splits
from clip_jax.evals.segmentation import SegmentationConfig
from clip_jax.evals.zero_shot import zero_shot
from clip_jax.models.generation import GenerationConfig
from clip_jax.storage.files import AnyPath

Task = Literal["zero-shot", "captions", "likelihood", "probe", "few-shot", "neighbours"]


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """Data sets and tasks of an evaluation."""

    # Data sets to evaluate: names from the CLIP paper; aro_relation, aro_attribution, sugar_crepe;
    # the multilingual babel_imagenet, xtd10, xtd200, flickr30k-200, crossmodal3600; the bundled
    # digits and, to be segmented, pasted_icons; or your own, as folder:PATH (one folder per class,
    # optionally below train/, val/ and test/), webdataset:PATH (tars in CLIP_benchmark's layout),
    # languages:PATH (captions in several languages) or segments:PATH (images/ and masks/). Empty:
    # all that are in data_dir, but for multilingual ones.
    dataset: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()  # Language codes, as the data set writes them. Empty: all.
    data_dir: str = "data"  # Folder of the named data sets: a path or a bucket's URL.
    # Tasks to run. zero-shot: classify or segment by class names, or retrieve. captions: BLEU and
    # CIDEr of generated captions. likelihood: classify by a decoder's probability of each class's
    # first prompt. probe: logistic regression on features, of patches for masks. few-shot: the same
    # on --shots images per class. neighbours: vote of the nearest training images. The last three
    # need a training split.
    tasks: tuple[Task, ...] = ("zero-shot",)
    # File with one prompt template per line, {} for the class name. None: published templates.
    templates: Path | None = None
    images: int | None = None  # Maximum number of images per split, spread over classes. None: all.
    shots: tuple[int, ...] = linear_probe.SHOTS  # Training images per class in the few-shot task.
    neighbours: int = 20  # Number of training images that vote in the neighbours task.
    generation: GenerationConfig = GenerationConfig()  # How captions are generated.
    # How images with masks are segmented.
    segmentation: SegmentationConfig = SegmentationConfig()
    # Random seed for few-shot samples, and for validation images of data sets without such a split.
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InputError("tasks is empty; set it to at least one task, such as zero-shot.")
        check_ranges(
            self, images="[1, inf)", shots="[1, inf)", neighbours="[1, inf)", seed="[0, inf)"
        )


def _zero_shot(splits: Splits, config: SegmentationConfig) -> Outcome:
    data = splits.open("test")
    if isinstance(data, Segmented):
        return segmentation.zero_shot(splits, config)
    return zero_shot(data, splits.embedded("test"), splits.encoder)


def _probe(splits: Splits, config: SegmentationConfig, seed: int) -> Outcome:
    if isinstance(splits.open("test"), Segmented):
        return segmentation.probe(splits, config, seed)
    return linear_probe.probe(splits, seed)


# Each runs on the splits of one data set, or raises Missing for data that it lacks.
TASKS: dict[Task, Callable[[Splits, SuiteConfig], Outcome]] = {
    "zero-shot": lambda s, config: _zero_shot(s, config.segmentation),
    "captions": lambda s, config: captioning.describe(s, config.generation),
    "likelihood": lambda s, _: captioning.classify_by_likelihood(s),
    "probe": lambda s, config: _probe(s, config.segmentation, config.seed),
    "few-shot": lambda s, config: linear_probe.few_shot(s, config.shots, config.seed),
    "neighbours": lambda s, config: linear_probe.neighbours(s, config.neighbours, config.seed),
}


@dataclass(frozen=True, kw_only=True)
class SuiteEvalConfig(SuiteConfig, EvaluatorConfig):
    """Data sets and tasks evaluated in training, with the same results as `clip-jax evaluate`."""

    missing: Literal["error", "skip"] = "error"  # How to treat data sets that are not on disk.
    memory_mib: int = 4_096  # MiB per process for decoded images kept between evaluations.
    every_steps: int = 5_000  # Steps between evaluations; the last step is always evaluated.

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "evals.", memory_mib="[0, inf)", every_steps="[1, inf)")

    def measures(self) -> list[str]:
        """Return the data sets with their tasks."""
        return [f"{name} ({task})" for name in names_of(self.dataset) for task in self.tasks]

    def make(self) -> "SuiteEvaluator":
        skip = self.missing == "skip"
        opened = data_sets(self.dataset, self.data_dir, self.languages, skip)
        return SuiteEvaluator(self, opened, self.every_steps, self.memory_mib << 20)


class SuiteEvaluator:
    """Yields `DATASET/METRIC` by CLIP_benchmark's names; writes `results.csv`, `results.md` and
    pictures of each data set."""

    def __init__(
        self,
        config: SuiteConfig,
        opened: Mapping[str, OpenSplit],
        every_steps: int = 1,
        memory: int = 0,
    ) -> None:
        """`opened` opens each data set's splits, by name (see `data_sets`); `memory` limits the
        decoded images that each process keeps, in bytes."""
        self.every_steps, self._config, self._opened = every_steps, config, opened
        self.names = tuple(opened)
        self._cache = ImageCache(memory)
        self._templates = prompts.read_templates(config.templates) if config.templates else None

    def run(self, encoder: Encoder, output: AnyPath | None = None) -> Iterator[tuple[str, float]]:
        """Run all tasks on all data sets that support them; write tables after each data set.

        A data set that cannot be read is reported and left out; if it is the only one, its
        InputError is raised. Raises NotFinite for a model that cannot be measured.
        """
        outcomes: list[tuple[str, Outcome]] = []
        for name, open_split in self._opened.items():
            splits = Splits(
                name,
                open_split,
                encoder,
                most=self._config.images,
                cache=self._cache,
                templates=self._templates,
            )
            try:
                new = list(_outcomes(splits, self._config))
            except InputError as error:
                if len(self._opened) == 1 or isinstance(error, NotFinite):
                    raise
                processes.say_once(f"left out: {name}: {error}")
                continue
            outcomes += [(name, outcome) for outcome in new]
            if output and new and processes.is_lead():
                tokens = encoder.preprocess.max_patches
                results.write(output, outcomes, encoder.name, tokens)
                for outcome in new:
                    folder = output / name
                    if not outcome.task.startswith("zeroshot"):
                        folder /= outcome.task
                    results.draw(folder, splits.open("test"), outcome, crop=tokens is None)
            for outcome in new:
                for metric, value in outcome.values.items():
                    yield f"{name}/{metric}", value


def _outcomes(splits: Splits, config: SuiteConfig) -> Iterator[Outcome]:
    """Run the tasks on one data set; report tasks without data and images that cannot be read."""
    for name, task in TASKS.items():
        if name not in config.tasks:
            continue
        try:
            outcome = task(splits, config)
        except Missing as error:
            processes.say_once(f"{splits.name}: {name} left out: {error}")
            continue
        for line in outcome.skipped[:3]:
            processes.say_once(f"{splits.name}: {line}")
        if len(outcome.skipped) > 3:
            processes.say_once(
                f"{splits.name}: {len(outcome.skipped)} images in total could not be read"
            )
        if outcome.values:
            yield outcome
