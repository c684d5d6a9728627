"""`SiglipModel` of transformers: names of tensors, settings, and back.

Fixed-resolution SigLIP 2 is the same model; that of native aspect ratios (NaFlex) is another.
"""

from typing import Any

import numpy as np

from clip_jax.convert.clip_model import Section, block_rows, linear, towers
from clip_jax.convert.state_dict import Row, join_queries, norm, part_queries
from clip_jax.convert.tensor_files import Tensors
from clip_jax.convert.weights import Weights, mlp_ratio
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

MODEL_TYPE = "siglip"
_HEAD = "vision_model.head"
_FUSED = f"{_HEAD}.attention.in_proj_"  # query, key and value in one tensor
_TEXT_HEAD = "text_model.head"


def rows(config: CLIPConfig) -> list[Row]:
    """The table, of tensors that `split` has parted."""
    pool, attention = "visual/attn_pool", f"{_HEAD}.attention"
    table = [
        Row(
            "visual/conv1/kernel", "vision_model.embeddings.patch_embedding.weight",
            "D C P Q -> P Q C D",
        ),
        Row("visual/conv1/bias", "vision_model.embeddings.patch_embedding.bias"),
        Row("visual/positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        *block_rows("visual/transformer/resblocks", "vision_model.encoder.layers.{}"),
        *norm("visual/ln_post", "vision_model.post_layernorm"),
        Row(f"{pool}/latent", f"{_HEAD}.probe"),
        Row(f"{pool}/q/kernel", f"{_FUSED}weight.q", "(N K) D -> D N K"),
        Row(f"{pool}/q/bias", f"{_FUSED}bias.q", "(N K) -> N K"),
        Row(f"{pool}/kv/kernel", f"{_FUSED}weight.kv", "(S N K) D -> D S N K"),
        Row(f"{pool}/kv/bias", f"{_FUSED}bias.kv", "(S N K) -> S N K"),
        Row(f"{pool}/proj/kernel", f"{attention}.out_proj.weight", "D (N K) -> N K D"),
        Row(f"{pool}/proj/bias", f"{attention}.out_proj.bias"),
        *norm(f"{pool}/norm", f"{_HEAD}.layernorm"),
        *linear(f"{pool}/mlp/c_fc", f"{_HEAD}.mlp.fc1"),
        *linear(f"{pool}/mlp/c_proj", f"{_HEAD}.mlp.fc2"),
        Row("text/token_embedding", "text_model.embeddings.token_embedding.weight"),
        Row("text/positional_embedding", "text_model.embeddings.position_embedding.weight"),
        *block_rows("text/transformer/resblocks", "text_model.encoder.layers.{}"),
        *norm("text/ln_final", "text_model.final_layer_norm"),
        Row("logit_scale", "logit_scale", "1 -> "),
        Row("logit_bias", "logit_bias", "1 -> "),
    ]  # fmt: skip
    if config.text.projection:
        table += [
            Row("text/text_projection", f"{_TEXT_HEAD}.weight", "E D -> D E"),
            Row("text/text_projection_bias", f"{_TEXT_HEAD}.bias"),
        ]
    return table


def split(tensors: Tensors) -> Tensors:
    """Part the pool's fused projection into the query's and that of keys and values."""
    return part_queries(tensors, lambda name: name.startswith(_FUSED))


def join(tensors: Tensors, config: CLIPConfig) -> Tensors:
    """Undo `split`; where the model has no text projection, write one that changes nothing."""
    joined = join_queries(tensors)
    if not config.text.projection:
        dtype, width = tensors["text_model.final_layer_norm.weight"].dtype, config.text.width
        joined[f"{_TEXT_HEAD}.weight"] = np.eye(width, dtype=dtype)
        joined[f"{_TEXT_HEAD}.bias"] = np.zeros(width, dtype)
    return joined


def read_config(content: dict[str, Any], source: str) -> CLIPConfig:
    """Read `config.json`. Raises InputError, which names what is missing or unknown."""
    vision = Section(content, "vision_config", source)
    text = Section(content, "text_config", source)
    width, text_width = vision.count("hidden_size", 768), text.count("hidden_size", 768)
    projected = text_width if text.values.get("projection_size") is None else (
        text.count("projection_size", text_width)
    )  # fmt: skip
    if not vision.values.get("vision_use_head", True) or projected != width:
        raise InputError(
            f"{source}: vision_use_head={vision.values.get('vision_use_head')!r:.99} with "
            f"projection_size={projected} for images of {width} is not supported: both towers "
            "must end in one space."
        )
    return CLIPConfig(
        embed_dim=width,
        vision=ViTConfig(
            image_size=vision.count("image_size", 224),
            patch_size=vision.count("patch_size", 16),
            width=width,
            depth=vision.count("num_hidden_layers", 12),
            num_heads=vision.count("num_attention_heads", 12),
            mlp_ratio=mlp_ratio(width, vision.count("intermediate_size", 3072)),
            pool="map",
            class_token=False,
            pre_norm=False,
            patch_bias=True,
            projection=False,
            activation=vision.activation("gelu_pytorch_tanh"),
            norm_epsilon=vision.epsilon(1e-6),
        ),
        text=TextConfig(
            context_length=text.count("max_position_embeddings", 64),
            vocab_size=text.count("vocab_size", 32_000),
            width=text_width,
            depth=text.count("num_hidden_layers", 12),
            num_heads=text.count("num_attention_heads", 12),
            mlp_ratio=mlp_ratio(text_width, text.count("intermediate_size", 3072)),
            causal=False,
            pool="last",
            projection_bias=True,
            activation=text.activation("gelu_pytorch_tanh"),
            norm_epsilon=text.epsilon(1e-6),
        ),
        init_logit_scale=10.0,
        init_logit_bias=-10.0,
    )


def check(weights: Weights, format_name: str = "Hugging Face's SiglipModel") -> None:
    """Raise InputError, which lists what a SigLIP model has no words for."""
    config, vision, text = weights.config, weights.config.vision, weights.config.text
    if isinstance(vision, ResNetConfig):
        raise InputError(f"{format_name} has no ResNet; choose --to openai, open-clip or clip-jax.")
    wrong = {
        "decoder": config.decoder is not None,
        "init_logit_bias=None": config.init_logit_bias is None,
        "vision.pool": vision.pool != "map",
        "vision.class_token": vision.class_token,
        "vision.pre_norm": vision.pre_norm,
        "vision.patch_bias=False": not vision.patch_bias,
        "vision.projection": vision.projection,
        "vision.layer_scale": vision.layer_scale is not None,
        "text.causal": text.causal,
        "text.pool": text.pool != "last",
        "text.projection_bias=False": text.projection and not text.projection_bias,
        "preprocess.resize_mode": weights.preprocess.resize_mode == "longest",
    }
    if unsupported := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise InputError(
            f"{format_name} cannot express this model's {', '.join(unsupported)}; "
            "choose --to open-clip or clip-jax."
        )


def config_json(weights: Weights, dtype: str) -> dict[str, Any]:
    """Return what `config.json` says."""
    vision_config, text_config = towers(weights.config)
    return {
        "architectures": ["SiglipModel"],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "vision_config": {"model_type": "siglip_vision_model", **vision_config},
        "text_config": {
            "model_type": "siglip_text_model",
            **text_config,
            "projection_size": weights.config.embed_dim,
        },
    }
