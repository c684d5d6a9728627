"""Read and write `open_clip_config.json`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_jax.convert import open_clip_towers, tokenizer_files
from clip_jax.convert.open_clip_towers import (
    TowerFamily,
    decoder_family,
    image_family,
    text_family,
)
from clip_jax.convert.settings import Settings, number_of, read_json
from clip_jax.convert.weights import Weights
from clip_jax.data.images import Preprocess
from clip_jax.data.tokenizers.clip_bpe import FULL_VOCAB_SIZE
from clip_jax.errors import InputError, naming
from clip_jax.models.clip import CLIPConfig, Text
from clip_jax.models.decoders import DecoderConfig
from clip_jax.models.text import Cleaning, TokenizerConfig
from clip_jax.serialize import from_dict, to_dict

CONFIG_NAME = "open_clip_config.json"
_LOCAL = "local"  # a name: open_clip loads the tokenizer files beside the weights
_PIXELS = {  # of preprocess_cfg → fields of Preprocess
    "mean": "mean", "std": "std", "interpolation": "interpolation", "resize_mode": "resize_mode",
    "fill_color": "fill",
}  # fmt: skip
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
    supported = {"clean", "strip_sep_token" if name else "reduction_mask"}
    for option, value in options.items():
        if option not in supported or (option == "reduction_mask" and value):
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
    if strip and tokenizer_files.has_zeroed_padding(folder, text):
        return tokenizer_files.with_cleaning(TokenizerConfig(), clean, f"{where}.clean")
    absent = tokenizer_files.missing(text, clean)
    if strip:  # CLIPA, with BERT's vocabulary
        absent = tokenizer_files.zeroed(replace(absent, begin_id=101, end_id=102, pad_id=0), 102)
    tokenizer = tokenizer_files.read(folder, text, absent)
    if tokenizer is absent:
        return absent
    if strip:
        tokenizer = tokenizer_files.without_separator(tokenizer, folder)
    return tokenizer_files.with_cleaning(tokenizer, clean, f"{where}.clean")


def _tower(families: Sequence[TowerFamily], section: Settings, quick_gelu: bool) -> Any:
    """Return the tower that a section describes."""
    return next(x for x in families if x.describes(section)).read(section, quick_gelu)


def read_config(path: Path) -> tuple[CLIPConfig, Preprocess]:
    """Read the file. Raises InputError, which names an unsupported setting."""
    content = read_json(path)
    with naming(path):
        return config_of(content, path)


def config_of(content: dict[str, Any], path: Path) -> tuple[CLIPConfig, Preprocess]:
    """Return what the content of such a file describes; `path` names it in messages."""
    top = Settings(content.get("model_cfg", content), f"{path}: model_cfg")
    quick_gelu = top.get("quick_gelu", False, bool)
    vision = Settings(top.get("vision_cfg", {}, dict), f"{path}: vision_cfg", _INERT)
    text = Settings(top.get("text_cfg", {}, dict), f"{path}: text_cfg", _INERT)
    pixels = Settings(content.get("preprocess_cfg", {}), f"{path}: preprocess_cfg")
    bias = top.get("init_logit_bias", None, object)
    text_config = _tower(open_clip_towers.TEXT_TOWERS, text, quick_gelu)
    decoder: DecoderConfig | None = None
    is_coca = False
    for family in open_clip_towers.DECODERS:
        if (both := family.read(top, text, text_config, path)) is not None:
            text_config, decoder = both
            is_coca = family is open_clip_towers.COCA
            break
    if decoder is not None and not text_config.writes_captions:
        raise InputError(f"{text.where}.hf_model_name is not supported with multimodal_cfg.")
    has_class_token = text_config.pool == "class_token"
    if has_class_token != is_coca:
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
    image = _tower(open_clip_towers.IMAGE_TOWERS, vision, quick_gelu)
    if image.pool == "queries" and not is_coca:
        raise InputError(
            f"{vision.where}.attentional_pool=True is not supported without multimodal_cfg."
        )
    values = {ours: pixels.get(name, None, object) for name, ours in _PIXELS.items()}
    values = {name: value for name, value in values.items() if value is not None}
    if image.max_patches is not None:
        image = image.with_max_patches(pixels.count("image_seq_len", image.max_patches))
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


def _zeroes_padding(text: Text) -> bool:
    """Return whether open_clip must replace a tokenizer's padding by id 0, the model's.

    A smaller vocabulary of CLIP is written as a tokenizer of transformers. That cannot pad with
    id 0, which is "!": it would take each "!" of a text for padding.
    """
    is_short = text.tokenizer.file == "clip" and not is_open_clips_own(text)
    return is_short and text.sees_padding


def write_tokenizer(folder: Path, text: Text) -> None:
    """Write the files of a tokenizer that is not built into open_clip."""
    if not is_open_clips_own(text):
        cleaned = text.tokenizer.clean in _CLEANING.values()
        tokenizer_files.write(folder, text, cleaned, zeroed_padding=_zeroes_padding(text))


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
    image, words = image_family(config.vision).write(config.vision), text_cfg(text)
    if is_custom(config):
        top["custom_text"] = True
    if config.decoder is not None:
        image["output_tokens"] = words["output_tokens"] = True
        for name in ("no_causal_mask", "pool_type", "proj_type"):  # implied by the kind of decoder
            words.pop(name, None)
        more_top, more_words = decoder_family(config.decoder).write(config)
        top, words = top | more_top, words | more_words
    return {**top, "vision_cfg": image, "text_cfg": words}


def is_custom(config: CLIPConfig) -> bool:
    """Return whether open_clip needs its class with both towers apart, the text tower's tensors
    below `text.`."""
    families = image_family(config.vision), text_family(config.text)
    return config.decoder is not None or any(family.is_custom for family in families)


def text_cfg(text: Text) -> dict[str, Any]:
    """Return the settings of text tower and tokenizer in open_clip's configuration."""
    content = text_family(text).write(text)
    if "hf_tokenizer_name" in content:
        return content
    if is_open_clips_own(text) and text.tokenizer.clean != "clip":
        content["tokenizer_kwargs"] = {"clean": text.tokenizer.clean}
    if not is_open_clips_own(text):
        clean = {ours: theirs for theirs, ours in _CLEANING.items()}.get(text.tokenizer.clean)
        content["hf_tokenizer_name"] = _LOCAL
        options: dict[str, Any] = {"clean": clean or "whitespace"}
        if text.tokenizer.zeroed_id is not None or _zeroes_padding(text):
            options["strip_sep_token"] = True
        content["tokenizer_kwargs"] = options
    return content
