"""Read and write `open_clip_config.json`."""

import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_jax.convert import bert, timm, tokenizer_files
from clip_jax.convert.settings import Settings, Table, by_table, count_of, number_of, read_json
from clip_jax.convert.weights import Weights
from clip_jax.data.images import Preprocess
from clip_jax.data.tokenizers.clip_bpe import FULL_VOCAB_SIZE
from clip_jax.errors import InputError, naming
from clip_jax.models.bert import BertConfig
from clip_jax.models.clip import CLIPConfig, Text, Vision
from clip_jax.models.decoder import CoCaConfig, DecoderConfig, MaMMUTConfig
from clip_jax.models.layers import Activation
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import Cleaning, Pool, TextConfig, TokenizerConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.serialize import from_dict, to_dict

CONFIG_NAME = "open_clip_config.json"
_LOCAL = "local"  # a name: open_clip loads the tokenizer files beside the weights
_IMAGE: Table = {
    "width": ("width", 768), "head_width": ("head_width", 64), "patch_size": ("patch_size", 16),
    "mlp_ratio": ("mlp_ratio", 4.0),
}  # fmt: skip
_RESNET: Table = {"width": ("width", 64), "head_width": ("head_width", 64)}
_QUERIES: Table = {
    "attn_pooler_queries": ("pool_queries", 256), "attn_pooler_heads": ("pool_heads", 8),
}  # fmt: skip
_TEXT: Table = {
    "context_length": ("context_length", 77), "vocab_size": ("vocab_size", FULL_VOCAB_SIZE),
    "width": ("width", 512), "layers": ("depth", 12), "heads": ("num_heads", 8),
    "mlp_ratio": ("mlp_ratio", 4.0),
}  # fmt: skip
_COCA: Table = {"layers": ("depth", 12), "heads": ("num_heads", 8)}
_PIXELS = {  # of preprocess_cfg → fields of Preprocess
    "mean": "mean", "std": "std", "interpolation": "interpolation", "resize_mode": "resize_mode",
    "fill_color": "fill",
}  # fmt: skip
_POOLS: dict[str, Any] = {"tok": "class_token", "avg": "mean", "avg_all": "mean_all"}
# Settings of multimodal_cfg that open_clip ignores.
_UNREAD = {
    "context_length",
    "vocab_size",
    "mlp_ratio",
    "dim_head",
    "n_queries",
    "attn_pooler_heads",
    "output_tokens",
}
# Settings without effect on a trained model.
_INERT = {
    "patch_dropout",
    "output_tokens",
    "attn_pooler_queries",
    "attn_pooler_heads",
    "timm_drop",
    "timm_drop_path",
    "timm_model_pretrained",
    "timm_proj_bias",
    "hf_model_pretrained",
    "hf_proj_type",
    "hf_pooler_type",
    "pos_embed_type",
}


def _activation(section: Settings, quick_gelu: bool) -> Activation:
    options = section.get("act_kwargs", {}, dict)
    if quick_gelu and not options:
        return "quick_gelu"
    if not quick_gelu and options in ({}, {"approximate": "none"}):
        return "gelu"
    if not quick_gelu and options == {"approximate": "tanh"}:
        return "gelu_tanh"
    raise InputError(
        f"{section.where}.act_kwargs={options!r:.99} with quick_gelu={quick_gelu} is not supported."
    )


def _epsilon(section: Settings) -> float:
    options = section.get("norm_kwargs", {}, dict)
    if set(options) - {"eps"}:
        raise InputError(f"{section.where}.norm_kwargs={options!r:.99}: only eps is supported.")
    return number_of(options.get("eps", 1e-5), f"{section.where}.norm_kwargs.eps", True)


def _vision(section: Settings, quick_gelu: bool) -> Vision:
    name = section.get("timm_model_name", None, str)
    if name is not None:  # it defines the tower, including the activation
        head = section.get("timm_pool", "avg", str), section.values.get("timm_proj", "linear")
        section.used.add("timm_proj")
        tower = timm.tower(name, head, section.count("image_size", 224), section.where)
        if isinstance(tower, ViTConfig) and tower.max_patches is not None:
            patches = section.count("image_seq_len", tower.max_patches)
            tower = replace(tower, max_patches=patches)
        return tower
    section.used |= {"timm_pool", "timm_proj"}
    layers = section.get("layers", 12, object)
    size = section.get("image_size", 224, object)
    if isinstance(size, list):
        if len(size) != 2 or size[0] != size[1]:
            raise InputError(
                f"{section.where}.image_size={size!r:.99} is not supported: it must be square."
            )
        size = size[0]
    image_size = count_of(size, f"{section.where}.image_size")
    if isinstance(layers, list):
        section.used |= {"patch_size", "mlp_ratio"}
        if len(layers) != 4 or any(type(x) is not int or not 1 <= x <= 200 for x in layers):
            raise InputError(
                f"{section.where}.layers={layers!r:.99}: a ResNet needs four stages of 1 to 200 "
                "blocks."
            )
        stages = typing.cast(tuple[int, int, int, int], tuple(layers))
        sizes = section.fields(_RESNET)
        heads = max(sizes["width"] * 32 // sizes.pop("head_width"), 1)
        return ResNetConfig(image_size=image_size, layers=stages, num_heads=heads, **sizes)
    pool = section.get("pool_type", "tok", str)
    ln_after = section.get("final_ln_after_pool", False, bool)
    queries = section.get("attentional_pool", False, object)
    if queries not in (False, True):
        raise InputError(
            f"{section.where}.attentional_pool={queries!r:.99} is not supported, since open_clip "
            "calls it untested; use true or false."
        )
    if pool not in _POOLS or (pool != "tok" and (queries or not ln_after)):
        raise InputError(
            f"{section.where}.pool_type={pool!r:.99} with final_ln_after_pool={ln_after} is not "
            "supported: clip_jax normalises after pooling."
        )
    scale = section.get("ls_init_value", None, object)
    sizes = section.fields(_IMAGE)
    return ViTConfig(
        image_size=image_size,
        depth=count_of(layers, f"{section.where}.layers"),
        num_heads=max(sizes["width"] // sizes.pop("head_width"), 1),
        **sizes,
        pool="queries" if queries else _POOLS[pool],
        **section.fields(_QUERIES),
        pre_norm=not section.get("no_ln_pre", False, bool),
        activation=_activation(section, quick_gelu),
        norm_epsilon=_epsilon(section),
        layer_scale=None if scale is None else number_of(scale, f"{section.where}.ls_init_value"),
    )


def _text(section: Settings, quick_gelu: bool) -> Text:
    if section.get("hf_model_name", None, str):
        return bert.read_open_clip(section)
    pools: dict[str, Pool] = {"argmax": "argmax", "eos": "eos", "last": "last"}
    pool = section.get("pool_type", "argmax", str)
    correct = section.get("correct_cls_mask", False, bool)
    is_coca = section.get("embed_cls", False, bool)
    eos = section.count("eos_id", 2)
    projection = section.get("proj_type", "linear", str)
    if pool not in pools or projection not in ("linear", "none"):
        raise InputError(
            f"{section.where}: pool_type={pool!r:.99} with proj_type="
            f"{projection!r:.99} is not supported."
        )
    return TextConfig(
        **section.fields(_TEXT),
        causal=not section.get("no_causal_mask", False, bool),
        pool="class_token" if is_coca else pools[pool],
        correct_class_mask=correct or not is_coca,
        eos_token_id=eos if pool == "eos" else TextConfig.eos_token_id,
        projection=projection == "linear",
        projection_bias=section.get("proj_bias", False, bool) and projection == "linear",
        activation=_activation(section, quick_gelu),
        norm_epsilon=_epsilon(section),
    )


def _coca(section: Settings, text: TextConfig) -> CoCaConfig:
    """Read `multimodal_cfg`. Raises InputError if the decoder does not fit the text tower."""
    section.used |= _UNREAD
    width = section.count("width", 512)
    if width != text.width:
        raise InputError(
            f"{section.where}.width={width} must equal text_cfg.width={text.width}, since the "
            "decoder takes those states."
        )
    return CoCaConfig(**section.fields(_COCA))


def _mammut(section: Settings, text: TextConfig) -> tuple[TextConfig, MaMMUTConfig]:
    """Read the text tower and the decoder of MaMMUT from `text_cfg`."""
    decoder = MaMMUTConfig(
        cross_every=section.count("cross_attn_ratio", 1),
        first_mlp=section.get("has_mlp", True, bool),
    )
    return replace(text, causal=False, pool="mean", projection=False), decoder


# open_clip's names of its cleaning, which precedes any tokenizer of transformers.
_CLEANING: dict[str, Cleaning] = {
    "lower": "clip",
    "whitespace": "whitespace",
    "canonicalize": "canonicalize",
}


def _tokenizer(section: Settings, text: Text, folder: Path) -> TokenizerConfig:
    options = section.get("tokenizer_kwargs", {}, dict)
    name = section.get("hf_tokenizer_name", "", str)
    where = f"{section.where}.tokenizer_kwargs"
    cleaning = options.get("clean", "whitespace" if name else "lower")
    if not isinstance(cleaning, str) or cleaning not in _CLEANING:
        raise InputError(
            f"{where}.clean is {cleaning!r:.99}; it must be one of {', '.join(_CLEANING)}."
        )
    clean = _CLEANING[cleaning]
    known = {"clean", "strip_sep_token" if name else "reduction_mask"}
    for option, value in options.items():
        if option not in known or (option == "reduction_mask" and value):
            raise InputError(
                f"{where}.{option}={value!r:.99} is not supported; remove it. Supported are clean, "
                "and with hf_tokenizer_name strip_sep_token."
            )
    mode = section.get("tokenizer_mode", None, object)
    if name and mode:
        raise InputError(
            f"{section.where}.tokenizer_mode={mode!r:.99} is not supported: clip_jax has no "
            "tokenizer that ends the padding with a class token. Use weights without it."
        )
    if not name:
        return TokenizerConfig(clean=clean)
    strip = options.get("strip_sep_token")
    absent = tokenizer_files.missing(text, clean)
    if strip:  # CLIPA, with BERT's vocabulary
        absent = tokenizer_files.zeroed(replace(absent, begin_id=101, end_id=102, pad_id=0), 102)
    tokenizer = tokenizer_files.read(folder, text, absent)
    if tokenizer is absent:
        return absent
    if strip:
        tokenizer = tokenizer_files.without_separator(tokenizer, folder)
    return tokenizer_files.with_cleaning(tokenizer, clean, f"{where}.clean")


def read_config(path: Path) -> tuple[CLIPConfig, Preprocess]:
    """Read the file. Raises InputError, which names an unsupported setting."""
    content = read_json(path)
    with naming(path):
        return _read_config(content, path)


def _read_config(content: dict[str, Any], path: Path) -> tuple[CLIPConfig, Preprocess]:
    top = Settings(content.get("model_cfg", content), f"{path}: model_cfg")
    quick_gelu = top.get("quick_gelu", False, bool)
    vision = Settings(top.get("vision_cfg", {}, dict), f"{path}: vision_cfg", _INERT)
    text = Settings(top.get("text_cfg", {}, dict), f"{path}: text_cfg", _INERT)
    pixels = Settings(content.get("preprocess_cfg", {}), f"{path}: preprocess_cfg")
    bias = top.get("init_logit_bias", None, object)
    text_config = _text(text, quick_gelu)
    decoder: DecoderConfig | None = None
    if text.get("does_full_decoding", False, bool):
        text_config, decoder = _mammut(text, text_config)
    elif multimodal := top.get("multimodal_cfg", None, dict):
        section = Settings(multimodal, f"{path}: multimodal_cfg")
        decoder = _coca(section, text_config)
        section.finish()
    if decoder is not None and isinstance(text_config, BertConfig):
        raise InputError(f"{text.where}.hf_model_name is not supported with multimodal_cfg.")
    has_class_token = text_config.pool == "class_token"
    if has_class_token != isinstance(decoder, CoCaConfig):
        raise InputError(
            f"{text.where}.embed_cls={has_class_token} is not supported "
            f"{'without' if has_class_token else 'with'} multimodal_cfg: a text tower has a class "
            "token if and only if there is a CoCa decoder."
        )
    tokenizer = _tokenizer(text, text_config, path.parent)
    pad = text.get("pad_id", 0, int)  # without a class token it has no effect
    if has_class_token and not tokenizer.file:
        tokenizer = replace(tokenizer, pad_id=pad)
    if has_class_token and pad != tokenizer.pad_id:
        raise InputError(
            f"{text.where}.pad_id={pad} is not supported: the class token does not attend to "
            f"padding, so it must be the tokenizer's padding id, {tokenizer.pad_id}."
        )
    image = _vision(vision, quick_gelu)
    if image.pool == "queries" and not isinstance(decoder, CoCaConfig):
        raise InputError(
            f"{vision.where}.attentional_pool=True is not supported without multimodal_cfg."
        )
    values = {ours: pixels.get(name, None, object) for name, ours in _PIXELS.items()}
    values = {name: value for name, value in values.items() if value is not None}
    if isinstance(image, ViTConfig) and image.max_patches is not None:
        image = replace(image, max_patches=pixels.count("image_seq_len", image.max_patches))
        values |= {"resize_mode": "naflex", "max_patches": image.max_patches}
        values["patch_size"] = image.patch_size
    if values.get("interpolation") == "random":  # for training; open_clip evaluates with bicubic
        values["interpolation"] = "bicubic"
    preprocess = from_dict(Preprocess, {**values, "image_size": image.image_size}, pixels.where)
    config = CLIPConfig(
        embed_dim=top.count("embed_dim", 512),
        vision=image,
        text=replace(text_config, tokenizer=tokenizer),
        decoder=decoder,
        init_logit_scale=10.0 if bias is not None else 1 / 0.07,
        init_logit_bias=None if bias is None else number_of(bias, f"{top.where}.init_logit_bias"),
        image_mean=preprocess.mean,
        image_std=preprocess.std,
    )
    top.used |= {"custom_text", "nonscalar_logit_scale", "init_logit_scale"}
    pixels.used |= {"size", "mode"}
    for section in (top, vision, text, pixels):
        section.finish()
    return config, preprocess


def preprocess_cfg(preprocess: Preprocess) -> dict[str, Any]:
    """Return the settings of preprocessing in open_clip's configuration.

    open_clip 3.3 has only squares for NaFlex, and ignores the number of patches.
    """
    values, content = to_dict(preprocess), {"size": preprocess.image_spec.side}
    if preprocess.max_patches is not None:
        content["image_seq_len"], values["resize_mode"] = preprocess.max_patches, "squash"
    return content | {name: values[ours] for name, ours in _PIXELS.items() if values[ours] != 0}


def is_open_clips_own(text: Text) -> bool:
    """Return whether a tokenizer is open_clip's built-in one."""
    tokenizer = text.tokenizer
    is_full = tokenizer.file == "clip" and text.clip_vocab_size == FULL_VOCAB_SIZE
    return is_full and tokenizer.clean in _CLEANING.values()


def write_tokenizer(folder: Path, text: Text) -> None:
    """Write the files of a tokenizer that is not built into open_clip."""
    if not is_open_clips_own(text):
        tokenizer_files.write(folder, text, text.tokenizer.clean in _CLEANING.values())


def check_tokenizer(text: Text) -> None:
    """Raise Inexpressible if neither open_clip nor transformers has such a tokenizer."""
    if not is_open_clips_own(text):
        tokenizer_files.check(text, text.tokenizer.clean in _CLEANING.values())


def model_cfg(weights: Weights) -> dict[str, Any]:
    """Return the settings of a model in open_clip's configuration."""
    config, text = weights.config, weights.config.text
    top: dict[str, Any] = {"embed_dim": config.embed_dim}
    if "quick_gelu" in (text.activation, config.vision.activation):
        top["quick_gelu"] = True
    if config.has_logit_bias:
        top["init_logit_bias"] = config.init_logit_bias
    image, words = _vision_cfg(config.vision), text_cfg(text)
    if is_custom(config):
        top["custom_text"] = True
    if config.decoder is not None:
        image["output_tokens"] = words["output_tokens"] = True
        for name in ("no_causal_mask", "pool_type", "proj_type"):  # implied by the kind of decoder
            words.pop(name, None)
    if isinstance(config.decoder, MaMMUTConfig):
        words |= {
            "does_full_decoding": True,
            "cross_attn_ratio": config.decoder.cross_every,
            "has_mlp": config.decoder.first_mlp,
        }
    elif config.decoder is not None:
        words["embed_cls"] = True
        top["multimodal_cfg"] = {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            **by_table(_COCA, config.decoder),
        }
    return {**top, "vision_cfg": image, "text_cfg": words}


def is_custom(config: CLIPConfig) -> bool:
    """Return whether open_clip needs its class with both towers apart, the text tower's tensors
    below `text.`."""
    apart = timm.family_of(config.vision) or config.decoder
    return apart is not None or isinstance(config.text, BertConfig)


def _vision_cfg(vision: Vision) -> dict[str, Any]:
    content: dict[str, Any] = {"image_size": vision.image_spec.side}
    if family := timm.family_of(vision):
        return content | {
            "timm_model_name": timm.name_of(vision),
            "timm_model_pretrained": False,
            "timm_pool": family.head[0],
            "timm_proj": family.head[1],
        }
    if isinstance(vision, ResNetConfig):
        content |= {"layers": list(vision.layers), "patch_size": None}
        return content | by_table(_RESNET, vision)
    vision = typing.cast(ViTConfig, vision)
    content |= {"layers": vision.depth, **by_table(_IMAGE, vision), **_options(vision)}
    if vision.layer_scale is not None:
        content["ls_init_value"] = vision.layer_scale
    if not vision.pre_norm:
        content["no_ln_pre"] = True
    if vision.pool == "queries":
        content |= {"attentional_pool": True, **by_table(_QUERIES, vision)}
    elif vision.pool != "class_token":
        names = {ours: theirs for theirs, ours in _POOLS.items()}
        content |= {"pool_type": names[vision.pool], "final_ln_after_pool": True}
    return content


def text_cfg(text: Text) -> dict[str, Any]:
    """Return the settings of text tower and tokenizer in open_clip's configuration."""
    if isinstance(text, BertConfig):
        content = bert.write_open_clip(text)
        if not text.tokenizer.file:
            return content | {"hf_tokenizer_name": content["hf_model_name"]}
    else:
        options = {
            "no_causal_mask": None if text.causal else True,
            "pool_type": text.pool if text.pool != "argmax" else None,
            "eos_id": text.eos_token_id if text.pool == "eos" else None,
            "pad_id": text.tokenizer.pad_id or None if text.pool == "class_token" else None,
            "proj_type": None if text.projection else "none",
            "proj_bias": text.projection_bias or None,
        }
        content = {**by_table(_TEXT, text), **_options(text)}
        content |= {name: value for name, value in options.items() if value is not None}
    if is_open_clips_own(text) and text.tokenizer.clean != "clip":
        content["tokenizer_kwargs"] = {"clean": text.tokenizer.clean}
    if not is_open_clips_own(text):
        clean = {ours: theirs for theirs, ours in _CLEANING.items()}.get(text.tokenizer.clean)
        content["hf_tokenizer_name"] = _LOCAL
        strips = {} if text.tokenizer.zeroed_id is None else {"strip_sep_token": True}
        content["tokenizer_kwargs"] = {"clean": clean or "whitespace", **strips}
    return content


def _options(tower: ViTConfig | Text) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if tower.activation == "gelu_tanh":
        options["act_kwargs"] = {"approximate": "tanh"}
    if tower.norm_epsilon != 1e-5:
        options["norm_kwargs"] = {"eps": tower.norm_epsilon}
    return options
