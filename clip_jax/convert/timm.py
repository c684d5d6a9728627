"""SigLIP's image towers in open_clip: timm models, identified by name.

The name determines the sizes and, unlike in the code of the released weights, the activation.
"""

from dataclasses import replace
from typing import Any, cast

from clip_jax.convert.state_dict import Rules
from clip_jax.errors import InputError
from clip_jax.models import zoo
from clip_jax.models.images import Patches
from clip_jax.models.vit import ViTConfig

# timm's name → tower. The towers added with SigLIP 2, and So400m/16, have tanh GELU. The name of a
# NaFlex tower has a table of 16 x 16 positions, and no number of patches.
TOWERS: dict[str, ViTConfig] = {
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
    f"naflexvit_{name}_siglip": cast(ViTConfig, zoo.get(architecture).vision)
    for name, architecture in (
        ("base_patch16", "ViT-B-16-SigLIP2-naflex"),
        ("so400m_patch16", "ViT-SO400M-16-SigLIP2-naflex"),
    )
}


def name_of(vision: ViTConfig) -> str:
    """Return timm's name of the tower with these sizes, whatever the activation, and of a NaFlex
    tower the number of patches.

    Raises InputError if timm has no such tower.
    """
    for name, tower in TOWERS.items():
        patches = tower.max_patches or vision.max_patches if vision.max_patches else None
        same = replace(vision, activation=tower.activation, patch_dropout=0.0, max_patches=patches)
        if same == tower:
            return name
    size = f"{vision.image_size} pixels"
    if vision.max_patches:
        size = f"NaFlex with {vision.grid} x {vision.grid} positions"
    raise InputError(
        "open_clip builds attention-pooling towers only by timm's names, and none is a "
        f"{vision.summary}, {size}; use --to hugging-face or clip-jax."
    )


_NAMES: Rules = (
    (r"^visual/ln_post/", "visual/trunk/norm/"),
    (r"^visual/attn_pool/", "visual/trunk/attn_pool/"),
    (r"^visual/transformer/resblocks/", "visual/trunk/blocks/{}/"),
    (r"(trunk/.*)/ln_([12])/", r"\1/norm\2/"),
    (r"(trunk/.*)/in_proj/", r"\1/qkv/"),
    (r"(trunk/.*)/out_proj/", r"\1/proj/"),
    (r"(trunk/.*)/c_fc/", r"\1/fc1/"),
    (r"(trunk/.*)/c_proj/", r"\1/fc2/"),
)
_PATCHES: Rules = (
    (r"^visual/conv1/", "visual/trunk/patch_embed/proj/"),
    (r"^visual/positional_embedding", "visual/trunk/pos_embed"),
)
_PATCH_AXES: Rules = ((r"^visual/positional_embedding", "1 L D -> L D"),)
_NAFLEX: Rules = (
    (r"^visual/conv1/", "visual/trunk/embeds/proj/"),
    (r"^visual/positional_embedding", "visual/trunk/embeds/pos_embed"),
)
_NAFLEX_AXES: Rules = (
    (r"^visual/conv1/kernel", "D (P Q C) -> P Q C D"),
    (r"^visual/positional_embedding", "1 H W D -> (H W) D"),
)


def as_dictionary(images: Patches) -> dict[str, Any]:
    """Return tensors of patches as timm's loader for NaFlex passes them to a tower."""
    import torch

    index = torch.arange(images.pixels.shape[1])
    valid, columns = index < images.length[:, None], images.grid[:, 1:].long()
    coordinates = torch.stack([index // columns, index % columns], dim=-1)
    coordinates = torch.where(valid[..., None], coordinates, 0)
    return {"patches": images.pixels, "patch_coord": coordinates, "patch_valid": valid}


def rules(vision: ViTConfig) -> tuple[Rules, Rules]:
    """Return the rules of a tower's names and axes."""
    if vision.max_patches is None:
        return (*_PATCHES, *_NAMES), _PATCH_AXES
    return (*_NAFLEX, *_NAMES), _NAFLEX_AXES
