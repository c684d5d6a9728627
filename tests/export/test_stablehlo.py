"""StableHLO in a fresh process of JAX alone, against the model; and by other versions of jax."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from clip_jax.convert.verify import our_outputs, random_inputs, relative_difference
from clip_jax.export.stablehlo import (
    CAPTION_READER,
    PLATFORMS,
    READER,
    caption_reader,
    spoken,
    write,
)
from clip_jax.loading import load
from clip_jax.models.text import TokenizerConfig
from clip_jax.refused import Refused
from tests.conftest import ROOT, batch
from tests.export.conftest import greedy


def call(folder, name, weights, inputs):
    exported = jax.export.deserialize((folder / f"{name}.stablehlo").read_bytes())
    assert exported.platforms == PLATFORMS
    return np.asarray(exported.call(weights, inputs))


def assert_right(folder, model, sizes):
    """Both towers at some batch sizes, from one artifact."""
    from safetensors.flax import load_file

    write(model, folder)
    weights = load_file(folder / "model.safetensors")
    made = batch(model.config, max(16, max(sizes)))
    images, tokens = (made["image"] / 127.5 - 1).astype(np.float32), made["text"]
    images, tokens = images[: max(sizes)], tokens[: max(sizes)]
    ours = our_outputs(model.config, model.params, images, tokens)
    for size in sizes:
        for name, inputs in (("image", images[:size]), ("text", tokens[:size])):
            found = call(folder, name, weights, inputs)
            assert relative_difference(found, ours[f"{name}_features"][:size]) <= 1e-5


@pytest.mark.long
def test_three_batch_sizes_from_one_artifact(tmp_path, clip):
    assert_right(tmp_path, clip, (1, 3, 64))


@pytest.mark.long
def test_every_family(tmp_path, family):
    assert_right(tmp_path, family, (3,))


@pytest.mark.long
@pytest.mark.parametrize(("name", "sizes"), [("coca", (1, 64)), ("mammut", (3,))])
def test_captions_token_by_token(tmp_path, families, name, sizes, monkeypatch):
    model = families[name]
    write(model, tmp_path / "program")
    made = batch(model.config, 64)
    images, tokens = (made["image"] / 127.5 - 1).astype(np.float32), made["text"]
    np.save(tmp_path / "images.npy", images[:3])
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(caption_reader("program", model.config), found)
    assert found["captions"].tolist() == greedy(model, images[:3])[:, 1:].tolist()
    given = spoken(model.config, tokens)
    ours = our_outputs(model.config, model.params, images, given)["caption_logits"]
    first, following, weights = found["read"]("caption_first"), found["following"], found["weights"]
    for size in sizes:
        logits, state = first.call(weights, images[:size])
        assert relative_difference(np.asarray(logits), ours[:size, 0]) <= 1e-5
        for place in range(1, given.shape[1] - 1):
            ids = given[:size, place]
            logits, state = following.call(weights, state, ids, np.int32(place))
            assert relative_difference(np.asarray(logits), ours[:size, place]) <= 1e-5


def test_captions_of_a_vocabulary_without_a_begin_are_refused(tmp_path, families):
    config = families["coca"].config
    rules = TokenizerConfig(file="", end_id=1)
    config = replace(config, text=replace(config.text, tokenizer=rules))
    with pytest.raises(Refused, match="begin_id=None"):
        write(replace(families["coca"], config=config), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reader", [READER, CAPTION_READER])
def test_the_readers_are_ten_lines_without_this_package(reader):
    assert "clip_jax" not in reader
    assert len([line for line in reader.splitlines() if line]) <= 10
    shown = reader.replace("{folder}", "program").replace("{length}", "29")
    assert shown in (ROOT / "docs/how-to/export.md").read_text()


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 1e-2), ("bfloat16", 3e-2)])
def test_half_the_bits(tmp_path, clip, dtype, bound):
    from safetensors.flax import load_file

    write(clip, tmp_path, dtype=dtype)
    weights = load_file(tmp_path / "model.safetensors")
    assert {str(x.dtype) for x in weights.values()} == {dtype}
    images, tokens = random_inputs(clip.config)
    ours = our_outputs(clip.config, clip.params, images, tokens)
    found = call(tmp_path, "image", weights, images)
    assert found.dtype == np.float32
    assert 1e-6 < relative_difference(found, ours["image_features"]) <= bound


def test_the_folder_is_a_model_folder_with_a_tokenizer_that_others_read(tmp_path, clip):
    import tokenizers

    write(clip, tmp_path)
    model = load(tmp_path)
    ids = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a cat").ids
    assert list(model.tokenize(["a cat"])[0, : len(ids)]) == ids


def test_what_an_older_jax_wrote_is_read():
    """tests/golden/generate.py writes it, with the oldest jax that is supported."""
    from safetensors.flax import load_file

    folder = ROOT / "tests/golden/stablehlo"
    weights = load_file(folder / "model.safetensors")
    with np.load(folder / "numbers.npz") as numbers:
        for name, inputs in (("image", numbers["images"]), ("text", numbers["tokens"])):
            found = call(folder, name, weights, inputs)
            assert relative_difference(found, numbers[f"{name}_features"]) <= 1e-5
