"""SigLIP's image towers as open_clip has them: a timm model, known by its name alone.

The name fixes the sizes and, unlike in the released weights' own code, the activation.
"""

from dataclasses import replace
from typing import cast

from clip_jax.convert.clip_model import linear
from clip_jax.convert.state_dict import Row, norm
from clip_jax.errors import InputError
from clip_jax.models import zoo
from clip_jax.models.vit import ViTConfig


def _trunks() -> dict[str, ViTConfig]:
    """timm's name → tower. Those with tanh GELU are the ones added with SigLIP 2, and So400m/16."""
    trunks: dict[str, ViTConfig] = {}
    for name, architecture, sizes, activation in (
        ("vit_base_patch32", "ViT-B-32-SigLIP2-256", (256,), "gelu_tanh"),
        ("vit_base_patch16", "ViT-B-16-SigLIP", (224, 256, 384, 512), "gelu"),
        ("vit_large_patch16", "ViT-L-16-SigLIP-256", (256, 384), "gelu"),
        ("vit_large_patch16", "ViT-L-16-SigLIP2-512", (512,), "gelu_tanh"),
        ("vit_so400m_patch14", "ViT-SO400M-14-SigLIP", (224, 378, 384), "gelu"),
        ("vit_so400m_patch16", "ViT-SO400M-16-SigLIP2-256", (256, 384, 512), "gelu_tanh"),
        ("vit_giantopt_patch16", "ViT-gopt-16-SigLIP2-256", (256, 384), "gelu_tanh"),
    ):
        vision = cast(ViTConfig, zoo.get(architecture).vision)
        for size in sizes:
            tower = replace(vision, image_size=size, activation=activation)
            trunks[f"{name}_siglip_{size}"] = tower
    return trunks


TRUNKS: dict[str, ViTConfig] = _trunks()


def name_of(vision: ViTConfig) -> str | None:
    """Return the name of the trunk with these sizes, whatever its activation; None without one."""
    for name, trunk in TRUNKS.items():
        if (
            replace(trunk, activation=vision.activation, patch_dropout=vision.patch_dropout)
            == vision
        ):
            return name
    return None


def as_named(vision: ViTConfig) -> ViTConfig:
    """Return the tower with the activation that open_clip will compute it with.

    Raises InputError if timm has no such trunk.
    """
    name = name_of(vision)
    if name is None:
        raise InputError(
            "open_clip builds attention-pooling towers by timm's names alone, and none is of "
            f"patch_size={vision.patch_size}, width={vision.width}, depth={vision.depth}, "
            f"image_size={vision.image_size}; choose --to hugging-face or clip-jax."
        )
    return replace(vision, activation=TRUNKS[name].activation)


def rows() -> list[Row]:
    """The table of a trunk."""
    trunk, block, pool = "visual.trunk", "visual.trunk.blocks.{}", "visual.trunk.attn_pool"
    ours, our_pool = "visual/transformer/resblocks", "visual/attn_pool"
    return [
        Row("visual/conv1/kernel", f"{trunk}.patch_embed.proj.weight", "D C P Q -> P Q C D"),
        Row("visual/conv1/bias", f"{trunk}.patch_embed.proj.bias"),
        Row("visual/positional_embedding", f"{trunk}.pos_embed", "1 L D -> L D"),
        *norm(f"{ours}/ln_1", f"{block}.norm1"),
        Row(f"{ours}/attn/in_proj/kernel", f"{block}.attn.qkv.weight", "(S N K) D -> D S N K"),
        Row(f"{ours}/attn/in_proj/bias", f"{block}.attn.qkv.bias", "(S N K) -> S N K"),
        Row(f"{ours}/attn/out_proj/kernel", f"{block}.attn.proj.weight", "D (N K) -> N K D"),
        Row(f"{ours}/attn/out_proj/bias", f"{block}.attn.proj.bias"),
        *norm(f"{ours}/ln_2", f"{block}.norm2"),
        *linear(f"{ours}/mlp/c_fc", f"{block}.mlp.fc1"),
        *linear(f"{ours}/mlp/c_proj", f"{block}.mlp.fc2"),
        *norm("visual/ln_post", f"{trunk}.norm"),
        Row(f"{our_pool}/latent", f"{pool}.latent"),
        Row(f"{our_pool}/q/kernel", f"{pool}.q.weight", "(N K) D -> D N K"),
        Row(f"{our_pool}/q/bias", f"{pool}.q.bias", "(N K) -> N K"),
        Row(f"{our_pool}/kv/kernel", f"{pool}.kv.weight", "(S N K) D -> D S N K"),
        Row(f"{our_pool}/kv/bias", f"{pool}.kv.bias", "(S N K) -> S N K"),
        Row(f"{our_pool}/proj/kernel", f"{pool}.proj.weight", "D (N K) -> N K D"),
        Row(f"{our_pool}/proj/bias", f"{pool}.proj.bias"),
        *norm(f"{our_pool}/norm", f"{pool}.norm"),
        *linear(f"{our_pool}/mlp/c_fc", f"{pool}.mlp.fc1"),
        *linear(f"{our_pool}/mlp/c_proj", f"{pool}.mlp.fc2"),
    ]
