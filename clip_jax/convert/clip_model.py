"""`CLIPModel` and `MetaClip2Model` of transformers: names of tensors, settings, and back.

They differ in how the end of text is found: by its id in MetaCLIP 2, whatever the id is; in CLIP
the id 2 stands for the highest id.
"""

import typing
from typing import Any

from clip_jax.convert.settings import count_of, number_of
from clip_jax.convert.state_dict import Row, norm
from clip_jax.convert.weights import Weights, mlp_ratio
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.layers import Activation
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

MODEL_TYPES = ("clip", "metaclip_2")
ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
ACTIVATION_NAMES: dict[Activation, str] = {
    "quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh",
}  # fmt: skip
_LEGACY_EOS = 2  # a wrong id that stood in the configurations; Hugging Face reads it as "argmax"


def block_rows(ours: str, theirs: str) -> list[Row]:
    """Rows of a stack of residual blocks."""
    qkv = [f"{theirs}.self_attn.{n}_proj" for n in "qkv"]
    weights, biases = tuple(f"{n}.weight" for n in qkv), tuple(f"{n}.bias" for n in qkv)
    return [
        *norm(f"{ours}/ln_1", f"{theirs}.layer_norm1"),
        Row(f"{ours}/attn/in_proj/kernel", weights, "S (N K) D -> D S N K"),
        Row(f"{ours}/attn/in_proj/bias", biases, "S (N K) -> S N K"),
        Row(
            f"{ours}/attn/out_proj/kernel", f"{theirs}.self_attn.out_proj.weight",
            "D (N K) -> N K D",
        ),
        Row(f"{ours}/attn/out_proj/bias", f"{theirs}.self_attn.out_proj.bias"),
        *norm(f"{ours}/ln_2", f"{theirs}.layer_norm2"),
        *linear(f"{ours}/mlp/c_fc", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}/mlp/c_proj", f"{theirs}.mlp.fc2"),
    ]  # fmt: skip


def linear(ours: str, theirs: str) -> list[Row]:
    """Rows of a linear layer."""
    return [
        Row(f"{ours}/kernel", f"{theirs}.weight", "F D -> D F"),
        Row(f"{ours}/bias", f"{theirs}.bias"),
    ]


# The names are theirs ("pre_layrnorm" too).
TABLE = [
    Row("visual/class_embedding", "vision_model.embeddings.class_embedding"),
    Row(
        "visual/conv1/kernel", "vision_model.embeddings.patch_embedding.weight",
        "D C P Q -> P Q C D",
    ),
    Row("visual/positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    *norm("visual/ln_pre", "vision_model.pre_layrnorm"),
    *block_rows("visual/transformer/resblocks", "vision_model.encoder.layers.{}"),
    *norm("visual/ln_post", "vision_model.post_layernorm"),
    Row("visual/proj", "visual_projection.weight", "E D -> D E"),
    Row("text/token_embedding", "text_model.embeddings.token_embedding.weight"),
    Row("text/positional_embedding", "text_model.embeddings.position_embedding.weight"),
    *block_rows("text/transformer/resblocks", "text_model.encoder.layers.{}"),
    *norm("text/ln_final", "text_model.final_layer_norm"),
    Row("text/text_projection", "text_projection.weight", "E D -> D E"),
    Row("logit_scale", "logit_scale"),
]  # fmt: skip


class Section:
    """A tower's settings, read with their defaults; messages name the file and the setting."""

    def __init__(self, content: dict[str, Any], name: str, source: str) -> None:
        part = content.get(name) or {}
        if not isinstance(part, dict):
            raise InputError(f"{source}: {name} is {part!r:.99}; an object is needed.")
        self.values, self.source = part, source
        if self.count("num_channels", 3) != 3:
            raise InputError(f"{source}: num_channels={part['num_channels']}; 3 are supported.")

    def count(self, name: str, default: int) -> int:
        return count_of(self.values.get(name, default), f"{self.source}: {name}")

    def epsilon(self, default: float) -> float:
        value = self.values.get("layer_norm_eps", default)
        return number_of(value, f"{self.source}: layer_norm_eps", True)

    def activation(self, default: str) -> Activation:
        name = self.values.get("hidden_act", default)
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise InputError(f"{self.source}: hidden_act={name!r:.99}; known are {[*ACTIVATIONS]}.")
        return ACTIVATIONS[name]


def read_config(content: dict[str, Any], source: str) -> CLIPConfig:
    """Read `config.json`. Raises InputError, which names what is missing or unknown."""
    # What `…_dict` holds, in old files, stands for the whole tower.
    old = [content.get(f"{name}_dict") is not None for name in ("vision_config", "text_config")]
    vision = Section(content, "vision_config_dict" if old[0] else "vision_config", source)
    text = Section(content, "text_config_dict" if old[1] else "text_config", source)
    width, text_width = vision.count("hidden_size", 768), text.count("hidden_size", 512)
    vocab_size, eos = text.count("vocab_size", 49_408), text.count("eos_token_id", 49_407)
    # The end of text, where it has the highest id, is found at its first place by argmax too.
    argmax = content["model_type"] == "clip" and eos in (_LEGACY_EOS, vocab_size - 1)
    return CLIPConfig(
        embed_dim=count_of(content.get("projection_dim", 512), f"{source}: projection_dim"),
        vision=ViTConfig(
            image_size=vision.count("image_size", 224),
            patch_size=vision.count("patch_size", 32),
            width=width,
            depth=vision.count("num_hidden_layers", 12),
            num_heads=vision.count("num_attention_heads", 12),
            mlp_ratio=mlp_ratio(width, vision.count("intermediate_size", 3072)),
            activation=vision.activation("quick_gelu"),
            norm_epsilon=vision.epsilon(1e-5),
        ),
        text=TextConfig(
            context_length=text.count("max_position_embeddings", 77),
            vocab_size=vocab_size,
            width=text_width,
            depth=text.count("num_hidden_layers", 12),
            num_heads=text.count("num_attention_heads", 8),
            mlp_ratio=mlp_ratio(text_width, text.count("intermediate_size", 2048)),
            pool="argmax" if argmax else "eos",
            eos_token_id=TextConfig.eos_token_id if argmax else eos,
            activation=text.activation("quick_gelu"),
            norm_epsilon=text.epsilon(1e-5),
        ),
    )


def check(weights: Weights) -> None:
    """Raise InputError, which lists what `CLIPModel` has no words for."""
    config, vision, text = weights.config, weights.config.vision, weights.config.text
    if isinstance(vision, ResNetConfig):
        raise InputError(
            "Hugging Face's CLIPModel has no ResNet; choose --to openai, open-clip or clip-jax."
        )
    wrong = {
        "decoder": config.decoder is not None,
        "init_logit_bias (SigLIP)": config.init_logit_bias is not None,
        "vision.pool": vision.pool != "class_token",
        "vision.pre_norm": not vision.pre_norm,
        "vision.patch_bias": vision.patch_bias,
        "vision.projection": not vision.projection,
        "vision.layer_scale": vision.layer_scale is not None,
        "text.causal": not text.causal,
        "text.pool": text.pool not in ("argmax", "eos"),
        "text.projection": not text.projection,
        "text.projection_bias": text.projection_bias,
        "preprocess.resize_mode": weights.preprocess.resize_mode == "longest",
    }
    if unsupported := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise InputError(
            f"Hugging Face's CLIPModel cannot express this model's {', '.join(unsupported)}; "
            "choose --to open-clip or clip-jax."
        )


def towers(config: CLIPConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what both classes of models say of the image tower and of the text tower."""
    vision = typing.cast(ViTConfig, config.vision)  # see `check`
    shapes = [
        {
            "hidden_size": tower.width,
            "intermediate_size": tower.mlp_width,
            "num_hidden_layers": tower.depth,
            "num_attention_heads": tower.num_heads,
            "hidden_act": ACTIVATION_NAMES[tower.activation],
            "layer_norm_eps": tower.norm_epsilon,
        }
        for tower in (vision, config.text)
    ]
    sizes = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    words = {
        "vocab_size": config.text.vocab_size,
        "max_position_embeddings": config.text.context_length,
    }
    return shapes[0] | sizes, shapes[1] | words


def config_json(weights: Weights, dtype: str) -> dict[str, Any]:
    """Return what `config.json` says."""
    config, text = weights.config, weights.config.text
    metaclip = text.pool == "eos" and text.tokenizer.file != "clip"
    eos = text.eos_token_id if text.pool == "eos" else text.vocab_size - 1
    vision_config, text_config = towers(config)
    kind, model_type = ("MetaClip2", "metaclip_2") if metaclip else ("CLIP", "clip")
    ids = {"eos_token_id": eos} if metaclip else {
        "bos_token_id": eos - 1, "eos_token_id": eos, "pad_token_id": eos,
    }  # fmt: skip
    return {
        "architectures": [f"{kind}Model"],
        "model_type": model_type,
        "dtype": dtype,
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": 2.6592,
        "vision_config": {
            "model_type": f"{model_type}_vision_model",
            **vision_config,
            "projection_dim": config.embed_dim,
        },
        "text_config": {
            "model_type": f"{model_type}_text_model",
            **text_config,
            "projection_dim": config.embed_dim,
            **ids,
        },
    }
