"""What transformers reads from a folder's tokenizer files: followed, without effect, or refused.

Most of its classes take only the vocabulary from `tokenizer.json` and build the rules themselves,
by the settings in `tokenizer_config.json`. Here `tokenizer.json` splits the texts, so a setting of
such a class that contradicts it raises an InputError.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tokenizers import Tokenizer

from clip_jax.convert.settings import read_json
from clip_jax.data.tokenizers import json_file
from clip_jax.data.tokenizers.clip_bpe import END_OF_TEXT, START_OF_TEXT, WORD_END
from clip_jax.errors import InputError

CONFIG_NAME = "tokenizer_config.json"
_ADDED_NAME = "added_tokens.json"  # of older folders: ids by tokens
Side = Literal["right", "left"]
AGAIN = (
    "Let transformers write the folder's tokenizer again "
    "(AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)), or correct the setting."
)


class TokenizerClass(NamedTuple):
    """A class of transformers, and what it builds itself. The default takes `tokenizer.json` as it
    is; regular expressions match `_steps`, and without them anything is right."""

    tokens: Mapping[str, str] = {}  # special tokens that it always has
    around: tuple[str, str] | None = None  # settings of begin and end; None: as in tokenizer.json
    pad_side: Side = "right"
    supported: Mapping[str, Any] = {}  # of settings that it follows, the default and only value
    normalizer: str | None = None
    pre_tokenizer: str | None = None
    model: str | None = None
    options: Mapping[str, Any] = {}  # of that model


_CLIP_MARKERS = r"<\|startoftext\|>|<\|endoftext\|>|"  # which older files leave out
_CLIP_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLIP_PIECES = _CLIP_MARKERS + _CLIP_PIECES
_CLIP_PADDING = "!"  # of stabilityai's text towers; its id is 0
# Released files split at spaces or not, which is the same once these are ▁.
_METASPACE = "WhitespaceSplit Metaspace:always|Metaspace:(always|first)"
_CHARACTERS = r"(Precompiled ?)?(Strip ?)?(Replace: \{2,\}:[ ▁])?"  # of sentencepiece's models
_BYTES = {"byte_fallback": True, "fuse_unk": True}
_GEMMA = TokenizerClass(
    tokens={f"{x}_token": f"<{x}>" for x in ("bos", "eos", "unk", "pad", "mask")},
    pad_side="left",
    normalizer="Replace: :▁",
    model="BPE",
    options=_BYTES,
    pre_tokenizer="(Split: :MergedWithPrevious:False)?",
)
_XLM_R = TokenizerClass(
    tokens={
        "bos_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "cls_token": "<s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    around=("bos_token", "eos_token"),
    supported={"add_prefix_space": True},
    normalizer=_CHARACTERS,
    pre_tokenizer=_METASPACE,
    model="Unigram",
)
_AS_IT_IS = "TokenizersBackend"
CLASSES = {
    **dict.fromkeys((_AS_IT_IS, "PreTrainedTokenizer", "PythonBackend"), TokenizerClass()),
    "BertTokenizer": TokenizerClass(
        tokens={f"{x}_token": f"[{x.upper()}]" for x in ("unk", "sep", "pad", "cls", "mask")},
        around=("cls_token", "sep_token"), normalizer="BertNormalizer",
        pre_tokenizer="BertPreTokenizer", model="WordPiece",
        options={"max_input_chars_per_word": 100, "continuing_subword_prefix": "##"},
    ),
    "CLIPTokenizer": TokenizerClass(
        tokens={
            "bos_token": START_OF_TEXT,
            **dict.fromkeys(("eos_token", "unk_token", "pad_token"), END_OF_TEXT),
        },
        around=("bos_token", "eos_token"), normalizer=r"NFC Replace:\\s\+:  Lowercase",
        pre_tokenizer=(
            f"Split:({re.escape(_CLIP_MARKERS)})?{re.escape(_CLIP_PIECES)}:Removed:True "
            "ByteLevel:False"
        ),
        model="BPE", options={"end_of_word_suffix": WORD_END},
    ),
    "GemmaTokenizer": _GEMMA,
    "RobertaTokenizer": _XLM_R._replace(
        around=("cls_token", "sep_token"), supported={"add_prefix_space": False}, normalizer="",
        pre_tokenizer="ByteLevel:False", model="BPE", options={"fuse_unk": False},
    ),
    "SiglipTokenizer": TokenizerClass(
        tokens={"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"},
        supported={"do_lower_case": True, "sp_model_kwargs": {}},
    ),
    "Siglip2Tokenizer": _GEMMA._replace(normalizer="(Lowercase )?Replace: :▁"),
    "T5Tokenizer": TokenizerClass(
        tokens={"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        around=("", "eos_token"), supported={"extra_ids": 0},
        normalizer=_CHARACTERS, pre_tokenizer=_METASPACE, model="Unigram",
    ),
    "Tipsv2Tokenizer": TokenizerClass(
        tokens={"unk_token": "<unk>", "pad_token": "<pad>"}, supported={"do_lower_case": True},
        normalizer="Lowercase( Precompiled)?", model="BPE", options=_BYTES,
        pre_tokenizer="WhitespaceSplit Metaspace:always",
    ),
    "XLMRobertaTokenizer": _XLM_R,
}  # fmt: skip
# The class of a folder that names none, by config.json's model_type.
_OF_MODELS = {
    "chinese_clip": "BertTokenizer",
    "clip": "CLIPTokenizer",
    "clip_text_model": "CLIPTokenizer",
    "metaclip_2": "XLMRobertaTokenizer",
    "siglip": "SiglipTokenizer",
    "tipsv2": "Tipsv2Tokenizer",
}
# Of BertTokenizer: the settings of its normaliser, and their defaults.
_BERT = {
    "lowercase": ("do_lower_case", True),
    "strip_accents": ("strip_accents", None),
    "handle_chinese_chars": ("tokenize_chinese_chars", True),
}
# Settings that change no ids, or that are read elsewhere.
_INERT = {
    _ADDED_NAME,
    "add_bos_token",
    "add_eos_token",
    "added_tokens_decoder",
    "additional_special_tokens",
    "auto_map",
    "backend",
    "chat_template",
    "clean_up_tokenization_spaces",
    "device_map",
    "do_basic_tokenize",
    "errors",
    "extra_special_tokens",
    "from_slow",
    "is_local",
    "legacy",
    "local_files_only",
    "max_len",
    "max_length",
    "model_input_names",
    "model_max_length",
    "name_or_path",
    "never_split",
    "pad_to_multiple_of",
    "pad_token_type_id",
    "padding",
    "padding_side",
    "processor_class",
    "return_token_type_ids",
    "spaces_between_special_tokens",
    "special_tokens_map_file",
    "stride",
    "token_type_ids_pattern",
    "tokenizer_class",
    "tokenizer_file",
    "trim_offsets",
    "truncation",
    "truncation_side",
    "truncation_strategy",
    "use_default_system_prompt",
    "use_fast",
    "verbose",
}
# Settings of some classes, without effect in the others.
_OF_CLASSES = {name for each in CLASSES.values() for name in each.supported}
_OF_CLASSES |= {name for name, _ in _BERT.values()}


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings of a folder, as transformers joins them from several files."""

    folder: Path
    values: dict[str, Any]
    kind: str  # Name of the class, without the ending Fast.

    @property
    def path(self) -> Path:
        return self.folder / CONFIG_NAME

    @property
    def its_class(self) -> TokenizerClass:
        return CLASSES[self.kind]

    def named(self) -> dict[str, str | None]:
        """Return the special tokens by the names of their settings, those of the class included."""
        values: dict[str, str | None] = dict(self.its_class.tokens)
        for name, value in self.values.items():
            if name.endswith("_token") and not name.startswith("add_"):
                values[name] = None if value is None else self._text(name, value)
        return values

    def extra(self) -> Iterator[tuple[str, str]]:
        """Return other tokens that are looked for in texts, with the names of their settings."""
        for name in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
            tokens = self.values.get(name) or []
            if not isinstance(tokens, list | dict):
                raise InputError(f"{self.path}: {name} is {tokens!r:.99}; it must hold tokens.")
            for token in tokens.values() if isinstance(tokens, dict) else tokens:
                yield name, self._text(name, token)
        for token in self.values.get(_ADDED_NAME, {}):
            yield _ADDED_NAME, token

    def _text(self, name: str, value: Any) -> str:
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise InputError(f"{self.path}: {name} is {value!r:.99}; it must be a string.")
        return text

    def side(self, name: str, default: str) -> Any:
        """Return `padding_side` or `truncation_side`."""
        side = self.values.get(name, default)
        if side not in ("right", "left"):
            raise InputError(f"{self.path}: {name} is {side!r:.99}; it must be right or left.")
        if name == "truncation_side" and side == "left":
            raise InputError(
                f"{self.folder}: truncation_side='left' is not supported, in {CONFIG_NAME} or as "
                "the direction in tokenizer.json; set it to right."
            )
        return side


def read_settings(folder: Path) -> TokenizerSettings:
    """Read the settings. Raises InputError, which names one that is not supported."""

    def content(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).exists() else {}

    values, model = content(CONFIG_NAME), content("config.json")
    if "added_tokens_decoder" not in values:  # as until transformers 4.33
        values |= content("special_tokens_map.json")
        values[_ADDED_NAME] = content(_ADDED_NAME)
    default = _OF_MODELS.get(str(model.get("model_type")), _AS_IT_IS)
    kind = values.get("tokenizer_class") or model.get("tokenizer_class") or default
    if model.get("model_type") == "siglip2":  # whatever the files say
        kind = "Siglip2Tokenizer"
    settings = TokenizerSettings(folder, values, str(kind).removesuffix("Fast"))
    if settings.kind not in CLASSES:
        raise InputError(
            f"{settings.path}: tokenizer_class={kind!r:.99} is not supported; it must be one of "
            f"{', '.join(CLASSES)}. Set it to PreTrainedTokenizerFast if tokenizer.json is right "
            "as it is."
        )
    _check_names(settings)
    return settings


def _check_names(settings: TokenizerSettings) -> None:
    supported = settings.its_class.supported
    for name, value in settings.values.items():
        if name in supported and value != supported[name]:
            raise InputError(
                f"{settings.path}: {name}={value!r:.99} is not supported with {settings.kind}; it "
                f"must be {supported[name]!r}."
            )
        is_harmless = name in _INERT or name in _OF_CLASSES or name.endswith("_token")
        if value and not is_harmless:
            raise InputError(
                f"{settings.path}: {name}={value!r:.99} is not supported, since it may change the "
                "token ids; remove it if it does not."
            )


# ------------------------------------------------------------------ a tokenizer.json


class Rules(NamedTuple):
    """The rules around the ids of a text."""

    begin_id: int | None
    end_id: int | None
    pad_id: int | None  # None: none is named.
    pad_side: Side


def read_rules(settings: TokenizerSettings, file: str) -> Rules:
    """Return the rules of a folder's `tokenizer.json`.

    Raises InputError if its class of transformers makes other ids of a text than this file.
    """
    tokenizer, its_class = json_file.read(file), settings.its_class
    _check_class(settings, tokenizer, file)
    named = settings.named()
    padding, truncation = tokenizer.padding or {}, tokenizer.truncation or {}
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if "pad_token" not in settings.values and padding:
        named["pad_token"] = padding["pad_token"]
    _check_tokens(settings, tokenizer, named, file)
    settings.side("truncation_side", truncation.get("direction", "right"))
    side = settings.side("padding_side", padding.get("direction", its_class.pad_side))

    def id_of(name: str) -> int | None:
        token = named.get(name)
        return None if token is None else tokenizer.token_to_id(token)

    if its_class.around is None:
        begin, end = _template(tokenizer, file)
    else:
        begin, end = map(id_of, its_class.around)
    for name in (*(its_class.around or ()), *(x for x in named if x == "pad_token")):
        if name and id_of(name) is None:
            raise InputError(f"{settings.path}: {name} is null; set it to a token of {file}.")
    return Rules(begin, end, id_of("pad_token"), side)


def check_clip(settings: TokenizerSettings, file: Path, padding_token: str = _CLIP_PADDING) -> None:
    """Raise InputError for a setting by which transformers makes other ids of CLIP's vocabulary
    than OpenAI. `file` is the folder's `tokenizer.json`, if it exists.

    Padding may be end of text or `padding_token`. Both of the released tokens have no effect: the
    padding follows the end of text.
    """
    clip, padding = "CLIPTokenizer", {}
    tokens = [*CLASSES[clip].tokens.items(), *settings.named().items(), *settings.extra()]
    truncation: dict[str, Any] = {}
    if file.exists():
        tokenizer = json_file.read(str(file))
        padding, truncation = tokenizer.padding or {}, tokenizer.truncation or {}
        added = tokenizer.get_added_tokens_decoder().values()
        tokens += [("added_tokens", token.content) for token in added]
        if settings.kind != clip:
            _check_class(replace(settings, kind=clip), tokenizer, str(file))
    elif settings.kind != clip and "tokenizer_class" in settings.values:
        raise InputError(
            f"{settings.path}: tokenizer_class={settings.kind} does not fit CLIP's vocab.json; "
            f"set it to {clip}."
        )
    allowed = {"bos_token": {START_OF_TEXT}, "eos_token": {END_OF_TEXT}, "unk_token": {END_OF_TEXT}}
    allowed["pad_token"] = {END_OF_TEXT, padding_token}
    for name, token in tokens:
        if token not in allowed.get(name, {START_OF_TEXT, END_OF_TEXT, padding_token, None}):
            raise InputError(
                f"{settings.path}: {name}={token!r:.99} is not supported with CLIP's vocabulary; "
                "remove it, or set it as in openai/clip-vit-base-patch32."
            )
    if settings.values.get("split_special_tokens"):
        raise InputError(
            f"{settings.path}: split_special_tokens=True is not supported; set it to false."
        )
    settings.side("truncation_side", truncation.get("direction", "right"))
    if settings.side("padding_side", padding.get("direction", "right")) == "left":
        raise InputError(
            f"{settings.folder}: padding_side='left' is not supported with CLIP's vocabulary; set "
            "it to right."
        )


def _check_class(settings: TokenizerSettings, tokenizer: Tokenizer, file: str) -> None:
    """Raise InputError unless the class of transformers would build what a file has."""
    its_class, model = settings.its_class, tokenizer.model
    if getattr(model, "dropout", None):
        raise InputError(f"{file}: model.dropout={model.dropout} makes random ids; set it to null.")
    kind = type(model).__name__
    expected = {"dropout": None, "ignore_merges": None, "byte_fallback": None, "fuse_unk": None}
    expected |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    expected |= its_class.options
    differing: dict[str, Any] = {}
    if its_class.model not in (None, kind):
        differing["model"] = kind
    for name, value in expected.items() if its_class.model == kind else ():
        if (getattr(model, name, None) or None) != (value or None):
            differing[f"model.{name}"] = getattr(model, name)
    for name in ("normalizer", "pre_tokenizer"):
        pattern, steps = getattr(its_class, name), _steps(getattr(tokenizer, name))
        if pattern is not None and not re.fullmatch(pattern, steps):
            differing[name] = steps or None
    if settings.kind == "BertTokenizer" and "normalizer" not in differing:
        _check_bert(settings, tokenizer, file)
    for name, value in differing.items():
        raise InputError(
            f"{file}: {name}={value!r:.99} is not that of {settings.kind}, which transformers "
            f"uses instead. {AGAIN} If the file is right, set tokenizer_class to "
            "PreTrainedTokenizerFast."
        )


def _check_bert(settings: TokenizerSettings, tokenizer: Tokenizer, file: str) -> None:
    state = json.loads(tokenizer.normalizer.__getstate__())
    meant = {ours: settings.values.get(name, default) for ours, (name, default) in _BERT.items()}
    for each in (state, meant):
        if each["strip_accents"] is None:
            each["strip_accents"] = each["lowercase"]
    for ours, (name, _) in _BERT.items():
        if bool(state[ours]) != bool(meant[ours]):
            raise InputError(
                f"{settings.path}: {name}={meant[ours]} differs from the normalizer of {file}, "
                f"which has {ours}={state[ours]}. {AGAIN}"
            )


def _check_tokens(
    settings: TokenizerSettings, tokenizer: Tokenizer, named: Mapping[str, str | None], file: str
) -> None:
    """Raise InputError unless all tokens that transformers looks for in texts are in the file."""
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    if settings.values.get("split_special_tokens") and added:
        raise InputError(
            f"{settings.path}: split_special_tokens=True is not supported; set it to false."
        )
    unknown = getattr(tokenizer.model, "unk_token", None)
    meant = named.get("unk_token")
    if settings.its_class.model in ("BPE", "WordPiece") and unknown not in (meant, None):
        raise InputError(
            f"{settings.path}: unk_token={meant!r:.99} differs from {file}, whose model has "
            f"unk_token={unknown!r:.99}. {AGAIN}"
        )
    for name, token in (*named.items(), *settings.extra()):
        if token is not None and token not in added:
            raise InputError(
                f"{settings.path}: {name}={token!r:.99} (or the default of {settings.kind}) is not "
                f"among the added_tokens of {file}, and transformers adds it. {AGAIN}"
            )
    decoder = settings.values.get("added_tokens_decoder")
    if not decoder or settings.its_class.model is None:
        return
    if not isinstance(decoder, dict) or not all(isinstance(x, dict) for x in decoder.values()):
        raise InputError(
            f"{settings.path}: added_tokens_decoder is {decoder!r:.99}; it must be an object of "
            "tokens by their ids."
        )
    names = ("lstrip", "rstrip", "normalized", "single_word")
    listed = {x["content"]: tuple(bool(x.get(name)) for name in names) for x in decoder.values()}
    for content, token in added.items():
        flags = tuple(getattr(token, name) for name in names)
        if listed.get(content, flags) != flags or content not in {*listed, *named.values()}:
            raise InputError(
                f"{settings.path}: added_tokens_decoder lacks {content!r:.99}, or describes it "
                f"in another way than the added_tokens of {file}. {AGAIN}"
            )


def _template(tokenizer: Tokenizer, file: str) -> tuple[int | None, int | None]:
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


def _steps(part: Any) -> str:
    """Describe a normaliser or pre-tokenizer by its steps, and by what in them changes ids."""
    return "" if part is None else " ".join(_described(json.loads(part.__getstate__())))


def _described(step: dict[str, Any]) -> Iterator[str]:
    kind = step["type"]
    match kind:
        case "Sequence":
            for each in next(value for value in step.values() if isinstance(value, list)):
                yield from _described(each)
        case "Replace":
            yield f"Replace:{next(iter(step['pattern'].values()))}:{step['content']}"
        case "Split":
            pattern = next(iter(step["pattern"].values()))
            yield f"Split:{pattern}:{step['behavior']}:{step['invert']}"
        case "Metaspace":
            yield f"Metaspace:{step['prepend_scheme']}"
        case "ByteLevel":
            yield f"ByteLevel:{step['add_prefix_space']}"
        case _:
            yield kind
