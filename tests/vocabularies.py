"""Toy vocabularies of every kind, made here: no released one ships with any package."""

import io
import json
import random
from pathlib import Path

import sentencepiece
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

_WORDS = [
    *("a", "photo", "of", "the", "cat", "dog", "red", "bicycle", "on", "street,", "in", "rain!"),
    *("It's", "42", "o'clock:", "schön", "größer", "über", "Ünïcödé", "naïve", "café", "猫", "犬"),
    *("写真", "кошка", "собака", "фото", "قطة", "😀", "two_words", "snake_case", "e-mail", "<b>"),
]


def captions(count: int = 400) -> list[str]:
    """Draw captions of many scripts."""
    rng = random.Random(0)
    return [" ".join(rng.choices(_WORDS, k=rng.randint(1, 9))) for _ in range(count)]


def sentencepiece_model(path: Path, kind: str = "unigram", size: int = 160) -> Path:
    """Train a sentencepiece model as T5's: <pad> 0, </s> 1, <unk> 2, no begin of text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions()), model_writer=model, model_type=kind, vocab_size=size,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


def byte_fallback(path: Path) -> Path:
    """Train a BPE as Gemma's: spaces are letters, unknown letters fall into bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = [f"<0x{i:02X}>" for i in range(256)]
    ascii_alone = [text.lower() for text in captions() if text.isascii()]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*special, *letters], show_progress=False
    )
    tokenizer.train_from_iterator(ascii_alone, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    # The bytes stay words, and are not tokens that are looked for in texts.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in special]
    path.write_text(json.dumps(content, ensure_ascii=False))
    return path


def wordpiece(path: Path) -> Path:
    """Train a WordPiece as BERT's, with [CLS] before and [SEP] after."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(captions(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(path))
    return path


def unigram(path: Path) -> Path:
    """Train a unigram as XLM-V's, <s> before and </s> after, padded with 1."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(captions(), trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save(str(path))
    return path
