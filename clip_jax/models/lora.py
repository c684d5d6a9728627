"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv:2106.09685), trained in place of frozen weights.

A linear map x·W becomes x·W + scale · (x·A)·B. A and B are stored beside the kernel: `X/kernel` has
`X/lora_a` and `X/lora_b`, a bare matrix `X` has `X_lora_a` and `X_lora_b`. A map fused of several
(queries, keys and values) has one adapter for each part that is a target, along the axis S.
"""

import fnmatch
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from clip_jax.errors import InputError
from clip_jax.models import layers
from clip_jax.models.clip import CLIPConfig, Params, parameters

PARTS = {1: ("",), 2: ("k", "v"), 3: ("q", "k", "v")}  # of a fused map, by their number
_BARE = ("visual/proj", "text/text_projection")  # matrices without a module of their own


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Train low-rank adapters of linear maps; the other weights of init_from are frozen."""

    rank: int = 8  # Rank of the adapters.
    alpha: float = 16.0  # Scale of the adapters: alpha / rank, or alpha / √rank (rank_stabilized).
    # Linear maps to adapt, as patterns such as "visual/*/attn/q", "*/mlp/*", "*proj". A fused map
    # is named by its parts: attn/q, attn/k, attn/v.
    targets: tuple[str, ...] = ("*/attn/*", "*/mlp/*")
    rank_stabilized: bool = False  # Divide alpha by √rank (rsLoRA, arXiv:2312.03732).

    def __post_init__(self) -> None:
        layers.check_sizes(self, "lora.", alpha="(0, inf)")

    @property
    def scale(self) -> float:
        """The factor of A·B."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class Adapted(NamedTuple):
    """A kernel with adapters."""

    kernel: str  # its path
    names: tuple[str, ...]  # of all its parts, such as visual/transformer/resblocks/attn/q
    chosen: tuple[bool, ...]  # which parts are targets
    inputs: tuple[int, ...]  # sizes of its contracted dimensions
    outputs: tuple[int, ...]
    depth: tuple[int, ...]  # length of the stack of blocks, or nothing
    dims: tuple[str, str, str]  # names of depth, inputs and outputs, for shardings

    @property
    def prefix(self) -> str:
        """What the adapters' paths begin with."""
        return f"{self.kernel}_".replace("/kernel_", "/")


@functools.lru_cache(maxsize=64)
def linear_maps(model: CLIPConfig) -> tuple[Adapted, ...]:
    """Return every kernel of the model that can have adapters, none of them chosen."""
    maps = []
    for path, box in parameters(model).items():
        axes = dict(zip(box.names, box.value.shape, strict=True))
        is_convolution = "P" in axes and (not model.vision.has_linear_patches or "O" in axes)
        if path not in _BARE and (not path.endswith("/kernel") or is_convolution):
            continue
        depth, parts = axes.pop("depth", None), axes.pop("S", 1)
        dims, sizes = tuple(axes), tuple(axes.values())
        cut = 1 if dims[0] == "D" else len(dims) - 1
        name = path.removesuffix("/kernel")
        folder = name.rpartition("/")[0]
        maps.append(
            Adapted(
                kernel=path,
                names=tuple(f"{folder}/{part}" if part else name for part in PARTS[parts]),
                chosen=(False,) * parts,
                inputs=sizes[:cut],
                outputs=sizes[cut:],
                depth=(depth,) if depth else (),
                dims=("depth " if depth else "", " ".join(dims[:cut]), " ".join(dims[cut:])),
            )
        )
    return tuple(maps)


def adapted(model: CLIPConfig, lora: LoRAConfig) -> list[Adapted]:
    """Return the kernels with adapters. Raises InputError for a target that matches no map."""
    maps, chosen = linear_maps(model), set[str]()
    names = [name for each in maps for name in each.names]
    for target in lora.targets:
        if not (matched := fnmatch.filter(names, target)):
            raise InputError(
                f"lora.targets: {target!r} matches no linear map of the model. Choose from these, "
                "or a pattern such as */attn/q:\n  " + "\n  ".join(names)
            )
        chosen.update(matched)
    marked = (each._replace(chosen=tuple(name in chosen for name in each.names)) for each in maps)
    return [each for each in marked if any(each.chosen)]


def shapes(model: CLIPConfig, lora: LoRAConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return path → shape and names of dimensions of every trained array."""
    arrays = {}
    for each in adapted(model, lora):
        inner, (stack, inputs, outputs) = (sum(each.chosen), lora.rank), each.dims
        a, b = (*each.depth, *each.inputs, *inner), (*each.depth, *inner, *each.outputs)
        arrays[f"{each.prefix}lora_a"] = a, f"{stack}{inputs} - -"
        arrays[f"{each.prefix}lora_b"] = b, f"{stack}- - {outputs}"
    return arrays


def draw(model: CLIPConfig, lora: LoRAConfig, key: Array) -> Params:
    """Draw adapters that change nothing yet: A from U(±1/√inputs), as in PEFT, and B = 0."""
    drawn = {path: jnp.zeros(shape) for path, (shape, _) in shapes(model, lora).items()}
    for number, each in enumerate(adapted(model, lora)):
        path, limit = f"{each.prefix}lora_a", math.prod(each.inputs) ** -0.5
        part = jax.random.fold_in(key, number)
        drawn[path] = jax.random.uniform(part, drawn[path].shape, jnp.float32, -limit, limit)
    return unflatten_dict(drawn, sep="/")


def join(base: Params, adapters: Params, model: CLIPConfig, lora: LoRAConfig) -> Params:
    """Return the parameters of the adapted model, for the model's own functions.

    They have `lora_scale` [depth, S, T]: the scale where adapter S is of part T, and 0 elsewhere.
    """
    flat = flatten_dict(base, sep="/") | flatten_dict(adapters, sep="/")
    for each in adapted(model, lora):
        scale = lora.scale * jnp.eye(len(each.chosen))[np.array(each.chosen)]
        flat[f"{each.prefix}lora_scale"] = jnp.broadcast_to(scale, (*each.depth, *scale.shape))
    return unflatten_dict(flat, sep="/")


def merge(base: Params, adapters: Params, model: CLIPConfig, lora: LoRAConfig) -> Params:
    """Return the base with W + scale · A·B in place of W, in float32."""
    flat, arrays = flatten_dict(base, sep="/"), flatten_dict(adapters, sep="/")
    for each in adapted(model, lora):
        a, b = (np.asarray(arrays[f"{each.prefix}lora_{name}"], np.float32) for name in "ab")
        a = a.reshape(*each.depth, -1, *a.shape[-2:])
        b = b.reshape(*each.depth, *b.shape[len(each.depth) :][:2], -1)
        kernel = np.array(flat[each.kernel], np.float32)
        parts = kernel.reshape(*a.shape[:-2], len(each.chosen), -1)  # of the same memory
        change = np.einsum("...DSR,...SRF->...DSF", a, b, optimize=True)
        parts[..., np.array(each.chosen), :] += np.float32(lora.scale) * change
        flat[each.kernel] = kernel
    return unflatten_dict(flat, sep="/")
