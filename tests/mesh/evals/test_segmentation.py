"""Segmentation by a model: from the command to the tables, on meshes, at other resolutions."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from clip_jax import sharding
from clip_jax.cli.commands import main
from clip_jax.convert.weights import Weights, with_input
from clip_jax.data.images import Preprocess
from clip_jax.evals.evaluator import Encoder
from clip_jax.evals.segmentation import at_size
from clip_jax.models.clip import CLIP
from clip_jax.models.dino import DinoConfig
from clip_jax.models.image_head import ImageHeadConfig
from clip_jax.sharding import MeshConfig
from tests.conftest import TINY, parameters, write_tiny_model

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


@pytest.fixture
def coloured(tmp_path):
    """Images with a colour in each quarter, whose masks are the colours."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for i in range(count):
            mask = np.kron(rng.integers(0, 3, (2, 2)), np.ones((16, 24), np.uint8)).astype(np.uint8)
            pixels = np.array([*COLOURS.values()], np.uint8)[mask]
            for kind, array in (("images", pixels), ("masks", mask)):
                (tmp_path / f"data/{split}/{kind}").mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(tmp_path / f"data/{split}/{kind}/{i}.png")
    (tmp_path / "data/classnames.txt").write_text("\n".join(COLOURS))
    write_tiny_model(tmp_path / "model")
    return tmp_path


def evaluated(folder, capsys, *flags):
    sizes = ["--segmentation.side=32", "--segmentation.window=16", "--segmentation.stride=8"]
    data = f"--dataset=segments:{folder}/data"
    assert main(["evaluate", str(folder / "model"), data, *sizes, *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_colours_are_found_by_a_probe_on_any_mesh(coloured, capsys):
    """Zero-shot, an untrained model only has a score; that of a probe is close to 1."""
    tasks = ("--tasks", "zero-shot", "probe", "--segmentation.protocol", "values")
    output = coloured / "results"
    values = evaluated(coloured, capsys, *tasks, "--output", str(output))
    assert 0 <= values["data/values/miou"] < 0.7
    assert values["data/linear_probe/values/miou"] > 0.8
    pictures = sorted(path.name for path in (output / "data/segments").iterdir())
    assert pictures == [f"00{i}_{i}.png" for i in range(5)]
    again = evaluated(coloured, capsys, *tasks, "--mesh.fsdp", "2")
    assert again == pytest.approx(values, abs=5e-3)


def test_a_model_at_another_size_is_that_of_the_converter():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:4])
    params, preprocess = parameters(TINY), Preprocess(image_size=16)
    shardings = sharding.param_shardings(TINY, params, mesh)
    placed = jax.device_put(params, shardings)
    encoder = Encoder(CLIP(TINY), placed, mesh, preprocess, lambda texts: np.zeros((1, 10)))
    got = at_size(encoder, 32)
    weights = Weights(config=TINY, params=params, preprocess=preprocess)
    expected = with_input(weights, image_size=32)
    assert got.model.config == expected.config
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(got.params), expected.params))


def test_patches_of_dinotxt_are_those_whose_mean_is_the_embedding():
    vision = DinoConfig(image_size=16, patch_size=8, width=32, depth=2, num_heads=2)
    head = ImageHeadConfig(depth=1, layer_scale=0.5)
    config = replace(TINY, vision=vision, image_head=head, embed_dim=24)
    model, params = CLIP(config), parameters(config)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    patches = model.encode_patches(params, images)
    assert patches.shape == (2, 4, 12)
    embedded = model.for_patches(model.encode_image(params, images))
    np.testing.assert_allclose(patches.mean(axis=1), embedded, rtol=0, atol=1e-6)
