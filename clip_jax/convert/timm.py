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
        free = {"activation": tower.activation, "max_patches": tower.max_patches}
        is_same = replace(vision, patch_dropout=0.0, **free) == tower
        if is_same and type(vision.image_spec) is type(tower.image_spec):
            return name
    is_naflex, grid = vision.max_patches is not None, f"{vision.grid} x {vision.grid}"
    size = f"NaFlex with {grid} positions" if is_naflex else f"{vision.image_size} pixels"
    raise InputError(
        "open_clip builds attention-pooling towers only by timm's names, and none is a "
        f"{vision.summary}, {size}; use --to hugging-face or clip-jax."
    )


NAMES: Rules = (
    (r"^visual/conv1/", "visual/trunk/patch_embed/proj/"),
    (r"^visual/positional_embedding", "visual/trunk/pos_embed"),
    (r"^visual/ln_post/", "visual/trunk/norm/"),
    (r"^visual/attn_pool/", "visual/trunk/attn_pool/"),
    (r"^visual/transformer/resblocks/", "visual/trunk/blocks/{}/"),
    (r"(trunk/.*)/ln_([12])/", r"\1/norm\2/"),
    (r"(trunk/.*)/in_proj/", r"\1/qkv/"),
    (r"(trunk/.*)/out_proj/", r"\1/proj/"),
    (r"(trunk/.*)/c_fc/", r"\1/fc1/"),
    (r"(trunk/.*)/c_proj/", r"\1/fc2/"),
)
AXES: Rules = ((r"^visual/positional_embedding", "1 L D -> L D"),)
NAFLEX_NAMES: Rules = (
    *NAMES, (r"trunk/patch_embed/", "trunk/embeds/"), (r"trunk/pos_", "trunk/embeds/pos_"),
)  # fmt: skip
NAFLEX_AXES: Rules = (
    (r"^visual/conv1/kernel", "D (P Q C) -> P Q C D"),
    (r"^visual/positional_embedding", "1 H W D -> (H W) D"),
)


def as_dictionary(images: Patches) -> dict[str, Any]:
    """Return tensors of patches as timm's loader for NaFlex passes them to a tower."""
    import torch

    index = torch.arange(images.pixels.shape[1])
    valid, columns = index < images.length[:, None], images.grid[:, 1:].long()
    coordinates = torch.stack([index // columns, index % columns], -1) * valid[..., None]
    return {"patches": images.pixels, "patch_coord": coordinates, "patch_valid": valid}
