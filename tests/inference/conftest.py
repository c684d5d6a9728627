"""Images of many shapes, models for them, and a fixture that runs commands."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_jax.cli.commands import main
from clip_jax.evals.evaluator import Encoder
from clip_jax.inference.loading import load, load_on_mesh, unit
from clip_jax.models.images import Patches
from clip_jax.sharding import MeshConfig, make_mesh
from tests.conftest import NAFLEX

# A NaFlex model with enough text positions for prompts.
NAFLEX_16 = dataclasses.replace(NAFLEX, text=dataclasses.replace(NAFLEX.text, context_length=16))
OWN, OTHER = 12, 30  # sequence lengths: the model's own, and another
SIZES = ((20, 60), (60, 20), (33, 40), (1, 50), (300, 7), (64, 64))  # width, height


def write_image(path: Path, width: int, height: int, seed: int = 0) -> None:
    """Write a smooth picture, which looks the same at every resolution."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR).save(path)


def write_photos(folder: Path) -> None:
    """Write an image of each of SIZES, and one that is broken."""
    for i, size in enumerate(SIZES):
        write_image(folder / f"{i}.png", *size, seed=i)
    (folder / "broken.png").write_bytes(b"not an image")


def write_classes(root: Path, shapes: Sequence[tuple[int, int]]) -> None:
    """Write a data set of two classes and two splits, with an image of each shape."""
    for i, split in enumerate(("train", "test")):
        for label, name in enumerate(("red", "blue")):
            for j, (width, height) in enumerate(shapes):
                path = root / split / name / f"{j}.png"
                write_image(path, width, height, seed=100 * label + 10 * i + j)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Return a function that runs a command and returns its JSON, or its error message."""

    def run(command: str, *args: Any, code: int = 0) -> Any:
        capsys.readouterr()
        assert main([command, *map(str, args), "--json"]) == code
        printed = capsys.readouterr()
        return json.loads(printed.out) if code == 0 else " ".join(printed.err.split())

    return run


def assert_loads_at_any_length(model: Path, photos: Path, least: float) -> None:
    """Check that a model or run can be loaded at two sequence lengths, also on a mesh.

    Its embeddings at the two lengths must differ by at least `least`.
    """
    own, other = load(model), load(model, tokens=OTHER)
    assert (own.tokens, other.tokens) == (OWN, OTHER)
    paths = [photos / f"{i}.png" for i in range(len(SIZES))]
    images = other.preprocess(paths)
    assert isinstance(images, Patches)
    assert images.pixels.shape == (len(SIZES), OTHER, 3 * 8**2)
    assert (images.length > OWN).all()
    expected = unit(other.encode_image(images))
    difference = np.abs(unit(own.encode_image(own.preprocess(paths))) - expected).max()
    assert difference >= least
    again = own.with_tokens(OTHER)
    np.testing.assert_array_equal(unit(again.encode_image(again.preprocess(paths))), expected)
    alone = [other.encode_image(other.preprocess(path)) for path in paths]
    np.testing.assert_allclose(unit(np.concatenate(alone)), expected, atol=1e-6)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    sharded = load_on_mesh(model, mesh, tokens=OTHER)
    assert (sharded.config, sharded.image_preprocess) == (other.config, other.image_preprocess)
    placed = Encoder(sharded.clip, sharded.params, mesh, sharded.image_preprocess, sharded.tokenize)
    packed = other.image_preprocess.batch
    np.testing.assert_allclose(placed.images(packed(paths[0])), expected[:1], atol=1e-6)


def encoder_at(path: Path, tokens: int) -> Encoder:
    """Load a model at a sequence length, as evaluators use it."""
    model = load(path, tokens=tokens)
    return Encoder(
        model.clip,
        model.params,
        make_mesh(MeshConfig()),
        model.image_preprocess,
        lambda texts: model.tokenize(texts, truncate=True),
    )
