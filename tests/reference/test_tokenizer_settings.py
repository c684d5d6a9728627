"""Each setting of a folder's tokenizer files: the ids of transformers and open_clip, or refused.

`python -m tests.reference.test_tokenizer_settings` prints the table of families and settings.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers

from clip_jax.convert import tokenizer_files
from clip_jax.convert.open_clip_config import read_config
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.errors import InputError
from clip_jax.models.text import TextConfig, TokenizerConfig
from tests import vocabularies

LENGTH = 16
TEXT = TextConfig(
    context_length=LENGTH, vocab_size=1_000, width=8, num_heads=1, pool="last", causal=False
)
CONFIG, VOCABULARY, OPEN_CLIP = "tokenizer_config.json", "tokenizer.json", "open_clip_config.json"


def strings(count: int = 400) -> list[str]:
    """Draw texts: empty, of spaces, long, with accents, signs, markers, entities and controls."""
    rng = random.Random(0)
    pieces = [
        *("Cat", "DOG", "É", "é", "e\u0301", "Ångström", "naïve", "İstanbul", "straße", "ΟΔΟΣ"),
        *("猫犬", "写真の猫", "고양이", "ﬁne", "½", "😀", "👩‍👩‍👧", "&amp;", "&lt;b&gt;", "&#39;"),
        *("\t", "\n", "\r", "\x00", "\x1f", "\x7f", "\u200b", "\ufeff", "\u00a0", "\u3000"),
        *("\u2028", "schÃ¶n", "<s>", "</s>", "<pad>", "<unk>", "<mask>", "<eos>", "<bos>"),
        *("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]", "[sep]", "<|endoftext|>"),
        *("<|startoftext|>", "<extra_id_0>", "▁", "##a"),
        *("x" * 120, "a_b", "don't", "!", "?!", "cat", "photo"),
    ]
    words = [*pieces, *" ".join(vocabularies.captions(30)).split()]

    def text() -> str:
        length = rng.choice([1, 2, 3, 5, 8, 40])
        return rng.choice(["", " ", "  "]).join(rng.choices(words, k=length))

    return ["", " ", "\n", *pieces, *(text() for _ in range(count - len(pieces) - 3))]


STRINGS = strings()


# ------------------------------------------------------------------ folders of each family


def _content(kind: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = getattr(vocabularies, kind)(Path(folder) / VOCABULARY)
        return json.loads(path.read_text())


def _byte_level(suffix: str, special: list[str]) -> dict[str, Any]:
    """Train a BPE of bytes, as CLIP's and RoBERTa's."""
    ending = {"end_of_word_suffix": suffix} if suffix else {}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(**ending))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        **ending,
    )
    tokenizer.train_from_iterator(vocabularies.captions(), trainer)
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    for letter in tokenizers.pre_tokenizers.ByteLevel.alphabet():
        vocab.setdefault(letter + suffix, len(vocab))
    return content


def _of_vocabulary(kind: str, name: str) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        content = _content(kind) if isinstance(kind, str) else kind()
        model, options = content["model"], {}
        if isinstance(model["vocab"], list):
            options["vocab"] = [tuple(piece) for piece in model["vocab"]]
        else:
            options["vocab"] = model["vocab"]
        if "merges" in model:
            options["merges"] = [tuple(pair) for pair in model["merges"]]
        if name == "T5Tokenizer":
            options["extra_ids"] = 0
        getattr(transformers, name)(**options).save_pretrained(path)

    return save


def _sentencepiece(path: Path) -> None:
    vocabularies.sentencepiece_model(path / "spiece.model")
    transformers.SiglipTokenizer(str(path / "spiece.model")).save_pretrained(path)


def _fast(kind: str, **options: str) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        file = getattr(vocabularies, kind)(path / VOCABULARY)
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), **options).save_pretrained(
            path
        )

    return save


def _t5() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = vocabularies.sentencepiece_model(Path(folder) / "words.model")
        return json.loads(tokenizer_files._unigram(path.read_bytes(), str(path)).to_str())


def _roberta() -> dict[str, Any]:
    return _byte_level("", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])


def _clip() -> dict[str, Any]:
    return _byte_level("</w>", ["<|startoftext|>", "<|endoftext|>"])


# family → (how its folder is saved, config.json's model_type or None for open_clip)
FAMILIES: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "SigLIP": (_sentencepiece, "siglip"),
    "SigLIP 2": (_of_vocabulary("byte_fallback", "GemmaTokenizer"), "siglip"),
    "SigLIP 2 NaFlex": (_of_vocabulary("byte_fallback", "Siglip2Tokenizer"), "siglip2"),
    "MetaCLIP 2": (_of_vocabulary("unigram", "XLMRobertaTokenizer"), "metaclip_2"),
    "AltCLIP": (_of_vocabulary("unigram", "XLMRobertaTokenizer"), "altclip"),
    "ChineseCLIP": (_of_vocabulary("wordpiece", "BertTokenizer"), "chinese_clip"),
    "TIPSv2": (_of_vocabulary("byte_fallback", "Tipsv2Tokenizer"), "tipsv2"),
    "CLIP, own BPE": (_of_vocabulary(_clip, "CLIPTokenizer"), "clip"),
    "open_clip, T5": (_of_vocabulary(_t5, "T5Tokenizer"), None),
    "open_clip, Gemma": (_of_vocabulary("byte_fallback", "GemmaTokenizer"), None),
    "open_clip, BERT": (_of_vocabulary("wordpiece", "BertTokenizer"), None),
    "open_clip, RoBERTa": (_of_vocabulary(_roberta, "RobertaTokenizer"), None),
    "open_clip, XLM-R": (_of_vocabulary("unigram", "XLMRobertaTokenizer"), None),
    "open_clip, CLIP's BPE": (_of_vocabulary(_clip, "CLIPTokenizer"), None),
    "open_clip, any": (_fast("wordpiece", pad_token="[PAD]", sep_token="[SEP]"), None),
    "open_clip, built in": (lambda path: None, None),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return _folders(tmp_path_factory.mktemp("folders"))


def _folders(root: Path) -> dict[str, Path]:
    folders = {}
    for family, (save, kind) in FAMILIES.items():
        folders[family] = path = root / family
        path.mkdir()
        save(path)
        if kind is not None:
            (path / "config.json").write_text(json.dumps({"model_type": kind}))
            continue
        built_in = family == "open_clip, built in"
        tokenizer = {} if built_in else {"hf_tokenizer_name": "local", "pool_type": "last"}
        content = {
            "embed_dim": 8,
            "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
            "text_cfg": {"context_length": LENGTH, "layers": 1} | tokenizer,
        }
        (path / OPEN_CLIP).write_text(json.dumps({"model_cfg": content}))
    return folders


# ------------------------------------------------------------------ changes of a setting


def _change(path: Path, file: str, names: str, value: Any) -> None:
    file_path = path / file
    content = json.loads(file_path.read_text()) if file_path.exists() else {}
    *parents, last = names.split("/")
    section = content
    for name in parents:
        section = section.setdefault(name, {})
    section[last] = value
    file_path.write_text(json.dumps(content))


LEFT = {"direction": "Left", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 9},
    "direction": "Left",
    "pad_to_multiple_of": 8,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "cat",
}
CAT = {
    "content": "cat",
    "lstrip": True,
    "rstrip": False,
    "normalized": False,
    "special": True,
    "single_word": False,
}
Change = tuple[str, str, Any]
# Every change: a file, the path of a setting in it, and its value.
CHANGES: list[Change] = [
    *((CONFIG, f"{name}_token", "cat")
      for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "image")),
    *((CONFIG, f"{name}_token", value) for name in ("bos", "eos", "sep", "pad", "cls")
      for value in ("<s>", "</s>", "[SEP]", "[CLS]", "<pad>", "<|endoftext|>", None)),
    (CONFIG, "do_lower_case", False), (CONFIG, "do_lower_case", True),
    (CONFIG, "strip_accents", False), (CONFIG, "strip_accents", True),
    (CONFIG, "tokenize_chinese_chars", False),
    (CONFIG, "truncation_side", "left"), (CONFIG, "padding_side", "left"),
    (CONFIG, "padding_side", "right"),
    (CONFIG, "add_bos_token", True), (CONFIG, "add_bos_token", False),
    (CONFIG, "add_eos_token", True), (CONFIG, "add_eos_token", False),
    (CONFIG, "add_prefix_space", True), (CONFIG, "add_prefix_space", False),
    (CONFIG, "split_special_tokens", True),
    (CONFIG, "extra_special_tokens", ["cat"]), (CONFIG, "additional_special_tokens", ["cat"]),
    (CONFIG, "extra_special_tokens", {"image_token": "cat"}),
    (CONFIG, "added_tokens_decoder", {"7": CAT}),
    (CONFIG, "model_max_length", 5), (CONFIG, "clean_up_tokenization_spaces", True),
    *((CONFIG, "tokenizer_class", name)
      for name in ("BertTokenizer", "CLIPTokenizer", "XLMRobertaTokenizer", "GemmaTokenizer",
                   "GemmaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend",
                   "LlamaTokenizer", "NoSuchTokenizer", "Siglip2Tokenizer", None)),
    (CONFIG, "legacy", True), (CONFIG, "extra_ids", 5), (CONFIG, "max_length", 5),
    (CONFIG, "sp_model_kwargs", {"add_bos": True}), (CONFIG, "stride", 2),
    (CONFIG, "truncation_strategy", "only_second"), (CONFIG, "pad_to_multiple_of", 32),
    (CONFIG, "fast_tokenizer_files", ["tokenizer.4.0.0.json"]), (CONFIG, "errors", "strict"),
    (CONFIG, "never_split", ["cat"]), (CONFIG, "name_or_path", "x"),
    (CONFIG, "processor_class", "CLIPProcessor"), (CONFIG, "clean_text", False),
    (CONFIG, "padding", "max_length"), (CONFIG, "truncation", False),
    (CONFIG, "do_basic_tokenize", False), (CONFIG, "auto_map", {}), (CONFIG, "use_fast", False),
    (CONFIG, "vocab", {"a": 0}), (CONFIG, "post_processor", "x"), (CONFIG, "unk_id", 1),
    ("config.json", "tokenizer_class", "BertTokenizer"),
    ("special_tokens_map.json", "pad_token", "cat"),
    ("special_tokens_map.json", "cls_token", "cat"),
    ("special_tokens_map.json", "additional_special_tokens", ["cat"]),
    ("added_tokens.json", "cat", 7),
    (VOCABULARY, "truncation", LEFT), (VOCABULARY, "truncation", LEFT | {"direction": "Right"}),
    (VOCABULARY, "padding", PADDING), (VOCABULARY, "normalizer", None),
    (VOCABULARY, "normalizer", {"type": "Lowercase"}), (VOCABULARY, "pre_tokenizer", None),
    (VOCABULARY, "pre_tokenizer", {"type": "WhitespaceSplit"}),
    (VOCABULARY, "normalizer/lowercase", False), (VOCABULARY, "normalizer/strip_accents", False),
    (VOCABULARY, "normalizer/handle_chinese_chars", False),
    (VOCABULARY, "added_tokens", []), (VOCABULARY, "post_processor", None),
    (VOCABULARY, "model/unk_token", None), (VOCABULARY, "model/byte_fallback", False),
    (VOCABULARY, "model/fuse_unk", False), (VOCABULARY, "model/max_input_chars_per_word", 3),
    (VOCABULARY, "model/dropout", 0.5),
    (VOCABULARY, "model/end_of_word_suffix", ""), (VOCABULARY, "model/ignore_merges", True),
    *((OPEN_CLIP, f"model_cfg/text_cfg/{name}", value)
      for name, value in (
          ("tokenizer_mode", "clips"), ("tokenizer_mode", "other"), ("tokenizer_mode", ""),
          ("hf_tokenizer_name", ""), ("hf_tokenizer_name", "bert-base-uncased"),
          ("context_length", 7),
          *((f"tokenizer_kwargs/{key}", each) for key, each in (
              ("clean", "lower"), ("clean", "canonicalize"), ("clean", "whitespace"),
              ("clean", "none"), ("clean", None), ("strip_sep_token", True),
              ("strip_sep_token", False),
              ("reduction_mask", "simple"), ("reduction_mask", ""), ("language", "eng_Latn"),
              ("do_lower_case", False), ("padding_side", "left"), ("context_length", 7),
              ("additional_special_tokens", ["cat"]), ("tokenizer_mode", "clips"),
          )),
      )),
]  # fmt: skip


def _applies(family: str, change: Change) -> bool:
    file = change[0]
    if file == OPEN_CLIP:
        return family.startswith("open_clip")
    if family == "open_clip, built in" or (file == "config.json" and family[:4] == "open"):
        return False
    return file != VOCABULARY or family != "SigLIP"


def _label(change: Change) -> str:
    file, name, value = change
    if isinstance(value, dict | list):
        value = "{…}" if len(str(value)) > 30 else value
    return f"{file.partition('.')[0]}: {name.removeprefix('model_cfg/text_cfg/')}={value!r}"


# ------------------------------------------------------------------ both programs


def ours(path: Path, kind: str | None) -> TextConfig | str:
    """Our text tower, or the message of the error."""
    try:
        if kind is None:
            text = read_config(path / OPEN_CLIP)[0].text
        else:
            default = TokenizerConfig() if kind == "clip" else TokenizerConfig(file="")
            text = replace(TEXT, tokenizer=tokenizer_files.read(path, TEXT, default))
        make_tokenizer(text)
    except InputError as error:
        return str(error)
    assert isinstance(text, TextConfig)
    return text


def theirs(path: Path, kind: str | None) -> Callable[[list[str]], Any]:
    """The tokenizer of transformers or of open_clip."""
    import open_clip

    if kind is None:
        return open_clip.get_tokenizer(f"local-dir:{path}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    options = {"padding": "max_length", "max_length": LENGTH, "truncation": True}
    return lambda texts: tokenizer(texts, return_tensors="np", **options)["input_ids"]


def compared(path: Path, kind: str | None) -> str:
    """Return `equal` or `refused`, or what is wrong."""
    text = ours(path, kind)
    if isinstance(text, str):
        return "refused"
    texts, rules = STRINGS, text.tokenizer
    if rules.file == "clip":  # open_clip has markers of its own
        texts = [x for x in texts if "<|" not in x]
    if rules.clean == "punctuation":  # a sentencepiece model reads no marker in a text
        texts = [x for x in texts if not any(y in x for y in ("</s>", "<unk>", "<pad>"))]
    ids = make_tokenizer(text)(texts, text.context_length, True)
    if rules.clean == "lower" and "GemmaTokenizer" in (path / CONFIG).read_text():
        texts = ["".join(map(str.lower, x)) for x in texts]  # as training did, not this class
    try:
        reference = np.asarray(theirs(path, kind)(texts))
    except Exception as error:
        return f"they fail: {error!r:.99}"
    if ids.shape != reference.shape:
        return f"shape {ids.shape} instead of {reference.shape}"
    wrong = int((ids != reference).any(1).sum())
    return f"{wrong} of {len(texts)} differ" if wrong else "equal"


def outcome(path: Path, family: str, *changes: Change) -> str | None:
    """Return the outcome of some changes; None if a file has no such setting."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(path, Path(folder) / "copy")
        try:
            for change in changes:
                _change(copy, *change)
        except (TypeError, AttributeError):  # a setting of null has no settings
            return None
        return compared(copy, FAMILIES[family][1])


# Families with a class of transformers that another family has, too: a few settings.
SAME_CLASS = (
    "AltCLIP",
    "open_clip, Gemma",
    "open_clip, BERT",
    "open_clip, XLM-R",
    "open_clip, CLIP's BPE",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_setting_alone_and_in_pairs(family, folders):
    """Ids differed in silence where a folder's settings had been changed by hand."""
    path, rng = folders[family], random.Random(family)
    changes = [x for x in CHANGES if _applies(family, x)]
    if family in SAME_CLASS:
        changes = [x for x in changes if x[0] == OPEN_CLIP or rng.random() < 0.15]
    assert outcome(path, family) == "equal"
    outcomes = {i: outcome(path, family, change) for i, change in enumerate(changes)}
    assert {i: x for i, x in outcomes.items() if x not in ("equal", "refused", None)} == {}
    followed = [change for i, change in enumerate(changes) if outcomes[i] == "equal"]
    for _ in range(10):
        pair = rng.choices(followed, k=2)
        assert outcome(path, family, *pair) in ("equal", "refused", None), pair


def main() -> None:
    """Print a row per setting, a column per family: = equal, r refused, . does not apply."""
    transformers.logging.set_verbosity_error()
    signs = {"equal": "=", "refused": "r", None: "."}
    with tempfile.TemporaryDirectory() as root:
        folders = _folders(Path(root))
        for number, family in enumerate(FAMILIES):
            print(f"{number:2} {family}: {outcome(folders[family], family)}")
        for change in CHANGES:
            row = []
            for family, path in folders.items():
                applies = _applies(family, change)
                result = outcome(path, family, change) if applies else None
                row.append(signs.get(result, result))
            print(f"{_label(change):60} {' '.join(map(str, row))}", flush=True)


if __name__ == "__main__":
    main()
