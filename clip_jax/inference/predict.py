"""Use a finished model: zero-shot labels for images, a folder embedded, a folder searched."""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from clip_jax.data.images import ImageError, center_crop, decode
from clip_jax.data.sources import SampleError
from clip_jax.data.sources.image_folder import image_files
from clip_jax.errors import InputError, check_picture, check_ranges
from clip_jax.evals.pictures import contact_sheet, in_words
from clip_jax.inference.loading import Model, load, unit
from clip_jax.models.generation import GenerationConfig
from clip_jax.storage import files
from clip_jax.storage.files import Place

DTYPE = Literal["float32", "bfloat16"]
TILE = 112  # pixels of a picture on a contact sheet
SHEET = 240  # pictures on a sheet at most


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Which of your labels fits each image, by the nearest text; or a caption of its own."""

    model: Place  # a run's work directory, a model folder, or a foreign file
    images: tuple[Place, ...] = ()  # files, or folders of them
    labels: tuple[str, ...] = ()  # the classes to choose from
    template: str = "a photo of a {}."  # sentence around each label; {} alone: the label as it is
    caption: bool = False  # describe each image (a model with a decoder: CoCa, MaMMUT)
    generation: GenerationConfig = GenerationConfig()  # how captions are written
    sheet: Place | None = None  # picture of the images (the first 240) with what was predicted
    batch_size: int = 64  # images at a time
    dtype: DTYPE = "float32"  # of the computation

    def __post_init__(self) -> None:
        check_ranges(self, batch_size="[1, inf)")
        check_picture(self.sheet, "sheet")
        if self.labels or not self.caption:
            check_labels(self.labels, self.template)


def predict(config: PredictConfig) -> list[dict[str, Any]]:
    """Return for each readable image its path and all labels with probabilities, best first.

    With `caption` what the model writes of it. Unreadable images are named on standard error.
    Raises InputError if no image is left.
    """
    files.check_destination(config.sheet, "--sheet", folder=False)
    paths = image_files(config.images)
    if not paths:
        given = ", ".join(map(str, config.images)) or "nothing"
        raise InputError(f"no images in {given}; --images takes files and folders of images.")
    model = load(config.model, dtype=config.dtype)
    if config.caption:
        model.clip.needs_decoder()
    labels = check_labels(config.labels, config.template) if config.labels else []
    classes = embed_labels(model, labels, config.template) if labels else None

    def describe(pixels: np.ndarray) -> list[dict[str, Any]]:
        found: dict[str, list] = {}
        if config.caption:
            written = model.caption(pixels, config.generation, batch_size=config.batch_size)
            found["caption"] = written
        if classes is not None:
            features = unit(model.encode_image(pixels, batch_size=config.batch_size))
            rows = probabilities(model, features, classes)
            found["labels"] = [ranked(labels, row) for row in rows]
        return [dict(zip(found, one, strict=True)) for one in zip(*found.values(), strict=True)]

    results, tiles = [], []
    for read, found, skipped in computed(
        model, paths, lambda path: path, describe, config.batch_size, keep=config.sheet is not None
    ):
        for path, reason in skipped:
            print(f"skipped {path}: {reason}", file=sys.stderr)
        for (path, tile), result in zip(read, found, strict=True):
            results.append({"image": str(path), **result})
            tiles += [tile] if len(tiles) < SHEET else []
    if not results:
        raise InputError(f"none of the {len(paths)} images could be read.")
    if config.sheet:
        lines = [[Path(x["image"]).name, *in_words(x, 3, 0)] for x in results[:SHEET]]
        more = f"the first {SHEET} of {len(results)} images"
        with files.written_whole(config.sheet) as path:
            contact_sheet(path, tiles, lines, title="" if len(results) <= SHEET else more)
    return results


def check_labels(labels: Sequence[str], template: str) -> list[str]:
    """Return the labels, each once: two that are alike would share a probability. Raises InputError
    if there is none, an empty one, or no place for it in the template."""
    if not labels or not all(label.strip() for label in labels):
        raise InputError(f"labels={list(labels)}: give at least one label and none empty.")
    if "{}" not in template:
        raise InputError(f"template={template!r} has no {{}} where the label goes.")
    return list(dict.fromkeys(labels))


def embed_labels(
    model: Model, labels: Sequence[str], template: str
) -> Float[np.ndarray, "classes E"]:
    """Embed each label in its sentence, at unit length."""
    tokens = model.tokenize(prompts(labels, template), truncate=True)
    return unit(model.encode_text(tokens))


def prompts(labels: Sequence[str], template: str) -> list[str]:
    """Put each label into its sentence."""
    return [template.replace("{}", label) for label in labels]


def probabilities(
    model: Model, images: Float[np.ndarray, "B E"], classes: Float[np.ndarray, "classes E"]
) -> Float[np.ndarray, "B classes"]:
    """Probabilities of unit-length embeddings, as the model was trained: the softmax of the scaled
    similarities (CLIP paper, figure 3), or with a bias each label's own (SigLIP paper, 3.2)."""
    logits = images @ classes.T * float(np.exp(model.params["logit_scale"]))
    if "logit_bias" in model.params:
        return np.exp(-np.logaddexp(0, -(logits + float(model.params["logit_bias"]))))
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def ranked(labels: Sequence[str], shares: Float[np.ndarray, " classes"]) -> list[dict[str, Any]]:
    """Pair labels with probabilities, best first."""
    best = sorted(zip(shares, labels, strict=True), key=lambda x: -x[0])
    return [{"label": label, "probability": float(share)} for share, label in best]


def computed(
    model: Model,
    items: Sequence[Any],
    read: Callable[[Any], Any],
    compute: Callable[[np.ndarray], Any],
    batch_size: int,
    keep: bool = False,
) -> Iterator[tuple[list[tuple[Any, Any]], Any, list[tuple[Any, str]]]]:
    """Yield items that could be read (each with a small picture if `keep`), what is computed of
    their pixels, and the others with the reason. Threads decode while the model computes."""

    def prepare(item: Any) -> tuple[Any, Any, str]:
        try:
            image = read(item)
            pixels = model.image_preprocess(image)
            tile = center_crop(decode(image), TILE) if keep else None
        except (ImageError, SampleError) as error:
            return None, None, str(error)
        return pixels, tile, ""

    def run(batch: Sequence[Any], futures: list[Future]) -> tuple[Any, Any, Any]:
        done = [future.result() for future in futures]
        good = [(item, x) for item, x in zip(batch, done, strict=True) if x[0] is not None]
        bad = [(item, x[2]) for item, x in zip(batch, done, strict=True) if x[0] is None]
        found = compute(np.stack([x[0] for _, x in good])) if good else []
        return [(item, x[1]) for item, x in good], found, bad

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        ahead: deque = deque()
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            ahead.append((batch, [threads.submit(prepare, item) for item in batch]))
            if len(ahead) > 2:
                yield run(*ahead.popleft())
        while ahead:
            yield run(*ahead.popleft())
