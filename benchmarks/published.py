"""Verify weights and tokens against the reference implementations, at the published sizes.

    PYTHONPATH=. python benchmarks/published.py [weights | tokens]

- weights: For each model and library, in both directions, the outputs are compared: a model that
  the library builds and saves is read by clip_jax, and random weights of clip_jax are written and
  loaded by the library's own loader. Each comparison is repeated with deliberate mistakes, which it
  must detect (`check`). The widest models have their full width but two layers; the shapes of
  the complete models are compared, too.
- tokens: The ids of 100,000 strings and of the characters of all Unicode planes are compared.

It needs the extra `peers` and takes about half an hour.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import unicodedata
import warnings
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from clip_jax.convert import hugging_face, openai
from clip_jax.convert import open_clip as open_clip_format
from clip_jax.convert.formats import Format, read_weights, write_weights
from clip_jax.convert.state_dict import param_shapes
from clip_jax.convert.verify import BOUND, random_inputs
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.tokenizers.clip_bpe import ClipTokenizer
from clip_jax.models import zoo
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.resnet import ResNetConfig

sys.path.insert(0, str(Path(__file__).parent.parent))  # for what the tests compare by

from tests.reference.parity import (
    check_parity,
    differences,
    import_openai_clip,
    lively,
    loaded,
    outputs,
    random_weights,
    texts_for,
)

LIBRARIES: tuple[Format, ...] = ("openai", "open-clip", "hugging-face")
CUT = ("RN50x16", "RN50x64", "ViT-H-14", "ViT-g-14", "ViT-bigG-14")
OPEN_CLIP_NAMES = {  # as open_clip's own configurations are called
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
    "RN50": "RN50-quickgelu",
    "RN101": "RN101-quickgelu",
    "RN50x4": "RN50x4-quickgelu",
    "RN50x16": "RN50x16-quickgelu",
    "RN50x64": "RN50x64-quickgelu",
    "ViT-H-14": "ViT-H-14",
    "ViT-g-14": "ViT-g-14",
    "ViT-bigG-14": "ViT-bigG-14",
}


def is_expressible(name: str, to: str) -> bool:
    """Return whether a library has a model: OpenAI has only heads of 64 channels and QuickGELU,
    Hugging Face no ResNet."""
    if to == "hugging-face":
        return not name.startswith("RN")
    return to == "open-clip" or not name.startswith(("ViT-H", "ViT-g", "ViT-big"))


def cut(config: CLIPConfig) -> CLIPConfig:
    """Reduce a model to two layers of full width (a ResNet: two blocks in each stage)."""
    text = replace(config.text, depth=2)
    if isinstance(config.vision, ResNetConfig):
        return replace(config, vision=replace(config.vision, layers=(2, 2, 2, 2)), text=text)
    return replace(config, vision=replace(config.vision, depth=2), text=text)


def model_of(to, name, config):
    """Build a library's model of a released architecture, as deep as `config`, and its settings."""
    vision, text = config.vision, config.text
    resnet = isinstance(vision, ResNetConfig)
    if to == "openai":
        from clip.model import CLIP as OpenAI

        depth, patch = (vision.layers, None) if resnet else (vision.depth, vision.patch_size)
        return OpenAI(
            config.embed_dim,
            vision.image_size,
            depth,
            vision.width,
            patch,
            text.context_length,
            text.vocab_size,
            text.width,
            text.num_heads,
            text.depth,
        ), {}
    if to == "open-clip":
        import open_clip

        settings = open_clip.get_model_config(OPEN_CLIP_NAMES[name])
        settings["vision_cfg"]["layers"] = list(vision.layers) if resnet else vision.depth
        settings["text_cfg"]["layers"] = text.depth
        return open_clip.CLIP(**settings), settings
    import transformers

    def tower(part):
        return {
            "hidden_size": part.width,
            "intermediate_size": part.mlp_width,
            "num_hidden_layers": part.depth,
            "num_attention_heads": part.num_heads,
            "hidden_act": part.activation,
        }

    settings = transformers.CLIPConfig(
        vision_config=tower(vision)
        | {"image_size": vision.image_size, "patch_size": vision.patch_size},
        text_config=tower(text) | {"max_position_embeddings": text.context_length},
        projection_dim=config.embed_dim,
    )
    return transformers.CLIPModel(settings), {}


def saved_by(to, name, config, folder):
    """Build a library's model with its own initialisation and let it save itself."""
    torch.manual_seed(0)
    folder.mkdir()
    model, settings = model_of(to, name, config)
    model = lively(model)
    if to == "openai":
        sizes = (config.vision.image_size, config.text.context_length, config.text.vocab_size)
        buffers = {n: torch.tensor(x) for n, x in zip(openai.SIZES, sizes, strict=True)}
        torch.save(model.state_dict() | buffers, folder / "model.pt")
        return model, folder / "model.pt"
    if to == "open-clip":
        torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
        content = {"model_cfg": settings, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(content))
    else:
        model.save_pretrained(folder)
    return model, folder


def shapes_by(rows, config):
    """Return the shape of every tensor of an architecture by its name in a library."""
    shapes, ours = {}, param_shapes(config)
    for row in rows:
        shape = ours[row.ours]
        for theirs in row.names:
            if "{}" in theirs:
                each = row.their_shape(shape[1:])
                shapes |= {theirs.format(i): each for i in range(shape[0])}
            else:
                shapes[theirs] = row.their_shape(shape)
    return shapes


def assert_same_shapes(name: str, to: str) -> None:
    """Check shapes and parameter counts against the model that a library builds without memory."""
    config = zoo.get(name)
    with torch.device("meta"):
        model, _ = model_of(to, name, config)
    table = {"openai": openai.rows, "open-clip": open_clip_format.rows}.get(to, hugging_face.rows)
    state = {n: x for n, x in model.state_dict().items() if not n.endswith(openai.COUNTER)}
    assert shapes_by(table(config), config) == {n: tuple(x.shape) for n, x in state.items()}
    ours = sum(prod(s) for p, s in param_shapes(config).items() if "batch_stats" not in p)
    assert ours == sum(x.numel() for x in model.parameters())


def other_activation(weights, ids):
    """Swap GELU and QuickGELU in both towers."""

    def swapped(tower):
        if isinstance(tower, ResNetConfig):
            return tower
        quick = tower.activation == "quick_gelu"
        return replace(tower, activation="gelu" if quick else "quick_gelu")

    config = weights.config
    config = replace(config, vision=swapped(config.vision), text=swapped(config.text))
    return replace(weights, config=config), ids


def other_padding(weights, ids):
    """Pad with another id, 5, after the end of the text."""
    return weights, np.where(ids == weights.config.text.tokenizer.pad_id, 5, ids)


def permuted_layer(weights, ids):
    """Reverse the hidden units of one MLP in each tower (in a ResNet, channels of a convolution):
    on their way in but not on their way out."""
    params = jax.tree.map(lambda x: x, weights.params)  # new dicts, the same arrays
    layers = [params["text"]["transformer"]["resblocks"]["mlp"]["c_fc"]]
    if isinstance(weights.config.vision, ResNetConfig):
        conv = params["visual"]["layer1"]["0"]["conv2"]
        conv["kernel"] = conv["kernel"][..., ::-1]
    else:
        layers.append(params["visual"]["transformer"]["resblocks"]["mlp"]["c_fc"])
    for layer in layers:
        kernel = np.array(layer["kernel"])
        kernel[0] = kernel[0, :, ::-1]
        layer["kernel"] = kernel
    return replace(weights, params=params), ids


def check(weights, model, images, our_ids, their_ids) -> float:
    """Return the largest difference; check that each mistake above makes a large one."""
    largest = check_parity(weights, model, images, our_ids, their_ids)
    theirs = outputs(model, images, their_ids)
    for mistake in (other_activation, other_padding, permuted_layer):
        noticed = differences(*mistake(weights, our_ids), theirs, images, their_ids)
        if mistake is other_activation and isinstance(weights.config.vision, ResNetConfig):
            del noticed["image_features"]  # its ReLU stays
        assert min(noticed.values()) > 10 * BOUND, (mistake.__name__, noticed)
    return largest


def compare(name: str, to: Format, folder: Path) -> str:
    """Return the largest differences of a model, for a library that reads ours, and the reverse."""
    config = cut(zoo.get(name)) if name in CUT else zoo.get(name)
    images = random_inputs(config)[0][:2]
    weights = random_weights(config)
    ours = make_tokenizer(config.text)(texts_for(to), config.text.context_length)
    write_weights(weights, folder / "out", to)
    model, tokenize = loaded(to, folder / "out")
    theirs = tokenize(texts_for(to)).numpy()
    outgoing = check(weights, model, images, ours, theirs)
    del weights, model
    model, path = saved_by(to, name, config, folder / "in")
    weights = read_weights(path)
    assert weights.config == config
    incoming = check(weights, model, images, ours, theirs)
    return f"{outgoing:.1e}, {incoming:.1e}"


def weights() -> None:
    """Print a row for each model."""
    print("| out, in | openai-clip | open_clip | transformers |\n|---|---|---|---|")
    for name in OPEN_CLIP_NAMES:
        cells = []
        for to in LIBRARIES:
            with tempfile.TemporaryDirectory() as folder:
                expressible = is_expressible(name, to)
                cells.append(compare(name, to, Path(folder)) if expressible else "")
                if expressible:
                    assert_same_shapes(name, to)
        print(f"| {name}{', cut' if name in CUT else ''} | {' | '.join(cells)} |", flush=True)


# ------------------------------------------------------------------ tokens

TOKENIZER = ClipTokenizer()
MARKERS = ("startoftext", "endoftext", "start_of_text", "end_of_text")

# What `piece` draws from; a string is a few pieces with something of `BETWEEN` after each.
WORDS = (
    "a photo of the cat dog's don't WE'LL I'm they've isn't he'd rock'n'roll naïve Café STRASSE "
    "straße ΟΔΟΣ Σ ΑΣ. ΑΣΑ İstanbul ıI ﬁsh ﬂow ſ 'ſ it'ſ 'S 'RE 'Ve 'LL 'd'd 'tis K Å ǅ ŉ ΐ ß ẞ "
    "1,234.50 ½ ² Ⅷ ①② ４５６ ४५ 三 x² 10th 3d c++ #tag @me e-mail https://a.b/c?d=e&f=g :-) ... … "
    "“quoted” ‘single’ don’t l’été – — ™ © € £5 ✓ 日本語 中文字符 한국어 עברית العربية हिन्दी ไทย "
    "ｱｲｳ Ｌｏｕｄ"
)
MOJIBAKE = "schön naïve “quoted” don’t — 日本 😀 español €5 ½ Ã Â Привет ça"
ENTITIES = (
    "&amp; &lt; &gt; &quot; &#39; &nbsp; &amp;amp; &amp;lt;b&amp;gt; &amp;amp;amp; &eacute; &AMP "
    "&notin &copy &#x1F600; &#128512; &#0; &#x1c; &#x85; &#x80; &#xD800; &#x110000; &#12; &#160; "
    "&amp;nbsp; &#x17f; '&#x17f; &bogus; &#; & &&amp;; &#x2028; &#x1680; &#8203; &Sigma; &zwj; "
    "<b>bold</b> <br/> &lt;|endoftext|&gt; <|endoftext&#124;>"
)
SPECIALS = [
    *(f"<|{marker}|>" for marker in MARKERS),
    *(f"<{marker}>" for marker in MARKERS),
    "<|EndOfText|>",
    "<|endoftext|",
    "|>",
    "<|endofteхt|>",
    "<|ſtartoftext|>",
    "<|endoftext|>'s",
    "</w>",
    "!</w>",
    "<|<|endoftext|>|>",
]
EMOJI = "😀 👩‍👩‍👧 👍🏽 🇩🇪 ❤️ 1️⃣ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ☺ 🫠 🪿 🫩"
BETWEEN = [" ", "", "  ", "\n", "\t", "\r\n", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0"]
BETWEEN += [" ", " ", " ", "\u2028", "\u3000", "\u200b", "\ufeff", "\u180e", "\u1680", "-", "'"]


def any_character(rng: random.Random) -> str:
    """Draw from all planes, surrogates and unassigned included; half from the first two blocks."""
    high = rng.choice((0x80, 0x250, 0x3000, 0x10000, 0x20000, sys.maxunicode + 1))
    return chr(rng.randrange(high))


def piece(rng: random.Random) -> str:
    kind = rng.randrange(9)
    if kind == 0:
        return "".join(any_character(rng) for _ in range(rng.randrange(1, 6)))
    if kind == 1:
        text = rng.choice(MOJIBAKE.split())
        for _ in range(rng.choice((1, 1, 2))):
            encoding = rng.choice(("latin-1", "cp1252", "cp1251", "cp437", "macroman"))
            text = text.encode("utf-8").decode(encoding, errors="replace")
        return text
    if kind == 2:
        return rng.choice(ENTITIES.split())
    if kind == 3:
        return rng.choice(SPECIALS)
    if kind == 4:
        return rng.choice(EMOJI.split())
    if kind == 5:
        return "".join(chr(rng.randrange(0x20, 0x7F)) for _ in range(rng.randrange(1, 12)))
    if kind == 6:
        return chr(rng.choice((*range(0x20), 0x7F, *range(0x80, 0xA0), 0x1B))) + "[31m"[:2]
    return rng.choice(WORDS.split())


def draw(count: int, seed: int) -> list[str]:
    """Draw strings, mostly of up to 20 pieces; one in a hundred exceeds any context length."""
    rng = random.Random(seed)
    result = []
    for _ in range(count):
        length = 400 if rng.random() < 0.01 else rng.randrange(21)
        parts = [part for _ in range(length) for part in (piece(rng), rng.choice(BETWEEN))]
        result.append("".join(parts))
    return result


def assert_same_ids(texts: list[str], openai_clip: Any, open_clip: Any) -> None:
    theirs = openai_clip.tokenize(texts, truncate=True).numpy()
    assert_equal(texts, theirs)
    # open_clip's markers are <start_of_text> and <end_of_text>: leave both kinds out.
    texts = [re.sub("text", "tent", text, flags=re.IGNORECASE) for text in texts]
    theirs = open_clip.tokenizer.SimpleTokenizer()(texts).numpy()
    assert_equal(texts, theirs)


def assert_equal(texts: list[str], theirs: np.ndarray) -> None:
    wrong = np.flatnonzero((TOKENIZER(texts, truncate=True) != theirs).any(axis=1))
    assert not wrong.size, f"{wrong.size} of {len(texts)} differ, first: {texts[wrong[0]]!r}"


def assert_same_characters(openai_clip: Any, every: int = 1) -> int:
    """Compare characters of all Unicode planes: each alone, in a word and after an apostrophe.

    Of large alphabets and of unassigned characters, which all behave alike, a sample is compared.
    """
    tokenizer = openai_clip.clip._tokenizer
    characters = []
    for i in range(0, sys.maxunicode + 1, every):
        is_assigned = unicodedata.category(chr(i)) not in ("Cn", "Co", "Cs")
        is_of_many = 0x4E00 <= i <= 0xD7A3 or i >= 0x17000
        if i % 97 == 0 or (is_assigned and (not is_of_many or i % 7 == 0)):
            characters.append(chr(i))
    for start in range(0, len(characters), 16):
        text = " ".join(f"{c} a{c}b '{c}" for c in characters[start : start + 16])
        expected = tokenizer.encode(text)
        ids = TOKENIZER(text, context_length=1_000)[0]
        assert ids[1 : len(expected) + 2].tolist() == [*expected, TOKENIZER.end_of_text], text
    return len(characters)


def tokens() -> None:
    """Compare the ids of 100,000 strings with both libraries', and of characters with OpenAI's."""
    openai_clip = import_openai_clip()
    import open_clip

    for seed in range(1, 5):
        assert_same_ids(draw(25_000, seed), openai_clip, open_clip)
    count = assert_same_characters(openai_clip)
    print(f"100,000 strings and {count:,} characters have the same ids.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=("weights", "tokens"), help="by default both")
    only = parser.parse_args().part
    import_openai_clip()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in (weights, tokens):
            if only in (None, part.__name__):
                part()


if __name__ == "__main__":
    main()
