"""Image towers that open_clip builds with timm: of SigLIP, MobileCLIP, PE core, EVA, ConvNeXt and
DINOv3; with DINOv2's, also those of timm's own folders.

The name determines the sizes and, unlike in the code of SigLIP's released weights, the activation.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np

from clip_jax.convert.state_dict import TORCH, Convention, check_floating
from clip_jax.convert.target import Inexpressible
from clip_jax.convert.tensor_files import Tensors
from clip_jax.errors import InputError
from clip_jax.models import dino, zoo
from clip_jax.models.clip import Vision
from clip_jax.models.conv_stem import ConvStemConfig
from clip_jax.models.convnext import ConvNeXtConfig
from clip_jax.models.dino import DinoConfig
from clip_jax.models.images import Patches
from clip_jax.models.rotary import RotaryConfig
from clip_jax.models.vit import ViTConfig


def _dino() -> dict[str, DinoConfig]:
    towers: dict[str, DinoConfig] = {}
    sizes = {"small": "S", "base": "B", "large": "L", "giant": "g"}
    for size, letter in sizes.items():
        for registers, suffix in (("", ""), ("reg4_", "-reg4")):
            tower = dino.TOWERS[f"DINOv2-{letter}-14{suffix}"]
            name = f"vit_{size}_patch14_{registers}dinov2"
            towers[name] = replace(tower, resizing="antialiased")
    sizes = {"small": "S-16", "small_plus": "S-16-plus", "base": "B-16", "large": "L-16"}
    sizes |= {"huge_plus": "H-16-plus", "7b": "7B-16"}
    for size, ours in sizes.items():
        tower = replace(dino.TOWERS[f"DINOv3-{ours}"], image_size=256, biases="none")
        towers[f"vit_{size}_patch16_dinov3"] = tower
        if size != "7b":
            towers[f"vit_{size}_patch16_dinov3_qkvb"] = replace(tower, biases="qv")
    return towers


# timm's name → image tower of DINOv2 or DINOv3.
DINO = _dino()
# timm's name → tower. The towers added with SigLIP 2, and So400m/16, have tanh GELU. The name of a
# NaFlex tower has a table of 16 x 16 positions, and no number of patches.
TOWERS: dict[str, Vision] = {
    f"{name}_siglip_{size}": replace(
        cast(ViTConfig, zoo.get(architecture).vision), image_size=size, activation=activation
    )
    for name, architecture, sizes, activation in (
        ("vit_base_patch32", "ViT-B-32-SigLIP2-256", (256,), "gelu_tanh"),
        ("vit_base_patch16", "ViT-B-16-SigLIP", (224, 256, 384, 512), "gelu"),
        ("vit_large_patch16", "ViT-L-16-SigLIP-256", (256, 384), "gelu"),
        ("vit_large_patch16", "ViT-L-16-SigLIP2-512", (512,), "gelu_tanh"),
        ("vit_so400m_patch14", "ViT-SO400M-14-SigLIP", (224, 378, 384), "gelu"),
        ("vit_so400m_patch16", "ViT-SO400M-16-SigLIP2-256", (256, 384, 512), "gelu_tanh"),
        ("vit_giantopt_patch16", "ViT-gopt-16-SigLIP2-256", (256, 384), "gelu_tanh"),
    )
    for size in sizes
} | {
    name: zoo.get(architecture).vision
    for name, architecture in (
        ("naflexvit_base_patch16_siglip", "ViT-B-16-SigLIP2-naflex"),
        ("naflexvit_so400m_patch16_siglip", "ViT-SO400M-16-SigLIP2-naflex"),
        ("vit_base_mci_224", "MobileCLIP-B"),
        ("vit_large_patch14_clip_224", "MobileCLIP2-L-14"),
        ("vit_pe_core_tiny_patch16_384", "PE-Core-T-16-384"),
        ("vit_pe_core_small_patch16_384", "PE-Core-S-16-384"),
        ("vit_pe_core_base_patch16_224", "PE-Core-B-16"),
        ("vit_pe_core_large_patch14_336", "PE-Core-L-14-336"),
        ("vit_pe_core_gigantic_patch14_448", "PE-Core-bigG-14-448"),
        ("eva_giant_patch14_224", "EVA01-g-14"),
        ("eva02_base_patch16_clip_224", "EVA02-B-16"),
        ("eva02_large_patch14_clip_224", "EVA02-L-14"),
        ("eva02_large_patch14_clip_336", "EVA02-L-14-336"),
        ("eva02_enormous_patch14_clip_224", "EVA02-E-14"),
        *((x, x) for x in zoo.ARCHITECTURES if re.fullmatch("convnext_[a-z]+", x)),
    )
}
# open_clip builds DINOv2's towers for images of 518 pixels only, and DINOv3's for any.
TOWERS |= {name: tower for name, tower in DINO.items() if not tower.has_table}
# Towers that are read alone: of DINO, and of SigLIP for squares, which have no projection.
ALONE: dict[str, ViTConfig] = DINO | {
    name: cast(ViTConfig, tower)
    for name, tower in TOWERS.items()
    if "siglip" in name and not tower.is_naflex
}
# Beginnings of other names in open_clip's configurations, and what such a tower is.
_OTHERS = {
    "fastvit_": "FastViT, MobileCLIP-S's network of reparameterised convolutions",
    "vitamin_": "ViTamin, of convolutions and attention",
    "swin_": "Swin, of attention in windows",
    "vit_relpos_": "ViT with relative positions",
    "vit_medium_patch16_gap_": "ViT without a class token that is pooled before its last norm",
}


Head = tuple[str, str | None]  # timm_pool and timm_proj


class Family(NamedTuple):
    """Towers whose tensors have the same names in timm."""

    fits: Callable[[Any], bool]  # whether a tower belongs to it
    head: Head
    convention: Convention
    free: tuple[str, ...] = ()  # fields that a name does not determine
    # Returns the tower of a name for another head and size, where one name has several.
    adapted: Callable[[Any, Head, int], Vision] = lambda tower, head, size: tower


_VIT = Convention(
    names=(
        (r"^visual/conv1/", "visual/trunk/patch_embed/proj/"),
        (r"^visual/class_embedding", "visual/trunk/cls_token"),
        (r"^visual/positional_embedding", "visual/trunk/pos_embed"),
        (r"^visual/ln_pre/", "visual/trunk/norm_pre/"),
        (r"^visual/ln_post/", "visual/trunk/norm/"),
        (r"^visual/attn_pool/", "visual/trunk/attn_pool/"),
        (r"^visual/proj$", "visual/trunk/head/weight"),
        (r"^visual/proj_bias$", "visual/trunk/head/bias"),
        (r"^visual/transformer/resblocks/", "visual/trunk/blocks/{}/"),
        (r"(trunk/.*)/ln_([12])/", r"\1/norm\2/"),
        (r"(trunk/.*)/ls_([12])/gamma", r"\1/gamma_\2"),
        (r"(trunk/.*)/in_proj/", r"\1/qkv/"),
        (r"(trunk/.*)/out_proj/", r"\1/proj/"),
        (r"(trunk/.*)/ln/", r"\1/norm/"),
        (r"(trunk/.*)/c_fc/", r"\1/fc1/"),
        (r"(trunk/.*)/c_proj/", r"\1/fc2/"),
    ),
    axes=(
        (r"^visual/class_embedding", "1 1 D -> D"),
        (r"^visual/positional_embedding", "1 L D -> L D"),
        (r"^visual/(proj|fc/kernel)$", "E D -> D E"),
    ),
)
_NAFLEX = Convention(
    names=(
        (r"^visual/conv1/", "visual/trunk/embeds/proj/"),
        (r"^visual/positional_embedding", "visual/trunk/embeds/pos_embed"),
    ),
    axes=(
        (r"^visual/conv1/kernel", "D (P Q C) -> P Q C D"),
        (r"^visual/positional_embedding", "1 H W D -> (H W) D"),
    ),
)
LAYER_SCALE = Convention(names=((r"/ls_([12])/gamma", r"/ls\1/gamma"),)) + _VIT
_STEM = Convention(
    names=((r"visual/conv1/(conv|bn)(\d)/", r"visual/trunk/patch_embed/backbone/\2/\1/"),)
)
_BIASES = Convention(names=((r"^visual/(.*)/in_proj/bias$", r"visual/\1/[q,v]_bias"),))
_APART = Convention(
    names=(
        (r"^visual/(.*)/in_proj/kernel$", r"visual/\1/[q,k,v]_proj/kernel"),
        (r"^visual/(.*)/in_proj/bias$", r"visual/\1/[q,v]_proj/bias"),
        (r"^visual/(.*)/c_gate/", r"visual/\1/fc1_g/"),
        (r"^visual/(.*)/c_fc/", r"visual/\1/fc1_x/"),
    ),
)
_CONVNEXT = Convention(
    names=(
        (r"^visual/conv0/", "visual/trunk/stem/0/"),
        (r"^visual/ln0/", "visual/trunk/stem/1/"),
        (r"^visual/ln(\d)/", r"visual/trunk/stages/\1/downsample/0/"),
        (r"^visual/conv(\d)/", r"visual/trunk/stages/\1/downsample/1/"),
        (r"^visual/stage(\d)/resblocks/", r"visual/trunk/stages/\1/blocks/{}/"),
        (r"/conv/", "/conv_dw/"),
        (r"/ls/gamma", "/gamma"),
        (r"^visual/ln_post/", "visual/trunk/head/norm/"),
        (r"^visual/fc/", "visual/head/mlp/fc1/"),
    ),
    axes=((r"/conv/kernel$", "D C P Q -> P Q C D"),),
)
_GATED = Convention(
    names=(
        (r"^visual/(.*)/c_gate/", r"visual/\1/fc1_g/"),
        (r"^visual/(.*)/c_fc/", r"visual/\1/fc1_x/"),
    ),
)
_REGISTERS = Convention(
    names=((r"^visual/registers", "visual/trunk/reg_token"),),
    axes=((r"^visual/registers", "1 L D -> L D"),),
)
_MAP, _TOKEN = ("map", "none"), ("token", None)


def _is(kind: type, **fields: Any) -> Callable[[Any], bool]:
    return lambda x: type(x) is kind and all(getattr(x, n) == y for n, y in fields.items())


def _convnext(head: str, projection: str) -> Family:
    projected = Convention(names=((r"^visual/proj$", f"visual/head/{projection}/weight"),))
    return Family(
        _is(ConvNeXtConfig, head=head),
        ("", head),
        _CONVNEXT + projected + _VIT,
        ("image_size", "head"),
        _convnext_of,
    )


def _convnext_of(tower: ConvNeXtConfig, head: Head, size: int) -> ConvNeXtConfig:
    return replace(tower, image_size=size, head="mlp" if head[1] == "mlp" else "linear")


def _dino_v3(biases: str, activation: str) -> Family:
    named = _REGISTERS + (_BIASES if biases == "qv" else Convention())
    if activation == "swiglu":
        named += _GATED
    return Family(
        _is(DinoConfig, positions="rotary", biases=biases, activation=activation, projection=False),
        ("token", "none"),
        named + _VIT,
        ("image_size", "layer_scale"),
        lambda tower, head, size: replace(tower, image_size=size),
    )


def _naflex_of(tower: ViTConfig, head: Head, size: int) -> ViTConfig:
    """Return the tower with the number of patches that open_clip 3.3 has for a size."""
    return replace(tower, max_patches=max(size // tower.patch_size, 1) ** 2)


FAMILIES = (
    Family(_is(ViTConfig, pool="map", max_patches=None), _MAP, _VIT, ("activation",)),
    Family(
        _is(ViTConfig, pool="map"),
        _MAP,
        _NAFLEX + _VIT,
        ("activation", "max_patches"),
        _naflex_of,
    ),
    Family(_is(ViTConfig, projection_bias=True), _TOKEN, LAYER_SCALE),
    Family(_is(ConvStemConfig), _TOKEN, _STEM + LAYER_SCALE, ("batch_norm_group",)),
    Family(_is(RotaryConfig, key_bias=True), ("map", None), _VIT),
    Family(_is(RotaryConfig, activation="gelu"), _TOKEN, _BIASES + _VIT),
    Family(_is(RotaryConfig, activation="swiglu"), _TOKEN, _APART + _VIT),
    *(_dino_v3(x, y) for x in ("qv", "none") for y in ("gelu", "swiglu")),
    _convnext("linear", "proj"),
    _convnext("mlp", "mlp/fc2"),
)


def family_of(vision: Vision) -> Family | None:
    """Return the family of a tower; None if open_clip has no such tower, or builds it itself."""
    return next((family for family in FAMILIES if family.fits(vision)), None)


def family_named(vision: Vision) -> Family:
    """Return the family of a tower that has one."""
    return next(family for family in FAMILIES if family.fits(vision))


def tower(name: str, head: Head, size: int, where: str) -> Vision:
    """Return the tower of a name, with pooling and projection `head`, for images of `size` pixels.

    Raises InputError, which begins with `where`, for another name, head or size.
    """
    if name not in TOWERS:
        kind = next((kind for start, kind in _OTHERS.items() if name.startswith(start)), "")
        raise InputError(
            f"{where}.timm_model_name={name!r:.99} is not supported by clip_jax"
            + (f", which has no {kind}." if kind else f"; use one of {', '.join(TOWERS)}.")
        )
    vision = family_named(TOWERS[name]).adapted(TOWERS[name], head, size)
    needed, fits = family_named(vision).head, vision.is_naflex or size == vision.image_size
    if head != needed or not fits:
        raise InputError(
            f"{where}: timm_pool={head[0]!r:.99}, timm_proj={head[1]!r:.99}, image_size={size} of "
            f"a {name} is not supported: it needs {', '.join(map(repr, needed))}, "
            f"{vision.image_size}."
        )
    return vision


def name_of(vision: Vision) -> str:
    """Return timm's name of the tower with these sizes, whatever its free fields.

    Raises Inexpressible if timm has no such tower.
    """
    family = family_of(vision)
    for name, named in TOWERS.items():
        if family is not None and type(named) is type(vision):
            free = {field: getattr(named, field) for field in family.free}
            is_same = replace(vision.with_patch_dropout(0.0), **free) == named
            if is_same and vision.is_naflex == named.is_naflex:
                return name
    size = f"{vision.image_size} pixels"
    if vision.is_naflex:
        size = f"NaFlex with {vision.grid} x {vision.grid} positions"
    raise Inexpressible(
        f"open_clip builds such towers only by timm's names, and none is a {vision.summary}, {size}"
    )


def as_dictionary(images: Patches) -> dict[str, Any]:
    """Return tensors of patches as timm's loader for NaFlex passes them to a tower."""
    import torch

    index = torch.arange(images.pixels.shape[1])
    valid, columns = index < images.length[:, None], images.grid[:, 1:].long()
    coordinates = torch.stack([index // columns, index % columns], -1) * valid[..., None]
    return {"patches": images.pixels, "patch_coord": coordinates, "patch_valid": valid}


# ------------------------------------------------------------------ DINOv2 and DINOv3


def dino_convention(tower: DinoConfig) -> Convention:
    """Return the names of a tower's tensors."""
    if tower.has_table:
        return _REGISTERS + LAYER_SCALE + TORCH
    return _dino_v3(tower.biases, tower.activation).convention + TORCH


def dino_name(tower: DinoConfig) -> str:
    """Return timm's name of the tower of these sizes, or else of the nearest kind of tower."""

    def differences(name: str) -> list[bool]:
        fields = ("has_table", "activation", "biases", "width", "depth", "num_heads")
        named = DINO[name]
        kinds = [bool(named.registers) != bool(tower.registers)]
        others = [getattr(named, field) != getattr(tower, field) for field in fields]
        return others[:3] + kinds + others[3:]

    return min(DINO, key=differences)


def from_file(tensors: Tensors, tower: DinoConfig, source: str) -> Tensors:
    """Return a file's tensors with the gates of DINOv2's packed MLP apart.

    With registers, timm adds the class token's position to the token: here the position is 0.
    """
    check_floating(tensors, source)
    if not tower.has_table:
        return tensors
    ours: Tensors = {}
    for name, x in tensors.items():
        if tower.activation == "swiglu" and ".mlp.fc1." in name and x.ndim and len(x) % 2 == 0:
            ours[name.replace("fc1", "c_gate")], ours[name] = np.split(x, 2)
        elif tower.registers and name.endswith(".pos_embed") and x.ndim == 3:
            ours[name] = np.concatenate([np.zeros_like(x[:, :1]), x], axis=1)
        else:
            ours[name] = x
    return ours


def to_file(tensors: Tensors, tower: DinoConfig) -> Tensors:
    """Undo `from_file`."""
    tensors = dict(tensors)
    for name in [name for name in tensors if ".mlp.c_gate." in name]:
        fused = name.replace("c_gate", "fc1")
        tensors[fused] = np.concatenate([tensors.pop(name), tensors[fused]])
    if tower.has_table and tower.registers:
        token, positions = (f"visual.trunk.{name}" for name in ("cls_token", "pos_embed"))
        first = tensors[positions][:, :1]
        moved = tensors[token] + first
        tensors[token] = np.where(first == 0, tensors[token], moved).astype(moved.dtype)
        tensors[positions] = tensors[positions][:, 1:]
    return tensors
