"""A vocabulary and its rules in Hugging Face's files, which open_clip's folders have too.

What is read is what transformers' tokenizer would do; what is written makes it give our ids.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_jax.convert import sentencepiece_json
from clip_jax.convert.files import read_json, write_json
from clip_jax.convert.tokenizer_json import is_clip_tokenizer, write_clip_tokenizer
from clip_jax.data.tokenizers import json_file, sentence_piece
from clip_jax.data.tokenizers.vocabulary import JSON_NAME, is_json, read_vocabulary
from clip_jax.errors import InputError
from clip_jax.models.text import Cleaning, TextConfig, TokenizerConfig
from clip_jax.storage.files import write_whole

CONFIG_NAME = "tokenizer_config.json"
SIGLIP_NAME = "spiece.model"
# Rules of released vocabularies, by their number of ids: (begin, end, padding).
_RELEASED = {
    32_000: (None, 1, 1), 250_000: (None, 1, 1), 256_000: (None, 1, 0), 901_629: (0, 2, 1),
}  # fmt: skip


def missing(text: TextConfig, clean: Cleaning) -> TokenizerConfig:
    """Return the rules of a vocabulary that does not lie beside the weights."""
    begin, end, pad = _RELEASED.get(text.vocab_size, (None, None, 0))
    return TokenizerConfig(file="", clean=clean, begin_id=begin, end_id=end, pad_id=pad)


def read(folder: Path, text: TextConfig, default: TokenizerConfig) -> TokenizerConfig:
    """Read which vocabulary and rules transformers takes from a folder; `default` without files."""
    if is_clip_tokenizer(folder, text.clip_vocab_size):
        return TokenizerConfig()
    path = folder / CONFIG_NAME
    settings = read_json(path) if path.exists() else {}
    if settings.get("truncation_side", "right") != "right":
        raise InputError(f"{path}: truncation_side='left' is not supported: texts lose their end.")
    side = settings.get("padding_side", "right")
    if side not in ("right", "left"):
        raise InputError(f"{path}: padding_side is {side!r:.99}; known are right and left.")
    kind = settings.get("tokenizer_class")
    if (folder / SIGLIP_NAME).exists() and kind in (None, "SiglipTokenizer"):
        return _read_siglip(folder, settings, side)
    if not (folder / JSON_NAME).exists():
        return default
    if kind == "Siglip2Tokenizer":
        side = settings.get("padding_side", "left")  # the class's own default
    return _read_json(folder, settings, "lower" if kind == "Siglip2Tokenizer" else "none", side)


def _read_siglip(folder: Path, settings: dict[str, Any], side: Any) -> TokenizerConfig:
    file = str(folder / SIGLIP_NAME)
    model = sentence_piece.load(file)
    if not settings.get("do_lower_case", True):
        raise InputError(f"{folder / CONFIG_NAME}: do_lower_case=False is not supported.")
    ids = []
    for name in ("eos_token", "pad_token"):
        token = _token(settings, name, folder) or "</s>"
        ids.append(model.piece_to_id(token))
        if model.id_to_piece(ids[-1]) != token:
            raise InputError(f"{folder / CONFIG_NAME}: {name}={token!r:.99} is not in {file}.")
    return TokenizerConfig(
        file=file, clean="punctuation", end_id=ids[0], pad_id=ids[1], pad_side=side
    )


def _read_json(
    folder: Path, settings: dict[str, Any], clean: Cleaning, side: Any
) -> TokenizerConfig:
    file = str(folder / JSON_NAME)
    tokenizer = json_file.load(file)

    def id_of(name: str) -> int | None:
        token = _token(settings, name, folder)
        number = None if token is None else tokenizer.token_to_id(token)
        if token is not None and number is None:
            raise InputError(f"{folder / CONFIG_NAME}: {name}={token!r:.99} is not in {file}.")
        return number

    if "add_bos_token" in settings or "add_eos_token" in settings:
        begin = id_of("bos_token") if settings.get("add_bos_token") else None
        end = id_of("eos_token") if settings.get("add_eos_token") else None
    else:
        begin, end = _template(tokenizer, file)
    pad = id_of("pad_token")
    return TokenizerConfig(
        file=file, clean=clean, begin_id=begin, end_id=end, pad_id=pad or 0, pad_side=side
    )


def _template(tokenizer: Any, file: str) -> tuple[int | None, int | None]:
    """Return what a tokenizer.json puts before and after a text."""
    if (count := tokenizer.num_special_tokens_to_add(False)) > 2:
        raise InputError(f"{file} adds {count} special tokens to a text; 2 at most are supported.")
    with json_file.damage_refused(file):  # its post-processor may name tokens that it lacks
        bare = tokenizer.encode("a", add_special_tokens=False).ids
        whole = tokenizer.encode("a", add_special_tokens=True).ids
    extra = len(whole) - len(bare)
    for before in range(min(extra, 1) + 1):
        after = whole[before + len(bare) :]
        if whole[before : before + len(bare)] == bare and len(after) <= 1:
            return (whole[0] if before else None), (after[0] if after else None)
    raise InputError(
        f"{file} puts {whole} for {bare}: at most one id before and one after are known."
    )


def _token(settings: dict[str, Any], name: str, folder: Path) -> str | None:
    value = settings.get(name)
    value = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(value, str):
        raise InputError(f"{folder / CONFIG_NAME}: {name} is {value!r:.99}; a string is needed.")
    return value


def write(
    folder: Path,
    text: TextConfig,
    cleaned: bool = False,
    as_json: bool = False,
    own_padding: bool = False,
) -> None:
    """Write what `AutoTokenizer.from_pretrained` needs to make the ids of a model's tokenizer.

    With `cleaned` its texts come cleaned; with `as_json` a sentencepiece model becomes a
    `tokenizer.json`, which is all that some readers know. Hugging Face repairs no mojibake and
    unescapes no HTML. `own_padding` as in `write_clip_tokenizer`.
    Raises InputError for a sentencepiece model with rules that no class of transformers has.
    """
    config = text.tokenizer
    if config.file == "clip":
        if not cleaned and config.clean != "clip":
            raise InputError(
                f"transformers has CLIP's BPE with CLIP's cleaning alone, and this model's is "
                f"{config.clean!r}; choose --to open-clip or clip-jax."
            )
        write_clip_tokenizer(folder, text, own_padding)
        return
    if not config.file:
        return
    data = read_vocabulary(config.file)
    settings: dict[str, Any] = {
        "model_max_length": text.context_length,
        "padding_side": config.pad_side,
        "truncation_side": "right",
    }
    if as_json and not is_json(data):
        data = json.dumps(sentencepiece_json.to_json(data, config.file)).encode()
        write_whole(folder / JSON_NAME, data)
        config = replace(config, file=str(folder / JSON_NAME))
    if is_json(data):
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= _write_json(folder, json.loads(data), config, cleaned)
    else:
        settings |= _write_siglip(folder, data, config, cleaned)
    write_json(folder / CONFIG_NAME, settings)


def _write_siglip(
    folder: Path, data: bytes, config: TokenizerConfig, cleaned: bool
) -> dict[str, Any]:
    fits = config.clean == "punctuation" or (cleaned and config.clean == "canonicalize")
    if not fits or config.begin_id is not None or config.end_id is None:
        raise InputError(
            f"{config.file} with text.tokenizer.clean={config.clean!r}, begin_id="
            f"{config.begin_id}, end_id={config.end_id} is not what transformers does with a "
            "sentencepiece model (SiglipTokenizer: punctuation, None, an id); choose --to clip-jax."
        )
    model = sentence_piece.load(config.file)
    write_whole(folder / SIGLIP_NAME, data)
    return {
        "tokenizer_class": "SiglipTokenizer",
        "eos_token": model.id_to_piece(config.end_id),
        "pad_token": model.id_to_piece(config.pad_id),
        "unk_token": model.id_to_piece(model.unk_id()),
        "do_lower_case": True,
    }


def _write_json(
    folder: Path, content: dict[str, Any], config: TokenizerConfig, cleaned: bool
) -> dict[str, Any]:
    """Write the vocabulary with the rules put into it; return the names of its special tokens."""
    names = {i: token for token, i in json_file.load(config.file).get_vocab().items()}
    steps = [] if cleaned else _CLEANING[config.clean]
    before = content.get("normalizer")
    if steps and before is not None:
        steps = [*steps, before]
    if steps:
        content["normalizer"] = {"type": "Sequence", "normalizers": steps}
    single = [{"Sequence": {"id": "A", "type_id": 0}}]
    special = {}
    for at, value in ((0, config.begin_id), (len(single), config.end_id)):
        if value is not None:
            token = names[value]
            entry = {"SpecialToken": {"id": token, "type_id": 0}}
            single = [entry, *single] if at == 0 else [*single, entry]
            special[token] = {"id": token, "ids": [value], "tokens": [token]}
    content |= {"truncation": None, "padding": None}
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special,
    } if special else None  # fmt: skip
    raw = json.dumps(content, ensure_ascii=False).encode()
    write_whole(folder / JSON_NAME, raw)
    ids = {"bos_token": config.begin_id, "eos_token": config.end_id, "pad_token": config.pad_id}
    return {name: names[value] for name, value in ids.items() if value is not None}


def _replace(pattern: str, by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": by}


_LOWER = {"type": "Lowercase"}
_SPACES = [_replace(r"\s+", " "), {"type": "Strip", "strip_left": True, "strip_right": True}]
_SIGNS = _replace(r"[!-/:-@\[-`{-~]", "")  # ASCII's punctuation
# Cleaning as normalizers of a tokenizer.json, which have no repair of mojibake and HTML.
_CLEANING: dict[Cleaning, list[dict[str, Any]]] = {
    "none": [],
    "lower": [_LOWER],
    "whitespace": _SPACES,
    "punctuation": [_LOWER, _SIGNS, *_SPACES],
    "canonicalize": [_replace("_", " "), _LOWER, _SIGNS, *_SPACES],
    "clip": [*_SPACES, _LOWER],
}


def with_cleaning(config: TokenizerConfig, clean: Cleaning, where: str) -> TokenizerConfig:
    """Return a tokenizer of transformers whose texts open_clip has cleaned before."""
    covered = {
        "none": ("whitespace", "canonicalize", "clip"), "lower": ("canonicalize", "clip"),
        "punctuation": ("canonicalize",), "clip": ("clip",),
    }  # fmt: skip
    if clean not in covered.get(config.clean, ()):
        raise InputError(
            f"{where}: cleaning {clean!r} before a tokenizer whose own is {config.clean!r} is not "
            "supported."
        )
    return replace(config, clean=clean)


def without_separator(config: TokenizerConfig, folder: Path) -> TokenizerConfig:
    """Return a tokenizer that has id 0 for its separator, as open_clip's `strip_sep_token` does.

    Raises InputError unless the separator is what ends each text.
    """
    path = folder / CONFIG_NAME
    token = _token(read_json(path) if path.exists() else {}, "sep_token", folder) or "[SEP]"
    if config.end_id is None or json_file.load(config.file).token_to_id(token) != config.end_id:
        raise InputError(
            f"{folder}: strip_sep_token with sep_token={token!r:.99}, which does not end each text "
            "of the tokenizer, is not supported."
        )
    return replace(config, end_id=0)
