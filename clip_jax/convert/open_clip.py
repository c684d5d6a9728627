"""open_clip's format: OpenAI's names with more options, beside an `open_clip_config.json`."""

import typing
from pathlib import Path
from typing import Any

from clip_jax.convert import openai
from clip_jax.convert.files import Tensors, read_json, write_json, write_safetensors
from clip_jax.convert.state_dict import Row, from_params, to_params
from clip_jax.convert.tokenizer_json import is_clip_tokenizer, write_tokenizer
from clip_jax.convert.weights import DType, TokenizerConfig, Weights, cast, tokenizer_size
from clip_jax.data.images import Channels, Preprocess
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


class _Settings:
    """One section of the JSON: what is taken from it, and at the end what nobody asked for."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise ValueError(f"{where} is {values!r}; an object is needed.")
        self.values, self.where, self.used = values, where, set(_INERT)

    def get(self, name: str, default: Any, kind: type | tuple[type, ...]) -> Any:
        self.used.add(name)
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) and kind is not bool:
            raise ValueError(f"{self.where}.{name} is {value!r}.")
        if not isinstance(value, kind):
            raise ValueError(f"{self.where}.{name} is {value!r}, of the wrong type.")
        return value

    def finish(self) -> None:
        for name, value in self.values.items():
            if name not in self.used and value not in (None, False, 0, "", {}, []):
                raise ValueError(f"{self.where}.{name}={value!r} is not supported by clip_jax.")


def _activation(section: _Settings, quick_gelu: bool) -> Activation:
    options = section.get("act_kwargs", {}, dict)
    if quick_gelu and not options:
        return "quick_gelu"
    if not quick_gelu and options in ({}, {"approximate": "none"}):
        return "gelu"
    if not quick_gelu and options == {"approximate": "tanh"}:
        return "gelu_tanh"
    raise ValueError(
        f"{section.where}.act_kwargs={options} with quick_gelu={quick_gelu} is not supported."
    )


def _epsilon(section: _Settings) -> float:
    options = section.get("norm_kwargs", {}, dict)
    if set(options) - {"eps"} or not isinstance(options.get("eps", 1e-5), float | int):
        raise ValueError(f"{section.where}.norm_kwargs={options}: only eps is supported.")
    return float(options.get("eps", 1e-5))


def _vision(section: _Settings, quick_gelu: bool) -> ViTConfig | ResNetConfig:
    layers = section.get("layers", 12, (int, list))
    width = section.get("width", 768, int)
    head_width = section.get("head_width", 64, int)
    image_size = section.get("image_size", 224, (int, list))
    if isinstance(image_size, list):
        if len(set(image_size)) != 1:
            raise ValueError(f"{section.where}.image_size={image_size}: images must be square.")
        image_size = image_size[0]
    if isinstance(layers, list):
        section.used |= {"patch_size", "mlp_ratio"}
        if len(layers) != 4:
            raise ValueError(f"{section.where}.layers={layers}: a ResNet has four stages.")
        return ResNetConfig(
            image_size=image_size, layers=tuple(layers), width=width,
            num_heads=width * 32 // head_width,
        )  # fmt: skip
    pool = section.get("pool_type", "tok", str)
    ln_after = section.get("final_ln_after_pool", False, bool)
    if pool not in ("tok", "avg") or (pool == "avg" and not ln_after):
        raise ValueError(
            f"{section.where}.pool_type={pool!r} with final_ln_after_pool={ln_after} is not "
            "supported: clip_jax normalises after pooling."
        )
    scale = section.get("ls_init_value", None, float)
    return ViTConfig(
        image_size=image_size,
        patch_size=section.get("patch_size", 16, int),
        width=width,
        depth=layers,
        num_heads=width // head_width,
        mlp_ratio=float(section.get("mlp_ratio", 4.0, (float, int))),
        pool="class_token" if pool == "tok" else "mean",
        pre_norm=not section.get("no_ln_pre", False, bool),
        activation=_activation(section, quick_gelu),
        norm_epsilon=_epsilon(section),
        layer_scale=scale,
    )


def _text(section: _Settings, quick_gelu: bool) -> TextConfig:
    pools: dict[str, Pool] = {"argmax": "argmax", "eos": "eos", "last": "last"}
    pool = section.get("pool_type", "argmax", str)
    eos = section.get("eos_id", 2, int)
    if pool not in pools or section.get("proj_type", "linear", str) != "linear":
        raise ValueError(
            f"{section.where}: pool_type={pool!r} with proj_type="
            f"{section.values.get('proj_type')!r} is not supported."
        )
    return TextConfig(
        context_length=section.get("context_length", 77, int),
        vocab_size=section.get("vocab_size", FULL_VOCAB_SIZE, int),
        width=section.get("width", 512, int),
        depth=section.get("layers", 12, int),
        num_heads=section.get("heads", 8, int),
        mlp_ratio=float(section.get("mlp_ratio", 4.0, (float, int))),
        causal=not section.get("no_causal_mask", False, bool),
        pool=pools[pool],
        eos_token_id=eos if pool == "eos" else TextConfig.eos_token_id,
        projection_bias=section.get("proj_bias", False, bool),
        activation=_activation(section, quick_gelu),
        norm_epsilon=_epsilon(section),
    )


def _tokenizer(section: _Settings, text: TextConfig, folder: Path) -> TokenizerConfig:
    options = section.get("tokenizer_kwargs", {}, dict)
    name = section.get("hf_tokenizer_name", "clip", str) or "clip"
    vocab_size = tokenizer_size(text)
    section.used |= {"tokenizer_mode"}
    clean = options.get("clean", "lower" if name == "clip" else "whitespace")
    if name != "clip" and clean == "lower" and is_clip_tokenizer(folder, vocab_size):
        name = "clip"
    return TokenizerConfig(
        name=name, vocab_size=vocab_size, context_length=text.context_length, clean=clean
    )


def _channels(section: _Settings, name: str, default: Channels) -> Channels:
    return typing.cast(Channels, tuple(map(float, section.get(name, default, (list, tuple)))))


def read_config(path: Path) -> tuple[CLIPConfig, Preprocess, TokenizerConfig]:
    """Read `open_clip_config.json`. ValueError names a setting that we do not have."""
    content = read_json(path)
    top = _Settings(content.get("model_cfg", content), f"{path}: model_cfg")
    quick_gelu = top.get("quick_gelu", False, bool)
    vision = _Settings(top.get("vision_cfg", {}, dict), f"{path}: vision_cfg")
    text = _Settings(top.get("text_cfg", {}, dict), f"{path}: text_cfg")
    pixels = _Settings(content.get("preprocess_cfg", {}), f"{path}: preprocess_cfg")
    bias = top.get("init_logit_bias", None, (float, int))
    mean = _channels(pixels, "mean", OPENAI_MEAN)
    std = _channels(pixels, "std", OPENAI_STD)
    text_config = _text(text, quick_gelu)
    tokenizer = _tokenizer(text, text_config, path.parent)
    config = CLIPConfig(
        embed_dim=top.get("embed_dim", 512, int),
        vision=_vision(vision, quick_gelu),
        text=text_config,
        init_logit_scale=10.0 if bias is not None else 1 / 0.07,
        init_logit_bias=None if bias is None else float(bias),
        image_mean=mean,
        image_std=std,
    )
    interpolation = pixels.get("interpolation", "bicubic", str)
    preprocess = Preprocess(
        image_size=config.vision.image_size,
        mean=mean,
        std=std,
        # open_clip evaluates with bicubic where training drew one at random.
        interpolation="bicubic" if interpolation == "random" else interpolation,
        resize_mode=pixels.get("resize_mode", "shortest", str),
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
    return Weights(config=config, params=params, preprocess=preprocess, tokenizer=tokenizer)


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
    wrong = {}
    if isinstance(vision, ViTConfig):
        quick = (vision.activation == "quick_gelu", text.activation == "quick_gelu")
        wrong = {
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
    return {n: cast(x, dtype) for n, x in tensors.items()} | openai.counters(tensors)


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
