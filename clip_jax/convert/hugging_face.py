"""Hugging Face's format: a folder that `CLIPModel` and `CLIPProcessor` load."""

import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_jax.convert.files import Tensors, read_json, read_tensors, write_json, write_safetensors
from clip_jax.convert.settings import channels_of, count_of, number_of, said_in
from clip_jax.convert.state_dict import Row, from_params, norm, to_params
from clip_jax.convert.tokenizer_json import has_tokenizer, is_clip_tokenizer, write_tokenizer
from clip_jax.convert.weights import (
    DType,
    TokenizerConfig,
    Weights,
    cast,
    mlp_ratio,
    tokenizer_size,
)
from clip_jax.data.images import Interpolation, Preprocess
from clip_jax.models.clip import OPENAI_MEAN, OPENAI_STD, CLIPConfig
from clip_jax.models.layers import Activation
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

WEIGHTS_NAME = "model.safetensors"
_WEIGHTS_NAMES = (
    WEIGHTS_NAME, f"{WEIGHTS_NAME}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_LEGACY_EOS = 2  # a wrong id that stood in the configurations; Hugging Face reads it as "argmax"
_RESAMPLE: dict[Interpolation, int] = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
_POSITION_IDS = "embeddings.position_ids"  # buffers of old files


def _block_rows(ours: str, theirs: str) -> list[Row]:
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
        Row(f"{ours}/mlp/c_fc/kernel", f"{theirs}.mlp.fc1.weight", "F D -> D F"),
        Row(f"{ours}/mlp/c_fc/bias", f"{theirs}.mlp.fc1.bias"),
        Row(f"{ours}/mlp/c_proj/kernel", f"{theirs}.mlp.fc2.weight", "D F -> F D"),
        Row(f"{ours}/mlp/c_proj/bias", f"{theirs}.mlp.fc2.bias"),
    ]  # fmt: skip


# The names are theirs ("pre_layrnorm" too).
TABLE = [
    Row("visual/class_embedding", "vision_model.embeddings.class_embedding"),
    Row(
        "visual/conv1/kernel", "vision_model.embeddings.patch_embedding.weight",
        "D C P Q -> P Q C D",
    ),
    Row("visual/positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    *norm("visual/ln_pre", "vision_model.pre_layrnorm"),
    *_block_rows("visual/transformer/resblocks", "vision_model.encoder.layers.{}"),
    *norm("visual/ln_post", "vision_model.post_layernorm"),
    Row("visual/proj", "visual_projection.weight", "E D -> D E"),
    Row("text/token_embedding", "text_model.embeddings.token_embedding.weight"),
    Row("text/positional_embedding", "text_model.embeddings.position_embedding.weight"),
    *_block_rows("text/transformer/resblocks", "text_model.encoder.layers.{}"),
    *norm("text/ln_final", "text_model.final_layer_norm"),
    Row("text/text_projection", "text_projection.weight", "E D -> D E"),
    Row("logit_scale", "logit_scale"),
]  # fmt: skip


def read(folder: Path) -> Weights:
    """Read a `CLIPModel` folder. Raises ValueError that names what is missing or unknown."""
    content = read_json(folder / "config.json")
    if content.get("model_type") != "clip":
        raise ValueError(
            f"{folder / 'config.json'} has model_type={content.get('model_type')!r}; "
            "Hugging Face's CLIPModel ('clip') is read."
        )
    path = next((folder / n for n in _WEIGHTS_NAMES if (folder / n).exists()), None)
    if path is None:
        raise ValueError(f"{folder} has none of {', '.join(_WEIGHTS_NAMES)}.")
    tensors = {n: x for n, x in read_tensors(path).items() if not n.endswith(_POSITION_IDS)}
    with said_in(folder / "config.json"):
        config = _read_config(content, str(folder / "config.json"))
    preprocess = _read_preprocess(folder, config)
    config = replace(config, image_mean=preprocess.mean, image_std=preprocess.std)
    params = to_params(TABLE, tensors, config, str(path))
    return Weights(
        config=config,
        params=params,
        preprocess=preprocess,
        tokenizer=_read_tokenizer(folder, config.text),
    )


def _section(content: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    """Return a tower's settings; in old files what `…_dict` says holds."""
    found: dict[str, Any] = {}
    for key in (name, f"{name}_dict"):
        part = content.get(key) or {}
        if not isinstance(part, dict):
            raise ValueError(f"{source}: {key} is {part!r:.99}; an object is needed.")
        found |= part
    return found


def _read_config(content: dict[str, Any], source: str) -> CLIPConfig:
    vision = _section(content, "vision_config", source)
    text = _section(content, "text_config", source)

    def get(section: dict[str, Any], name: str, default: int) -> int:
        return count_of(section.get(name, default), f"{source}: {name}")

    def epsilon(section: dict[str, Any]) -> float:
        return number_of(section.get("layer_norm_eps", 1e-5), f"{source}: layer_norm_eps", True)

    def activation(section: dict[str, Any]) -> Activation:
        name = section.get("hidden_act", "quick_gelu")
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            known = sorted(_ACTIVATIONS)
            raise ValueError(f"{source}: hidden_act={name!r:.99}; known are {known}.")
        return _ACTIVATIONS[name]

    if get(vision, "num_channels", 3) != 3:
        raise ValueError(f"{source}: num_channels={vision['num_channels']}; 3 are supported.")
    width, text_width = get(vision, "hidden_size", 768), get(text, "hidden_size", 512)
    vocab_size = get(text, "vocab_size", 49_408)
    eos = get(text, "eos_token_id", 49_407)
    # The end of text, where it has the highest id, is found at its first place by argmax too.
    argmax = eos in (_LEGACY_EOS, vocab_size - 1)
    return CLIPConfig(
        embed_dim=get(content, "projection_dim", 512),
        vision=ViTConfig(
            image_size=get(vision, "image_size", 224),
            patch_size=get(vision, "patch_size", 32),
            width=width,
            depth=get(vision, "num_hidden_layers", 12),
            num_heads=get(vision, "num_attention_heads", 12),
            mlp_ratio=mlp_ratio(width, get(vision, "intermediate_size", 3072)),
            activation=activation(vision),
            norm_epsilon=epsilon(vision),
        ),
        text=TextConfig(
            context_length=get(text, "max_position_embeddings", 77),
            vocab_size=vocab_size,
            width=text_width,
            depth=get(text, "num_hidden_layers", 12),
            num_heads=get(text, "num_attention_heads", 8),
            mlp_ratio=mlp_ratio(text_width, get(text, "intermediate_size", 2048)),
            pool="argmax" if argmax else "eos",
            eos_token_id=TextConfig.eos_token_id if argmax else eos,
            activation=activation(text),
            norm_epsilon=epsilon(text),
        ),
    )


def _read_preprocess(folder: Path, config: CLIPConfig) -> Preprocess:
    size = config.vision.image_size
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return Preprocess(image_size=size)
    content = read_json(path)
    resize, crop = content.get("size", size), content.get("crop_size", size)
    resize = {"shortest_edge": resize} if isinstance(resize, int) else resize
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    square = {"height": size, "width": size}
    cropped = content.get("do_center_crop", True)
    if resize == square and (not cropped or crop == square):
        mode = "squash"
    elif resize == {"shortest_edge": size} and cropped and crop == square:
        mode = "shortest"
    else:
        raise ValueError(
            f"{path}: size={resize!r:.99}, crop_size={crop!r:.99}, do_center_crop={cropped!r:.99} "
            f"is not supported for an image size of {size}."
        )
    kinds = {number: name for name, number in _RESAMPLE.items()}
    resample = content.get("resample", _RESAMPLE["bicubic"])
    scale = number_of(content.get("rescale_factor", 1 / 255), f"{path}: rescale_factor")
    steps = ("do_resize", "do_rescale", "do_normalize")
    if (
        type(resample) is not int
        or resample not in kinds
        or abs(scale * 255 - 1) > 1e-6
        or not all(content.get(step, True) for step in steps)
    ):
        raise ValueError(
            f"{path}: resample={resample!r:.99}, rescale_factor={scale} or a step that is left out "
            f"({', '.join(steps)}) is not supported."
        )
    mean, std = content.get("image_mean"), content.get("image_std")
    return Preprocess(
        image_size=size,
        mean=OPENAI_MEAN if mean is None else channels_of(mean, f"{path}: image_mean"),
        std=OPENAI_STD if std is None else channels_of(std, f"{path}: image_std", True),
        interpolation=kinds[resample],
        resize_mode=mode,
    )


def _read_tokenizer(folder: Path, text: TextConfig) -> TokenizerConfig:
    vocab_size = tokenizer_size(text)
    clip = not has_tokenizer(folder) or is_clip_tokenizer(folder, vocab_size)
    return TokenizerConfig(
        name="clip" if clip else f"{folder.name}/tokenizer.json",
        vocab_size=vocab_size,
        context_length=text.context_length,
        clean="lower" if clip else "whitespace",
    )


def check(weights: Weights) -> None:
    """ValueError that lists what `CLIPModel` has no words for."""
    config, vision, text = weights.config, weights.config.vision, weights.config.text
    if isinstance(vision, ResNetConfig):
        raise ValueError(
            "Hugging Face's CLIPModel has no ResNet; choose --to openai, open-clip or clip-jax."
        )
    wrong = {
        "init_logit_bias (SigLIP)": config.init_logit_bias is not None,
        "vision.pool": vision.pool != "class_token",
        "vision.pre_norm": not vision.pre_norm,
        "vision.patch_bias": vision.patch_bias,
        "vision.projection": not vision.projection,
        "vision.layer_scale": vision.layer_scale is not None,
        "text.causal": not text.causal,
        "text.pool": text.pool == "last",
        "text.projection_bias": text.projection_bias,
        "preprocess.resize_mode": weights.preprocess.resize_mode == "longest",
        "tokenizer": weights.tokenizer.name != "clip",
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(
            f"Hugging Face's CLIPModel cannot express this model's {', '.join(found)}; "
            "choose --to open-clip or clip-jax."
        )


def to_tensors(weights: Weights, dtype: DType | None = None) -> Tensors:
    """Return the state dict under Hugging Face's names. ValueError if it cannot be expressed."""
    check(weights)
    return {n: cast(x, dtype) for n, x in from_params(TABLE, weights.params).items()}


def write(weights: Weights, folder: Path, *, dtype: DType | None = None) -> None:
    """Write everything that `CLIPModel` and `CLIPProcessor.from_pretrained` need offline."""
    tensors = to_tensors(weights, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    write_json(folder / "config.json", _config(weights, tensors))
    write_json(folder / "preprocessor_config.json", _preprocessor(weights.preprocess))
    write_tokenizer(folder, weights.tokenizer)


def _config(weights: Weights, tensors: Tensors) -> dict[str, Any]:
    config, text = weights.config, weights.config.text
    vision = typing.cast(ViTConfig, config.vision)  # see `check`
    names = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    eos = tokenizer_size(text) - 1
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": tensors["visual_projection.weight"].dtype.name,
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": 2.6592,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_width,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": names[vision.activation],
            "layer_norm_eps": vision.norm_epsilon,
            "projection_dim": config.embed_dim,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "hidden_size": text.width,
            "intermediate_size": text.mlp_width,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.num_heads,
            "hidden_act": names[text.activation],
            "layer_norm_eps": text.norm_epsilon,
            "projection_dim": config.embed_dim,
            "bos_token_id": eos - 1,
            "eos_token_id": eos,
            "pad_token_id": eos,
        },
    }


def _preprocessor(preprocess: Preprocess) -> dict[str, Any]:
    size = preprocess.image_size
    square = {"height": size, "width": size}
    shortest = preprocess.resize_mode == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if shortest else square,
        "resample": _RESAMPLE[preprocess.interpolation],
        "do_center_crop": shortest,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
