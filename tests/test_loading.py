"""Loading a model from a run and from files; converting, and being told what is wrong."""

import dataclasses
import importlib
import json
import os

import jax
import numpy as np
import pytest

import clip_jax
from clip_jax import loading
from clip_jax.cli import main
from clip_jax.config import Config
from clip_jax.convert.command import ConvertConfig, convert
from clip_jax.convert.weights import Weights, default_preprocess
from clip_jax.loading import Model, _encode, load, load_on_mesh, padded_size, starting_params
from clip_jax.models.clip import CLIP
from clip_jax.serialize import to_dict
from clip_jax.sharding import MeshConfig, make_mesh, param_shardings
from tests.conftest import RESNET, TINY, larger, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(TINY, tmp_path_factory.mktemp("vit") / "run")


@pytest.fixture(scope="module")
def resnet_run(tmp_path_factory):
    return write_run(RESNET, tmp_path_factory.mktemp("resnet") / "run")


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
    assert image_features.shape == text_features.shape == (2, 16)
    expected = jax.jit(model.clip.encode_image)(params, pixels)
    np.testing.assert_allclose(image_features, expected, rtol=1e-5)
    assert load(workdir, dtype="bfloat16").config.dtype == "bfloat16"


@pytest.mark.parametrize("name", ["run", "resnet_run"])
def test_each_device_reads_its_part_of_a_run_alone(name, request, monkeypatch):
    workdir, _, params = request.getfixturevalue(name)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    monkeypatch.setattr(loading, "read_weights", None)  # which has it all in this process
    model = load_on_mesh(workdir, mesh)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    places = param_shardings(model.config, model.params, mesh)
    assert jax.tree.map(lambda x: x.sharding, model.params) == places
    split = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(model.params))
    assert split < 0.6 * sum(x.nbytes for x in jax.tree.leaves(params))


def test_a_folder_lies_on_the_mesh_alike(run, tmp_path):
    workdir, _, params = run
    folder = tmp_path / "folder"
    convert(ConvertConfig(source=workdir, destination=folder, to="clip-jax"))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = load_on_mesh(folder, mesh)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    places = param_shardings(model.config, model.params, mesh)
    assert jax.tree.map(lambda x: x.sharding, model.params) == places


@pytest.mark.parametrize("name", ["run", "resnet_run"])
def test_a_run_converts_and_comes_back(name, request, tmp_path):
    """Through our folder and open_clip's (and Hugging Face's, for a ViT), byte for byte."""
    source, _, params = request.getfixturevalue(name)
    formats = ["clip-jax", "open-clip"] + ["hugging-face"] * (name == "run") + ["clip-jax"]
    for i, to in enumerate(formats):
        destination = tmp_path / str(i) / "model"  # a card begins with the folder's name
        config = ConvertConfig(source=source, destination=destination, to=to)
        assert convert(config).verification is None
        source = destination
        jax.tree.map(np.testing.assert_array_equal, load(source).params, params)
    for path in (tmp_path / "0/model").iterdir():
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
    assert model.encode_image(np.zeros((1, size, size, 3), np.float32)).shape == (1, 16)


def test_the_library_says_what_can_be_loaded():
    # Whether or not the module of the same name was imported, before or after.
    assert importlib.import_module("clip_jax.loading").load is clip_jax.load is load
    with pytest.raises(ValueError, match="there is no nowhere"):
        clip_jax.load("nowhere")


def test_a_run_that_saved_nothing(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(to_dict(Config(model=TINY))))
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
        ("out/file/new", ["--to", "clip-jax"], "is a file, and"),
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


def test_default_pixels_are_the_models():
    config = dataclasses.replace(TINY, image_mean=(0.5, 0.5, 0.5))
    assert default_preprocess(config).mean == (0.5, 0.5, 0.5)


# ------------------------------------------------------------------ any number of rows


@pytest.fixture(scope="module")
def model():
    params = jax.jit(CLIP(TINY).init)(jax.random.key(0))
    return Model(TINY, params, default_preprocess(TINY))


@pytest.mark.parametrize("count", [0, 1, 3, 8, 37])
def test_any_number_of_rows_equals_the_pure_function(model, count):
    rng = np.random.default_rng(count)
    images = rng.normal(size=(count, 16, 16, 3)).astype(np.float32)
    tokens = rng.integers(0, 520, (count, 10)).astype(np.int32)
    for found, method, rows in (
        (model.encode_image(images, batch_size=16), model.clip.encode_image, images),
        (model.encode_text(tokens, batch_size=16), model.clip.encode_text, tokens),
    ):
        assert isinstance(found, jax.Array)
        assert found.shape == (count, 16)
        if count:
            expected = jax.jit(method)(model.params, jax.numpy.asarray(rows))
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_few_shapes_are_compiled(model):
    """On 8 devices, 33 lengths up to 32 need the sizes 8, 16 and 32."""
    assert len(jax.local_devices()) == 8
    _encode.clear_cache()
    for count in range(33):
        model.encode_text(np.ones((count, 10), np.int32), batch_size=32)
    assert _encode._cache_size() == 3


def test_every_device_takes_its_share(model):
    mesh, params = model._placed
    assert mesh.size == len(jax.local_devices())
    assert all(len(x.sharding.device_set) == mesh.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("rows", "shards", "batch_size", "expected"),
    [(1, 1, 64, 1), (3, 1, 64, 4), (33, 1, 64, 64), (50, 1, 50, 50), (9, 8, 64, 16), (5, 8, 5, 8)],
)
def test_padded_sizes(rows, shards, batch_size, expected):
    assert padded_size(rows, shards, batch_size) == expected


def test_bfloat16_is_close(model):
    half = dataclasses.replace(model, config=dataclasses.replace(TINY, dtype="bfloat16"))
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    exact, rounded = np.asarray(model.encode_image(images)), np.asarray(half.encode_image(images))
    assert 1e-6 < np.linalg.norm(exact - rounded) / np.linalg.norm(exact) < 2e-2


def test_a_terminal_sees_progress_of_long_lists_alone(model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    rows = np.ones((80, 10), np.int32)
    model.encode_text(rows, batch_size=40)
    assert not capsys.readouterr().err
    model.encode_text(rows, batch_size=8)
    printed = capsys.readouterr()
    assert "encode_text" in printed.err
    assert not printed.out


def test_a_batch_size_of_none_is_refused(model):
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        model.encode_text(np.ones((1, 10), np.int32), batch_size=0)


# ------------------------------------------------------------------ weights to begin with


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run's work directory that took no training."""
    workdir = tmp_path_factory.mktemp("drawn") / "run"
    write_run(TINY, workdir)
    return workdir


def test_positions_are_fitted_to_resolution_and_text(drawn):
    before, params = load(drawn).params, starting_params(drawn, larger(TINY))
    positions = params["visual"]["positional_embedding"]
    assert positions.shape == (1 + 4 * 4, 32)
    old = before["visual"]["positional_embedding"]
    np.testing.assert_array_equal(positions[0], old[0])  # the class token's
    assert old[1:].min() < positions[1:].mean() < old[1:].max()
    np.testing.assert_array_equal(
        params["text"]["positional_embedding"], before["text"]["positional_embedding"][:5]
    )
    np.testing.assert_array_equal(params["visual"]["proj"], before["visual"]["proj"])


def test_weights_that_do_not_fit_are_named(drawn):
    wide = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, width=64))
    with pytest.raises(ValueError, match=r"has text/.* and the model needs"):
        starting_params(drawn, wide)
    assert set(starting_params(drawn, wide, ["image"])) == {"visual"}
