"""A vocabulary of one's own, from the captions of a source: byte-pair encoding of any script.

As Gemma's: spaces are letters, and a letter that the vocabulary lacks falls into its bytes, so that
no text has unknown words.
"""

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from clip_jax.data.sources import SampleError, StoredSource
from clip_jax.data.tokenizers.clean import CLEANING
from clip_jax.errors import InputError
from clip_jax.models.text import Cleaning
from clip_jax.storage.files import write_whole

PAD, END, BEGIN, UNKNOWN = "<pad>", "<eos>", "<bos>", "<unk>"
_SPECIAL = [PAD, END, BEGIN, UNKNOWN]
_BYTES = [f"<0x{i:02X}>" for i in range(256)]
_SMALLEST = len(_SPECIAL) + len(_BYTES)


def train_vocabulary(
    source: StoredSource, path: str, size: int, clean: Cleaning = "lower"
) -> dict[str, Any]:
    """Train on all captions, cleaned as the model will clean them; write a `tokenizer.json`.

    Returns what was found and the flags with which a model takes it. Raises InputError for a source
    without captions, and for a size that has no room beside the bytes.
    """
    if size <= _SMALLEST:
        raise InputError(
            f"vocabulary_size={size}: {_SMALLEST} are taken by bytes and markers; give more."
        )
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*_SPECIAL, *_BYTES], show_progress=False,
        limit_alphabet=(size - _SMALLEST + 1) // 2,  # rarer letters fall into bytes
    )  # fmt: skip
    counts = {"captions": 0, "unreadable": 0}
    tokenizer.train_from_iterator(_cleaned(source, clean, counts), trainer)
    if not counts["captions"]:
        raise InputError(f"the source has no captions ({counts['unreadable']} samples unreadable).")
    content = json.loads(tokenizer.to_str())
    # Only the markers are looked for in texts: a caption's "<0x41>" is letters.
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in _SPECIAL]
    write_whole(path, json.dumps(content, ensure_ascii=False))
    ids = tokenizer.get_vocab_size()
    flags = {
        "file": path, "clean": clean, "end-id": _SPECIAL.index(END), "pad-id": _SPECIAL.index(PAD),
    }  # fmt: skip
    arguments = [f"--model.text.tokenizer.{name} {value}" for name, value in flags.items()]
    arguments += [
        f"--model.text.vocab-size {ids}",
        f"--model.text.pool eos --model.text.eos-token-id {_SPECIAL.index(END)}",
    ]
    return {"vocabulary": path, "ids": ids, **counts, "flags": " ".join(arguments)}


def _cleaned(source: StoredSource, clean: Cleaning, counts: dict[str, int]) -> Iterator[str]:
    rule = CLEANING[clean]
    for index in range(len(source)):
        try:
            captions = source.captions(index)
        except SampleError:
            counts["unreadable"] += 1
            continue
        counts["captions"] += len(captions)
        yield from map(rule, captions)


def describe(result: dict[str, Any]) -> str:
    """Lines for people."""
    return (
        f"{result['ids']:,} ids from {result['captions']:,} captions in {result['vocabulary']}; "
        f"train with\n  {result['flags']}"
    )
