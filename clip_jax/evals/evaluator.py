"""What evaluators share: a model with its inputs on a mesh; and when each of them has its turn."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from clip_jax import processes, sharding
from clip_jax.data.images import Preprocess
from clip_jax.data.tokenizers import read_captions
from clip_jax.errors import InputError
from clip_jax.evals import prompts
from clip_jax.models.clip import CLIP, Params, l2_normalize
from clip_jax.models.images import Images
from clip_jax.models.vit import ViTConfig
from clip_jax.storage.files import AnyPath


@dataclass(frozen=True, eq=False)
class Encoder:
    """A model on a mesh, with its own way of reading images and texts."""

    model: CLIP
    params: Params
    mesh: Mesh
    preprocess: Preprocess
    tokenize: Callable[[Sequence[str]], np.ndarray]  # texts to token ids [B, L], cut to length
    name: str = "model"  # in tables
    _known: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @property
    def logit_scale(self) -> float:
        return float(np.exp(jax.device_get(self.params["logit_scale"])))

    def images(self, images: Images) -> Float[np.ndarray, "B E"]:
        """Embed images that every process has, at unit length."""
        return self.compute(embed_images, images)

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "B E"]:
        """Embed texts at unit length."""
        return self.compute(embed_texts, self.tokenize(texts))

    def compute(
        self, function: Callable[..., Array], *rows: Any, batch_size: int = sharding.ROWS,
        **options: Any,
    ) -> np.ndarray:  # fmt: skip
        """Run a function as of `compiled` over images or tokens that every process has."""
        run = compiled(function, self.model, self.mesh, **options)
        return sharding.in_batches(run, self.mesh, self.params, *rows, batch_size=batch_size)

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


@functools.lru_cache(maxsize=16)
def compiled(
    function: Callable[..., Array], model: CLIP, mesh: Mesh, /, **options: Any
) -> Callable[..., Array]:
    """Compile `function(model, params, *rows, **options)` for batches that are split over the mesh,
    as in training; what it returns is on every device."""
    model = replace(model, layout=sharding.layout(mesh, model.config.attention))
    bound = functools.partial(function, model, **options)
    return jax.jit(bound, out_shardings=sharding.replicated(mesh))


def embed_images(
    model: CLIP, params: Params, images: Images, *, normalize: bool = True
) -> Float[Array, "B E"]:
    """Embed images, at unit length unless `normalize` is off."""
    features = model.encode_image(params, model.normalize(images))
    return l2_normalize(features) if normalize else features


def embed_texts(
    model: CLIP, params: Params, tokens: Int[Array, "B L"], *, normalize: bool = True
) -> Float[Array, "B E"]:
    """Embed rows of tokens, at unit length unless `normalize` is off."""
    features = model.encode_text(params, tokens)
    return l2_normalize(features) if normalize else features


def embed_for_probe(model: CLIP, params: Params, images: Images) -> Float[Array, "B D"]:
    """Embed images as a probe takes them, the paper's choice: a ViT's features before the
    projection, a ResNet's embeddings, of the lengths that the tower gives them."""
    config = model.config
    if isinstance(config.vision, ViTConfig) and config.vision.projection:
        vision = replace(config.vision, projection=False)
        model = replace(model, config=replace(config, embed_dim=vision.width, vision=vision))
        visual = {name: x for name, x in params["visual"].items() if name != "proj"}
        params = {**params, "visual": visual}
    return embed_images(model, params, images, normalize=False)


@runtime_checkable
class Evaluator(Protocol):
    """Built by `make` of its own config, which is a member of `Config.evals`; yields named numbers,
    in training and on finished weights.

    One that knows from the start on which data sets it measures has their `names`: its results are
    called `NAME/METRIC`.
    """

    every_steps: int

    def run(self, encoder: Encoder, output: AnyPath | None = None) -> Iterator[tuple[str, float]]:
        """Measure a model; with `output`, also write tables and pictures into that folder.

        All processes call it and get the same numbers; one writes.
        """
        ...


class Evaluations:
    """A run's evaluators, each at its own steps and all at the last."""

    def __init__(self, configs: Sequence[Any], steps: int) -> None:
        """`configs` have `make() -> Evaluator`; `steps` are those of the whole run."""
        self._evaluators: list[Evaluator] = [config.make() for config in configs]
        self._steps = steps
        self._results: dict[int, set[str]] = {}  # names of the numbers that each one yielded

    def measured(self) -> list[str]:
        """Name what is measured: all processes must find the same data sets."""
        return [name for e in self._evaluators for name in getattr(e, "names", ())]

    def due(self, step: int) -> bool:
        """Say whether any evaluator has its turn; the last step is always one."""
        return step == self._steps or any(step % e.every_steps == 0 for e in self._evaluators)

    def run(self, step: int, encoder: Encoder, output: AnyPath) -> Iterator[dict[str, float]]:
        """Yield the results of each evaluator whose turn it is; at the last step they also write
        tables and pictures to `output`."""
        last = step == self._steps
        for index, evaluator in enumerate(self._evaluators):
            if last or step % evaluator.every_steps == 0:
                values = dict(evaluator.run(encoder, output if last else None))
                self._results[index] = {*values}
                yield values

    def check_gives(self, wanted: str) -> None:
        """Raise InputError where no evaluator gives a result of this name, as far as is known by
        now:

        of data sets which there are, of all evaluators what they gave when they had their turn.
        """
        known: set[str] = set()
        for index, evaluator in enumerate(self._evaluators):
            names = self._results.get(index)
            if names is None and (data_sets := getattr(evaluator, "names", None)) is not None:
                names = {f"{name}/*" for name in data_sets}
            if names is None or {wanted, f"{wanted.partition('/')[0]}/*"} & names:
                return
            known |= names
        raise InputError(
            f"checkpoint.best={wanted!r} is no result of this run's evaluators, which give "
            f"{', '.join(sorted(known)) or 'none'}. Name one of these, give the run evaluators "
            "(evals), or leave them to `evaluate RUN --watch` with --checkpoint.best-of watcher."
        )


def say(line: str) -> None:
    """Write a line to standard error, once for all processes."""
    if processes.is_lead():
        print(line, file=sys.stderr)
