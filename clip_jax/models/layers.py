"""Layers of both towers: the pre-norm residual block of CLIP's transformers (paper, 2.4).

Dimension names of the repository, in signatures, einsum strings and the names of parameters:
`B` batch, `H W C` image, `P Q` patch rows and columns, `L` tokens, `D` width, `S` query-key-value,
`N` heads, `K` head dim, `F` MLP width, `E` embedding, `V` vocabulary. Only parameters have
`depth`, the scanned axis; `O`, channels of a convolution; `W`, the width of a token embedding
table; and `-`, an axis that is never sharded (gains, biases, positions, the rows of that table).
"""

import functools
import math
import operator
import re
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from clip_jax.errors import check_ranges
from clip_jax.models import attention

# swiglu: SiLU of a further linear map, times the first one (arXiv:2002.05202).
Activation = Literal["quick_gelu", "gelu", "gelu_tanh", "relu", "swiglu"]
# LayerNorm of a residual block: before each branch, of its output, or after the sum (BERT).
Norm = Literal["before", "branch", "after"]
Biases = Literal["qkv", "qv", "none"]  # which of attention's queries, keys and values have a bias
DType = Literal["float32", "bfloat16"]
# Activations saved for the backward pass, which recomputes the others: from all to none.
Remat = Literal["none", "hidden", "mlp", "residual", "attention", "outputs", "full"]
# Names of saved activations, and their size in widths per token (mean and variance are 2 numbers).
KEPT = {
    "hidden": ("moments", "qkv", "attended", "residual", "hidden"),  # 9; recomputes norms, GELU
    "mlp": ("moments", "attended", "residual", "hidden"),  # 6; also queries, keys and values
    "residual": ("moments", "qkv", "attended", "residual"),  # 5; norms and the MLP's first matmul
    "attention": ("moments", "qkv", "attended"),  # 4; also the projection of attention's output
    "outputs": ("moments", "attended", "residual"),  # 2; both of "mlp" and "residual"
    "full": (),  # 0; recomputes everything
}
# Pattern of the names of these modules in a compiled step by the part of `plan` they belong to; the
# first that matches counts. Towers add patterns for their own modules (`TowerConfig.parts`).
PARTS = (
    ("norms", r"/(ln_\w+|norm)/"),
    ("projections", r"/(in_proj|out_proj)/(?!.*mlp)|/(q|kv|proj)/"),
    ("MLP", r"/mlp/"),
    ("attention", r"/attn"),
)
STACKS = ("resblocks", "layers")  # parameters of a `Transformer` of `Block` or of `decoder.Layer`
# Ranges of the settings of models that memory and compilation depend on. Real models stay far
# inside; a file with another size is refused before anything of that size is made.
SIZES = {
    "image_size": "[1, 16384]", "patch_size": "[1, 16384]", "max_patches": "[1, 65536]",
    "num_patches": "[0, 65536]", "reference_grid": "[1, 16384]", "registers": "[0, 65536]",
    "pool_queries": "[2, 65536]", "pool_heads": "[1, 32768]", "embed_dim": "[1, 65536]",
    "width": "[1, 32768]", "depth": "[1, 1024]", "layers": "[1, 100]", "num_heads": "[1, 32768]",
    "mlp_ratio": "(0, 1000]", "mlp_width": "[1, 4194304]", "batch_norm_group": "[1, 2147483647]",
    "context_length": "[2, 65536]", "num_positions": "[1, 131072]", "token_types": "[1, 65536]",
    "first_position": "[0, 65536]", "vocab_size": "[1, 4194304]", "eos_token_id": "[0, 4194303]",
    "begin_id": "[0, 4194303]", "end_id": "[0, 4194303]", "pad_id": "[0, 4194303]",
    "zeroed_id": "[0, 4194303]", "kept_positions": "[0, 65536]", "stretched_from": "[2, 65536]",
    "unroll": "[1, 1024]", "rank": "[1, 32768]",
}  # fmt: skip
Init = Callable[..., Array]
_ONES = 8  # rows of ones whose product is a sum; of one row the compiler would make a sum again


def check_sizes(config: Any, where: str, **ranges: str) -> None:
    """Raise InputError for settings outside `SIZES`, or outside other `ranges`, as `check_ranges`
    does."""
    sizes = {name: text for name, text in SIZES.items() if hasattr(type(config), name)}
    check_ranges(config, where, **sizes | ranges)


class Layout(NamedTuple):
    """Functions that depend on how arrays are sharded; the model knows no mesh (see `sharding`)."""

    constrain: Callable[[Array], Array] = lambda x: x  # called on activations [B, ...]
    lookup: Callable[[Array, Array], Array] = operator.getitem  # table [V, D], ids [B, L]
    attend: Callable[..., Array] = attention.xla  # of qkv, heads, causal, lengths
    einsum: Callable[[str, Array, Array], Array] = jnp.einsum  # of x [B, ...] and a kernel
    conv: Callable[..., Array] = jax.lax.conv_general_dilated  # of a kernel sharded along D
    whole_heads: bool = True  # whether every device has all heads


@dataclass(frozen=True)
class Operations:
    """Operations of a forward pass, which the conventions of `flops` turn into FLOPs."""

    macs: int = 0  # multiply-adds of convolutions and matmuls, attention's included
    attention: int = 0  # those of attention without its projections
    layer_norm: int = 0  # elements normalised
    batch_norm: int = 0  # elements normalised

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __rmul__(self, times: int) -> "Operations":
        return Operations(*(times * count for count in astuple(self)))


def named(names: str, init: Init) -> Callable[..., Any]:
    """Return an initialiser whose parameters have named dimensions (see above)."""
    return nn.with_partitioning(init, tuple(names.split()))


def quick_gelu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Compute x·σ(1.702x), with which OpenAI's weights were trained; GELU gives other results."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Compute x·Φ(x), with Φ of the normal distribution: by `lax.erfc` in float32, by `fast_gelu`
    in bfloat16, where `erfc` takes a TPU longer than the matmul that follows."""
    return nn.gelu(x, approximate=False) if x.dtype.itemsize >= 4 else fast_gelu(x)


# Fitted to log Φ(x)/Φ(−x) = 2xp(x²) up to |x| = 5; coefficients of p, highest power first.
_LOG_ODDS = (4.5165e-6, -4.93366e-4, 3.7914015e-2, 0.7963037)


def _error_function(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Return 2Φ(x) − 1, to 2e-4."""
    square, (odds, *others) = jnp.minimum(x * x, 25), _LOG_ODDS
    for coefficient in others:
        odds = odds * square + coefficient
    return jnp.tanh(x * odds)


@jax.custom_jvp
def fast_gelu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Compute x·Φ(x) in float32 with an error of at most 2e-4, and round it to the type of x."""
    x32 = x.astype(jnp.float32)
    half = 0.5 * x32
    return (half + half * _error_function(x32)).astype(x.dtype)


@fast_gelu.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    x32 = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * x32 * x32 - 0.5 * math.log(2 * math.pi))
    slope = 0.5 + 0.5 * _error_function(x32) + x32 * density
    return fast_gelu(x), (slope * dx.astype(jnp.float32)).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "swiglu": nn.silu,  # of the gate
}


def uniform(limit: float) -> Init:
    """Return an initialiser U(−limit, limit); PyTorch's Linear has `uniform(fan_in**-0.5)`."""

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


class BlockInit(NamedTuple):
    """Initialisers of one residual block's matrices."""

    in_proj: Init
    out_proj: Init
    c_fc: Init
    c_proj: Init

    @classmethod
    def image(cls, width: int, mlp_width: int) -> "BlockInit":
        """Return PyTorch's defaults, as in OpenAI's image tower (Xavier for `in_proj`)."""
        linear = uniform(width**-0.5)
        return cls(uniform((6 / (4 * width)) ** 0.5), linear, linear, uniform(mlp_width**-0.5))

    @classmethod
    def text(cls, width: int, depth: int) -> "BlockInit":
        """Return normals scaled by width and depth, as in OpenAI's `initialize_parameters`."""
        normal = nn.initializers.normal
        residual = normal(width**-0.5 * (2 * depth) ** -0.5)
        return cls(normal(width**-0.5), residual, normal((2 * width) ** -0.5), residual)


class BlockConfig(NamedTuple):
    """Settings of one residual block."""

    num_heads: int
    mlp_width: int
    activation: Activation
    epsilon: float  # of LayerNorm
    init_fns: BlockInit
    layer_scale: float | None = None  # initial gain of both residual branches; None: no gains
    causal: bool = False  # tokens do not attend to later ones
    layout: Layout = Layout()
    mlp: bool = True  # False: the attention branch alone
    norm: Norm = "before"
    inner_norm: bool = False  # norms before the last linear map of both branches, too (EVA-02)
    biases: Biases = "qkv"
    pair_distance: int = 1  # between the channels that rotary positions turn as a pair


class LayerNorm(nn.Module):
    """LayerNorm, computed at least in float32 and returned in the input's dtype."""

    epsilon: float = 1e-5
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", named("-", nn.initializers.ones), (x.shape[-1],))
        x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x32 = x32 - checkpoint_name(x32.mean(-1), "moments")[..., None]
        variance = checkpoint_name(jnp.square(x32).mean(-1), "moments")[..., None]
        x32 = x32 * jax.lax.rsqrt(variance + self.epsilon) * scale
        if self.use_bias:
            x32 = x32 + self.param("bias", named("-", nn.initializers.zeros), (x.shape[-1],))
        return x32.astype(x.dtype)


def mean(x: Float[Array, "B L D"], length: Int[Array, " B"] | None) -> Float[Array, "B D"]:
    """Return the mean of the first `length` tokens of each row; None: of all."""
    if length is None:
        return x.mean(axis=1)
    valid = jnp.arange(x.shape[1]) < length[:, None]
    return jnp.where(valid[:, :, None], x, 0).sum(1) / length[:, None].astype(x.dtype)


@jax.custom_vjp
def affine(
    x: Float[Array, "*B D"], kernel: Float[Array, "..."], bias: Float[Array, "..."]
) -> Float[Array, "*B F"]:
    """Compute x·kernel + bias, the kernel reshaped to a matrix, with faster gradients.

    The bias's gradient is a product: as a sum over rows, a TPU takes seven times as long as reading
    it does. The kernel's is computed as a matrix: with the parameter's axes, the compiler would
    copy the output's gradient to another layout.
    """
    return x @ kernel.reshape(x.shape[-1], -1) + bias.reshape(-1)


def _affine_forward(x: Array, kernel: Array, bias: Array) -> tuple[Array, tuple[Array, ...]]:
    return affine(x, kernel, bias), (x, kernel, bias)


def _affine_backward(saved: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array]:
    x, kernel, bias = saved
    dkernel, dbias = jax.lax.platform_dependent(x, dy, cpu=_flat_sums, default=_sums)
    if kernel.ndim > 2:
        dkernel = jax.lax.optimization_barrier(dkernel)
    dx = dy @ kernel.reshape(x.shape[-1], -1).T
    return dx, dkernel.reshape(kernel.shape), dbias.reshape(bias.shape)


def _sums(x: Array, dy: Array) -> tuple[Array, Array]:
    rows = tuple(range(x.ndim - 1))
    over_rows = ((rows, rows), ((), ()))
    dkernel = jax.lax.dot_general(x, dy, over_rows)
    if dy.dtype == jnp.float32:  # a TPU rounds the products of float32
        return dkernel, dy.sum(rows)
    ones = jnp.ones((*dy.shape[:-1], _ONES), dy.dtype)
    return dkernel, jax.lax.dot_general(ones, dy, over_rows)[0]


def _flat_sums(x: Array, dy: Array) -> tuple[Array, Array]:
    """Compute the same from matrices: of more axes, XLA on CPU makes transposed copies."""
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return x.T @ dy, jnp.ones(len(dy), dy.dtype) @ dy


affine.defvjp(_affine_forward, _affine_backward)


class Einsum(nn.Module):
    """Linear map einsum(equation, x, kernel) + bias, whose parameters have named axes."""

    equation: str
    shape: tuple[int, ...]
    bias_shape: tuple[int, ...] | None
    kernel_init: Init
    bias_init: Init = nn.initializers.zeros
    einsum: Callable[[str, Array, Array], Array] = jnp.einsum
    # Merge the output's axes after rows and tokens: the compiler's layout of arrays of many axes is
    # not the one that attention kernels read.
    flat: bool = False
    # The kernel is gathered from its shards as a matrix, whose rows are all its axes but the last.
    # A TPU computes the product of patches and a kernel of many axes as a slower convolution.
    as_matrix: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        left, right, _ = re.split(",|->", self.equation)
        kernel_init = named(" ".join(right), self.kernel_init)
        kernel = self.param("kernel", kernel_init, self.shape).astype(x.dtype)
        bias = None
        if self.bias_shape is not None:
            names = " ".join(name for name in right if name not in left).replace("D", "-")
            bias_init = named(names, self.bias_init)
            bias = self.param("bias", bias_init, self.bias_shape).astype(x.dtype)
            if "S" in right and len(bias) < kernel.shape[right.index("S")]:  # keys have none
                bias = jnp.insert(bias, 1, 0, axis=0)
        if self.flat and bias is not None:
            return adapt(self, x, affine(x, kernel, bias))
        if self.flat:
            y = x @ kernel.reshape(x.shape[-1], -1)
        elif self.as_matrix:
            matrix = kernel.reshape(-1, kernel.shape[-1])
            x = x.reshape(*x.shape[: x.ndim - kernel.ndim + 1], -1)
            y = self.einsum("BLP,PD->BLD", x, matrix)
        else:
            y = self.einsum(self.equation, x, kernel)
        return adapt(self, x, y if bias is None else y + bias)


def adapt(module: nn.Module, x: Float[Array, "..."], y: Float[Array, "..."], name: str = "") -> Any:
    """Return y = x·W with what the low-rank adapters of W add, if W has any (see `lora`).

    The last axes of `x` are those that W contracts. `name` begins the names of the adapters.
    """
    if not module.has_variable("params", f"{name}lora_a"):
        return y
    a, b, scale = (
        module.get_variable("params", f"{name}lora_{part}").astype(x.dtype)
        for part in ("a", "b", "scale")
    )
    a, b = a.reshape(-1, *a.shape[-2:]), b.reshape(*b.shape[:2], -1)
    contracted = next(i for i in range(1, x.ndim) if math.prod(x.shape[-i:]) == len(a))
    rows = x.reshape(*x.shape[:-contracted], -1)
    low, b = jnp.einsum("...D,DSR->...SR", rows, a), jnp.einsum("SRF,ST->SRTF", b, scale)
    return y + jnp.einsum("...SR,SRTF->...TF", low, b).reshape(y.shape)


def record(module: nn.Module, inputs: Callable[[], tuple[Any, ...]]) -> None:
    """Record attention weights, if `apply` collects any (`mutable=["intermediates"]`).

    `inputs` returns those of `attention.weights`. Otherwise nothing calls it, so that programs stay
    the same.
    """
    if module.is_mutable_collection("intermediates"):
        module.sow("intermediates", "weights", attention.weights(*inputs()))


class Attention(nn.Module):
    """Multi-head self-attention with a fused projection to queries, keys and values."""

    num_heads: int
    init_fns: BlockInit
    causal: bool
    layout: Layout = Layout()
    norm: float | None = None  # epsilon of LayerNorm of the heads' output; None: no norm
    biases: Biases = "qkv"
    pair_distance: int = 1  # see `attention.rotate`
    out_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        keys: attention.Keys | attention.Rotation = None,
        cache: attention.KV | None = None,
        position: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B L D"], attention.KV | None]:
        """Attend to all tokens, to `keys` (a mask, or the first n), or to those in a KV cache.

        A mask is that of each row's tokens [B, L], or of each of their queries, too [B, L, L].

        `keys` may instead be rotary positions, with which all tokens are attended to.

        With `cache`, x is one token at `position`, which attends to the tokens up to itself; the
        updated cache is returned.
        """
        width = x.shape[-1]
        heads = (self.num_heads, width // self.num_heads)
        biases = {"qkv": (3, *heads), "qv": (2, *heads), "none": None}
        qkv = Einsum(
            "BLD,DSNK->BLSNK",
            (width, 3, *heads),
            biases[self.biases],
            self.init_fns.in_proj,
            flat=self.layout.whole_heads,
            name="in_proj",
        )(x)
        if isinstance(keys, attention.Rotation):
            qkv, keys = attention.rotate(qkv, self.num_heads, keys, self.pair_distance), None
        qkv = checkpoint_name(qkv, "qkv")
        if not self.causal:
            record(self, lambda: (*attention.split_heads(qkv, self.num_heads)[:2], keys))
        if cache is not None and position is not None:
            x, cache = attention.cached(qkv, self.num_heads, cache, position)
        elif keys is not None and keys.ndim > 1:  # no kernel supports such a mask
            x = attention.xla(qkv, self.num_heads, self.causal, keys=keys)
        else:
            x = self.layout.attend(qkv, self.num_heads, self.causal, keys)
        x = checkpoint_name(x, "attended")
        if self.norm is not None:
            flat = x.reshape(*x.shape[:2], width)
            x = LayerNorm(self.norm, name="ln")(flat).reshape(x.shape)
        x = Einsum(
            "BLNK,NKD->BLD",
            (*heads, width),
            (width,) if self.out_bias else None,
            self.init_fns.out_proj,
            flat=self.layout.whole_heads,
            name="out_proj",
        )(x)
        return x, cache


class MLP(nn.Module):
    """Two linear maps around an activation, which may have a third map as its gate."""

    mlp_width: int
    activation: Activation
    init_fns: BlockInit
    norm: float | None = None  # epsilon of LayerNorm after the activation; None: no norm
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        width, mlp_width = x.shape[-1], self.mlp_width

        def hidden(name: str) -> Array:
            return checkpoint_name(
                Einsum(
                    "...D,DF->...F",
                    (width, mlp_width),
                    (mlp_width,) if self.use_bias else None,
                    self.init_fns.c_fc,
                    uniform(width**-0.5),
                    flat=True,
                    name=name,
                )(x),
                "hidden",
            )

        activation = ACTIVATIONS[self.activation]
        if self.activation == "swiglu":
            y = activation(hidden("c_gate")) * hidden("c_fc")
        else:
            y = activation(hidden("c_fc"))
        if self.norm is not None:
            y = LayerNorm(self.norm, name="ln")(y)
        return Einsum(
            "...F,FD->...D",
            (mlp_width, width),
            (width,) if self.use_bias else None,
            self.init_fns.c_proj,
            uniform(mlp_width**-0.5),
            flat=True,
            name="c_proj",
        )(y)


class LayerScale(nn.Module):
    """LayerScale: a learned gain per channel (CaiT, arXiv:2103.17239)."""

    initial: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        init = named("-", nn.initializers.constant(self.initial))
        gamma = self.param("gamma", init, (x.shape[-1],))
        return x * gamma.astype(x.dtype)


def block_operations(
    tokens: int,
    width: int,
    mlp_width: int,
    mlp: bool = True,
    gated: bool = False,
    inner_norm: bool = False,
) -> Operations:
    """Count a block's operations: 4·width² + 2·tokens·width + 2·width·mlp_width per token, and half
    as much again for the MLP with a gate."""
    return Operations(
        macs=tokens * width * (4 * width + 2 * tokens + mlp * (2 + gated) * mlp_width),
        attention=2 * tokens * width * tokens,
        layer_norm=tokens * ((1 + mlp) * width + inner_norm * (width + mlp_width)),
    )


class Block(nn.Module):
    """Residual block: x + attention(ln_1(x)), then x + mlp(ln_2(x)); see `Norm` for other orders.

    Returns x and the cache, if any (see `Attention`), or with `collect` x twice.
    """

    stack = STACKS[0]
    config: BlockConfig
    collect: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        cache: attention.KV | None = None,
        keys: attention.Keys | attention.Rotation = None,
        position: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"] | attention.KV | None]:
        c = self.config
        inner = c.epsilon if c.inner_norm else None

        def add(number: int, x: Array, branch: Callable[[Array], Array]) -> Array:
            norm = LayerNorm(c.epsilon, name=f"ln_{number}")
            y = branch(norm(x) if c.norm == "before" else x)
            if c.norm == "branch":
                y = norm(y)
            if c.layer_scale is not None:
                y = LayerScale(c.layer_scale, name=f"ls_{number}")(y)
            return c.layout.constrain(norm(x + y) if c.norm == "after" else x + y)

        def attend(x: Array) -> Array:
            nonlocal cache
            sizes = (c.num_heads, c.init_fns, c.causal, c.layout, inner)
            attn = Attention(*sizes, c.biases, c.pair_distance, name="attn")
            x, cache = attn(x, keys, cache, position)
            return x

        x = checkpoint_name(add(1, x, attend), "residual")
        if c.mlp:
            mlp = MLP(c.mlp_width, c.activation, c.init_fns, inner, name="mlp")
            x = add(2, x, mlp)
        return x, x if self.collect else cache


def apart(params: dict[str, Any]) -> dict[str, Any]:
    """Split stacked parameters into those of each block, under the stack's name and a number.

    Token-by-token decoding would otherwise slice every block's parameters out of the stack for
    each token, which takes a CPU longer than the matmuls.
    """
    out = {}
    for name, tree in params.items():
        if name in STACKS:
            for i in range(len(jax.tree.leaves(tree)[0])):
                out[f"{name}_{i}"] = jax.tree.map(lambda x, i=i: x[i], tree)
        else:
            out[name] = apart(tree) if isinstance(tree, dict) else tree
    return out


class Transformer(nn.Module):
    """Stack of blocks, scanned: every parameter has a leading axis of length `depth`.

    Returns the last block's output and, with `collect`, every block's as `[depth, B, L, D]`. With
    `caches`, one per block, it returns the updated caches instead, and blocks have separate
    parameters (see `apart`). All blocks get the same `other`, the keys to attend to or an image;
    `fields` and `options` are further fields of `block`. An iteration runs `unroll` blocks.
    """

    config: BlockConfig
    depth: int
    remat: Remat = "none"
    unroll: int = 1
    block: type[Any] = Block
    fields: tuple[Any, ...] = ()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B *L D"],
        other: Any = None,
        *,
        caches: list[Any] | None = None,
        position: Int[Array, ""] | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "B *L D"], Any]:
        x = self.config.layout.constrain(x)
        if caches is not None:
            updated = []
            for i, cache in enumerate(caches):
                name = f"{self.block.stack}_{i}"
                block = self.block(self.config, *self.fields, name=name, **options)
                x, cache = block(x, cache, other, position)
                updated.append(cache)
            return x, updated
        block = self.block
        if self.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(*KEPT[self.remat])
            # Inside a loop XLA cannot merge the recomputation away, so no barrier is needed.
            block = nn.remat(block, prevent_cse=self.unroll >= self.depth, policy=policy)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast,) * 3,
            length=self.depth,
            unroll=min(self.unroll, self.depth),
            metadata_params={nn.PARTITION_NAME: "depth"},
        )
        stack = scanned(self.config, *self.fields, name=self.block.stack, **options)
        return stack(x, None, other, position)
