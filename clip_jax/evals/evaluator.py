"""What evaluators share: the encoder that they measure, and the schedule on which they run."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from clip_jax import processes, sharding
from clip_jax.data.images import Preprocess
from clip_jax.data.tokenizers import read_captions
from clip_jax.errors import InputError
from clip_jax.evals import prompts
from clip_jax.evals.ranks import NotFinite, check_finite
from clip_jax.models.clip import CLIP, Params, l2_normalize
from clip_jax.models.images import Images
from clip_jax.parts import Part
from clip_jax.storage.files import AnyPath


@dataclass(frozen=True, eq=False)
class Encoder:
    """A model on a mesh, with its own preprocessing of images and its own tokenizer."""

    model: CLIP
    params: Params
    mesh: Mesh
    preprocess: Preprocess
    tokenize: Callable[[Sequence[str]], np.ndarray]  # texts to token ids [B, L], truncated
    name: str = "model"  # in tables of results
    head: Any = None  # a trained classifier: `classes`, and `kernel` [classes, E]
    _embedded: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @property
    def logit_scale(self) -> float:
        return float(np.exp(jax.device_get(self.params["logit_scale"])))

    def images(self, images: Images) -> Float[np.ndarray, "B E"]:
        """Embed images, the same ones on every process, as unit vectors."""
        return self.compute(embed_images, images)

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "B E"]:
        """Embed texts as unit vectors; equal texts get equal vectors at any position."""
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        features = self.token_ids(self.tokenize(list(rows)))
        return features[[rows[text] for text in texts]]

    def token_ids(self, ids: Int[np.ndarray, "B L"]) -> Float[np.ndarray, "B E"]:
        """Embed rows of token ids as unit vectors, with as little padding as all of them need."""
        return self.compute(embed_texts, self.model.config.text.shortened(ids))

    def compute(
        self,
        function: Callable[..., Array],
        *rows: Any,
        batch_size: int = sharding.ROWS,
        **options: Any,
    ) -> np.ndarray:
        """Run a function that `compiled` takes over images or tokens, equal on every process.

        Raises NotFinite for results with NaN or infinity.
        """
        run = compiled(function, self.model, self.mesh, **options)
        results = sharding.in_batches(run, self.mesh, self.params, *rows, batch_size=batch_size)
        check_finite(results, f"the model's outputs ({name_of(function)})")
        return results

    def read(self, ids: Int[np.ndarray, "B L"]) -> list[str]:
        """Decode generated token ids to texts."""
        return read_captions(ids, self.model.config.text)

    def classes(
        self, templates: Sequence[str], names: Sequence[str]
    ) -> Float[np.ndarray, "templates classes E"]:
        """Embed every class name in every template, each prompt once: ImageNet and its variants
        share 80,000 prompts, and the tasks on one data set share all of them."""
        rows = [prompts.fill(template, name) for template in templates for name in names]
        if new := [row for row in dict.fromkeys(rows) if row not in self._embedded]:
            self._embedded.update(zip(new, self.texts(new), strict=True))
        features = np.stack([self._embedded[row] for row in rows])
        return features.reshape(len(templates), len(names), -1)


def name_of(function: Callable[..., Array]) -> str:
    """Return a function's name, for messages about its results."""
    return getattr(function, "__name__", "unnamed")


def length_of(preprocess: Preprocess) -> dict[str, int]:
    """Return `tokens`, the sequence length at which a NaFlex model is measured, for its results.

    A model of fixed resolution has none.
    """
    return {} if preprocess.max_patches is None else {"tokens": preprocess.max_patches}


@functools.lru_cache(maxsize=16)
def compiled(
    function: Callable[..., Array], model: CLIP, mesh: Mesh, /, **options: Any
) -> Callable[..., Array]:
    """Compile `function(model, params, *rows, **options)` for batches sharded over the mesh, as in
    training; its result is replicated."""
    model = replace(model, layout=sharding.layout(mesh, model.config.attention))
    bound = functools.partial(function, model, **options)
    compiler = processes.compiler_options(mesh.devices.flat[0].platform)
    return jax.jit(bound, out_shardings=sharding.replicated(mesh), compiler_options=compiler)


def embed_images(
    model: CLIP, params: Params, images: Images, *, normalize: bool = True
) -> Float[Array, "B E"]:
    """Embed images, as unit vectors unless `normalize` is off."""
    features = model.encode_image(params, model.normalize(images))
    return _unit(features) if normalize else features


def attend_to_patches(model: CLIP, params: Params, images: Images) -> Float[Array, "B L"]:
    """Return how much the embedding of each image attends to its patches."""
    return model.patch_attention(params, model.normalize(images))


def embed_texts(
    model: CLIP, params: Params, tokens: Int[Array, "B L"], *, normalize: bool = True
) -> Float[Array, "B E"]:
    """Embed rows of token ids, as unit vectors unless `normalize` is off."""
    features = model.encode_text(params, tokens)
    return _unit(features) if normalize else features


def _unit(features: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Scale to unit length; NaN where the length overflows, for which `l2_normalize` gives 0."""
    length = jnp.square(features).sum(axis=1, keepdims=True)
    return jnp.where(jnp.isfinite(length), l2_normalize(features), jnp.nan)


def embed_for_probe(model: CLIP, params: Params, images: Images) -> Float[Array, "B D"]:
    """Embed images for a linear probe as the CLIP paper does: a ViT's features before the
    projection, or a ResNet's embeddings, neither of them normalised."""
    config = model.config
    vision, width, visual = config.vision.unprojected(config.embed_dim, params["visual"])
    model = replace(model, config=replace(config, embed_dim=width, vision=vision))
    return embed_images(model, {**params, "visual": visual}, images, normalize=False)


class EvaluatorConfig(Part):
    """Base of the configs of evaluators, the members of `Config.evals`."""

    def measures(self) -> list[str]:
        """Return what no other evaluator of the run may measure, since metrics would have the same
        names: by default the name of the class."""
        return [type(self).__name__]

    def make(self) -> "Evaluator":
        """Return the evaluator. Raises InputError if its data is missing."""
        raise NotImplementedError


@runtime_checkable
class Evaluator(Protocol):
    """An evaluator: yields named metrics, during training and on saved weights.

    One that knows its data sets before it runs has their `names`; its metrics are `NAME/METRIC`.
    """

    every_steps: int

    def run(self, encoder: Encoder, output: AnyPath | None = None) -> Iterator[tuple[str, float]]:
        """Measure a model; with `output`, also write tables and pictures into that folder.

        All processes call it and get the same numbers; only one writes.
        """
        ...


def check_distinct(configs: Sequence[Any]) -> None:
    """Raise InputError if two evaluators of a run measure the same: of two metrics with one name,
    the second would replace the first."""
    owners: dict[str, int] = {}
    for index, config in enumerate(configs):
        for subject in config.measures():
            if (first := owners.setdefault(subject, index)) != index:
                raise InputError(
                    f"evals.{first} and evals.{index} both measure {subject}, so their metrics "
                    "have the same names; set another `name` (of held-out pairs), data set or "
                    "task, or remove one of the two."
                )


def folders_of(evaluators: Sequence[Evaluator], output: AnyPath | None) -> list[AnyPath | None]:
    """Return where each evaluator writes its files: to `output`, but the second one with data sets
    to `output/suite_2` and so on, since their tables have the same names."""
    folders, suites = [], 0
    for evaluator in evaluators:
        suites += hasattr(evaluator, "names")
        is_later = hasattr(evaluator, "names") and suites > 1
        folders.append(output / f"suite_{suites}" if output and is_later else output)
    return folders


class Evaluations:
    """A run's evaluators: each runs every `every_steps` steps, and all run at the last step."""

    def __init__(self, configs: Sequence[Any], steps: int) -> None:
        """`configs` have `make() -> Evaluator`; `steps` is the length of the run.

        Raises InputError for an evaluator that would run every 0 steps.
        """
        self._evaluators: list[Evaluator] = [config.make() for config in configs]
        for evaluator in self._evaluators:
            if evaluator.every_steps < 1:
                raise InputError(
                    f"{type(evaluator).__name__} has every_steps={evaluator.every_steps}; it must "
                    "be at least 1: change it in the evaluator's config."
                )
        self._steps = steps
        self._results: dict[int, set[str]] = {}  # metrics that each evaluator yielded

    def measured(self) -> list[str]:
        """Return the names of the data sets, which must be the same on all processes."""
        return [name for e in self._evaluators for name in getattr(e, "names", ())]

    def due(self, step: int) -> bool:
        """Say whether any evaluator runs at this step; all run at the last."""
        return step == self._steps or any(step % e.every_steps == 0 for e in self._evaluators)

    def run(self, step: int, encoder: Encoder, output: AnyPath) -> Iterator[dict[str, Any]]:
        """Yield the metrics of each evaluator that is due, with a NaFlex model's `tokens`; at the
        last step, evaluators also write tables and pictures to `output`.

        A model whose embeddings are not finite has no metrics but `failed`, the reason: training
        goes on.
        """
        last = step == self._steps
        folders = folders_of(self._evaluators, output if last else None)
        for index, evaluator in enumerate(self._evaluators):
            if not last and step % evaluator.every_steps:
                continue
            try:
                values: dict[str, Any] = dict(evaluator.run(encoder, folders[index]))
            except NotFinite as error:
                yield {"failed": str(error)}
                continue
            self._results[index] = {*values}
            yield length_of(encoder.preprocess) | values

    def check_gives(self, wanted: str) -> None:
        """Raise InputError if no evaluator yields a metric of this name, as far as is known.

        Before an evaluator has run, at most its data sets are known; afterwards, its metrics.
        """
        measured: set[str] = set()
        for index, evaluator in enumerate(self._evaluators):
            names = self._results.get(index)
            if names is None and (data_sets := getattr(evaluator, "names", None)) is not None:
                names = {f"{name}/*" for name in data_sets}
            if names is None or {wanted, f"{wanted.partition('/')[0]}/*"} & names:
                return
            measured |= names
        raise InputError(
            f"checkpoint.best={wanted!r} is not a metric of this run's evaluators, which yield "
            f"{', '.join(sorted(measured)) or 'none'}. Name one of these, add evaluators to "
            "`evals`, or evaluate with `evaluate RUN --watch` and --checkpoint.best-of watcher."
        )
