"""Distillation: the similarities (MobileCLIP, Vasu et al. 2023, section 4) or the embeddings of a
trained model, the student, follow those of frozen teachers."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.errors import InputError, check_ranges
from clip_jax.losses.contrastive import Contrastive
from clip_jax.losses.objective import Context, Frozen, Outputs, Parameter, Result
from clip_jax.losses.pairs import Pairs
from clip_jax.losses.sums import Block, Max, Statistics, Sum, SumOf, Sums
from clip_jax.models.clip import CLIPConfig, l2_normalize
from clip_jax.models.inputs import ImageInput, Input, StoredInput, TextInput
from clip_jax.models.layers import DType

_RANGES = {"logit_scale": "(0, inf)", "logit_bias": "(-inf, inf)"}


@dataclass(frozen=True, kw_only=True)
class LiveTeacher:
    """A frozen model that encodes each batch within the training step."""

    weights: str  # Weights of the teacher: a run directory, model folder or weight file, or icons.
    model: CLIPConfig | None = None  # Architecture of the teacher. None: read from its weights.
    dtype: DType = "bfloat16"  # Type of the teacher's matmuls, and of its parameters in memory.
    logit_scale: float | None = None  # Factor on the teacher's cosines. None: the teacher's own.
    logit_bias: float | None = None  # Bias of the teacher's logits in a sigmoid. None: its own.

    def __post_init__(self) -> None:
        check_ranges(self, "LiveTeacher.", **_RANGES)

    @property
    def architecture(self) -> CLIPConfig:
        """Return the teacher's configuration in its `dtype`. Raises InputError if unknown."""
        if self.model is None:
            raise InputError(
                f"the architecture of the teacher {self.weights!r} is unknown: set "
                "LiveTeacher.model, or use a command that reads it from the weights."
            )
        return replace(self.model, dtype=self.dtype)

    @property
    def has_logit_bias(self) -> bool:
        """Whether the bias of its logits is known. Raises InputError as `architecture` does."""
        return self.logit_bias is not None or self.architecture.has_logit_bias

    @property
    def embed_dim(self) -> int:
        """Return the width of the teacher's embeddings."""
        return self.architecture.embed_dim


@dataclass(frozen=True, kw_only=True)
class StoredTeacher:
    """A model whose embeddings are stored with the pairs (`clip-jax prepare --reinforce`)."""

    embed_dim: int  # Width of the teacher's embeddings; those of all teachers are side by side.
    logit_scale: float = 100.0  # Factor on the teacher's cosines.
    logit_bias: float = 0.0  # Bias of the teacher's logits, which sigmoid losses need. 0: unknown.

    def __post_init__(self) -> None:
        check_ranges(self, "StoredTeacher.", embed_dim="[1, inf)", **_RANGES)

    @property
    def has_logit_bias(self) -> bool:
        """Whether the bias of its logits is known."""
        return self.logit_bias != 0


@dataclass(frozen=True)
class TeacherSum(Sum):
    """Σ w and Σ w · (cosine − top), where w = exp(logit − maximum) of one teacher's logits."""

    of: str  # the maximum's name

    def start(self, zero: Float[Array, " B"]) -> tuple[Array, Array]:
        return zero, zero

    def summands(self, name: str, block: Block) -> tuple[Array, Array]:
        weights = jnp.exp(block.below[self.of])
        return weights, weights * block.below["top"]

    def rebase(
        self, total: tuple[Array, Array], old: Statistics, new: Statistics
    ) -> tuple[Array, Array]:
        factor = jnp.exp(old[self.of] - new[self.of])
        weights, below = total
        return factor * weights, factor * (below + weights * (old["top"] - new["top"]))


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(Contrastive):
    """Distillation: similarities, or embeddings, follow those of frozen teachers."""

    name: ClassVar[str] = "distillation"

    # Teachers, which count equally.
    teachers: tuple[LiveTeacher | StoredTeacher, ...] = ()  # ty: ignore[incompatible-attribute-override]
    # Loss of the similarities. softmax: cross-entropy with the mean of the teachers' softmaxes over
    # the batch; sigmoid (MobileCLIP): −log σ(label · logit), in which label is 2 p − 1 and p the
    # mean of the teachers' sigmoids; soft_label_sigmoid: binary cross-entropy with p.
    similarity: Literal["softmax", "sigmoid", "soft_label_sigmoid"] = "softmax"
    similarity_weight: float = 1.0  # Factor on the loss of the similarities. 0: not computed.
    logit_scale: float | None = None  # Factor on the student's cosines. None: the model's own.
    # Distance between a trained linear map of the embeddings and the teacher's. cosine: 1 − cosine;
    # squared_error: squares summed over the width. It is summed over images and captions.
    features: Literal["cosine", "squared_error"] = "cosine"
    features_weight: float = 0.0  # Factor on the distance of the embeddings. 0: not computed.

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            self,
            "DistillationConfig.",
            similarity_weight="[0, inf)",
            features_weight="[0, inf)",
            logit_scale="(0, inf)",
        )

    @property
    def needs_bias(self) -> bool:  # ty: ignore[incompatible-property-override]
        """Whether the loss takes a logit_bias of the model, and of each teacher."""
        return self.similarity != "softmax"

    def check(self, model: CLIPConfig) -> None:
        """Raise InputError unless there are teachers of known architecture, with needed biases."""
        if not self.teachers:
            raise InputError("DistillationConfig.teachers is empty; set at least one teacher.")
        if not self.similarity_weight and not self.features_weight:
            raise InputError(
                "DistillationConfig.similarity_weight and features_weight are both 0, so that its "
                "loss is always 0; set one of them above 0, or remove the term."
            )
        super().check(model)
        for number, x in enumerate(self.teachers):
            unbiased = not x.has_logit_bias  # raises InputError for an unknown architecture
            if unbiased and self.needs_bias and self.similarity_weight:
                raise InputError(
                    f"similarity={self.similarity} needs a logit bias, but teachers.{number} has "
                    f"none: set {type(x).__name__}.logit_bias, or choose softmax."
                )

    def reads(self, model: CLIPConfig) -> dict[str, Input]:
        """Return the inputs of the loss and of the teachers that the student's towers lack."""
        widths = tuple(x.embed_dim for x in self.teachers if isinstance(x, StoredTeacher))
        kinds = cast(Any, ("image", *self.texts) if widths else ())
        stored = {f"stored_{kind}": StoredInput(kind, widths) for kind in kinds}
        live = {name: x for x, name in self._names(model).items() if name not in ("image", "text")}
        return stored | live

    def frozen(self) -> dict[str, Frozen]:
        """Return the live teachers by name."""
        return {
            f"teacher{i}": Frozen(x.architecture, x.weights, len(self.texts))
            for i, x in enumerate(self.teachers)
            if isinstance(x, LiveTeacher)
        }

    def parameters(self, model: CLIPConfig) -> dict[str, Parameter]:
        """Return the linear maps from each tower's embeddings to each teacher's."""
        return {
            f"teacher{i}_{tower}": Parameter((model.embed_dim, x.embed_dim), "E -")
            for i, x in enumerate(self.teachers if self.features_weight else ())
            for tower in ("image", "text")
        }

    def encode(self, x: Context) -> Outputs:
        """Return the teachers' embeddings as in `Side`, and the distances of each row."""
        names, kinds = self._names(x.model.config), {"image": "image", **self.texts}
        outputs, distances, start = {}, [], 0
        for i, teacher in enumerate(self.teachers):
            params = x.frozen.get(f"teacher{i}", {})
            scale, bias = teacher.logit_scale, teacher.logit_bias
            scale = jnp.exp(params["logit_scale"]) if scale is None else scale
            bias = params.get("logit_bias", 0.0) if bias is None else bias
            if isinstance(teacher, LiveTeacher):
                model = replace(x.model, config=teacher.architecture)
                image, *texts = (x.inputs[names[_input(model.config, kind)]] for kind in kinds)
                named = {str(j) if j else "text": text for j, text in enumerate(texts)}
                out, _ = model.outputs(params, {"image": model.normalize(image)}, named)
                embeddings = [*out.values()]
            else:
                columns = slice(start, start := start + teacher.embed_dim)
                embeddings = [x.inputs[f"stored_{kind}"][:, columns] for kind in kinds]
            for (kind, output), y in zip(kinds.items(), embeddings, strict=True):
                is_image = kind == "image"
                y = l2_normalize(jax.lax.stop_gradient(y.astype(jnp.float32)))
                if self.features_weight:
                    kernel = x.params[self.name][f"teacher{i}_{'image' if is_image else 'text'}"]
                    z = jnp.einsum("BE,ED->BD", x.outputs[output], kernel, precision=self.precision)
                    cosine, squares = (l2_normalize(z) * y).sum(-1), jnp.square(z - y).sum(-1)
                    distances.append(1 - cosine if self.features == "cosine" else squares)
                factor, channel = (scale, bias) if is_image else (1.0, 1.0)
                y *= factor
                if self.needs_bias:
                    y = jnp.concatenate([y, jnp.full_like(y[:, :1], channel)], 1)
                outputs[f"teacher{i}_{kind}"] = y
        if distances:
            outputs["rows"] = sum(distances) / len(self.teachers)
        return outputs

    def loss(self, x: Context) -> Result:
        """Compute the loss of the global batch."""
        loss, metrics = jnp.float32(0), {}
        if self.similarity_weight:
            if self.logit_scale is not None:
                x = replace(x, params=x.params | {"logit_scale": jnp.log(self.logit_scale)})
            loss, metrics = super().loss(x)
        loss *= self.similarity_weight
        if self.features_weight:
            loss += self.features_weight * x.outputs["rows"].mean()
        return loss, metrics

    def macs(self, model: CLIPConfig, batch_size: int, locked: Sequence[str]) -> int:
        """Count the similarities of the student and the teachers, and the linear maps."""
        pairs = super().macs(model, batch_size, locked) if self.similarity_weight else 0
        width = sum(x.embed_dim for x in self.teachers) if self.features_weight else 0
        return pairs + 3 * batch_size * model.embed_dim * width * (1 + len(self.texts))

    def sums(self, scale: Float[Array, ""], bias: Float[Array, ""]) -> Sums:
        """Return a sigmoid's loss of all pairs of an image, and each teacher's softmax."""

        def losses(pairs: Pairs) -> Float[Array, "R C"]:
            logits, p = scale * pairs.cosine + bias, _probability(pairs)
            if self.similarity == "soft_label_sigmoid":
                return jax.nn.softplus(logits) - p * logits
            return jax.nn.softplus((1 - 2 * p) * logits)

        def logits_of(i: int) -> Max:
            return Max(lambda pairs: pairs.teachers[i])

        count = len(self.teachers)
        tops = {f"teacher{i}_top": logits_of(i) for i in range(count)}
        sums = {f"teacher{i}": TeacherSum(f"teacher{i}_top") for i in range(count)}
        return {"losses": SumOf(losses)} | tops | sums

    def losses(
        self, image: Statistics, text: Statistics, scale: Float[Array, ""], bias: Float[Array, ""]
    ) -> Float[Array, " B"]:
        """Return the loss of each pair from the statistics of its image and its text."""
        if self.similarity != "softmax":
            return image["losses"]
        log_sum = (jnp.log(image["exp_sum"]) + jnp.log(text["exp_sum"])) / 2
        sums = [x[f"teacher{i}"] for x in (image, text) for i in range(len(self.teachers))]
        return log_sum - scale * sum(below / total for total, below in sums) / len(sums)

    def gradient(
        self,
        pairs: Pairs,
        image: Statistics,
        text: Statistics,
        scale: Float[Array, ""],
        bias: Float[Array, ""],
    ) -> Float[Array, "R C"]:
        """Return d Σ losses / d logits on a block."""
        if self.similarity != "softmax":
            logits, p = scale * pairs.cosine + bias, _probability(pairs)
            if self.similarity == "soft_label_sigmoid":
                return jax.nn.sigmoid(logits) - p
            return (1 - 2 * p) * jax.nn.sigmoid((1 - 2 * p) * logits)
        gradient = jnp.zeros_like(pairs.cosine)
        for axis, side in ((1, image), (0, text)):
            x = jax.tree.map(functools.partial(jnp.expand_dims, axis=axis), side)
            gradient += jnp.exp(scale * (pairs.cosine - x["top"])) / x["exp_sum"]
            for i, logits in enumerate(pairs.teachers):
                total, _ = x[f"teacher{i}"]
                weights = jnp.exp(logits - x[f"teacher{i}_top"])
                gradient -= weights / (len(pairs.teachers) * total)
        return gradient / 2

    def _names(self, model: CLIPConfig) -> dict[Input, str]:
        """Return the name of each different input of the student and the live teachers."""
        names: dict[Input, str] = {}
        teachers = {f"{name}_": teacher.config for name, teacher in self.frozen().items()}
        for prefix, reader in {"": model, **teachers}.items():
            for kind in ("image", *self.texts):
                names.setdefault(_input(reader, kind), prefix + kind)
        return names


def _input(model: CLIPConfig, kind: str) -> Input:
    """Return the images or captions that a model reads."""
    if kind == "image":
        return ImageInput(model.vision.image_spec)
    return TextInput(model.text, synthetic=kind == "synthetic")


def _probability(pairs: Pairs) -> Float[Array, "R C"]:
    """Return the mean of the teachers' sigmoids."""
    return functools.reduce(jnp.add, map(jax.nn.sigmoid, pairs.teachers)) / len(pairs.teachers)
