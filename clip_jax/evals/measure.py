"""A data set in, its numbers out: zero-shot classification, retrieval and more, images streamed."""

import functools
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import Progress

from clip_jax.data.images import ImageError, ImageLike
from clip_jax.data.sources import SampleError
from clip_jax.evals import prompts
from clip_jax.evals.alignment import POOL, diagnostics
from clip_jax.evals.compositions import composition
from clip_jax.evals.datasets import Captioned, Contrasted, Data, Labelled, Missing, Split, Tagged
from clip_jax.evals.evaluator import encode_images, encode_texts
from clip_jax.evals.linear_probe import probe_features
from clip_jax.evals.retrieval import retrieval
from clip_jax.evals.zero_shot import classification, multi_label
from clip_jax.models.clip import CLIP, Params

_STREAMED = 1_024  # images in memory at a time


@dataclass(frozen=True, eq=False)
class Encoder:
    """A model with its own way of reading images and texts."""

    model: CLIP
    params: Params
    mesh: Mesh
    preprocess: Callable[[ImageLike], np.ndarray]  # an image to its normalised pixels [H, W, 3]
    tokenize: Callable[[Sequence[str]], np.ndarray]  # texts to token ids [B, L], cut to length
    _known: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @property
    def logit_scale(self) -> float:
        return float(np.exp(jax.device_get(self.params["logit_scale"])))

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "B E"]:
        return encode_texts(self.model, self.params, self.tokenize(texts), self.mesh)

    def classes(
        self, templates: Sequence[str], names: Sequence[str]
    ) -> Float[np.ndarray, "templates classes E"]:
        """Embed every class name in every template. Nothing is embedded twice: ImageNet and its
        variants share 80,000 prompts, and so do the tasks on one data set."""
        rows = [prompts.fill(template, name) for template in templates for name in names]
        if new := [row for row in dict.fromkeys(rows) if row not in self._known]:
            self._known.update(zip(new, self.texts(new), strict=True))
        features = np.stack([self._known[row] for row in rows])
        return features.reshape(len(templates), len(names), -1)


@dataclass(frozen=True)
class Embedded:
    """The images of a data set that could be read, in order."""

    features: Float[np.ndarray, "B E"]
    indices: Int[np.ndarray, " B"]  # in the data set
    answers: list  # what belongs to each: a class, truths, captions
    skipped: list[str]  # images that cannot be read, and why

    @functools.cached_property
    def labels(self) -> Int[np.ndarray, "B ..."]:
        return np.array(self.answers)


@dataclass(frozen=True)
class Outcome:
    """What one task found on one data set: numbers by name, and for a classification more."""

    task: str  # CLIP_benchmark's name
    values: dict[str, float]
    skipped: list[str] = field(default_factory=list)
    names: Sequence[str] = ()
    logits: Float[np.ndarray, "B classes"] | None = None  # cosine × logit scale
    labels: Int[np.ndarray, " B"] | None = None
    indices: Int[np.ndarray, " B"] | None = None
    of_template: dict[str, float] = field(default_factory=dict)  # top-1 of each alone
    templates: Sequence[str] = ()  # chosen on validation images


def zero_shot(data: Data, images: Embedded, encoder: Encoder) -> Outcome:
    """Do without training what the data set is for: classify, tag, retrieve, or tell apart."""
    match data:
        case Labelled():
            return classify(data, images, encoder)
        case Tagged():
            return tag(data, images, encoder)
        case Captioned():
            return retrieve(images, encoder)
        case Contrasted():
            return contrast(data, images, encoder)


def classify(data: Labelled, images: Embedded, encoder: Encoder) -> Outcome:
    """Classify every image by class names × templates, averaged in embedding space.

    With several templates also each template alone: mean, spread, gain of the ensemble.
    """
    labels = images.labels
    texts = encoder.classes(data.templates, data.names)
    logits = images.features @ prompts.ensemble(texts).T
    values, of_template = classification(logits, labels), {}
    if len(data.templates) > 1:
        found = prompts.sensitivity(images.features, labels, texts, data.templates)
        values, of_template = values | found.values(), found.of_template
    return Outcome(
        "zeroshot_classification", values, images.skipped, data.names,
        logits * encoder.logit_scale, labels, images.indices, of_template,
    )  # fmt: skip


def tag(data: Tagged, images: Embedded, encoder: Encoder) -> Outcome:
    """Rank all images for each class: mean average precision, CLIP_benchmark's and VOC2007's."""
    texts = prompts.ensemble(encoder.classes(data.templates, data.names))
    values = multi_label(images.features @ texts.T, images.labels)
    return Outcome("zeroshot_classification", values, images.skipped)


def retrieve(images: Embedded, encoder: Encoder) -> Outcome:
    """Find images by captions and captions by images; an image may have several."""
    owner = np.repeat(np.arange(len(images.answers)), [len(texts) for texts in images.answers])
    texts = encoder.texts([text for group in images.answers for text in group])
    values = retrieval(images.features, texts, owner, encoder.mesh)
    return Outcome("zeroshot_retrieval", values, images.skipped)


def contrast(data: Contrasted, images: Embedded, encoder: Encoder) -> Outcome:
    """Count how often the right caption is nearer to its image than the wrong one; ties lose."""
    texts = encoder.texts([text for pair in images.answers for text in pair])
    right, wrong = texts[::2], texts[1::2]
    own, other = ((images.features * x).sum(axis=1) for x in (right, wrong))
    groups = [data.groups[i] for i in images.indices]
    values = composition(own > other, groups, data)
    return Outcome("image_caption_selection", values, images.skipped)


def align(images: Embedded, encoder: Encoder, pool: int = POOL) -> Outcome:
    """Measure how images and their first captions lie: alignment, uniformity, gap, InfoNCE.

    InfoNCE is among `pool` pairs, or all where there are fewer: `info_nce_pool` says how many.
    """
    texts = encoder.texts([group[0] for group in images.answers])
    pool = min(pool, len(texts))
    values = diagnostics(images.features, texts, encoder.logit_scale, encoder.mesh, pool=pool)
    return Outcome("alignment", values | {"info_nce_pool": float(pool)}, images.skipped)


class Splits:
    """A data set's splits, each opened and embedded when first asked for, once for all tasks."""

    def __init__(self, name: str, open_split: Callable[[Split], Data], encoder: Encoder) -> None:
        self.name, self.encoder = name, encoder
        self.open = functools.cache(open_split)
        self._embedded: dict[tuple[Split, bool], Embedded] = {}

    def embedded(self, split: Split, *, before_projection: bool = False) -> Embedded:
        """Return unit features, or those that the linear probe takes. Missing, if not on disk."""
        key = split, before_projection
        if key not in self._embedded:
            what = f"{self.name}, {split}"
            self._embedded[key] = embed(
                self.open(split), self.encoder, before_projection=before_projection, what=what
            )
        return self._embedded[key]


def select_templates(splits: Splits) -> Outcome:
    """Choose templates greedily on validation images, as in OpenAI's prompt-engineering notebook,
    and measure on test images: those chosen together, and every template alone.

    Without a validation split training images choose: nothing is trained. Missing without either.
    """
    test = splits.open("test")
    if not isinstance(test, Labelled) or len(test.templates) < 2:
        raise Missing(f"{splits.name} has not two templates; --templates file.txt gives your own.")
    try:
        validation = splits.embedded("validation")
    except Missing:
        validation = splits.embedded("train")
    images, templates = splits.embedded("test"), test.templates
    texts = splits.encoder.classes(templates, test.names)
    chosen = prompts.greedy_selection(validation.features, validation.labels, texts)
    found = prompts.sensitivity(images.features, images.labels, texts, templates)
    logits = images.features @ prompts.ensemble(texts[chosen]).T
    values = found.values() | {
        "templates/selected": classification(logits, images.labels)["acc1"],
        "templates/selected_of": float(len(chosen)),
    }
    return Outcome(
        "templates", values, of_template=found.of_template,
        templates=[templates[i] for i in chosen],
    )  # fmt: skip


def embed(
    data: Data, encoder: Encoder, *, before_projection: bool = False, what: str = "images"
) -> Embedded:
    """Embed all images that can be read, and keep what belongs to each.

    Unit features; or, for probes, those before the projection in their own length. A terminal sees
    the progress. ValueError where no image can be read.
    """
    encode = probe_features if before_projection else encode_images
    features, indices, answers, skipped = [], [], [], []

    def read(index: int) -> tuple[np.ndarray, Any] | str:
        try:
            image, answer = data.load(index)
            return encoder.preprocess(image), answer
        except (ImageError, SampleError) as error:
            return f"image {index}: {error}"

    console, hidden = Console(stderr=True), not sys.stderr.isatty()
    bar = Progress(console=console, disable=hidden, transient=True)
    with bar, ThreadPoolExecutor() as threads:
        task = bar.add_task(what, total=data.count)
        for start in range(0, data.count, _STREAMED):
            part, images = range(start, min(start + _STREAMED, data.count)), []
            for index, found in zip(part, threads.map(read, part), strict=True):
                bar.advance(task)
                if isinstance(found, str):
                    skipped.append(found)
                    continue
                images.append(found[0])
                answers.append(found[1])
                indices.append(index)
            if images:
                pixels = np.stack(images)
                features.append(encode(encoder.model, encoder.params, pixels, encoder.mesh))
    if not features:
        raise ValueError(f"none of {data.count} images can be read; the first: {skipped[:1]}.")
    return Embedded(np.concatenate(features), np.array(indices), answers, skipped)
