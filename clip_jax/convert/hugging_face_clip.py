"""CLIP and MetaCLIP 2 in transformers: `CLIPModel` and `MetaClip2Model`.

They differ in the end of text: MetaCLIP 2 uses the configured id; in CLIP, id 2 means the highest
id. One tower alone is a `CLIPVisionModelWithProjection` or a `CLIPTextModelWithProjection`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_jax.convert import hugging_face_family
from clip_jax.convert.hugging_face_family import ACTIVATIONS, IMAGE, TEXT, Family
from clip_jax.convert.settings import count_of
from clip_jax.convert.target import Assumptions
from clip_jax.convert.tokenizer_files import missing
from clip_jax.convert.weights import Weights
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

_LEGACY_EOS = 2  # a wrong id in old configurations; Hugging Face reads it as "argmax"
IMAGE_ASSUMPTIONS: Assumptions = {  # also those of other families with CLIP's image tower
    "vision": ViTConfig,
    "vision.activation": tuple(ACTIVATIONS.values()),
    "text.activation": tuple(ACTIVATIONS.values()),
    "vision.max_patches": None,
    "decoder": None,
    "has_logit_bias": False,
    "vision.pool": "class_token",
    "vision.pre_norm": True,
    "vision.patch_bias": False,
    "vision.projection": True,
    "vision.projection_bias": False,
    "vision.layer_scale": None,
    "preprocess.resize_mode": ("shortest", "squash"),
}
_ASSUMPTIONS: Assumptions = {
    **IMAGE_ASSUMPTIONS,
    "text": TextConfig,
    "text.causal": True,
    "text.pool": ("argmax", "eos"),
    "text.projection": True,
    "text.projection_bias": False,
}


def _assumptions(weights: Weights) -> Assumptions:
    if weights.only_tower == "text" and weights.config.text.eos_token_id == _LEGACY_EOS:
        return _ASSUMPTIONS | {"text.pool": "argmax"}  # as CLIPTextModel pools with such an id
    return _ASSUMPTIONS


def _read(content: dict[str, Any], path: Path) -> CLIPConfig:
    image, words = hugging_face_family.sections(content, path)
    vision = hugging_face_family.tower_fields(image, IMAGE, "quick_gelu")
    fields = hugging_face_family.tower_fields(words, TEXT, "quick_gelu")
    eos = words.count("eos_token_id", 49_407)
    is_clip = content["model_type"] == CLIP.model_type
    # An end of text with the highest id is also that of argmax.
    argmax = is_clip and eos in (_LEGACY_EOS, fields["vocab_size"] - 1)
    text = TextConfig(
        **fields,
        pool="argmax" if argmax else "eos",
        eos_token_id=TextConfig.eos_token_id if argmax else eos,
    )
    if not is_clip:
        text = replace(text, tokenizer=missing(text, "none"))
    return CLIPConfig(
        embed_dim=count_of(content.get("projection_dim", 512), f"{path}: projection_dim"),
        vision=ViTConfig(**vision),
        text=text,
    )


def projected(
    model_type: str, vision: dict[str, Any], text: dict[str, Any], embed_dim: int
) -> dict[str, Any]:
    """Return the settings of a model whose towers both have projections."""
    width = {"projection_dim": embed_dim}
    sections = hugging_face_family.with_types(model_type, vision | width, text | width)
    return {**width, "logit_scale_init_value": 2.6592, **sections}


def _write(config: CLIPConfig, model_type: str) -> dict[str, Any]:
    vision = hugging_face_family.tower_settings(IMAGE, config.vision)
    text = hugging_face_family.tower_settings(TEXT, config.text)
    text["eos_token_id"] = end = config.text.end_of_text_id
    if model_type == CLIP.model_type:
        text |= {"bos_token_id": end - 1, "pad_token_id": end}
    return projected(model_type, vision, text, config.embed_dim)


def _is_metaclip_2(config: CLIPConfig) -> bool:
    return config.text.pool == "eos" and config.text.tokenizer.file != "clip"


CLIP = Family(
    class_name="CLIPModel",
    model_type="clip",
    fits=lambda config: True,  # the last family, whose name is that of errors
    assumptions=_assumptions,
    convention=hugging_face_family.convention("text_projection"),
    read=_read,
    write=_write,
)
METACLIP_2 = replace(
    CLIP, class_name="MetaClip2Model", model_type="metaclip_2", fits=_is_metaclip_2
)
