"""SigLIP and SigLIP 2 in transformers: `SiglipModel` for a fixed resolution, and `Siglip2Model` for
native aspect ratios (NaFlex). What both assume of a model, big_vision assumes, too."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.convert import hugging_face_family
from clip_jax.convert.hugging_face_family import ACTIVATIONS, IMAGE, TEXT, Family
from clip_jax.convert.settings import Table
from clip_jax.convert.state_dict import Convention
from clip_jax.convert.target import Assumptions, fixed
from clip_jax.convert.tensor_files import Tensors
from clip_jax.convert.tokenizer_files import missing
from clip_jax.convert.weights import Weights, square_side
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.text import Cleaning, TextConfig
from clip_jax.models.vit import ViTConfig

_HEAD = "text_model.head"
_LOGITS = Convention(axes=((r"^logit_", "1 -> "),))
_LINEAR_PATCHES = Convention(axes=((r"^visual/conv1/kernel$", "D (P Q C) -> P Q C D"),))
_CONVENTION = _LOGITS + hugging_face_family.convention("text/head")
_IMAGE: Table = {
    **IMAGE, "patch_size": ("patch_size", 16), "layer_norm_eps": ("norm_epsilon", 1e-6),
}  # fmt: skip
_NAFLEX_IMAGE = {name: row for name, row in _IMAGE.items() if name != "image_size"}
_TEXT: Table = {
    **TEXT,
    "vocab_size": ("vocab_size", 32_000), "max_position_embeddings": ("context_length", 64),
    "hidden_size": ("width", 768), "intermediate_size": ("mlp_width", 3072),
    "num_attention_heads": ("num_heads", 12), "layer_norm_eps": ("norm_epsilon", 1e-6),
}  # fmt: skip
ASSUMPTIONS: Assumptions = {
    "vision": ViTConfig,
    "text": TextConfig,
    "only_tower": None,
    "decoder": None,
    "has_logit_bias": True,
    "vision.pool": "map",
    "vision.class_token": False,
    "vision.pre_norm": False,
    "vision.patch_bias": True,
    "vision.projection": False,
    "vision.layer_scale": None,
    "text.causal": False,
    "text.pool": "last",
    "vision.activation": tuple(ACTIVATIONS.values()),
    "text.activation": tuple(ACTIVATIONS.values()),
    "preprocess.resize_mode": ("shortest", "squash"),
}


def assumptions(weights: Weights) -> Assumptions:
    """Return what implementations of SigLIP assume of a model like this one."""
    assumed = ASSUMPTIONS | {"text.projection_bias": weights.config.text.projection}
    if weights.config.vision.is_naflex:
        assumed["preprocess.resize_mode"] = "naflex"
    return assumed


def _is_siglip(config: CLIPConfig) -> bool:
    return type(config.vision) is ViTConfig and config.vision.pool == "map"


def _read(
    content: dict[str, Any],
    path: Path,
    table: Table,
    cleaning: Cleaning,
) -> CLIPConfig:
    image, words = hugging_face_family.sections(content, path)
    vision = hugging_face_family.tower_fields(image, table, "gelu_pytorch_tanh")
    if "image_size" not in vision:
        patches = image.count("num_patches", 256)
        side = square_side(patches, "num_patches", image.where)
        vision |= {"image_size": side * vision["patch_size"], "max_patches": patches}
    fields = hugging_face_family.tower_fields(words, _TEXT, "gelu_pytorch_tanh")
    projected = words.count("projection_size", fields["width"])
    has_head = image.get("vision_use_head", True, object)
    if not has_head or projected != vision["width"]:
        raise InputError(
            f"{path}: vision_use_head={has_head!r:.99} with projection_size={projected} for "
            f"images of {vision['width']} is not supported: both embeddings need the same width."
        )
    text = TextConfig(**fields, **fixed(ASSUMPTIONS, "text"), projection_bias=True)
    return CLIPConfig(
        embed_dim=vision["width"],
        vision=ViTConfig(**vision, **fixed(ASSUMPTIONS, "vision")),
        text=replace(text, tokenizer=missing(text, cleaning)),
        init_logit_scale=10.0,
        init_logit_bias=-10.0,
    )


def _write(config: CLIPConfig, model_type: str) -> dict[str, Any]:
    vision = hugging_face_family.tower_settings(IMAGE, config.vision)
    text = hugging_face_family.tower_settings(TEXT, config.text)
    text["projection_size"] = config.embed_dim
    if config.vision.is_naflex:
        del vision["image_size"]
        vision["num_patches"] = config.vision.grid**2
    return hugging_face_family.with_types(model_type, vision, text)


def _to_file(tensors: Tensors, config: CLIPConfig) -> Tensors:
    """Add the projection that SiglipModel always has: the identity if ours has none."""
    if config.text.projection:
        return tensors
    dtype, width = tensors["text_model.final_layer_norm.weight"].dtype, config.text.width
    identity = {f"{_HEAD}.weight": np.eye(width, dtype=dtype)}
    return tensors | identity | {f"{_HEAD}.bias": np.zeros(width, dtype)}


SIGLIP = Family(
    class_name="SiglipModel",
    model_type="siglip",
    fits=lambda config: _is_siglip(config) and not config.vision.is_naflex,
    assumptions=assumptions,
    convention=_CONVENTION,
    read=lambda content, path: _read(content, path, _IMAGE, "punctuation"),
    write=_write,
    processor="Siglip",
    to_file=_to_file,
)
SIGLIP_2 = Family(
    class_name="Siglip2Model",
    model_type="siglip2",
    fits=lambda config: _is_siglip(config) and config.vision.is_naflex,
    assumptions=assumptions,
    convention=_LINEAR_PATCHES + _CONVENTION,
    read=lambda content, path: _read(content, path, _NAFLEX_IMAGE, "lower"),
    write=_write,
    processor="Siglip2",
    to_file=_to_file,
)
