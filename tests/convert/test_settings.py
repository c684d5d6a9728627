"""Foreign configurations with something wrong in them: one message that names the file, exit 2."""

import json
from pathlib import Path

import pytest

from clip_jax.cli import main
from clip_jax.convert.formats import read_weights, write_weights

FILES = {
    "hugging-face": ["config.json", "preprocessor_config.json", "tokenizer.json"],
    "open-clip": ["open_clip_config.json"],
}
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


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("mean", *case) for case in BAD_CHANNELS] + [("std", *c) for c in BAD_CHANNELS + BAD_STD],
)
@pytest.mark.parametrize("to", FILES)
def test_mean_and_standard_deviation(tmp_path, make_weights, capsys, to, name, value, says):
    write_weights(make_weights("vit"), tmp_path / "in", to)
    if to == "open-clip":
        path = tmp_path / "in" / "open_clip_config.json"
        content = json.loads(path.read_text())
        content["preprocess_cfg"][name] = value
    else:
        path = tmp_path / "in" / "preprocessor_config.json"
        content = json.loads(path.read_text())
        content[f"image_{name}"] = value
    path.write_text(json.dumps(content))
    args = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "clip-jax"]
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path}: " in error
    assert name in error
    assert says in error
    assert not (tmp_path / "out").exists()


def leaves(value, path=()):
    """The place of every value in nested JSON, containers too; of long lists the first."""
    yield path
    if isinstance(value, dict):
        for key in list(value)[:10]:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from leaves(value[0], (*path, 0))


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "to", "file"),
    [("vit", to, file) for to, files in FILES.items() for file in files]
    + [("eos", "hugging-face", "config.json"), ("eos", "open-clip", "open_clip_config.json")],
)
def test_every_value_wrong_in_turn(tmp_path, make_weights, name, to, file):
    """It is read all the same, or a ValueError of ours says in few words which file is wrong."""
    write_weights(make_weights(name), tmp_path, to)
    path = tmp_path / file
    original = path.read_text()
    refused = 0
    for place in leaves(json.loads(original)):
        for wrong in WRONG:
            content = {"": json.loads(original)}
            *parents, last = ("", *place)
            holder = content
            for key in parents:
                holder = holder[key]
            holder[last] = wrong
            path.write_text(json.dumps(content[""]))
            try:
                read_weights(tmp_path)
            except ValueError as error:
                refused += 1
                assert str(tmp_path) in str(error), (place, wrong, error)  # noqa: PT017
                assert len(str(error)) < 2000, (place, wrong)  # noqa: PT017
                assert deepest(error).startswith("clip_jax"), (place, wrong)  # noqa: PT017
    assert refused or file == "tokenizer.json"  # whatever is in there, it is another tokenizer


def deepest(error: BaseException) -> str:
    """The module that raised: what is not ours is a bug to the command line."""
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    return frame.tb_frame.f_globals["__name__"]


def test_sizes_beyond_reason_take_no_memory(tmp_path, make_weights):
    write_weights(make_weights("vit"), tmp_path, "hugging-face")
    path: Path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for section, name in [
        ("vision_config", "image_size"), ("vision_config", "num_hidden_layers"),
        ("text_config", "max_position_embeddings"), ("text_config", "vocab_size"),
    ]:  # fmt: skip
        changed = json.loads(json.dumps(content))
        changed[section][name] = 1 << 22
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"does not fit the architecture|is not supported"):
            read_weights(tmp_path)
