"""Foreign configurations with something wrong in them: one message that names the file."""

import json
from dataclasses import replace
from types import TracebackType

import pytest

from clip_jax.convert import image_processor, tokenizer_files
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.open_clip_config import read_config
from clip_jax.data.images import Preprocess
from clip_jax.models.text import TokenizerConfig
from tests import vocabularies
from tests.convert.conftest import make_weights

WRONG = [
    None, True, "x", -1, 0, 1.5, 10**400, float("nan"), float("inf"),
    [], [1, 2], [[1]], {}, {"a": 1},
]  # fmt: skip
BAD_CHANNELS = [
    ([0.5, 0.5], "three numbers are needed"),
    ([0.5, 0.5, 0.5, 0.5], "three numbers are needed"),
    (0.5, "three numbers are needed"),
    ("0.5 0.5 0.5", "three numbers are needed"),
    ({"r": 0.5}, "three numbers are needed"),
    ([0.5, "0.5", 0.5], "[1] is '0.5'; a finite number"),
    ([0.5, None, 0.5], "[1] is None; a finite number"),
    ([0.5, True, 0.5], "[1] is True; a finite number"),
    ([0.5, float("nan"), 0.5], "[1] is nan; a finite number"),
    ([0.5, 10**400, 0.5], "a finite number"),
]
BAD_STD = [
    ([0.5, 0, 0.5], "[1] is 0; a finite number above 0 is needed"),
    ([0.5, 0.5, -0.5], "[2] is -0.5; a finite number above 0 is needed"),
]
CASES = [("mean", *case) for case in BAD_CHANNELS]
CASES += [("std", *case) for case in BAD_CHANNELS + BAD_STD]


@pytest.mark.parametrize("to", ["hugging-face", "open-clip"])
def test_mean_and_standard_deviation(tmp_path, to):
    write_weights(make_weights("vit"), tmp_path, to)
    file, prefix = ("open_clip_config.json", "") if to == "open-clip" else (
        "preprocessor_config.json", "image_"
    )  # fmt: skip
    original = (tmp_path / file).read_text()
    for name, value, message in CASES:
        content = json.loads(original)
        content.get("preprocess_cfg", content)[prefix + name] = value
        (tmp_path / file).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=name) as error:
            read_weights(tmp_path)
        assert f"{tmp_path / file}: " in str(error.value)
        assert message in str(error.value)


def leaves(value, path=()):
    """The place of every value in nested JSON, containers too; of long lists the first."""
    yield path
    if isinstance(value, dict):
        for key in list(value)[:10]:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from leaves(value[0], (*path, 0))


@pytest.mark.parametrize(
    ("name", "to", "file"),
    [
        ("vit", "hugging-face", "config.json"),
        ("eos", "hugging-face", "preprocessor_config.json"),
        ("own words", "hugging-face", "tokenizer.json"),
        ("own words", "hugging-face", "tokenizer_config.json"),
        ("eos", "open-clip", "open_clip_config.json"),
    ],
)
def test_every_value_wrong_in_turn(tmp_path, name, to, file):
    """It is read all the same, or a ValueError of ours says in few words which file is wrong."""
    weights = make_weights("eos" if name == "own words" else name)
    if name == "own words":
        words = vocabularies.byte_fallback(tmp_path / "words.json")
        rules = TokenizerConfig(file=str(words), clean="lower", begin_id=2, end_id=1, pad_id=0)
        text = replace(weights.config.text, tokenizer=rules)
        weights = replace(weights, config=replace(weights.config, text=text))
    write_weights(weights, tmp_path, to)
    text, default = weights.config.text, Preprocess(image_size=32)
    read = {  # what reads the file, and no more of the folder where that would take long
        "preprocessor_config.json": lambda: image_processor.read(tmp_path, default),
        "tokenizer.json": lambda: tokenizer_files.read(tmp_path, text, TokenizerConfig()),
        "tokenizer_config.json": lambda: tokenizer_files.read(tmp_path, text, TokenizerConfig()),
        "open_clip_config.json": lambda: read_config(tmp_path / file),
    }.get(file, lambda: read_weights(tmp_path))
    if file == "config.json":  # reading CLIP's vocabulary each time takes long
        (tmp_path / "tokenizer.json").unlink()
    path = tmp_path / file
    original = path.read_text()
    refusals = []
    for i, place in enumerate(leaves(json.loads(original))):
        # A vocabulary is the library's to read: a third of the values at each place.
        for wrong in WRONG[i % 3 :: 3] if file == "tokenizer.json" else WRONG:
            content = {"": json.loads(original)}
            *parents, last = ("", *place)
            holder = content
            for key in parents:
                holder = holder[key]
            holder[last] = wrong
            path.write_text(json.dumps(content[""]))
            try:
                read()
            except ValueError as error:
                refusals.append((place, wrong, error))
    assert refusals
    for place, wrong, error in refusals:
        assert str(tmp_path) in str(error), (place, wrong, error)
        assert len(str(error)) < 2000, (place, wrong)
        assert deepest(error.__traceback__).startswith("clip_jax"), (place, wrong)


def deepest(frame: TracebackType | None) -> str:
    """The module that raised: what is not ours is a bug to the command line."""
    while frame and frame.tb_next:
        frame = frame.tb_next
    return frame.tb_frame.f_globals["__name__"] if frame else ""


def test_sizes_beyond_reason_take_no_memory(tmp_path):
    write_weights(make_weights("vit"), tmp_path, "hugging-face")
    path = tmp_path / "config.json"
    content = path.read_text()
    for section, name in [
        ("vision_config", "image_size"), ("vision_config", "num_hidden_layers"),
        ("text_config", "max_position_embeddings"), ("text_config", "vocab_size"),
    ]:  # fmt: skip
        changed = json.loads(content)
        changed[section][name] = 1 << 22
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"does not fit the architecture|is not supported"):
            read_weights(tmp_path)
