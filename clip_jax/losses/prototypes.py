"""Losses in which a student predicts to which prototypes a teacher assigns the same image.

A head maps the states of a tower to a few hundred channels of unit length, and a linear layer these
to the logits of many prototypes (DINO, Caron et al. 2021, arXiv:2104.14294). Steps keep the former
for the global batch. Logits exist for some rows at a time: both passes compute them.

The teacher's probabilities are a softmax of its logits / temperature + potentials, one for each
prototype. These keep all images from one prototype: they are a centre that follows the mean of the
logits (DINO), or come from the Sinkhorn-Knopp algorithm (SwAV, Caron et al. 2020, arXiv:2006.09882;
DINOv2 and DINOv3).
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from clip_jax.errors import InputError, check_ranges
from clip_jax.losses.caption import product
from clip_jax.losses.objective import AnyMesh, Axes, Context, Parameter, Pass, Result, Term
from clip_jax.models.clip import CLIPConfig, Params, l2_normalize
from clip_jax.models.images import ImageSpec, unstack
from clip_jax.models.inputs import ViewInput
from clip_jax.models.layers import gelu
from clip_jax.models.vit import ViTConfig

TEACHER_VIEW = "teacher_view"  # the input's name
# Names of the teacher's pass, by whether its tower is an average.
_OF = {True: "teacher", False: "teacher with the student's tower"}
_SINKHORN = 3  # iterations (DINOv2, DINOv3)
_NEVER = -1e30  # a logit without probability; −∞ − −∞ would be no number
_STD = 0.02  # of a head's first weights (DINO)


@dataclass(frozen=True, kw_only=True)
class PrototypeTerm(Term):
    """Base of terms whose student follows a teacher by prototypes.

    Sizes of the head and the last temperatures are DINOv3's defaults (arXiv:2508.10104).
    """

    hidden: int = 2_048  # Channels of the head's hidden layers.
    layers: int = 3  # Linear layers of the head before the prototypes.
    bottleneck: int = 256  # Channels of the head's output, which has unit length.
    prototypes: int = 65_536  # Number of prototypes.
    student_temperature: float = 0.1  # Temperature of the student's softmax.
    # First and last temperature of the teacher's softmax (DINOv3: 0.04 0.07 and 30 epochs).
    teacher_temperature: tuple[float, float] = (0.07, 0.07)
    warmup: int = 0  # Steps in which the temperature changes linearly. 0: it is the last one.
    # What keeps all images from one prototype. center: a moving average of the teacher's logits is
    # subtracted (DINO); sinkhorn: prototypes are equally frequent in a batch (DINOv3).
    balance: Literal["center", "sinkhorn"] = "center"
    center_decay: float = 0.9  # Decay of the moving average with balance=center (DINO).
    # Decay of the teacher's moving average of the student's weights, which does not change (DINO
    # begins with it).
    decay: float = 0.996
    chunk_size: int = 1_024  # Rows per device whose logits are in memory at once.
    flip: float = 0.5  # Probability of mirroring a view; avoid it if captions say left or right.
    color_jitter: float = 0.8  # Probability of jittering the colours of a view.
    grayscale: float = 0.2  # Probability of converting a view to grayscale.

    def __post_init__(self) -> None:
        sizes = ("hidden", "layers", "bottleneck", "prototypes", "chunk_size")
        check_ranges(
            self,
            f"{type(self).__name__}.",
            **dict.fromkeys(sizes, "[1, inf)"),
            weight="[0, inf)",
            student_temperature="(0, inf)",
            teacher_temperature="(0, inf)",
            warmup="[0, inf)",
            center_decay="[0, 1)",
            decay="(0, 1)",
            **dict.fromkeys(("flip", "color_jitter", "grayscale"), "[0, 1]"),
        )

    def check(self, model: CLIPConfig) -> None:
        """Raise InputError unless the image tower has patches with norms of their own."""
        vision = model.vision
        is_simple = isinstance(vision, ViTConfig) and vision.has_linear_patches
        if not is_simple or vision.pool == "queries" or model.image_head is not None:
            raise InputError(
                f"{type(self).__name__} needs a vision transformer without convolutions, without "
                "model.image_head and without pool=queries (CoCa): choose another model.vision, or "
                "leave out the term."
            )

    def head_parameters(self, width: int) -> dict[str, Parameter]:
        """Return the parameters of the head for states of this width, and the prototypes."""
        widths = [width, *[self.hidden] * (self.layers - 1), self.bottleneck]
        parameters = {}
        for i, shape in enumerate(itertools.pairwise(widths)):
            dims = "D F" if i % 2 == 0 else "F D"
            parameters[f"layer{i}/kernel"] = Parameter(shape, dims, std=_STD)
            parameters[f"layer{i}/bias"] = Parameter(shape[1:], "-", std=0.0)
        shape = (self.bottleneck, self.prototypes)
        return parameters | {"prototypes": Parameter(shape, "D V", std=_STD, in_loss=True)}

    def init(self, params: Params) -> Any:
        """Return the number of steps, and the mean of the teacher's logits with a centre."""
        state: dict[str, Array] = {"steps": jnp.zeros((), jnp.int32)}
        if self.balance == "center":
            state["center"] = jnp.zeros((self.prototypes,))
        return state

    def apply_head(
        self, x: Context, params: Params, states: Float[Array, "B L D"]
    ) -> Float[Array, "B L C"]:
        """Apply the head's layers in the model's type; the result is float32, of unit length."""
        y = states.astype(x.model.config.dtype)
        for i in range(self.layers):
            layer = params[f"layer{i}"]
            equation = "BLD,DF->BLF" if i % 2 == 0 else "BLF,FD->BLD"
            y = gelu(y) if i else y
            y = x.model.layout.einsum(equation, y, layer["kernel"].astype(y.dtype))
            y = y + layer["bias"].astype(y.dtype)
        return l2_normalize(y.astype(jnp.float32))

    def temperature(self, steps: Int[Array, ""]) -> Float[Array, ""]:
        """Return the teacher's temperature after so many steps of the term."""
        first, last = self.teacher_temperature
        share = jnp.clip(steps / self.warmup, 0, 1) if self.warmup else 1.0
        return jnp.float32(first + (last - first) * share)

    def view(self, spec: ImageSpec, count: int, area: tuple[float, float]) -> ViewInput:
        """Return views with the term's augmentations."""
        return ViewInput(spec, count, area, self.flip, self.color_jitter, self.grayscale)

    def teacher_view(self, model: CLIPConfig) -> ViewInput:
        """Return what the teacher sees: the complete image, as large as the tower's."""
        return self.view(model.vision.image_spec, 1, (1.0, 1.0))

    def teacher_pass(self, model: CLIPConfig, average: bool = True) -> dict[str, Pass]:
        """Return the teacher's pass over its view, by its name."""
        return {_OF[average]: Pass(model.vision.operations(model.embed_dim), is_trained=False)}

    def teacher_states(
        self, x: Context, average: bool = True
    ) -> tuple[Float[Array, "B E"], Float[Array, "B L D"]]:
        """Return the teacher's embeddings and patches of its view, without gradients.

        The tower is the moving average, or the student's own. Terms share them.
        """

        def compute() -> tuple[Array, Array]:
            params = x.params | ({"visual": x.average["visual"]} if average else {})
            view = x.model.normalize(unstack(x.inputs[TEACHER_VIEW]))
            return x.model.pooled_and_patches(lax.stop_gradient(params), view)

        return x.once(_OF[average], compute)

    def of_teacher(self, x: Context, states: Float[Array, "B L D"]) -> Float[Array, "B L C"]:
        """Apply the moving average of the head to the teacher's states, without gradients."""
        return lax.stop_gradient(self.apply_head(x, x.average[self.name], states))

    def loss(self, x: Context) -> Result:
        """Average the cross-entropies over the global batch; the metric is the mean entropy of the
        teacher, in nats."""
        student, teacher = x.outputs["student"], x.outputs["teacher"]
        weights = self.weights(x)
        params, average = x.params[self.name], x.average[self.name]
        of_teacher = lax.stop_gradient(average["prototypes"])
        temperature = self.temperature(x.carried["steps"])
        options: Any = {
            "mesh": x.mesh,
            "axes": x.axes,
            "dtype": x.model.config.dtype,
            "chunk_size": self.chunk_size,
        }
        if self.balance == "sinkhorn":
            potentials = sinkhorn(teacher, weights > 0, of_teacher, temperature, **options)
        else:
            potentials = -x.carried["center"] / temperature
        rows, entropy = cross_entropy(
            student,
            teacher,
            params["prototypes"],
            of_teacher,
            potentials,
            (self.student_temperature, temperature),
            **options,
        )
        loss = (weights * rows).sum() / student.shape[2]
        return loss, {"teacher_entropy": (weights * entropy).sum()}

    def update(self, x: Context) -> Any:
        """Count the step, and move the centre by the mean of the teacher's logits."""
        state = {"steps": x.carried["steps"] + 1}
        if self.balance == "center":
            counted = self.weights(x) > 0
            weights = counted / counted.sum()
            mean = jnp.einsum("BT,BTC->C", weights, x.outputs["teacher"], precision="highest")
            logits = jnp.matmul(mean, x.average[self.name]["prototypes"], precision="highest")
            old = x.carried["center"]
            state["center"] = self.center_decay * old + (1 - self.center_decay) * logits
        return state

    def weights(self, x: Context) -> Float[Array, "B T"]:
        """Return the share of each of the teacher's states in the loss; they have the sum 1."""
        raise NotImplementedError

    def prototype_macs(self, width: int, student: int, teacher: int) -> int:
        """Count the multiply-adds of head and prototypes for so many rows in a step."""
        widths = [width, *[self.hidden] * (self.layers - 1), self.bottleneck]
        head = sum(a * b for a, b in itertools.pairwise(widths))
        logits = self.bottleneck * self.prototypes
        passes = 1 + _SINKHORN * (self.balance == "sinkhorn")
        return 3 * student * (head + logits) + teacher * (head + passes * logits)


def tower_at(model: CLIPConfig, side: int) -> ViTConfig:
    """Return the image tower for views with sides of so many pixels.

    Raises InputError unless they have full patches.
    """
    vision = cast(ViTConfig, model.vision)
    patch = vision.patch_size
    if side % patch:
        raise InputError(
            f"view_size={side} must be a multiple of model.vision.patch_size={patch}; change it."
        )
    if side > vision.image_size:
        raise InputError(
            f"view_size={side} must be at most model.vision.image_size={vision.image_size}; change "
            "it."
        )
    if vision.max_patches is not None:
        return replace(vision, max_patches=(side // patch) ** 2)
    return vision.with_image_size(side)


def sinkhorn(
    teacher: Float[Array, "B T C"],
    counted: Bool[Array, "B T"],
    prototypes: Float[Array, "C K"],
    temperature: Float[Array, ""],
    *,
    mesh: AnyMesh,
    axes: Axes,
    dtype: str,
    chunk_size: int,
) -> Float[Array, " K"]:
    """Return the potentials of prototypes after three iterations over the `counted` states.

    With logits l and potentials f of prototypes and g of states, q = exp(l + f + g). An iteration
    gives each prototype the same Σ q over all states, then each state Σ q = 1, which is the softmax
    that follows. Nothing is differentiated.
    """

    def local(teacher: Array, counted: Array, kernel: Array, temperature: Array) -> Array:
        kernel = _gathered(kernel, axes, dtype)
        teacher = teacher.astype(dtype)
        chunks = _chunks((teacher, counted), 2, chunk_size)

        def visit(
            potentials: Array | None, sums: tuple[Array, Array], chunk: tuple[Array, Array]
        ) -> tuple[Any, None]:
            states, is_counted = chunk
            logits = _logits(states, kernel, axes) / temperature
            if potentials is not None:
                logits = logits - _log_sum(logits + potentials, axes)[:, None]
            logits = jnp.where(is_counted[:, None], logits, _NEVER)
            top, total = sums
            new = jnp.maximum(top, logits.max(0))
            return (new, total * jnp.exp(top - new) + jnp.exp(logits - new).sum(0)), None

        potentials = None
        for _ in range(_SINKHORN):
            zeros = jnp.zeros_like(kernel[0])  # varies over the mesh like a sum of logits
            add = functools.partial(visit, potentials)
            (top, total), _ = lax.scan(add, (zeros + _NEVER, zeros), chunks)
            highest = lax.pmax(top, axes.rows)
            potentials = -highest - jnp.log(lax.psum(total * jnp.exp(top - highest), axes.rows))
        return cast(Array, potentials)

    rows, kernel = P(axes.rows), P(axes.width, axes.vocabulary)
    inputs = (rows, rows, kernel, P())
    mapped = jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=P(axes.vocabulary))
    return mapped(*lax.stop_gradient((teacher, counted, prototypes, temperature)))


def cross_entropy(
    student: Float[Array, "B T S C"],
    teacher: Float[Array, "B T C"],
    prototypes: Float[Array, "C K"],
    of_teacher: Float[Array, "C K"],
    potentials: Float[Array, " K"],
    temperatures: tuple[float, Float[Array, ""]],
    *,
    mesh: AnyMesh,
    axes: Axes,
    dtype: str,
    chunk_size: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Return the cross-entropy of each of the teacher's states with S of the student's, summed over
    S, and the entropy of the teacher's.

    Both sides' probabilities are softmaxes, in float32, of the products with their prototypes /
    their `temperatures` (student, teacher), the teacher's with `potentials` added. Matmuls are in
    `dtype`. Gradients are those of `student` and `prototypes`.
    """
    of_student, teacher_temperature = temperatures
    number = student.shape[2]

    def local(student: Array, teacher: Array, potentials: Array, *rest: Array) -> Any:
        temperature, kernel, teacher_kernel = rest
        kernel, teacher_kernel = (_gathered(x, axes, dtype) for x in (kernel, teacher_kernel))

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def compare(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
            student, teacher = chunk
            logits = _logits(teacher, teacher_kernel, axes) / temperature + potentials
            log_p = logits - _log_sum(logits, axes)[:, None]
            p = jnp.exp(log_p)
            entropy = -lax.psum((p * log_p).sum(-1), axes.vocabulary)
            predicted = _logits(student.reshape(-1, student.shape[-1]), kernel, axes) / of_student
            normalizers = _log_sum(predicted, axes).reshape(-1, number).sum(-1)
            predicted = predicted.reshape(-1, number, predicted.shape[-1]).sum(1)
            return normalizers - lax.psum((p * predicted).sum(-1), axes.vocabulary), entropy

        states = student.astype(dtype), teacher.astype(dtype)
        chunks = _chunks(states, 2, max(chunk_size // number, 1))
        return jax.tree.map(lambda x: x.reshape(student.shape[:2]), lax.map(compare, chunks))

    rows, kernel = P(axes.rows), P(axes.width, axes.vocabulary)
    inputs = (rows, rows, P(axes.vocabulary), P(), kernel, kernel)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=(rows, rows))
    teacher, of_teacher, potentials, temperature = lax.stop_gradient(
        (teacher, of_teacher, potentials, teacher_temperature)
    )
    return mapped(student, teacher, potentials, temperature, prototypes, of_teacher)


def _gathered(kernel: Float[Array, "c k"], axes: Axes, dtype: str) -> Float[Array, "C k"]:
    """Gather this device's prototypes in `dtype`, and return them in float32.

    Their gradients are summed over all rows here in float32, and over devices behind that loop,
    since here they vary along all axes of the mesh.
    """
    kernel = lax.all_gather(kernel.astype(dtype), axes.width, axis=0, tiled=True)
    others = tuple(axis for axis in axes.rows if axis != axes.width)
    return lax.pcast(kernel.astype(jnp.float32), others, to="varying")


def _chunks(arrays: Any, dims: int, size: int) -> Any:
    """Split the rows of local arrays, their first `dims` dimensions, into equal chunks of at most
    `size` rows."""
    rows = math.prod(jax.tree.leaves(arrays)[0].shape[:dims])
    count = next(n for n in range(-(-rows // size), rows + 1) if rows % n == 0)
    return jax.tree.map(lambda x: x.reshape(count, rows // count, *x.shape[dims:]), arrays)


def _logits(states: Float[Array, "N C"], kernel: Float[Array, "C k"], axes: Axes) -> Array:
    """Multiply states, which all devices along the vocabulary have, by local prototypes."""
    return _product(lax.pcast(states, axes.vocabulary, to="varying"), kernel)


@jax.custom_vjp
def _product(states: Float[Array, "N C"], kernel: Float[Array, "C k"]) -> Float[Array, "N k"]:
    """Multiply in the states' type, also in the backward pass; sums are in float32."""
    return product("NC,CK->NK", states, kernel.astype(states.dtype))


def _product_bwd(arguments: tuple[Array, Array], d_logits: Array) -> tuple[Array, Array]:
    states, kernel = arguments
    d_logits = d_logits.astype(states.dtype)
    d_states = product("NK,CK->NC", d_logits, kernel.astype(states.dtype))
    return d_states.astype(states.dtype), product("NC,NK->CK", states, d_logits)


_product.defvjp(lambda *arguments: (_product(*arguments), arguments), _product_bwd)


def _log_sum(logits: Float[Array, "N k"], axes: Axes) -> Float[Array, " N"]:
    """Return log Σ exp over all prototypes."""
    top = lax.pmax(lax.stop_gradient(logits.max(-1)), axes.vocabulary)
    return top + jnp.log(lax.psum(jnp.exp(logits - top[:, None]).sum(-1), axes.vocabulary))
