"""Read and write Hugging Face's tokenizer files, which open_clip's folders have, too.

The rules read are those of transformers' tokenizer; the files written make it return our ids.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HubTokenizer
from tokenizers.models import BPE, Unigram

from clip_jax.convert import tokenizer_settings
from clip_jax.convert.settings import MAX_JSON, read_json, write_json
from clip_jax.convert.target import Inexpressible
from clip_jax.convert.tokenizer_settings import CLIP_PIECES, CONFIG_NAME, TokenizerSettings
from clip_jax.data.tokenizers import json_file, sentence_piece
from clip_jax.data.tokenizers.clip_bpe import END_OF_TEXT, START_OF_TEXT, WORD_END, ClipTokenizer
from clip_jax.data.tokenizers.vocabulary import JSON_NAME, is_json, read_vocabulary
from clip_jax.display import say
from clip_jax.errors import InputError, needing
from clip_jax.models.text import Cleaning, TextConfig, TokenizerConfig
from clip_jax.storage.files import write_whole

SIGLIP_NAME = "spiece.model"
_ZEROED_PADDING = "<|padding|>"  # has no row in the model's table: its id becomes 0
# Vocabularies in other files than those that are read.
_UNREAD = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    SIGLIP_NAME,
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_UNIGRAM = 1  # in sentencepiece's TrainerSpec.ModelType
_UNKNOWN, _CONTROL = 2, 3  # in its SentencePiece.Type
# Special ids of released vocabularies, by number of ids: (begin, end, padding).
_RELEASED = {
    32_000: (None, 1, 1),
    250_000: (None, 1, 1),
    256_000: (None, 1, 0),
    901_629: (0, 2, 1),
    **dict.fromkeys((50_265, 250_002), (0, 2, 1)),
    **dict.fromkeys((21_128, 30_522), (101, 102, 0)),
}


def exist(folder: Path) -> bool:
    """Return whether a folder has a vocabulary for a tokenizer of transformers."""
    return any((folder / name).exists() for name in (JSON_NAME, *_UNREAD))


def missing(text: TextConfig, clean: Cleaning) -> TokenizerConfig:
    """Return the rules of a vocabulary whose files are missing."""
    begin, end, pad = _RELEASED.get(text.vocab_size, (None, None, 0))
    return TokenizerConfig(file="", clean=clean, begin_id=begin, end_id=end, pad_id=pad)


def read(folder: Path, text: TextConfig, default: TokenizerConfig) -> TokenizerConfig:
    """Read the vocabulary and rules of a folder; return `default` if it has no such files."""
    settings = tokenizer_settings.read_settings(folder)
    ends = default.file == "clip" or not text.sees_padding  # so that padding has no effect
    if ends and is_clip_tokenizer(folder, text.clip_vocab_size):
        tokenizer_settings.check_clip(settings, folder / JSON_NAME)
        return TokenizerConfig()
    if settings.kind == "SiglipTokenizer" and (folder / SIGLIP_NAME).exists():
        return _read_siglip(settings)
    file = str(folder / JSON_NAME)
    if not (folder / JSON_NAME).exists():
        _check_absent(settings, default)
        return default
    if settings.kind == "SiglipTokenizer":
        raise InputError(
            f"{folder}: {settings.kind} needs {SIGLIP_NAME}; add it, or set tokenizer_class in "
            f"{CONFIG_NAME} to PreTrainedTokenizerFast if {JSON_NAME} is right as it is."
        )
    rules = tokenizer_settings.read_rules(settings, file)
    # Released SigLIP 2 folders name Gemma's class, which ignores this setting; training did not.
    lowers = settings.kind == "GemmaTokenizer" and settings.values.get("do_lower_case") is True
    return TokenizerConfig(
        file=file,
        clean="lower" if lowers or settings.kind == "Siglip2Tokenizer" else "none",
        begin_id=rules.begin_id,
        end_id=rules.end_id,
        pad_id=default.pad_id if rules.pad_id is None else rules.pad_id,
        pad_side=rules.pad_side,
    )


def _check_absent(settings: TokenizerSettings, default: TokenizerConfig) -> None:
    """Raise InputError if a folder has files of another vocabulary than CLIP's, its default."""
    names = [name for name in _UNREAD if (settings.folder / name).exists()]
    kind = settings.kind if "tokenizer_class" in settings.values else "CLIPTokenizer"
    if default.file == "clip" and (names or kind != "CLIPTokenizer"):
        raise InputError(
            f"{settings.folder} has a vocabulary of its own ({', '.join(names) or kind}) "
            f"and no {JSON_NAME}, the only such file that is read. Let transformers write it: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )


def _read_siglip(settings: TokenizerSettings) -> TokenizerConfig:
    file = str(settings.folder / SIGLIP_NAME)
    model = sentence_piece.load(file)
    ids: dict[str, int] = {}
    for name, token in (*settings.named().items(), *settings.extra()):
        if token is None and name not in settings.its_class.tokens:
            continue
        ids[name] = number = model.piece_to_id(token or "")
        # transformers looks for these in texts, where a control token is not expected.
        is_control = model.is_control(number) or model.is_unknown(number)
        if not is_control or model.id_to_piece(number) != token:
            raise InputError(
                f"{settings.path}: {name}={token!r:.99} is not a control token of {file}; it must "
                "be one, as those of google/siglip-base-patch16-224."
            )
    settings.side("truncation_side", "right")
    return TokenizerConfig(
        file=file,
        clean="punctuation",
        end_id=ids["eos_token"],
        pad_id=ids["pad_token"],
        pad_side=settings.side("padding_side", "right"),
    )


def write(
    folder: Path,
    text: TextConfig,
    cleaned: bool = False,
    as_json: bool = False,
    own_padding: bool = False,
    zeroed_padding: bool = False,
) -> None:
    """Write the files with which `AutoTokenizer.from_pretrained` returns a model's token ids.

    With `cleaned`, its input is already cleaned; with `as_json`, a sentencepiece model becomes a
    `tokenizer.json`, the only format of some readers. Hugging Face repairs no mojibake and
    unescapes no HTML. `own_padding` and `zeroed_padding` are those of `write_clip_tokenizer`.
    Raises Inexpressible as `check` does.
    """
    config = text.tokenizer
    check(text, cleaned, as_json)
    if config.file == "clip":
        write_clip_tokenizer(folder, text, own_padding, zeroed_padding)
        return
    if not config.file:
        return
    if config.zeroed_id is not None and (as_json or not cleaned):
        say(
            f"{folder}: its tokenizer keeps token id {config.zeroed_id} of texts that name it, "
            f"which is 0 here (text.tokenizer.zeroed_id)."
        )
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
        settings |= _write_siglip(folder, data, config)
    write_json(folder / CONFIG_NAME, settings)


def check(text: TextConfig, cleaned: bool = False, as_json: bool = False) -> None:
    """Raise Inexpressible if no tokenizer of transformers has a model's rules; see `write`."""
    config = text.tokenizer
    lower_case = ("clip", "canonicalize") if cleaned else ("clip",)
    if config.file == "clip" and config.clean not in lower_case:
        raise Inexpressible(
            "transformers has CLIP's BPE only with text.tokenizer.clean="
            f"{' or '.join(map(repr, lower_case))}, not {config.clean!r}"
        )
    if config.file in ("", "clip") or as_json or is_json(read_vocabulary(config.file)):
        return
    fits = config.clean == "punctuation" or (cleaned and config.clean == "canonicalize")
    if not fits or config.begin_id is not None or config.end_id is None:
        raise Inexpressible(
            f"{config.file} with text.tokenizer.clean={config.clean!r}, begin_id="
            f"{config.begin_id}, end_id={config.end_id} is not supported by transformers for a "
            "sentencepiece model (SiglipTokenizer: punctuation, None, an id)"
        )


def _write_siglip(folder: Path, data: bytes, config: TokenizerConfig) -> dict[str, Any]:
    model, end = sentence_piece.load(config.file), config.end_id
    assert end is not None  # as `check` has seen
    write_whole(folder / SIGLIP_NAME, data)
    return {
        "tokenizer_class": "SiglipTokenizer",
        "eos_token": model.id_to_piece(end),
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
    ids["sep_token"] = config.zeroed_id  # of open_clip's strip_sep_token
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
        "none": ("whitespace", "canonicalize", "clip"),
        "lower": ("canonicalize", "clip"),
        "punctuation": ("canonicalize",),
        "clip": ("canonicalize", "clip"),
    }
    if clean not in covered.get(config.clean, ()):
        raise InputError(
            f"{where}: cleaning {clean!r} before a tokenizer that cleans by {config.clean!r} is "
            "not supported."
        )
    return replace(config, clean=clean)


def without_separator(config: TokenizerConfig, folder: Path) -> TokenizerConfig:
    """Return the rules with id 0 instead of each separator, as by open_clip's `strip_sep_token`."""
    settings = tokenizer_settings.read_settings(folder)
    token = settings.named().get("sep_token")
    number = None if token is None else json_file.load(config.file).token_to_id(token)
    if number is None:
        raise InputError(
            f"{settings.path}: strip_sep_token needs a sep_token of the vocabulary, and it is "
            f"{token!r:.99}; set it."
        )
    return zeroed(config, number)


def zeroed(config: TokenizerConfig, number: int) -> TokenizerConfig:
    """Return the rules with id 0 instead of `number`."""
    names = ("begin_id", "end_id", "pad_id")
    changes = {name: 0 for name in names if getattr(config, name) == number}
    return replace(config, zeroed_id=number, **changes)


# ------------------------------------------------------------------ CLIP's vocabulary


def write_clip_tokenizer(
    folder: Path, text: TextConfig, own_padding: bool = False, zeroed_padding: bool = False
) -> None:
    """Write the two files that `CLIPProcessor.from_pretrained` needs to tokenize and to pad.

    Padding is end-of-text, as in Hugging Face's CLIP: the state of the first one is pooled, so
    features equal those of our padding with 0. (Id 0 is "!", which as a padding token would be
    removed from texts.) Hugging Face applies no ftfy and unescapes no HTML. With `own_padding`,
    for readers that do not remove padding tokens from texts, padding is the model's own. With
    `zeroed_padding`, for open_clip's `strip_sep_token`, which replaces the separator by id 0,
    padding is a separator that no text has.
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
    split = pre_tokenizers.Split(Regex(CLIP_PIECES), behavior="removed", invert=True)
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
    padding = END_OF_TEXT
    if zeroed_padding:
        padding = _ZEROED_PADDING
        content.add_special_tokens([padding])
    elif own_padding:
        padding = content.id_to_token(text.tokenizer.pad_id)
    (folder / JSON_NAME).write_text(content.to_str(pretty=False))
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": text.context_length,
        "bos_token": START_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "pad_token": padding,
        "do_lower_case": True,
    }
    if zeroed_padding:
        settings["sep_token"] = padding
    write_json(folder / CONFIG_NAME, settings)


def has_zeroed_padding(folder: Path, text: TextConfig) -> bool:
    """Return whether a folder's tokenizer is CLIP's with the padding of `zeroed_padding`.

    Raises InputError if its other settings are not CLIP's.
    """
    settings = tokenizer_settings.read_settings(folder)
    named = settings.named()
    if any(named.get(name) != _ZEROED_PADDING for name in ("pad_token", "sep_token")):
        return False
    if not is_clip_tokenizer(folder, text.clip_vocab_size):
        return False
    tokenizer_settings.check_clip(settings, folder / JSON_NAME, _ZEROED_PADDING)
    return True


def is_clip_tokenizer(folder: Path, vocab_size: int) -> bool:
    """Return whether a folder's tokenizer files have CLIP's vocabulary of that size."""
    path = next((x for n in (JSON_NAME, "vocab.json") if (x := folder / n).exists()), None)
    if path is None or path.stat().st_size > MAX_JSON:  # CLIP's has three million bytes
        return False
    vocab: Any = read_json(path)
    merges: Any = []
    if path.name == JSON_NAME:
        model = vocab.get("model")
        model = model if isinstance(model, dict) else {}
        vocab, merges = model.get("vocab"), model.get("merges")
    elif (lines := folder / "merges.txt").exists():
        merges = lines.read_text(errors="replace").splitlines()
        merges = merges[1:] if merges[:1] and merges[0].startswith("#version") else merges
    try:
        clip = ClipTokenizer(vocab_size)
    except InputError:
        return False
    if vocab != clip.vocab or not isinstance(merges, list):
        return False
    pairs = (x.split(" ") if isinstance(x, str) else x for x in merges[: len(clip.merges)])
    return list(pairs) == [[*pair] for pair in clip.merges]
