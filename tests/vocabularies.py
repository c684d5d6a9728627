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
        sentence_iterator=iter(captions()),
        model_writer=model,
        model_type=kind,
        vocab_size=size,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
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
        vocab_size=200,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions(), trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save(str(path))
    return path


# ------------------------------------------------------------------ as large as released ones


def odd_strings(count: int) -> list[str]:
    """Draw strings of many scripts, spaces, signs and words of the large vocabularies."""
    rng = random.Random(1)
    blocks = [(32, 127), (0xA0, 0x250), (0x400, 0x460), (0x4E00, 0x9FFF), (0x1F300, 0x1F640)]
    words = _drawn_words(rng, 500)

    def piece() -> str:
        if rng.random() < 0.5:
            return rng.choice(words)
        first, last = rng.choice(blocks)
        return "".join(chr(rng.randrange(first, last)) for _ in range(rng.randint(1, 6)))

    return [
        rng.choice(["", " ", "  "]).join(piece() for _ in range(rng.randint(0, 9)))
        for _ in range(count)
    ]


def large_bpe(path: Path, size: int = 256_000) -> Path:
    """Write a BPE as Gemma's, of its size: every beginning of a word is a piece, with a space
    before it and without."""
    content = json.loads(byte_fallback(path).read_text())
    vocab, merges, rng = content["model"]["vocab"], content["model"]["merges"], random.Random(0)
    while len(vocab) < size:
        for word in _drawn_words(rng, 1_000):
            for text in (word[1:], word):
                for end in range(1, len(text) + 1):
                    vocab.setdefault(text[:end], len(vocab))
                    vocab.setdefault(text[end - 1], len(vocab))
    content["model"]["vocab"] = vocab = dict(list(vocab.items())[:size])
    known = {tuple(pair) for pair in merges}
    for text in vocab:
        pairs = dict.fromkeys([(text[:-1], text[-1:]), (text[:1], text[1:])])
        merges += [[*pair] for pair in pairs if pair not in known and all(x in vocab for x in pair)]
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False))
    return path


def large_unigram(path: Path, size: int = 140_000) -> Path:
    """Write a unigram as XLM-V's, which has 901,629 pieces."""
    content = json.loads(unigram(path).read_text())
    pieces, rng = content["model"]["vocab"], random.Random(0)
    known = {piece for piece, _ in pieces}
    content["added_tokens"] = [x for x in content["added_tokens"] if x["content"] != "<mask>"]
    while len(pieces) < size:
        for word in _drawn_words(rng, 1000):
            if word not in known and len(pieces) < size:
                known.add(word)
                pieces.append([word, round(-8 - 10 * rng.random(), 12)])
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False))
    return path


def _drawn_words(rng: random.Random, count: int) -> list[str]:
    scripts = [
        "etaoinshrdlcumwfgypbvk",
        "оеаинтсрвлкмдпуяыьгзбч",
        "אבגדהוזחטיכלמנסעפצקרשת",
        "的一是不了人我在有他这中大来上国",
    ]
    return [
        "▁" + "".join(rng.choices(rng.choice(scripts), k=rng.randint(3, 12))) for _ in range(count)
    ]
