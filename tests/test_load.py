"""Loading a model from a run and from files; converting, and being told what is wrong."""

import dataclasses
import importlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clip_jax
from clip_jax.checkpoint import CheckpointConfig, Checkpoints
from clip_jax.cli import main
from clip_jax.config import Config
from clip_jax.convert.weights import Weights, default_inputs
from clip_jax.load import ConvertConfig, convert, load
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.serialize import to_dict
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.optim import OptimConfig, make_optimizer
from clip_jax.step import init_state

VIT = CLIPConfig(
    embed_dim=24,
    vision=ViTConfig(image_size=16, patch_size=8, width=32, depth=2, num_heads=2),
    text=TextConfig(vocab_size=600, context_length=12, width=32, depth=2, num_heads=2),
)
RESNET = dataclasses.replace(
    VIT, vision=ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=4, num_heads=2)
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(VIT, tmp_path_factory.mktemp("vit") / "run")


@pytest.fixture(scope="module")
def resnet_run(tmp_path_factory):
    return write_run(RESNET, tmp_path_factory.mktemp("resnet") / "run")


def write_run(model, workdir):
    """Write a work directory as `train` leaves it, at step 2; return its parameters too."""
    trained = dataclasses.replace(model, dtype="float32", remat="dots")
    config = Config(model=trained, steps=2, optim=OptimConfig(warmup_steps=1))
    optimizer = make_optimizer(config.optim, config.steps)
    shapes = jax.eval_shape(lambda: init_state(jax.random.key(0), CLIP(config.model), optimizer))
    rng = np.random.default_rng(0)
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    checkpoints = Checkpoints(workdir / "checkpoints", CheckpointConfig())
    for step in (1, 2):
        state = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 1, x.shape), x.dtype), shapes)
        checkpoints.save(step, state, {"samples": step})
    checkpoints.close()
    return workdir, model, state.params


def test_a_run_is_loaded(run):
    workdir, config, params = run
    model = load(workdir)
    assert model.config == dataclasses.replace(config, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    size = config.vision.image_size
    pixels = model.preprocess([np.zeros((40, 30, 3), np.uint8), np.ones((20, 20, 3), np.uint8)])
    assert pixels.shape == (2, size, size, 3)
    image_features = model.encode_image(pixels)
    text_features = model.encode_text(model.tokenize(["a photo", "of a cat"]))
    assert image_features.shape == text_features.shape == (2, 24)
    expected = jax.jit(model.clip.encode_image)(params, pixels)
    np.testing.assert_allclose(image_features, expected, rtol=1e-5)
    assert load(workdir, dtype="bfloat16").config.dtype == "bfloat16"


@pytest.mark.parametrize("name", ["run", "resnet_run"])
def test_a_run_converts_and_comes_back(name, request, tmp_path):
    """Through our folder and open_clip's (and Hugging Face's, for a ViT), byte for byte."""
    source, _, params = request.getfixturevalue(name)
    formats = ["clip-jax", "open-clip"] + ["hugging-face"] * (name == "run") + ["clip-jax"]
    for i, to in enumerate(formats):
        destination = tmp_path / str(i)
        assert convert(ConvertConfig(source=source, destination=destination, to=to)) is None
        source = destination
        jax.tree.map(np.testing.assert_array_equal, load(source).params, params)
    for path in (tmp_path / "0").iterdir():
        assert (source / path.name).read_bytes() == path.read_bytes(), path.name


def test_verification_of_our_own_folder(run, tmp_path, capsys):
    workdir, _, _ = run
    args = ["convert", str(workdir), str(tmp_path / "out"), "--to", "clip-jax", "--verify"]
    assert main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_relative_difference"] == 0.0
    assert main([*args, "--overwrite", "--dtype", "float16", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["max_relative_difference"] == 0.0
    assert 1e-5 < values["rounding_loss"] < 1e-1


def test_a_failed_verification_exits_with_1(run, tmp_path, monkeypatch):
    from clip_jax.convert import folder

    workdir, _, _ = run
    read = folder.read

    def another(path) -> Weights:
        weights = read(path)
        params = jax.tree.map(lambda x: x * np.float32(1.001), weights.params)
        return dataclasses.replace(weights, params=params)

    monkeypatch.setattr(folder, "read", another)
    args = ["convert", str(workdir), str(tmp_path / "out"), "--to", "clip-jax", "--verify"]
    assert main(args) == 1


def test_another_image_size(run):
    workdir, config, _ = run
    size = 2 * config.vision.image_size
    model = load(workdir, image_size=size)
    assert model.config.vision.image_size == model.image_preprocess.image_size == size
    assert model.encode_image(np.zeros((1, size, size, 3), np.float32)).shape == (1, 24)


def test_the_library_says_what_can_be_loaded():
    # Whether or not the module of the same name was imported, before or after.
    assert importlib.import_module("clip_jax.load").load is clip_jax.load is load
    with pytest.raises(ValueError, match="there is no nowhere"):
        clip_jax.load("nowhere")


def test_a_run_that_saved_nothing(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(to_dict(Config(model=VIT))))
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("destination", "extra", "says"),
    [
        ("out", ["--to", "clip-jax"], "something is at"),
        ("run", ["--to", "clip-jax"], "is both source and destination"),
        ("out", ["--to", "openai", "--overwrite"], "is a directory; --to openai writes a file"),
        ("out/file", ["--to", "clip-jax", "--overwrite"], "is a file; --to clip-jax writes a"),
        ("new", ["--to", "clip-jax", "--plain"], "--plain is a choice of --to openai"),
        ("new", ["--to", "openai"], "OpenAI's format cannot express"),
        ("new", ["--to", "clip-jax", "--image-size", "4"], "smaller than one patch"),
        ("new", ["--to", "clip-jax", "--activation", "gelu"], "its activation is quick_gelu, not"),
        ("new", ["--to", "clip-jax", "--architecture", "ViT-H-14"], "is no ViT-H-14: its towers"),
        ("new", ["--to", "clip-jax", "--architecture", "ViT"], "no architecture 'ViT'; did"),
        ("out/file/new", ["--to", "clip-jax"], "cannot be written: Not a directory"),
    ],
)
def test_wrong_use_exits_with_2(run, tmp_path, capsys, destination, extra, says):
    workdir, _, _ = run
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("here")
    to = workdir if destination == "run" else tmp_path / destination
    assert main(["convert", str(workdir), str(to), *extra]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().split("\n")) == 1
    assert says in error
    assert (tmp_path / "out/file").read_text() == "here"


def test_another_format_in_the_same_folder(run, tmp_path):
    """What is written last is what is read, not the mark that another format left."""
    workdir, _, params = run
    kinds = ["clip-jax", "hugging-face", "open-clip", "hugging-face", "clip-jax", "open-clip"]
    for to in kinds:
        convert(ConvertConfig(source=workdir, destination=tmp_path, to=to, overwrite=True))
        (tmp_path / "notes.txt").write_text("mine")
        jax.tree.map(np.testing.assert_array_equal, load(tmp_path).params, params)
        assert (tmp_path / "manifest.json").exists() == (to == "clip-jax")
        assert (tmp_path / "open_clip_config.json").exists() == (to == "open-clip")
        assert (tmp_path / "notes.txt").exists()


def test_a_pipe_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "x.pt")
    assert main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "out"), "--to", "clip-jax"]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_default_inputs_are_the_models():
    config = dataclasses.replace(VIT, image_mean=(0.5, 0.5, 0.5))
    preprocess, tokenizer = default_inputs(config)
    assert preprocess.mean == (0.5, 0.5, 0.5)
    assert (tokenizer.vocab_size, tokenizer.context_length) == (600, 12)
