"""Classify images zero-shot by the nearest label, or write captions of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from clip_jax.data.images import ImageError, ImageLike, Item, read_ahead
from clip_jax.data.sources import SampleError
from clip_jax.data.sources.image_folder import image_files
from clip_jax.display import say
from clip_jax.errors import InputError, check_picture, check_ranges, shown
from clip_jax.evals.evaluator import length_of
from clip_jax.evals.pictures import attention_sheet
from clip_jax.inference.loading import Model, load, unit
from clip_jax.models import templates
from clip_jax.models.generation import GenerationConfig
from clip_jax.models.images import Images, concatenate, pictures
from clip_jax.models.layers import DType
from clip_jax.models.templates import check_template, fill
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

# Characters of a text that are read per token of the context; later ones cannot matter: the longest
# token of CLIP's vocabulary has 32 letters.
_LETTERS = 100
SHEET = 240  # most images on a picture of attention maps


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Classify images zero-shot by any list of labels, or write captions of them."""

    # Run directory, RUN@STEP, RUN@best, model folder, weights in another format, or icons, the
    # bundled model.
    model: AnyPath
    images: tuple[AnyPath, ...] = ()  # Image files, or folders of them.
    labels: tuple[str, ...] = ()  # Labels to choose from. Empty: those of the model's classifier.
    # Prompt template; {} is the label. None: the model's own, or "a photo of a {}." if it has none.
    template: str | None = None
    # Picture (PNG, SVG or PDF) of each image beside a map of the patches that its embedding attends
    # to; needs a vision transformer.
    attention: AnyPath | None = None
    caption: bool = False  # Write a caption of each image; needs a CoCa or MaMMUT model.
    generation: GenerationConfig = GenerationConfig()
    batch_size: int = 64  # Images computed at once.
    dtype: DType = "float32"  # Data type of the computation.
    # Patches per image of a NaFlex model (sequence length). None: the model's own.
    tokens: int | None = None
    # Number of first channels of embeddings, for a model trained for it (Matryoshka). None: all.
    dim: int | None = None

    def __post_init__(self) -> None:
        check_ranges(self, batch_size="[1, inf)", tokens="[1, inf)", dim="[1, inf)")
        check_picture(self.attention, "attention")
        if self.labels:
            check_labels(self.labels, templates.DEFAULT if self.template is None else self.template)


def predict(config: PredictConfig) -> list[dict[str, Any]]:
    """Return for each readable image its path and all labels with probabilities, best first.

    With `attention`, a picture of up to 240 images with their attention maps is written. With
    `caption`, also a caption; of a NaFlex model, also its sequence length `tokens`. Unreadable
    images are reported on standard error. Raises InputError if no image can be read.
    """
    paths = image_files(config.images)
    if not paths:
        names = ", ".join(map(str, config.images)) or "nothing"
        raise InputError(f"no images in {names}; set --images to image files or folders of them.")
    files.check_destination(config.attention, "--attention", folder=False)
    model = load(config.model, dtype=config.dtype, tokens=config.tokens, dim=config.dim)
    if config.caption:
        model.clip.needs_decoder()
    head = None if config.labels else model.head
    labels = list(head.classes) if head else []
    template = model.template if config.template is None else config.template
    if config.labels:
        labels = check_labels(config.labels, template)
    elif not (head or config.caption or config.attention):
        raise InputError(
            f"{config.model} has no classifier, so give at least one label by --labels, such as "
            '--labels "red star" "blue circle".'
        )
    classes = embed_labels(model, labels, template) if config.labels else None

    results: list[dict[str, Any]] = []
    drawn: list[tuple[Any, Any]] = []  # images and their attention maps
    size = config.batch_size
    for readable, images, skipped in read_images(model, paths, lambda path: path, size):
        for path, reason in skipped:
            say(f"skipped {path}: {reason}")
        if images is None:
            continue
        rows: list[dict[str, Any]] = [{"image": str(path)} for path in readable]
        if config.caption:
            captions = model.caption(images, config.generation, batch_size=size)
            for row, caption in zip(rows, captions, strict=True):
                row["caption"] = caption
        if config.attention and len(drawn) < SHEET:
            maps = model.attention_maps(images, batch_size=size)
            drawn += zip(pictures(images, model.config.vision.patch_size), maps, strict=True)
        if labels:
            x = model.encode_image(images, batch_size=size)
            by_class = model.class_probabilities(x) if head else model.probabilities(x, classes)
            for row, shares in zip(rows, by_class, strict=True):
                row["labels"] = ranked(labels, shares)
        results += [row | length_of(model.image_preprocess) for row in rows]
    if not results:
        raise InputError(f"none of the {len(paths)} images could be read; see the reasons above.")
    if config.attention:
        lines = [answer(result) for result in results[:SHEET]]
        attention_sheet(config.attention, *zip(*drawn[:SHEET], strict=True), lines)
    return results


def answer(result: dict[str, Any]) -> str:
    """Return the best label with its probability, or else the caption or the file's name."""
    if "labels" in result:
        return "{label}  {probability:.0%}".format(**result["labels"][0])
    return result.get("caption", files.as_path(result["image"]).name)


def check_labels(labels: Sequence[str], template: str) -> list[str]:
    """Return the labels without duplicates. Raises InputError for unusable labels or template."""
    if not labels or not all(label.strip() for label in labels):
        raise InputError(
            f"labels={shown(list(labels))}: give at least one label, and no empty ones."
        )
    check_template(template, "template")
    return list(dict.fromkeys(labels))


def embed_labels(
    model: Model, labels: Sequence[str], template: str
) -> Float[np.ndarray, "classes E"]:
    """Return normalised embeddings of the labels, each in the template."""
    most = letters_read(model)
    tokens = model.tokenize([fill(template, label, most) for label in labels], truncate=True)
    return unit(model.encode_text(tokens))


def letters_read(model: Model) -> int:
    """Return how many characters of a text can matter to the model."""
    return _LETTERS * model.config.text.context_length


def ranked(labels: Sequence[str], shares: Float[np.ndarray, " classes"]) -> list[dict[str, Any]]:
    """Return labels with probabilities, best first."""
    best = sorted(zip(shares, labels, strict=True), key=lambda x: -x[0])
    return [{"label": label, "probability": float(share)} for share, label in best]


def read_images(
    model: Model, items: Sequence[Item], read: Callable[[Item], ImageLike], batch_size: int
) -> Iterator[tuple[list[Item], Images | None, list[tuple[Item, str]]]]:
    """Yield per batch the readable items, their images (None: none), and the others with reasons.

    Threads decode images while the model computes."""

    def prepare(item: Item) -> tuple[Item, Images | None, str]:
        try:
            return item, model.image_preprocess.batch(read(item)), ""
        except (ImageError, SampleError) as error:
            return item, None, str(error)

    batches = (items[start : start + batch_size] for start in range(0, len(items), batch_size))
    for batch in read_ahead(batches, prepare):
        readable = [(item, images) for item, images, _ in batch if images is not None]
        images = concatenate([images for _, images in readable]) if readable else None
        skipped = [(item, reason) for item, images, reason in batch if images is None]
        yield [item for item, _ in readable], images, skipped
