"""A data set in, its numbers out: zero-shot classification, retrieval and more, images streamed."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, Shaped

from clip_jax import processes, sharding
from clip_jax.display import Display
from clip_jax.errors import InputError
from clip_jax.evals import prompts
from clip_jax.evals.alignment import POOL, diagnostics
from clip_jax.evals.caption_scores import bleu, cider
from clip_jax.evals.captions import likelihood, writer
from clip_jax.evals.compositions import composition
from clip_jax.evals.datasets import (
    Captioned,
    Contrasted,
    Data,
    Labelled,
    Missing,
    Split,
    Tagged,
    Translated,
    spread,
)  # fmt: skip
from clip_jax.evals.evaluator import Encoder, image_encoder
from clip_jax.evals.languages import average
from clip_jax.evals.linear_probe import without_projection
from clip_jax.evals.reader import Kept, Reader, Share
from clip_jax.evals.retrieval import retrieval
from clip_jax.evals.zero_shot import classification, classifier, multi_label
from clip_jax.models.clip import CLIP
from clip_jax.models.generation import GenerationConfig
from clip_jax.models.images import Images


@dataclass(frozen=True)
class Embedded:
    """The images of a data set that could be read, in order."""

    features: Shaped[np.ndarray, "B ..."]  # or what else was computed of each
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
    by_language: dict[str, dict[str, float]] = field(default_factory=dict)


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
        case Translated():
            return translate(data, images, encoder)


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


def translate(data: Translated, images: Embedded, encoder: Encoder) -> Outcome:
    """Classify or retrieve in each language, the images being embedded once; and the means.

    A language that says nothing of the images read is left out.
    """
    found: dict[str, dict[str, float]] = {}
    quiet = not processes.is_lead()
    with Display("languages", len(data.languages), quiet=quiet, fleeting=True) as display:
        for language in data.languages:
            said = [data.said(language, answer) for answer in images.answers]
            mine = [i for i, answer in enumerate(said) if answer is not None]
            part = Embedded(
                images.features[mine], images.indices[mine], [said[i] for i in mine], []
            )
            if mine and data.names:
                templates = data.templates[language]
                texts = [
                    [prompts.fill(t, name) for t in templates] for name in data.names[language]
                ]
                logits = part.features @ classifier(encoder, texts).T
                found[language] = classification(logits, part.labels)
            elif mine:
                found[language] = retrieve(part, encoder).values
            display.add(1)
    if not found:
        raise InputError("no language says anything of the images that were read.")
    task = "zeroshot_classification" if data.names else "zeroshot_retrieval"
    return Outcome(task, average(found), images.skipped, by_language=found)


def align(images: Embedded, encoder: Encoder, pool: int = POOL) -> Outcome:
    """Measure how images and their first captions lie: alignment, uniformity, gap, InfoNCE.

    InfoNCE is among `pool` pairs, or all where there are fewer: `info_nce_pool` says how many.
    """
    texts = encoder.texts([group[0] for group in images.answers])
    pool = min(pool, len(texts))
    values = diagnostics(images.features, texts, encoder.logit_scale, encoder.mesh, pool=pool)
    return Outcome("alignment", values | {"info_nce_pool": float(pool)}, images.skipped)


def describe(splits: "Splits", generation: GenerationConfig) -> Outcome:
    """Write a caption for each image, greedily unless told otherwise, and compare with its own.

    Missing where the images have no captions.
    """
    if not isinstance(splits.open("test"), Captioned):
        raise Missing(f"{splits.name}: captions are for images with captions of their own.")
    encoder = splits.encoder
    model = _as_preprocessed(encoder)
    write = writer(model, encoder.mesh, generation)
    images = splits.computed("test", write)
    written = encoder.read(images.features)
    values = {f"bleu{n}": x for n, x in enumerate(bleu(written, images.answers), 1)}
    values["cider"] = cider(written, images.answers)
    return Outcome("captioning", values, images.skipped)


def classify_by_likelihood(splits: "Splits") -> Outcome:
    """Classify every image by which class's prompt the decoder finds most probable, given it.

    Of the templates the first. Missing where the images have no classes.
    """
    data, encoder = splits.open("test"), splits.encoder
    if not isinstance(data, Labelled):
        raise Missing(f"{splits.name}: likelihood is for images of classes.")
    texts = [prompts.fill(data.templates[0], name) for name in data.names]
    score = likelihood(_as_preprocessed(encoder), encoder.mesh)(encoder.tokenize(texts))
    images = splits.computed("test", score)
    values = {
        f"likelihood/{name}": x
        for name, x in classification(images.features, images.labels).items()
    }
    return Outcome("likelihood_classification", values, images.skipped)


class Splits:
    """A data set's splits, each opened and embedded when first asked for, once for all tasks."""

    def __init__(
        self, name: str, open_split: Callable[[Split], Data], encoder: Encoder, *,
        most: int | None = None, kept: Kept | None = None,
    ) -> None:  # fmt: skip
        """`most` is how many images of a split are read, spread over its classes; `kept` has those
        decoded before."""

        def opened(split: Split) -> Data:
            data = open_split(split)
            if not data.count:
                raise InputError(f"{name}: no images with a class or caption in its {split} split.")
            return data if most is None else spread(data, most)

        self.name, self.encoder = name, encoder
        self.open = functools.cache(opened)
        self._kept = kept or Kept(0)
        self._embedded: dict[tuple[Split, bool], Embedded] = {}

    def embedded(self, split: Split, *, before_projection: bool = False) -> Embedded:
        """Return unit features, or those that the linear probe takes. Missing, if not on disk."""
        key = split, before_projection
        if key not in self._embedded:
            model, params = _as_preprocessed(self.encoder), self.encoder.params
            if before_projection:
                model, params = without_projection(model, params)
            encode = image_encoder(model, self.encoder.mesh, normalize=not before_projection)
            self._embedded[key] = self.computed(split, encode, params)
        return self._embedded[key]

    def computed(
        self, split: Split, function: Callable[[Any, Any], Any], params: Any = None
    ) -> Embedded:
        """Return what a compiled function of parameters and pixels gives. Missing likewise."""
        data = self.open(split)
        reader = Reader(data, self.encoder.preprocess, self.encoder.mesh, data.count)
        return compute(
            self._kept.read((self.name, split), reader), self.encoder.mesh, data.count, function,
            self.encoder.params if params is None else params, f"{self.name}, {split}",
        )  # fmt: skip


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


def compute(
    shares: Iterable[Share], mesh: Mesh, count: int, function: Callable[[Any, Any], Any],
    params: Any, what: str = "images",
) -> Embedded:  # fmt: skip
    """Compute a function of all images that can be read, on every process alike, and keep what
    belongs to each.

    `shares` are this process's rows of each batch of the first `count` images; the function takes
    parameters and pixels. A terminal sees the progress. Raises InputError where no image can be
    read.
    """
    put = functools.partial(jax.make_array_from_process_local_data, sharding.batch_sharding(mesh))
    answers: dict[int, Any] = {}
    skipped: dict[int, str] = {}

    def batches() -> Iterator[tuple[Any, Images]]:
        for share in shares:
            answers.update(share.answers)
            skipped.update(share.skipped)
            yield params, jax.tree.map(put, share.images)

    with Display(what, count, quiet=not processes.is_lead(), fleeting=True) as display:
        features = sharding.compute_batches(function, batches(), display)
    answers, skipped = _of_all((answers, skipped))
    if not answers:
        raise InputError(
            f"none of {count} images can be read; the first: {list(skipped.values())[:1]}."
        )
    indices = np.array(list(answers))
    return Embedded(features[indices], indices, list(answers.values()), list(skipped.values()))


def _of_all(known: tuple[dict[int, Any], ...]) -> list[dict[int, Any]]:
    """Bring together what each process knows of its images, in the order of the data set."""
    rows = [[(i, np.asarray(x).tolist()) for i, x in one.items()] for one in known]
    every = processes.gather(rows)
    return [dict(sorted(map(tuple, itertools.chain(*parts)))) for parts in zip(*every, strict=True)]


def _as_preprocessed(encoder: Encoder) -> CLIP:
    """Return the model that normalises pixels on the device as its preprocessing does here."""
    how, config = encoder.preprocess, encoder.model.config
    return replace(encoder.model, config=replace(config, image_mean=how.mean, image_std=how.std))
