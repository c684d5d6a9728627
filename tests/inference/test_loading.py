"""Loading a model from a run and from files; converting it, and what is refused."""

import dataclasses
import importlib
import json
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

import clip_jax
from clip_jax.checkpoints import manager
from clip_jax.cli.commands import main
from clip_jax.convert import model_folder
from clip_jax.convert.conversion import ConvertConfig, convert
from clip_jax.convert.fitting import starting_params
from clip_jax.convert.formats import read_weights
from clip_jax.convert.on_demand import Parameter
from clip_jax.convert.verify import Verification
from clip_jax.convert.weights import Weights, default_preprocess
from clip_jax.evals.evaluator import compiled, embed_texts
from clip_jax.inference.loading import Model, load, load_on_mesh
from clip_jax.sharding import MeshConfig, make_mesh, padded_size, param_shardings
from tests.conftest import RESNET, TINY, larger, parameters, write_run, write_tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Work directory, architecture and parameters of a run."""
    return write_run(TINY, tmp_path_factory.mktemp("runs") / "vit")


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """The same of a ResNet's folder."""
    write_tiny_model(folder := tmp_path_factory.mktemp("resnet"), seed=1, config=RESNET)
    return folder, RESNET, parameters(RESNET)


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


def test_each_device_reads_its_part_of_a_run_alone(run, tmp_path, monkeypatch):
    """A folder is placed on the mesh alike; parameters that are not finite are refused."""
    workdir, _, params = run
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with monkeypatch.context() as patch:
        patch.setattr(Parameter, "__array__", None)  # which has it all in this process
        model = load_on_mesh(workdir, mesh)
    convert(ConvertConfig(source=workdir, destination=tmp_path, to="clip-jax"))
    for one in (model, load_on_mesh(tmp_path, mesh)):
        assert_on_mesh(one, params, mesh)
    damaged = params | {"logit_scale": np.float32(np.inf)}
    with (
        mock.patch.object(manager, "restore_params", autospec=True, return_value=damaged),
        pytest.raises(ValueError, match="logit_scale has 1 values that are NaN or infinite"),
    ):
        load_on_mesh(workdir, mesh)


def assert_on_mesh(model, params, mesh):
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    places = param_shardings(model.config, model.params, mesh)
    assert jax.tree.map(lambda x: x.sharding, model.params) == places
    split = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(model.params))
    assert split < 0.6 * sum(x.nbytes for x in jax.tree.leaves(params))


def test_a_resnet_is_placed_on_a_mesh(resnet):
    folder, _, params = resnet
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert_on_mesh(load_on_mesh(folder, mesh), params, mesh)


def test_verification_of_our_own_folder(run, tmp_path, capsys):
    """If the numbers differ, the exit code is 1."""
    workdir, config, params = run
    args = ["convert", str(workdir), str(tmp_path / "out"), "--to", "clip-jax", "--verify"]
    assert main([*args, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["max_relative_difference"] == 0.0
    assert values["verifications"][0]["reference"] == "clip_jax"
    assert values["not_compared"] == [
        "source: clip_jax alone reads a run",
        "result: clip_jax alone reads its own format",
    ]
    assert main([*args, "--overwrite", "--dtype", "float16", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["max_relative_difference"] == 0.0
    assert 1e-5 < values["verifications"][0]["rounding_loss"] < 1e-1
    assert main([*args, "--overwrite"]) == 0
    assert "rounding" not in capsys.readouterr().out  # where nothing is rounded
    for factor, code in ((1.001, 1), (np.nan, 2)):  # NaN cannot be read
        scaled = jax.tree.map(lambda x, by=factor: x * np.float32(by), params)
        other = Weights(config=config, params=scaled, preprocess=default_preprocess(config))
        with mock.patch.object(model_folder, "read", autospec=True, return_value=other):
            assert main([*args, "--overwrite", "--json"]) == code
        if code == 1:
            values = json.loads(capsys.readouterr().out)
            assert values["max_relative_difference"] > 1e-5
            assert "image tower" in values["verifications"][0]["differing"]
    assert not Verification(image_features=np.nan, text_features=0.0).passed


@pytest.mark.parametrize("name", ["run", "resnet"])
def test_another_image_size(name, request):
    workdir, config, params = request.getfixturevalue(name)
    size = 2 * config.vision.image_size
    model = load(workdir, image_size=size)
    assert model.config.vision.image_size == model.image_preprocess.image_size == size
    assert model.encode_image(np.zeros((1, size, size, 3), np.float32)).shape == (1, 16)
    np.testing.assert_array_equal(model.params["logit_scale"], params["logit_scale"])


def test_the_library_says_what_can_be_loaded():
    # Whether or not the module of the same name was imported, before or after.
    assert importlib.import_module("clip_jax.inference.loading").load is clip_jax.load is load
    with pytest.raises(ValueError, match="there is no nowhere"):
        clip_jax.load("nowhere")


@pytest.mark.parametrize(
    ("destination", "extra", "says"),
    [
        ("out", ["--to", "clip-jax"], "exists; use --overwrite (in Python: overwrite=True) to "),
        ("run", ["--to", "clip-jax"], "is both source and destination"),
        ("out", ["--to", "openai", "--overwrite"], "is a folder; --to openai takes a file"),
        (
            "out/file",
            ["--to", "clip-jax", "--overwrite"],
            "is a file; --to clip-jax needs a folder",
        ),
        ("new", ["--to", "clip-jax", "--image-size", "4"], "must be at least one patch"),
        ("new", ["--to", "clip-jax", "--activation", "gelu"], "its activation is quick_gelu, not"),
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


# ------------------------------------------------------------------ any number of rows


@pytest.fixture(scope="module")
def model():
    return Model(TINY, parameters(TINY), default_preprocess(TINY))


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


def test_bytes_are_normalised_as_preprocess_normalises(model):
    """Also where a file's preprocessing has another mean than its configuration."""
    how = dataclasses.replace(model.image_preprocess, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    other = dataclasses.replace(model, image_preprocess=how)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    expected = other.encode_image(other.preprocess(list(pixels)))
    np.testing.assert_allclose(other.encode_image(pixels), expected, atol=1e-5)
    assert np.abs(expected - model.encode_image(pixels)).max() > 1e-2


def test_few_shapes_are_compiled_for_all_devices(model):
    """On 8 devices, 41 lengths up to 40 need the sizes 8, 16, 32 and 40."""
    assert model._mesh.size == len(jax.local_devices()) == 8
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(model._replicated))
    encode: Any = compiled(embed_texts, model.clip, model._mesh, normalize=False)
    encode.clear_cache()
    assert {padded_size(count, 8, 40) for count in range(41)} == {8, 16, 32, 40}
    for count in (0, 1, 9, 17, 32, 33, 40):
        model.encode_text(np.ones((count, 10), np.int32), batch_size=40)
    assert encode._cache_size() == 4


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


def test_positions_are_fitted_to_resolution_and_text(run):
    workdir, _, before = run
    params = starting_params(read_weights(workdir), larger(TINY))
    positions = params["visual"]["positional_embedding"]
    assert positions.shape == (1 + 4 * 4, 32)
    old = before["visual"]["positional_embedding"]
    np.testing.assert_array_equal(positions[0], old[0])  # the class token's
    assert old[1:].min() < positions[1:].mean() < old[1:].max()
    np.testing.assert_array_equal(
        params["text"]["positional_embedding"], before["text"]["positional_embedding"][:5]
    )
    np.testing.assert_array_equal(params["visual"]["proj"], before["visual"]["proj"])


def test_weights_that_do_not_fit_are_named(run):
    """The image tower alone can be taken."""
    workdir, text = run[0], TINY.text
    rules = dataclasses.replace(text.tokenizer, clean="lower")
    for changes, message in (
        ({"width": 64}, r"has text/.* and the model needs"),
        ({"tokenizer": rules}, "its text.tokenizer.clean is 'clip', this model's 'lower'"),
    ):
        other = dataclasses.replace(TINY, text=dataclasses.replace(text, **changes))
        with pytest.raises(ValueError, match=message):
            starting_params(read_weights(workdir), other)
        assert set(starting_params(read_weights(workdir), other, ["image"])) == {"visual"}
