"""open_clip's format: OpenAI's names with more options, beside an `open_clip_config.json`."""

import typing
from pathlib import Path
from typing import Any

from clip_jax.convert import openai
from clip_jax.convert.files import Tensors, read_json, write_json, write_safetensors
from clip_jax.convert.settings import Settings, channels_of, count_of, number_of, one_of, said_in
from clip_jax.convert.state_dict import Row, from_params, to_params
from clip_jax.convert.tokenizer_json import is_clip_tokenizer, write_tokenizer
from clip_jax.convert.weights import (
    Cleaning,
    DType,
    TokenizerConfig,
    Weights,
    cast,
    tokenizer_size,
)
from clip_jax.data.images import Interpolation, Preprocess, ResizeMode
from clip_jax.data.tokenizer import FULL_VOCAB_SIZE
from clip_jax.models.clip import OPENAI_MEAN, OPENAI_STD, CLIPConfig
from clip_jax.models.layers import Activation
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import Pool, TextConfig
from clip_jax.models.vit import ViTConfig

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
# What open_clip's own loader would take, the first first.
WEIGHTS_NAMES = (
    WEIGHTS_NAME, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin",
)  # fmt: skip
_TEXT_PREFIXES = (
    "text.transformer.", "text.token_embedding.", "text.positional_embedding", "text.ln_final.",
    "text.text_projection",
)  # fmt: skip
_LOCAL = "local"  # open_clip takes the tokenizer files beside the weights, whatever the name
# Settings that change no number of a finished model.
_INERT = {
    "patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads", "timm_drop",
    "timm_drop_path", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias",
    "hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "pos_embed_type", "pad_id",
}  # fmt: skip


def _activation(section: Settings, quick_gelu: bool) -> Activation:
    options = section.get("act_kwargs", {}, dict)
    if quick_gelu and not options:
        return "quick_gelu"
    if not quick_gelu and options in ({}, {"approximate": "none"}):
        return "gelu"
    if not quick_gelu and options == {"approximate": "tanh"}:
        return "gelu_tanh"
    raise ValueError(
        f"{section.where}.act_kwargs={options!r:.99} with quick_gelu={quick_gelu} is not supported."
    )


def _epsilon(section: Settings) -> float:
    options = section.get("norm_kwargs", {}, dict)
    if set(options) - {"eps"}:
        raise ValueError(f"{section.where}.norm_kwargs={options!r:.99}: only eps is supported.")
    return number_of(options.get("eps", 1e-5), f"{section.where}.norm_kwargs.eps", True)


def _vision(section: Settings, quick_gelu: bool) -> ViTConfig | ResNetConfig:
    layers = section.get("layers", 12, object)
    width = section.count("width", 768)
    head_width = section.count("head_width", 64)
    size = section.get("image_size", 224, object)
    if isinstance(size, list):
        if len(size) != 2 or size[0] != size[1]:
            raise ValueError(f"{section.where}.image_size={size!r:.99}: images must be square.")
        size = size[0]
    image_size = count_of(size, f"{section.where}.image_size")
    if isinstance(layers, list):
        section.used |= {"patch_size", "mlp_ratio"}
        if len(layers) != 4 or any(type(x) is not int or not 1 <= x <= 200 for x in layers):
            raise ValueError(
                f"{section.where}.layers={layers!r:.99}: a ResNet has four stages of 1 to 200 "
                "blocks."
            )
        stages = typing.cast(tuple[int, int, int, int], tuple(layers))
        heads = max(width * 32 // head_width, 1)
        return ResNetConfig(image_size=image_size, layers=stages, width=width, num_heads=heads)
    pool = section.get("pool_type", "tok", str)
    ln_after = section.get("final_ln_after_pool", False, bool)
    if pool not in ("tok", "avg") or (pool == "avg" and not ln_after):
        raise ValueError(
            f"{section.where}.pool_type={pool!r:.99} with final_ln_after_pool={ln_after} is not "
            "supported: clip_jax normalises after pooling."
        )
    scale = section.get("ls_init_value", None, object)
    return ViTConfig(
        image_size=image_size,
        patch_size=section.count("patch_size", 16),
        width=width,
        depth=count_of(layers, f"{section.where}.layers"),
        num_heads=max(width // head_width, 1),
        mlp_ratio=section.number("mlp_ratio", 4.0),
        pool="class_token" if pool == "tok" else "mean",
        pre_norm=not section.get("no_ln_pre", False, bool),
        activation=_activation(section, quick_gelu),
        norm_epsilon=_epsilon(section),
        layer_scale=None if scale is None else number_of(scale, f"{section.where}.ls_init_value"),
    )


def _text(section: Settings, quick_gelu: bool) -> TextConfig:
    pools: dict[str, Pool] = {"argmax": "argmax", "eos": "eos", "last": "last"}
    pool = section.get("pool_type", "argmax", str)
    eos = section.count("eos_id", 2)
    if pool not in pools or section.get("proj_type", "linear", str) != "linear":
        raise ValueError(
            f"{section.where}: pool_type={pool!r:.99} with proj_type="
            f"{section.values.get('proj_type')!r:.99} is not supported."
        )
    return TextConfig(
        context_length=section.count("context_length", 77),
        vocab_size=section.count("vocab_size", FULL_VOCAB_SIZE),
        width=section.count("width", 512),
        depth=section.count("layers", 12),
        num_heads=section.count("heads", 8),
        mlp_ratio=section.number("mlp_ratio", 4.0),
        causal=not section.get("no_causal_mask", False, bool),
        pool=pools[pool],
        eos_token_id=eos if pool == "eos" else TextConfig.eos_token_id,
        projection_bias=section.get("proj_bias", False, bool),
        activation=_activation(section, quick_gelu),
        norm_epsilon=_epsilon(section),
    )


def _tokenizer(section: Settings, text: TextConfig, folder: Path) -> TokenizerConfig:
    options = section.get("tokenizer_kwargs", {}, dict)
    name = section.get("hf_tokenizer_name", "clip", str) or "clip"
    vocab_size = tokenizer_size(text)
    section.used |= {"tokenizer_mode"}
    clean = options.get("clean", "lower" if name == "clip" else "whitespace")
    clean = one_of(clean, f"{section.where}.tokenizer_kwargs.clean", Cleaning)
    if name != "clip" and clean == "lower" and is_clip_tokenizer(folder, vocab_size):
        name = "clip"
    return TokenizerConfig(
        name=name, vocab_size=vocab_size, context_length=text.context_length, clean=clean
    )


def read_config(path: Path) -> tuple[CLIPConfig, Preprocess, TokenizerConfig]:
    """Read `open_clip_config.json`. ValueError names a setting that we do not have."""
    content = read_json(path)
    with said_in(path):
        return _read_config(content, path)


def _read_config(
    content: dict[str, Any], path: Path
) -> tuple[CLIPConfig, Preprocess, TokenizerConfig]:
    top = Settings(content.get("model_cfg", content), f"{path}: model_cfg")
    quick_gelu = top.get("quick_gelu", False, bool)
    vision = Settings(top.get("vision_cfg", {}, dict), f"{path}: vision_cfg", _INERT)
    text = Settings(top.get("text_cfg", {}, dict), f"{path}: text_cfg", _INERT)
    pixels = Settings(content.get("preprocess_cfg", {}), f"{path}: preprocess_cfg")
    bias = top.get("init_logit_bias", None, object)
    mean = channels_of(pixels.get("mean", OPENAI_MEAN, object), f"{pixels.where}.mean")
    std = channels_of(pixels.get("std", OPENAI_STD, object), f"{pixels.where}.std", True)
    text_config = _text(text, quick_gelu)
    tokenizer = _tokenizer(text, text_config, path.parent)
    config = CLIPConfig(
        embed_dim=top.count("embed_dim", 512),
        vision=_vision(vision, quick_gelu),
        text=text_config,
        init_logit_scale=10.0 if bias is not None else 1 / 0.07,
        init_logit_bias=None if bias is None else number_of(bias, f"{top.where}.init_logit_bias"),
        image_mean=mean,
        image_std=std,
    )
    interpolation = pixels.get("interpolation", "bicubic", object)
    if interpolation == "random":  # in training; open_clip evaluates such a model with bicubic
        interpolation = "bicubic"
    resize_mode = pixels.get("resize_mode", "shortest", object)
    preprocess = Preprocess(
        image_size=config.vision.image_size,
        mean=mean,
        std=std,
        interpolation=one_of(interpolation, f"{pixels.where}.interpolation", Interpolation),
        resize_mode=one_of(resize_mode, f"{pixels.where}.resize_mode", ResizeMode),
    )
    top.used |= {"custom_text", "nonscalar_logit_scale", "init_logit_scale"}
    pixels.used |= {"size", "mode", "fill_color"}
    for section in (top, vision, text, pixels):
        section.finish()
    return config, preprocess, tokenizer


def table(config: CLIPConfig) -> list[Row]:
    """OpenAI's rows and those of open_clip's options."""
    found = openai.rows(config)
    if config.text.projection_bias:
        found = [row for row in found if row.ours != "text/text_projection"]
        found += [
            Row("text/text_projection", "text_projection.weight", "E D -> D E"),
            Row("text/text_projection_bias", "text_projection.bias"),
        ]
    if config.init_logit_bias is not None:
        found.append(Row("logit_bias", "logit_bias"))
    return found


def find_weights(folder: Path) -> Path:
    """Choose the file of weights in a folder as open_clip does."""
    for name in WEIGHTS_NAMES:
        for path in (folder / name, folder / f"{name}.index.json"):
            if path.exists():
                return path
    others = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt"))
    if len(others) != 1:
        raise ValueError(
            f"{folder} holds {len(others)} files of weights ({[p.name for p in others[:5]]}); "
            f"exactly one, or one called {WEIGHTS_NAME}, is needed."
        )
    return others[0]


def read(
    tensors: Tensors,
    source: str,
    config_path: Path | None,
    *,
    activation: Activation | None = None,
    architecture: str | None = None,
) -> Weights:
    """Read a state dict, with its configuration or, without one, told what no tensor shows."""
    tensors = _flat_names(tensors)
    if config_path is None:
        return openai.read(tensors, source, activation=activation, architecture=architecture)
    config, preprocess, tokenizer = read_config(config_path)
    weights = openai.without_bookkeeping(tensors)
    for name in ("logit_scale", "logit_bias"):  # one number, of shape [] or [1]
        if name in weights and weights[name].size == 1:
            weights[name] = weights[name].reshape(())
    params = to_params(table(config), weights, config, source)
    return Weights(
        config=config,
        params=params,
        preprocess=preprocess,
        tokenizer=tokenizer,
        batches_tracked=openai.batches_tracked(tensors),
    )


def _flat_names(tensors: Tensors) -> Tensors:
    """Take away what training wraps names in, and the `text.` of open_clip's custom towers."""
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    return {
        name.removeprefix("text.") if name.startswith(_TEXT_PREFIXES) else name: x
        for name, x in tensors.items()
    }


def check(weights: Weights) -> None:
    """ValueError that lists what open_clip has no settings for."""
    vision, text = weights.config.vision, weights.config.text
    # A tokenizer of our own is written as Hugging Face's, which can only pad with end of text.
    own = weights.tokenizer.name == "clip" and weights.tokenizer.vocab_size != FULL_VOCAB_SIZE
    wrong = {
        f"padding with id 0 in a vocabulary of {weights.tokenizer.vocab_size}, which "
        "text.causal=False and text.pool='last' see": own
        and (not text.causal or text.pool == "last")
    }
    if isinstance(vision, ViTConfig):
        quick = (vision.activation == "quick_gelu", text.activation == "quick_gelu")
        wrong |= {
            "one tower with QuickGELU": quick[0] != quick[1],
            "vision.class_token=False": not vision.class_token,
            "vision.pool": vision.pool == "map",
            "vision.patch_bias": vision.patch_bias,
            "vision.projection=False": not vision.projection,
        }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(
            f"open_clip's own towers cannot express this model's {', '.join(found)}; "
            "choose --to clip-jax."
        )


def to_tensors(weights: Weights, dtype: DType | None = None) -> Tensors:
    """Return the state dict under open_clip's names. ValueError if it cannot be expressed."""
    check(weights)
    tensors = from_params(table(weights.config), weights.params)
    counters = openai.counters(tensors, weights.batches_tracked)
    return {n: cast(x, dtype) for n, x in tensors.items()} | counters


def write(weights: Weights, folder: Path, *, dtype: DType | None = None) -> None:
    """Write a folder that `open_clip.create_model_and_transforms("local-dir:…")` loads."""
    tensors = to_tensors(weights, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    preprocess = weights.preprocess
    content = {
        "model_cfg": _model_cfg(weights),
        "preprocess_cfg": {
            "size": preprocess.image_size,
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "interpolation": preprocess.interpolation,
            "resize_mode": preprocess.resize_mode,
        },
    }
    write_json(folder / CONFIG_NAME, content)
    if "hf_tokenizer_name" in content["model_cfg"]["text_cfg"] and weights.tokenizer.name == "clip":
        write_tokenizer(folder, weights.tokenizer)


def _model_cfg(weights: Weights) -> dict[str, Any]:
    config, vision, text = weights.config, weights.config.vision, weights.config.text
    top: dict[str, Any] = {"embed_dim": config.embed_dim}
    if text.activation == "quick_gelu":
        top["quick_gelu"] = True
    if config.init_logit_bias is not None:
        top["init_logit_bias"] = config.init_logit_bias
    vision_cfg: dict[str, Any] = {"image_size": vision.image_size, "width": vision.width}
    if isinstance(vision, ResNetConfig):
        vision_cfg |= {
            "layers": list(vision.layers),
            "patch_size": None,
            "head_width": vision.output_width // vision.num_heads,
        }
    else:
        vision_cfg |= {
            "layers": vision.depth,
            "patch_size": vision.patch_size,
            "head_width": vision.width // vision.num_heads,
            "mlp_ratio": vision.mlp_ratio,
            **_options(vision),
        }
        if vision.layer_scale is not None:
            vision_cfg["ls_init_value"] = vision.layer_scale
        if not vision.pre_norm:
            vision_cfg["no_ln_pre"] = True
        if vision.pool == "mean":
            vision_cfg |= {"pool_type": "avg", "final_ln_after_pool": True}
    text_cfg: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.num_heads,
        "layers": text.depth,
        "mlp_ratio": text.mlp_ratio,
        **_options(text),
    }
    if not text.causal:
        text_cfg["no_causal_mask"] = True
    if text.pool != "argmax":
        text_cfg["pool_type"] = text.pool
    if text.pool == "eos":
        text_cfg["eos_id"] = text.eos_token_id
    if text.projection_bias:
        text_cfg["proj_bias"] = True
    tokenizer = weights.tokenizer
    if tokenizer.name != "clip" or tokenizer.vocab_size != FULL_VOCAB_SIZE:
        text_cfg["hf_tokenizer_name"] = _LOCAL if tokenizer.name == "clip" else tokenizer.name
        text_cfg["tokenizer_kwargs"] = {"clean": tokenizer.clean}
    return {**top, "vision_cfg": vision_cfg, "text_cfg": text_cfg}


def _options(tower: ViTConfig | TextConfig) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if tower.activation == "gelu_tanh":
        options["act_kwargs"] = {"approximate": "tanh"}
    if tower.norm_epsilon != 1e-5:
        options["norm_kwargs"] = {"eps": tower.norm_epsilon}
    return options
