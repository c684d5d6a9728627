"""What evaluators share: a model with its inputs, and features of any number of images or texts,
computed on the whole mesh under the layout of the training step."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from clip_jax import sharding
from clip_jax.data.images import Preprocess
from clip_jax.data.tokenizers import read_captions
from clip_jax.errors import InputError
from clip_jax.evals import prompts
from clip_jax.models.clip import CLIP, Params, l2_normalize
from clip_jax.models.images import Images


@dataclass(frozen=True, eq=False)
class Encoder:
    """A model on a mesh, with its own way of reading images and texts."""

    model: CLIP
    params: Params
    mesh: Mesh
    preprocess: Preprocess
    tokenize: Callable[[Sequence[str]], np.ndarray]  # texts to token ids [B, L], cut to length
    _known: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @property
    def logit_scale(self) -> float:
        return float(np.exp(jax.device_get(self.params["logit_scale"])))

    def images(self, images: Images) -> Float[np.ndarray, "B E"]:
        """Embed images that every process has, at unit length."""
        return encode_images(self.model, self.params, images, self.mesh)

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "B E"]:
        """Embed texts at unit length."""
        return encode_texts(self.model, self.params, self.tokenize(texts), self.mesh)

    def read(self, ids: Int[np.ndarray, "B L"]) -> list[str]:
        """Turn ids that the model has written back into texts."""
        return read_captions(ids, self.model.config.text)

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


class Evaluator(Protocol):
    """Built from its own config; yields named numbers, in training and on finished weights."""

    every_steps: int

    def run(self, encoder: Encoder) -> Iterator[tuple[str, float]]: ...


class Evaluations:
    """A run's evaluators, each at its own steps and all at the last."""

    def __init__(self, configs: Sequence[Any], steps: int) -> None:
        """`configs` have `make() -> Evaluator`; `steps` are those of the whole run."""
        self._evaluators: list[Evaluator] = [config.make() for config in configs]
        self._steps = steps
        self._results: dict[int, set[str]] = {}  # names that each evaluator has given

    def measured(self) -> list[str]:
        """Name what is measured: all processes must find the same data sets."""
        return [name for e in self._evaluators for name in getattr(e, "names", ())]

    def due(self, step: int) -> bool:
        """Say whether any evaluator has its turn; the last step is always one."""
        return step == self._steps or any(step % e.every_steps == 0 for e in self._evaluators)

    def run(self, step: int, encoder: Encoder) -> Iterator[dict[str, float]]:
        """Yield what each evaluator finds whose turn it is."""
        for index, evaluator in enumerate(self._evaluators):
            if step == self._steps or step % evaluator.every_steps == 0:
                values = dict(evaluator.run(encoder))
                self._results[index] = {*values}
                yield values

    def check_gives(self, wanted: str) -> None:
        """Raise InputError where no evaluator gives a result of this name, as far as is known by
        now:

        of data sets which there are, of all evaluators what they gave when they had their turn.
        """
        found: set[str] = set()
        for index, evaluator in enumerate(self._evaluators):
            given = self._results.get(index)
            if given is None and (data_sets := getattr(evaluator, "names", None)) is not None:
                given = {f"{name}/*" for name in data_sets}
            if given is None or {wanted, f"{wanted.partition('/')[0]}/*"} & given:
                return
            found |= given
        raise InputError(
            f"checkpoint.best={wanted!r} is no result of this run's evaluators, which give "
            f"{', '.join(sorted(found)) or 'none'}. Name one of these, give the run evaluators "
            "(evals), or leave them to `evaluate RUN --watch` with --checkpoint.best-of watcher."
        )

    def draw(self, encoder: Encoder, folder: Path) -> None:
        """Let those draw that can, into a folder; all processes compute, one keeps."""
        for evaluator in self._evaluators:
            if draw := getattr(evaluator, "draw", None):
                draw(encoder, folder)


def encode_images(
    model: CLIP, params: Params, images: Images, mesh: Mesh, *,
    batch_size: int = sharding.ROWS, normalize: bool = True,
) -> Float[np.ndarray, "B E"]:  # fmt: skip
    """Embed images, unit length unless told otherwise, in order, on every process alike."""
    encode = image_encoder(model, mesh, normalize)
    return sharding.in_batches(encode, mesh, params, images, batch_size=batch_size)


def encode_texts(
    model: CLIP, params: Params, tokens: Int[np.ndarray, "B L"], mesh: Mesh, *,
    batch_size: int = sharding.ROWS,
) -> Float[np.ndarray, "B E"]:  # fmt: skip
    """Embed token rows, unit length, in the given order, on every process alike."""
    encode = text_encoder(model, mesh)
    return sharding.in_batches(encode, mesh, params, tokens, batch_size=batch_size)


@functools.lru_cache(maxsize=8)
def image_encoder(model: CLIP, mesh: Mesh, normalize: bool) -> Callable[[Params, Any], jax.Array]:
    """Compile the image tower for one batch over the mesh; its features are on every device."""
    model = laid_out(model, mesh)

    def encode(params: Params, images: Images) -> jax.Array:
        features = model.encode_image(params, model.normalize(images))
        return l2_normalize(features) if normalize else features

    return jax.jit(encode, out_shardings=sharding.replicated(mesh))


@functools.lru_cache(maxsize=8)
def text_encoder(model: CLIP, mesh: Mesh) -> Callable[[Params, Any], jax.Array]:
    """Compile the text tower for one batch over the mesh; its features are on every device."""
    model = laid_out(model, mesh)

    def encode(params: Params, tokens: jax.Array) -> jax.Array:
        return l2_normalize(model.encode_text(params, tokens))

    return jax.jit(encode, out_shardings=sharding.replicated(mesh))


def laid_out(model: CLIP, mesh: Mesh) -> CLIP:
    """Return the model that computes on the mesh as in training."""
    return replace(model, layout=sharding.layout(mesh, model.config.attention))
