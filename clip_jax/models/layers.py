"""What both towers are made of: the pre-norm residual block of CLIP's transformers (paper, 2.4).

Dimension key of the repository, in signatures and in einsum strings alike:
`B` batch, `H W C` image, `P Q` patch rows and columns, `L` tokens, `D` width, `S` query-key-value,
`N` heads, `K` head dim, `F` MLP width, `E` embedding, `V` vocabulary.
"""

import functools
import operator
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from clip_jax.models import attention

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]
DType = Literal["float32", "bfloat16"]
Remat = Literal["none", "full", "attention", "dots"]
Init = Callable[..., Array]


class Layout(NamedTuple):
    """How arrays lie on a mesh, which the model does not know (`sharding.layout` does)."""

    place: Callable[[Array], Array] = lambda x: x  # called on activations [B, ...]
    lookup: Callable[[Array, Array], Array] = operator.getitem  # table [V, D], ids [B, L]
    attend: Callable[[Array, Array, Array, attention.Mask], Array] = attention.xla
    einsum: Callable[[str, Array, Array], Array] = jnp.einsum  # of x [B, ...] and a kernel
    conv: Callable[..., Array] = jax.lax.conv_general_dilated  # of a kernel split by D


def quick_gelu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """x·σ(1.702x): OpenAI's released weights were trained with it, so it is not interchangeable."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
}


def uniform(limit: float) -> Init:
    """U(−limit, limit); PyTorch's Linear default is `uniform(fan_in**-0.5)`."""

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
        """PyTorch's defaults, which OpenAI's image tower keeps (Xavier for `in_proj`)."""
        linear = uniform(width**-0.5)
        return cls(uniform((6 / (4 * width)) ** 0.5), linear, linear, uniform(mlp_width**-0.5))

    @classmethod
    def text(cls, width: int, depth: int) -> "BlockInit":
        """Normals scaled by width and depth, as OpenAI's `initialize_parameters` draws them."""
        residual = nn.initializers.normal(width**-0.5 * (2 * depth) ** -0.5)
        return cls(
            nn.initializers.normal(width**-0.5),
            residual,
            nn.initializers.normal((2 * width) ** -0.5),
            residual,
        )


class BlockConfig(NamedTuple):
    """What one residual block is made of."""

    num_heads: int
    mlp_width: int
    activation: Activation
    epsilon: float  # LayerNorm's
    init_fns: BlockInit
    layer_scale: float | None = None  # initial gain of both residual branches; None: no gains
    layout: Layout = Layout()


class LayerNorm(nn.Module):
    """LayerNorm computed in float32 whatever comes in, returned in the dtype that came in."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 - x32.mean(-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.epsilon)
        return (x32 * scale + bias).astype(x.dtype)


class Einsum(nn.Module):
    """einsum(equation, x, kernel) + bias: a linear map whose axes keep their names."""

    equation: str
    shape: tuple[int, ...]
    bias_shape: tuple[int, ...] | None
    kernel_init: Init
    bias_init: Init = nn.initializers.zeros
    einsum: Callable[[str, Array, Array], Array] = jnp.einsum

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kernel = self.param("kernel", self.kernel_init, self.shape).astype(x.dtype)
        y = self.einsum(self.equation, x, kernel)
        if self.bias_shape is None:
            return y
        return y + self.param("bias", self.bias_init, self.bias_shape).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection."""

    num_heads: int
    init_fns: BlockInit
    layout: Layout = Layout()

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "L L"] | None
    ) -> Float[Array, "B L D"]:
        width = x.shape[-1]
        heads = (self.num_heads, width // self.num_heads)
        qkv = Einsum(
            "BLD,DSNK->BLSNK", (width, 3, *heads), (3, *heads), self.init_fns.in_proj,
            name="in_proj",
        )(x)  # fmt: skip
        qkv = checkpoint_name(qkv, "qkv")
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        x = checkpoint_name(self.layout.attend(q, k, v, mask), "attended")
        return Einsum(
            "BLNK,NKD->BLD", (*heads, width), (width,), self.init_fns.out_proj, name="out_proj"
        )(x)


class MLP(nn.Module):
    """Two linear maps around an activation."""

    mlp_width: int
    activation: Activation
    init_fns: BlockInit

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        width, mlp_width = x.shape[-1], self.mlp_width
        x = Einsum(
            "...D,DF->...F", (width, mlp_width), (mlp_width,), self.init_fns.c_fc,
            uniform(width**-0.5), name="c_fc",
        )(x)  # fmt: skip
        x = ACTIVATIONS[self.activation](x)
        return Einsum(
            "...F,FD->...D", (mlp_width, width), (width,), self.init_fns.c_proj,
            uniform(mlp_width**-0.5), name="c_proj",
        )(x)  # fmt: skip


class LayerScale(nn.Module):
    """A learned gain per channel (CaiT's)."""

    initial: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        gamma = self.param("gamma", nn.initializers.constant(self.initial), (x.shape[-1],))
        return x * gamma.astype(x.dtype)


class Block(nn.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

    config: BlockConfig
    collect: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "L L"] | None
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"] | None]:
        c = self.config
        attn = Attention(c.num_heads, c.init_fns, c.layout, name="attn")
        mlp = MLP(c.mlp_width, c.activation, c.init_fns, name="mlp")
        ls_1 = ls_2 = lambda x: x
        if c.layer_scale is not None:
            ls_1 = LayerScale(c.layer_scale, name="ls_1")
            ls_2 = LayerScale(c.layer_scale, name="ls_2")
        x = c.layout.place(x + ls_1(attn(LayerNorm(c.epsilon, name="ln_1")(x), mask)))
        x = c.layout.place(x + ls_2(mlp(LayerNorm(c.epsilon, name="ln_2")(x))))
        return x, x if self.collect else None


class Transformer(nn.Module):
    """A stack of blocks, scanned: every parameter has a leading axis of length `depth`.

    Returns the last block's output and, with `collect`, every block's as `[depth, B, L, D]`.
    """

    config: BlockConfig
    depth: int
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        mask: Bool[Array, "L L"] | None = None,
        collect: bool = False,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "depth B L D"] | None]:
        block = Block
        if self.remat != "none":
            policies = {
                "full": jax.checkpoint_policies.nothing_saveable,
                # 4 widths a token instead of 9 for "dots"; of a block's four projections, two
                # are computed again: the attention's output and the MLP's first.
                "attention": jax.checkpoint_policies.save_only_these_names("qkv", "attended"),
                "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            }
            # Inside a scan XLA cannot merge the recomputation away: no CSE barrier needed.
            block = nn.remat(Block, prevent_cse=False, policy=policies[self.remat])
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )(self.config, collect, name="resblocks")
        return stack(self.config.layout.place(x), mask)
