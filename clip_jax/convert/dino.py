"""DINOv2 and DINOv3 in transformers: `Dinov2Model`, `Dinov2WithRegistersModel`, `DINOv3ViTModel`.

They are image towers alone. The mask token of pre-training is left out, and written as zeros.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from clip_jax.convert.hugging_face_family import ACTIVATIONS, Family, activation_name
from clip_jax.convert.settings import Settings, Table, by_table
from clip_jax.convert.state_dict import TORCH, Convention, check_floating
from clip_jax.convert.target import Assumptions
from clip_jax.convert.tensor_files import Tensors
from clip_jax.convert.weights import Weights, mlp_ratio
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.dino import DinoConfig
from clip_jax.models.text import TextConfig, TokenizerConfig
from clip_jax.models.vit import ViTConfig

_MASK, _REGISTERS = "embeddings.mask_token", "embeddings.register_tokens"
_CLASS = "embeddings.cls_token"
_SIZES: Table = {
    "hidden_size": ("width", 768), "num_hidden_layers": ("depth", 12),
    "num_attention_heads": ("num_heads", 12), "layerscale_value": ("layer_scale", 1.0),
    "image_size": ("image_size", 224),
}  # fmt: skip
_V2: Table = {**_SIZES, "patch_size": ("patch_size", 14), "layer_norm_eps": ("norm_epsilon", 1e-6)}
_REGISTERS_TABLE: Table = {
    **_V2, "patch_size": ("patch_size", 16), "num_register_tokens": ("registers", 4),
}  # fmt: skip
_V3: Table = {
    **_SIZES, "patch_size": ("patch_size", 16), "layer_norm_eps": ("norm_epsilon", 1e-5),
    "hidden_size": ("width", 384), "intermediate_size": ("mlp_width", 1536),
    "num_attention_heads": ("num_heads", 6), "num_register_tokens": ("registers", 0),
}  # fmt: skip

_TOKENS = Convention(
    names=(
        (r"^visual/class_embedding", "visual/embeddings/cls_token"),
        (r"^visual/registers", "visual/embeddings/register_tokens"),
        (r"^visual/positional_embedding", "visual/embeddings/position_embeddings"),
        (r"/ln_([12])/", r"/norm\1/"),
        (r"/ls_([12])/gamma", r"/layer_scale\1/lambda1"),
    ),
    axes=(
        (r"^visual/class_embedding", "1 1 D -> D"),
        (r"^visual/(registers|positional_embedding)", "1 L D -> L D"),
    ),
)
_TOWER = Convention(names=((r"^visual/", ""),)) + TORCH
_V2_CONVENTION = Convention(
    names=(
        (r"^visual/conv1/", "visual/embeddings/patch_embeddings/projection/"),
        (r"^visual/transformer/resblocks/", "visual/encoder/layer/{}/"),
        (r"/attn/in_proj/", "/attention/attention/[query,key,value]/"),
        (r"/attn/out_proj/", "/attention/output/dense/"),
        (r"/mlp/c_fc/", "/mlp/fc1/"),
        (r"/mlp/c_proj/", "/mlp/fc2/"),
        (r"^visual/ln_post/", "visual/layernorm/"),
    ),
)
_V3_CONVENTION = Convention(
    names=(
        (r"^visual/conv1/", "visual/embeddings/patch_embeddings/"),
        (r"^visual/transformer/resblocks/", "visual/layer/{}/"),
        (r"/attn/in_proj/", "/attention/[q,k,v]_proj/"),
        (r"/attn/out_proj/", "/attention/o_proj/"),
        (r"/mlp/c_gate/", "/mlp/gate_proj/"),
        (r"/mlp/c_fc/", "/mlp/up_proj/"),
        (r"/mlp/c_proj/", "/mlp/down_proj/"),
        (r"^visual/ln_post/", "visual/norm/"),
    ),
)
_NO_KEY_BIAS = Convention(names=((r"/attn/in_proj/bias$", "/attention/[q,v]_proj/bias"),))


# ------------------------------------------------------------------ settings


def _activation(section: Settings, gated: bool, default: str) -> str:
    """Return the activation. Raises InputError for another one than SiLU in a gated MLP."""
    name = section.get("hidden_act", default, object)
    if name not in ({"silu"} if gated else ACTIVATIONS):
        needed = "silu" if gated else f"one of {', '.join(ACTIVATIONS)}"
        raise InputError(
            f"{section.where}.hidden_act={name!r:.99} is not supported; it must be {needed}."
        )
    return "swiglu" if gated else ACTIVATIONS[name]


def _check(section: Settings, **needed: Any) -> None:
    for name, value in needed.items():
        if (other := section.get(name, value, object)) != value:
            raise InputError(
                f"{section.where}.{name}={other!r:.99} is not supported; it must be {value!r}."
            )


def _model(section: Settings, fields: dict[str, Any], mlp_width: int) -> CLIPConfig:
    _check(section, num_channels=3)
    return alone(DinoConfig(**fields, mlp_ratio=mlp_ratio(fields["width"], mlp_width)))


def alone(tower: DinoConfig | ViTConfig) -> CLIPConfig:
    """Return a model of this image tower, whose text tower has no weights and no vocabulary."""
    text = TextConfig(tokenizer=TokenizerConfig(file="", clean="none"))
    return CLIPConfig(embed_dim=tower.width, vision=tower, text=text)


def _gated_width(hidden: int) -> int:
    """Return the width of DINOv2's gated MLP, of which another would have `hidden`."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def _read_v2(table: Table, content: dict[str, Any], path: Path) -> CLIPConfig:
    section = Settings(content, str(path))
    fields = section.fields(table)
    hidden = int(fields["width"] * section.number("mlp_ratio", 4.0))
    gated = section.get("use_swiglu_ffn", False, bool)
    activation = "swiglu" if gated else _activation(section, False, "gelu")
    fields |= {
        "positions": "learned",
        "resizing": "antialiased" if "registers" in fields else "plain",
        "biases": "qkv" if section.get("qkv_bias", True, bool) else "none",
        "activation": activation,
    }
    return _model(section, {"registers": 0} | fields, _gated_width(hidden) if gated else hidden)


def _read_v3(content: dict[str, Any], path: Path) -> CLIPConfig:
    section = Settings(content, str(path))
    _check(section, rope_theta=100.0, proj_bias=True, mlp_bias=True)
    defaults = {"query": True, "key": False, "value": True}
    biases = tuple(section.get(f"{name}_bias", x, bool) for name, x in defaults.items())
    names = {(True,) * 3: "qkv", (True, False, True): "qv", (False,) * 3: "none"}
    if biases not in names:
        raise InputError(
            f"{section.where}: query_bias, key_bias, value_bias={biases} is not supported; they "
            f"must be one of {', '.join(map(str, names))}."
        )
    fields = section.fields(_V3)
    gated = section.get("use_gated_mlp", False, bool)
    fields |= {"biases": names[biases], "activation": _activation(section, gated, "gelu")}
    return _model(section, fields, fields.pop("mlp_width"))


def _ratio(tower: DinoConfig) -> int:
    """Return the whole number that `Dinov2Config` stores for the width of the MLP."""
    gates = 3 / 2 if tower.activation == "swiglu" else 1
    return max(round(tower.mlp_width * gates / tower.width), 1)


def _write_v2(table: Table, config: CLIPConfig) -> dict[str, Any]:
    tower = cast(DinoConfig, config.vision)
    gated = tower.activation == "swiglu"
    return {
        **by_table(table, tower),
        "mlp_ratio": _ratio(tower),
        "use_swiglu_ffn": gated,
        "hidden_act": "gelu" if gated else activation_name(tower),
        "qkv_bias": tower.biases == "qkv",
    }


def _write_v3(config: CLIPConfig, _: str) -> dict[str, Any]:
    tower = cast(DinoConfig, config.vision)
    gated = tower.activation == "swiglu"
    return {
        **by_table(_V3, tower),
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else activation_name(tower),
        "query_bias": tower.biases != "none",
        "key_bias": tower.biases == "qkv",
        "value_bias": tower.biases != "none",
    }


# What the formats of a tower alone need; timm's folders, too.
ASSUMPTIONS: Assumptions = {
    "vision": DinoConfig,
    "only_tower": "image",
    "vision.pool": "class_token",
    "vision.class_token": True,
    "vision.pre_norm": False,
    "vision.patch_bias": True,
    "vision.projection": False,
    "vision.layer_scale": float,
    "vision.activation": (*ACTIVATIONS.values(), "swiglu"),
    "preprocess.resize_mode": ("shortest", "squash"),
}


def _assumptions_v2(weights: Weights) -> Assumptions:
    tower = weights.config.vision
    if not isinstance(tower, DinoConfig):
        return ASSUMPTIONS
    hidden = tower.width * _ratio(tower)
    width = _gated_width(hidden) if tower.activation == "swiglu" else hidden
    return ASSUMPTIONS | {"vision.biases": ("qkv", "none"), "vision.mlp_width": width}


# ------------------------------------------------------------------ tensors


def _from_file(tensors: Tensors, _: Settings, source: str) -> Tensors:
    """Leave out the mask token and an empty tensor of registers; split DINOv2's fused gates."""
    check_floating(tensors, source)
    ours: Tensors = {}
    for name, x in tensors.items():
        if name == _MASK or (name == _REGISTERS and not x.size):
            continue
        if ".mlp.weights_in." in name and x.ndim and len(x) % 2 == 0:
            parts = np.split(x, 2)
            ours[name.replace("weights_in", "c_gate")] = parts[0]
            ours[name.replace("weights_in", "fc1")] = parts[1]
        else:
            ours[name.replace("mlp.weights_out", "mlp.fc2")] = x
    return ours


def _to_file(tensors: Tensors, config: CLIPConfig) -> Tensors:
    """Undo `_from_file`, with zeros for the mask token."""
    tower = cast(DinoConfig, config.vision)
    token, tensors = tensors[_CLASS], dict(tensors)
    tensors[_MASK] = np.zeros_like(token[0] if tower.has_table else token)
    if not tower.has_table or tower.registers:
        tensors.setdefault(_REGISTERS, token[:, :0])
    for name in [name for name in tensors if ".mlp.c_gate." in name]:
        up = name.replace("c_gate", "fc1")
        down = name.replace("c_gate", "fc2")
        fused = [tensors.pop(name), tensors.pop(up)]
        tensors[name.replace("c_gate", "weights_in")] = np.concatenate(fused)
        tensors[name.replace("c_gate", "weights_out")] = tensors.pop(down)
    return tensors


def _is_v2(config: CLIPConfig, registers: bool) -> bool:
    tower = config.vision
    return isinstance(tower, DinoConfig) and tower.has_table and registers == (tower.registers > 0)


def _is_v3(config: CLIPConfig, key_bias: bool) -> bool:
    tower = config.vision
    return (
        isinstance(tower, DinoConfig)
        and not tower.has_table
        and key_bias == (tower.biases == "qkv")
    )


V2 = Family(
    class_name="Dinov2Model",
    model_type="dinov2",
    fits=lambda config: _is_v2(config, False),
    assumptions=_assumptions_v2,
    convention=_TOKENS + _V2_CONVENTION + _TOWER,
    read=lambda content, path: _read_v2(_V2, content, path),
    write=lambda config, _: _write_v2(_V2, config),
    processor="Bit",
    from_file=_from_file,
    to_file=_to_file,
    only_tower="image",
)
V2_WITH_REGISTERS = replace(
    V2,
    class_name="Dinov2WithRegistersModel",
    model_type="dinov2_with_registers",
    fits=lambda config: _is_v2(config, True),
    read=lambda content, path: _read_v2(_REGISTERS_TABLE, content, path),
    write=lambda config, _: _write_v2(_REGISTERS_TABLE, config),
)
V3 = Family(
    class_name="DINOv3ViTModel",
    model_type="dinov3_vit",
    fits=lambda config: _is_v3(config, False),
    assumptions=lambda weights: ASSUMPTIONS,
    convention=_TOKENS + _NO_KEY_BIAS + _V3_CONVENTION + _TOWER,
    read=_read_v3,
    write=_write_v3,
    processor="DINOv3ViT",
    from_file=_from_file,
    to_file=_to_file,
    only_tower="image",
)
V3_WITH_KEY_BIAS = replace(
    V3, fits=lambda config: _is_v3(config, True), convention=_TOKENS + _V3_CONVENTION + _TOWER
)
FAMILIES = (V2, V2_WITH_REGISTERS, V3, V3_WITH_KEY_BIAS)
