"""A data set in, its numbers out: zero-shot classification or retrieval, images streamed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from clip_jax.data.images import ImageError, ImageLike
from clip_jax.evals import prompts
from clip_jax.evals.datasets import Captioned, Labelled
from clip_jax.evals.evaluator import encode_images, encode_texts
from clip_jax.evals.retrieval import retrieval
from clip_jax.evals.zero_shot import classification
from clip_jax.models.clip import CLIP, Params

_STREAMED = 1_024  # images in memory at a time


@dataclass(frozen=True)
class Encoder:
    """A model with its own way of reading images and texts."""

    model: CLIP
    params: Params
    mesh: Mesh
    preprocess: Callable[[ImageLike], np.ndarray]  # an image to its normalised pixels [H, W, 3]
    tokenize: Callable[[Sequence[str]], np.ndarray]  # texts to token ids [B, L], cut to length

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "B E"]:
        return encode_texts(self.model, self.params, self.tokenize(texts), self.mesh)


@dataclass(frozen=True)
class Outcome:
    """Numbers by name; of a classification also what each image got."""

    values: dict[str, float]
    skipped: list[str] = field(default_factory=list)  # images that cannot be read, and why
    names: Sequence[str] = ()
    logits: Float[np.ndarray, "B classes"] | None = None  # cosine × logit scale
    labels: Int[np.ndarray, " B"] | None = None
    indices: Int[np.ndarray, " B"] | None = None  # in the data set


def classify(data: Labelled, encoder: Encoder) -> Outcome:
    """Classify every image by class names × templates, averaged in embedding space.

    With several templates also each template alone: mean, spread, gain of the ensemble.
    """
    rows = [prompts.fill(t, name) for t in data.templates for name in data.names]
    shape = (len(data.templates), len(data.names), -1)
    texts = encoder.texts(rows).reshape(shape)
    features, indices, labels, skipped = _embed(data, encoder)
    labels = np.array(labels)
    logits = features @ prompts.ensemble(texts).T
    values = classification(logits, labels)
    if len(data.templates) > 1:
        found = prompts.sensitivity(features, labels, texts, data.templates)
        values |= found.values()
    scale = float(np.exp(jax.device_get(encoder.params["logit_scale"])))
    return Outcome(values, skipped, data.names, logits * scale, labels, indices)


def retrieve(data: Captioned, encoder: Encoder) -> Outcome:
    """Find images by captions and captions by images; an image may have several."""
    features, _, captions, skipped = _embed(data, encoder)
    owner = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
    texts = encoder.texts([text for group in captions for text in group])
    return Outcome(retrieval(features, texts, owner, encoder.mesh), skipped)


def _embed(
    data: Labelled | Captioned, encoder: Encoder
) -> tuple[Float[np.ndarray, "B E"], Int[np.ndarray, " B"], list, list[str]]:
    """Embed all images that can be read; return features, places, what belongs to each."""
    features, indices, answers, skipped = [], [], [], []
    images: list[np.ndarray] = []

    def flush() -> None:
        if images:
            pixels = np.stack(images)
            features.append(encode_images(encoder.model, encoder.params, pixels, encoder.mesh))
            images.clear()

    for index, (image, answer) in enumerate(data):
        try:
            images.append(encoder.preprocess(image))
        except ImageError as error:
            skipped.append(f"image {index}: {error}")
            continue
        indices.append(index)
        answers.append(answer)
        if len(images) == _STREAMED:
            flush()
    flush()
    if not features:
        raise ValueError(f"none of {data.count} images can be read; the first: {skipped[:1]}.")
    return np.concatenate(features), np.array(indices), answers, skipped
