"""Read and write Hugging Face's tokenizer files, which open_clip's folders have, too.

The rules read are those of transformers' tokenizer; the files written make it return our ids.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HubTokenizer
from tokenizers.models import BPE, Unigram

from clip_jax.convert.settings import MAX_JSON, read_json, write_json
from clip_jax.data.tokenizers import json_file, sentence_piece
from clip_jax.data.tokenizers.clip_bpe import END_OF_TEXT, START_OF_TEXT, WORD_END, ClipTokenizer
from clip_jax.data.tokenizers.vocabulary import JSON_NAME, is_json, read_vocabulary
from clip_jax.errors import InputError, needing
from clip_jax.models.text import Cleaning, TextConfig, TokenizerConfig
from clip_jax.storage.files import write_whole

CONFIG_NAME = "tokenizer_config.json"
SIGLIP_NAME = "spiece.model"
_UNIGRAM = 1  # in sentencepiece's TrainerSpec.ModelType
_UNKNOWN, _CONTROL = 2, 3  # in its SentencePiece.Type
# Special ids of released vocabularies, by number of ids: (begin, end, padding).
_RELEASED = {
    32_000: (None, 1, 1), 250_000: (None, 1, 1), 256_000: (None, 1, 0), 901_629: (0, 2, 1),
    **dict.fromkeys((50_265, 250_002), (0, 2, 1)), **dict.fromkeys((21_128, 30_522), (101, 102, 0)),
}  # fmt: skip


def missing(text: TextConfig, clean: Cleaning) -> TokenizerConfig:
    """Return the rules of a vocabulary whose files are missing."""
    begin, end, pad = _RELEASED.get(text.vocab_size, (None, None, 0))
    return TokenizerConfig(file="", clean=clean, begin_id=begin, end_id=end, pad_id=pad)


def read(folder: Path, text: TextConfig, default: TokenizerConfig) -> TokenizerConfig:
    """Read the vocabulary and rules of a folder; return `default` if it has no such files."""
    if is_clip_tokenizer(folder, text.clip_vocab_size):
        return TokenizerConfig()
    path = folder / CONFIG_NAME
    settings = read_json(path) if path.exists() else {}
    if settings.get("truncation_side", "right") != "right":
        raise InputError(f"{path}: truncation_side='left' is not supported; set it to right.")
    side = settings.get("padding_side", "right")
    if side not in ("right", "left"):
        raise InputError(f"{path}: padding_side is {side!r:.99}; it must be right or left.")
    kind = settings.get("tokenizer_class")
    if (folder / SIGLIP_NAME).exists() and kind in (None, "SiglipTokenizer"):
        return _read_siglip(folder, settings, side)
    if not (folder / JSON_NAME).exists():
        return default
    if kind == "Siglip2Tokenizer":
        side = settings.get("padding_side", "left")  # the class's default
    # Released SigLIP 2 folders name Gemma's class, which ignores this setting; training did not.
    lowers = kind == "GemmaTokenizer" and settings.get("do_lower_case") is True
    clean = "lower" if lowers or kind == "Siglip2Tokenizer" else "none"
    return _read_json(folder, settings, clean, side, default.pad_id)


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
    folder: Path, settings: dict[str, Any], clean: Cleaning, side: Any, default_pad: int
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
    pad = default_pad if (named := id_of("pad_token")) is None else named
    return TokenizerConfig(
        file=file, clean=clean, begin_id=begin, end_id=end, pad_id=pad, pad_side=side
    )


def _template(tokenizer: Any, file: str) -> tuple[int | None, int | None]:
    """Return the ids that a tokenizer.json puts before and after a text."""
    if (count := tokenizer.num_special_tokens_to_add(False)) > 2:
        raise InputError(f"{file} adds {count} special tokens to a text; 2 at most are supported.")
    with json_file.damage_refused(file):  # its post-processor may name missing tokens
        bare = tokenizer.encode("a", add_special_tokens=False).ids
        ids = tokenizer.encode("a", add_special_tokens=True).ids
    extra = len(ids) - len(bare)
    for before in range(min(extra, 1) + 1):
        after = ids[before + len(bare) :]
        if ids[before : before + len(bare)] == bare and len(after) <= 1:
            return (ids[0] if before else None), (after[0] if after else None)
    raise InputError(
        f"{file} turns {bare} into {ids}; at most one id before and one after are supported."
    )


def _token(settings: dict[str, Any], name: str, folder: Path) -> str | None:
    value = settings.get(name)
    value = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(value, str):
        raise InputError(f"{folder / CONFIG_NAME}: {name} is {value!r:.99}; it must be a string.")
    return value


def write(
    folder: Path,
    text: TextConfig,
    cleaned: bool = False,
    as_json: bool = False,
    own_padding: bool = False,
) -> None:
    """Write the files with which `AutoTokenizer.from_pretrained` returns a model's token ids.

    With `cleaned`, its input is already cleaned; with `as_json`, a sentencepiece model becomes a
    `tokenizer.json`, the only format of some readers. Hugging Face repairs no mojibake and
    unescapes no HTML. `own_padding` is that of `write_clip_tokenizer`.
    Raises InputError for a sentencepiece model with rules that no class of transformers has.
    """
    config = text.tokenizer
    if config.file == "clip":
        if not cleaned and config.clean != "clip":
            raise InputError(
                f"transformers has CLIP's BPE only with text.tokenizer.clean='clip', not "
                f"{config.clean!r}; use --to open-clip or clip-jax."
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
    if is_json(data) or as_json:
        tokenizer = json_file.load(config.file) if is_json(data) else _unigram(data, config.file)
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= _write_json(folder, tokenizer, config, cleaned)
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
            f"{config.begin_id}, end_id={config.end_id} is not supported by transformers for a "
            "sentencepiece model (SiglipTokenizer: punctuation, None, an id); use --to clip-jax."
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
    folder: Path, tokenizer: HubTokenizer, config: TokenizerConfig, cleaned: bool
) -> dict[str, Any]:
    """Write the vocabulary with its rules; return the names of its special tokens."""
    steps = [] if cleaned else list(_CLEANING[config.clean])
    if steps and tokenizer.normalizer is not None:
        steps.append(tokenizer.normalizer)
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    ids = {"bos_token": config.begin_id, "eos_token": config.end_id, "pad_token": config.pad_id}
    names = {name: tokenizer.id_to_token(i) for name, i in ids.items() if i is not None}
    around = {names[x]: ids[x] for x in ("bos_token", "eos_token") if x in names}
    template = [names.get("bos_token"), "$A", names.get("eos_token")]
    parts = [part for part in template if part is not None]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=parts, special_tokens=list(around.items())
    )
    write_whole(folder / JSON_NAME, tokenizer.to_str())
    return names


def _unigram(data: bytes, file: str) -> HubTokenizer:
    """Return a tokenizer equivalent to a sentencepiece unigram model, for readers without it.

    Raises InputError for another kind of model, and if the package `protobuf` is missing.
    """
    with needing(
        f"converting {file} to a tokenizer.json needs the package protobuf: "
        "pip install 'clip-jax-pods[onnx]'."
    ):
        from sentencepiece import sentencepiece_model_pb2
    made_at_run_time: Any = sentencepiece_model_pb2
    model = made_at_run_time.ModelProto.FromString(data)
    if model.trainer_spec.model_type != _UNIGRAM:
        raise InputError(
            f"{file} is a sentencepiece model of another kind than unigram; set --tokenizer to the "
            "tokenizer.json that was published with it."
        )
    rules, pieces = model.normalizer_spec, model.pieces
    tokenizer = HubTokenizer(
        Unigram(
            [(piece.piece, piece.score) for piece in pieces],
            next(i for i, piece in enumerate(pieces) if piece.type == _UNKNOWN),
            model.trainer_spec.byte_fallback,
        )
    )
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if rules.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.add_special_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=True)
            for piece in pieces
            if piece.type in (_UNKNOWN, _CONTROL)
        ]
    )
    return tokenizer


_LOWER = normalizers.Lowercase()
_SPACES = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
_SIGNS = normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), "")  # ASCII punctuation
# Cleaning as normalizers of a tokenizer.json, which cannot repair mojibake and HTML.
_CLEANING: dict[Cleaning, list[normalizers.Normalizer]] = {
    "none": [],
    "lower": [_LOWER],
    "whitespace": _SPACES,
    "punctuation": [_LOWER, _SIGNS, *_SPACES],
    "canonicalize": [normalizers.Replace("_", " "), _LOWER, _SIGNS, *_SPACES],
    "clip": [*_SPACES, _LOWER],
}


def with_cleaning(config: TokenizerConfig, clean: Cleaning, where: str) -> TokenizerConfig:
    """Return the rules of transformers' tokenizer, with open_clip's cleaning before it."""
    covered = {
        "none": ("whitespace", "canonicalize", "clip"), "lower": ("canonicalize", "clip"),
        "punctuation": ("canonicalize",), "clip": ("clip",),
    }  # fmt: skip
    if clean not in covered.get(config.clean, ()):
        raise InputError(
            f"{where}: cleaning {clean!r} before a tokenizer that cleans by {config.clean!r} is "
            "not supported."
        )
    return replace(config, clean=clean)


def without_separator(config: TokenizerConfig, folder: Path) -> TokenizerConfig:
    """Return the rules with id 0 instead of the separator, as by open_clip's `strip_sep_token`.

    Raises InputError unless texts end with the separator.
    """
    path = folder / CONFIG_NAME
    token = _token(read_json(path) if path.exists() else {}, "sep_token", folder) or "[SEP]"
    if config.end_id is None or json_file.load(config.file).token_to_id(token) != config.end_id:
        raise InputError(
            f"{folder}: strip_sep_token with sep_token={token!r:.99}, which does not end each text "
            "of the tokenizer, is not supported."
        )
    return replace(config, end_id=0)


# ------------------------------------------------------------------ CLIP's vocabulary

_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def write_clip_tokenizer(folder: Path, text: TextConfig, own_padding: bool = False) -> None:
    """Write the two files that `CLIPProcessor.from_pretrained` needs to tokenize and to pad.

    Padding is end-of-text, as in Hugging Face's CLIP: the state of the first one is pooled, so
    features equal those of our padding with 0. (Id 0 is "!", which as a padding token would be
    removed from texts.) Hugging Face applies no ftfy and unescapes no HTML. With `own_padding`,
    for readers that do not remove padding tokens from texts, padding is the model's own.
    """
    tokenizer = ClipTokenizer(text.clip_vocab_size)
    content = HubTokenizer(
        BPE(
            vocab=tokenizer.vocab,
            merges=tokenizer.merges,
            continuing_subword_prefix="",
            end_of_word_suffix=WORD_END,
            unk_token=END_OF_TEXT,
        )
    )
    content.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    content.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    content.decoder = decoders.ByteLevel()
    content.post_processor = processors.RobertaProcessing(
        (END_OF_TEXT, tokenizer.end_of_text),
        (START_OF_TEXT, tokenizer.start_of_text),
        trim_offsets=False,
        add_prefix_space=False,
    )
    content.add_special_tokens([START_OF_TEXT, END_OF_TEXT])
    (folder / JSON_NAME).write_text(content.to_str(pretty=False))
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": text.context_length,
        "bos_token": START_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "pad_token": content.id_to_token(text.tokenizer.pad_id) if own_padding else END_OF_TEXT,
        "do_lower_case": True,
    }
    write_json(folder / CONFIG_NAME, settings)


def is_clip_tokenizer(folder: Path, vocab_size: int) -> bool:
    """Return whether a folder's tokenizer files have CLIP's vocabulary of that size.

    The merges are not compared: each creates the token of the next id, so the vocabulary implies
    them.
    """
    path = next((x for n in (JSON_NAME, "vocab.json") if (x := folder / n).exists()), None)
    if path is None or path.stat().st_size > MAX_JSON:  # CLIP's has three million bytes
        return False
    vocab = read_json(path)
    if path.name == JSON_NAME:
        model = vocab.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
    try:
        return vocab == ClipTokenizer(vocab_size).vocab
    except InputError:
        return False
