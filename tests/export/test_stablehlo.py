"""StableHLO artifacts against the model; and those that an older jax wrote."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.flax import load_file

from clip_jax.cli.commands import main
from clip_jax.convert.formats import write_weights
from clip_jax.convert.verify import relative_difference
from clip_jax.errors import InputError
from clip_jax.export.patches import to_arrays
from clip_jax.export.stablehlo import PLATFORMS, READER, write
from clip_jax.inference.loading import load
from clip_jax.models.text import TokenizerConfig
from tests.conftest import ROOT, parameters
from tests.export.conftest import programs


def call(folder, name, weights, inputs):
    exported = jax.export.deserialize((folder / f"{name}.stablehlo").read_bytes())
    assert exported.platforms == PLATFORMS
    return np.asarray(exported.call(weights, inputs))


def test_both_towers_at_any_batch_size_from_one_artifact(tmp_path, clip):
    write(clip.weights, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for size in (1, 3):
        for tower, inputs in (("image", clip.images), ("text", clip.tokens)):
            features = call(tmp_path, tower, weights, inputs[:size])
            ours = clip.ours[f"{tower}_features"][:size]
            assert relative_difference(features, ours) <= 1e-5
    model = load(tmp_path)  # it is a model folder, with a tokenizer that others read
    ids = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a cat").ids
    assert list(model.tokenize(["a cat"])[0, : len(ids)]) == ids


def test_captions_of_a_vocabulary_without_a_begin_are_refused(tmp_path, families):
    weights = families("coca").weights
    text = replace(weights.config.text, tokenizer=TokenizerConfig(file="", end_id=1))
    with pytest.raises(InputError, match="begin_id=None"):
        write(replace(weights, config=replace(weights.config, text=text)), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["pe_core and xlm_roberta", "resnet and siglip", "dinotxt and dinotxt"]
)
def test_stablehlo_is_verified(tmp_path, capsys, families, name):
    """Of image and text towers of different families."""
    image, text = (families(kind).weights for kind in name.split(" and "))
    config = replace(image.config, embed_dim=text.config.embed_dim, text=text.config.text)
    params = parameters(config)
    weights, output = replace(image, config=config, params=params), tmp_path / "out"
    write_weights(weights, tmp_path / "model", "clip-jax")
    args = ["export", str(tmp_path / "model"), str(output), "--format", "stablehlo"]
    assert main([*args, "--verify", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["max_relative_difference"] <= values["bound"] == 1e-5
    assert load(output).config.embed_dim == weights.config.embed_dim
    if "resnet" in name:  # damaged afterwards, it is told without being written again
        (output / "text.stablehlo").write_bytes(b"")
        assert main([*args, "--existing"]) == 2
        assert "truncated or another model's" in capsys.readouterr().err


def test_the_card_of_naflex_reads_the_arrays_of_the_page(tmp_path, families, monkeypatch):
    family = families("naflex")
    write_weights(family.weights, tmp_path / "model", "clip-jax")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "model", "program", "--format", "stablehlo"]) == 0
    np.savez("images.npz", **to_arrays(family.images))
    np.save("tokens.npy", family.tokens)
    card = Path("program/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {}
    exec(code, names)
    assert relative_difference(names["image_features"], family.ours["image_features"]) <= 1e-5
    assert "`images.npz` has `pixel_values` [batch, patches, values], normalised" in card
    assert main(["export", "model", "onnx", "--format", "onnx"]) == 0
    assert "model_file_name: 'vision_model'" in Path("onnx/README.md").read_text()


def test_the_readers_are_ten_lines_without_this_package():
    assert programs()[0] == READER.replace("{folder}", "program")
    for reader in programs():
        assert "clip_jax" not in reader
        assert len([line for line in reader.splitlines() if line]) <= 10


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 1e-2), ("bfloat16", 3e-2)])
def test_half_the_bits(tmp_path, clip, dtype, bound):
    write(clip.weights, tmp_path, dtype=dtype)
    weights = load_file(tmp_path / "model.safetensors")
    assert {str(x.dtype) for x in weights.values()} == {dtype}
    features = call(tmp_path, "image", weights, clip.images)
    assert features.dtype == np.float32
    assert 1e-6 < relative_difference(features, clip.ours["image_features"]) <= bound


def test_what_an_older_jax_wrote_is_read():
    """tests/golden/generate.py writes it, with the oldest jax that is supported."""
    folder = ROOT / "tests/golden/stablehlo"
    weights = load_file(folder / "model.safetensors")
    with np.load(folder / "numbers.npz") as numbers:
        for name, inputs in (("image", numbers["images"]), ("text", numbers["tokens"])):
            features = call(folder, name, weights, inputs)
            assert relative_difference(features, numbers[f"{name}_features"]) <= 1e-5
