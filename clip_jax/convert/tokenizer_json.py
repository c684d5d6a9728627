"""CLIP's tokenizer as Hugging Face's `tokenizer.json` and `tokenizer_config.json`."""

from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HubTokenizer
from tokenizers.models import BPE

from clip_jax.convert.files import MAX_JSON, read_json, read_small, write_json
from clip_jax.data.tokenizers.clip_bpe import END_OF_TEXT, START_OF_TEXT, WORD_END, ClipTokenizer
from clip_jax.errors import InputError
from clip_jax.models.text import TextConfig

_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def write_clip_tokenizer(folder: Path, text: TextConfig, own_padding: bool = False) -> None:
    """Write the two files that `CLIPProcessor.from_pretrained` needs to tokenize and to pad.

    Padding is end-of-text, as Hugging Face's CLIP does it: the end is read at its first place, so
    features are those of our zeros. (Its "!" has id 0, but as a padding token it would also be
    taken out of texts.) Hugging Face applies no ftfy and unescapes no HTML. With `own_padding`, for
    readers that take a padding token out of no text, it is the model's own.
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
    (folder / "tokenizer.json").write_text(content.to_str(pretty=False))
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": text.context_length,
        "bos_token": START_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "pad_token": content.id_to_token(text.tokenizer.pad_id) if own_padding else END_OF_TEXT,
        "do_lower_case": True,
    }
    write_json(folder / "tokenizer_config.json", settings)


def is_clip_tokenizer(folder: Path, vocab_size: int) -> bool:
    """Say whether a folder's tokenizer files hold CLIP's vocabulary and merges of that size."""
    vocabulary = _read_vocab(folder)
    if vocabulary is None:
        return False
    try:
        tokenizer = ClipTokenizer(vocab_size)
    except InputError:
        return False
    vocab, merges = vocabulary
    return vocab == tokenizer.vocab and merges == tokenizer.merges


def _read_vocab(folder: Path) -> tuple[Any, list[tuple[Any, ...]]] | None:
    if (path := folder / "tokenizer.json").exists():
        if path.stat().st_size > MAX_JSON:  # CLIP's takes three million bytes
            return None
        model = read_json(path).get("model")
        merges = model.get("merges") if isinstance(model, dict) else None
        if not isinstance(model, dict) or not isinstance(merges, list):
            return None
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in merges)
        return model.get("vocab"), [tuple(pair) for pair in pairs if isinstance(pair, list)]
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        lines = read_small(folder / "merges.txt").decode(errors="replace").split("\n")
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        return read_json(folder / "vocab.json"), [tuple(pair) for pair in merges]
    return None
