"""A run that begins with another's weights: higher resolution, one tower, averaged weights."""

import dataclasses

import jax
import numpy as np
import pytest

from clip_jax.checkpoint import CheckpointConfig
from clip_jax.load import load, starting_params
from clip_jax.models.clip import CLIP
from clip_jax.optim import OptimConfig
from clip_jax.train import train
from tests.runs import tiny_digits
from tests.test_load import VIT, write_run
from tests.test_train import final_state


def larger(config):
    """Twice the resolution, half the text."""
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, image_size=2 * config.vision.image_size),
        text=dataclasses.replace(config.text, context_length=config.text.context_length // 2),
    )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run's work directory that took no training."""
    workdir = tmp_path_factory.mktemp("drawn") / "run"
    write_run(VIT, workdir)
    return workdir


def test_positions_are_fitted_to_resolution_and_text(drawn):
    before, params = load(drawn).params, starting_params(drawn, larger(VIT))
    positions = params["visual"]["positional_embedding"]
    assert positions.shape == (1 + 4 * 4, 32)
    old = before["visual"]["positional_embedding"]
    np.testing.assert_array_equal(positions[0], old[0])  # the class token's
    assert old[1:].min() < positions[1:].mean() < old[1:].max()
    np.testing.assert_array_equal(
        params["text"]["positional_embedding"], before["text"]["positional_embedding"][:6]
    )
    np.testing.assert_array_equal(params["visual"]["proj"], before["visual"]["proj"])


def test_weights_that_do_not_fit_are_named(drawn):
    wide = dataclasses.replace(VIT, text=dataclasses.replace(VIT.text, width=64))
    with pytest.raises(ValueError, match=r"has text/.* and the model needs"):
        starting_params(drawn, wide)
    assert set(starting_params(drawn, wide, ["image"])) == {"visual"}


def tiny(**changes):
    defaults = {"steps": 3, "evals": (), "checkpoint": CheckpointConfig(every_steps=100)}
    return tiny_digits(**(defaults | changes))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A short phase with few patches and averaged weights."""
    workdir = tmp_path_factory.mktemp("first")
    config = tiny()
    vision = dataclasses.replace(config.model.vision, patch_dropout=0.5)
    optim = OptimConfig(
        learning_rate=2e-3, warmup_steps=1, ema_decay=0.5, skip_norm_ratio=10.0,
        first_moment="bfloat16",
    )  # fmt: skip
    config = dataclasses.replace(
        config, optim=optim, model=dataclasses.replace(config.model, vision=vision), accumulation=2
    )
    train(config, workdir)
    return workdir


@pytest.mark.slow
def test_a_run_is_loaded_with_its_averaged_weights(first):
    state = final_state(first, 3)
    params, ema = state["params"], state["opt_state"]["inner"]["ema"]
    jax.tree.map(np.testing.assert_array_equal, load(first).params, ema)
    moved = params["visual"]["conv1"]["kernel"] - ema["visual"]["conv1"]["kernel"]
    assert np.abs(moved).max() > 0
    assert state["opt_state"]["inner"]["inner"][0]["mu"]["logit_scale"].dtype == "bfloat16"


@pytest.mark.slow
def test_a_phase_of_full_resolution_goes_on_from_the_first(first, tmp_path):
    config = tiny(
        init_from=str(first), model=larger(tiny().model),
        optim=OptimConfig(learning_rate=0.0, warmup_steps=1),
    )  # fmt: skip
    train(config, tmp_path)
    expected = starting_params(first, config.model)
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path, 3)["params"], expected)


@pytest.mark.slow
def test_one_tower_alone_is_taken_and_kept(first, tmp_path):
    optim = OptimConfig(learning_rate=1e-2, warmup_steps=1, locked=("image",))
    config = tiny(init_from=str(first), init_towers=("image",), optim=optim)
    train(config, tmp_path)
    params, before = final_state(tmp_path, 3)["params"], load(first).params
    jax.tree.map(np.testing.assert_array_equal, params["visual"], before["visual"])
    drawn = CLIP(config.model).init(jax.random.key(config.seed))
    moved = np.abs(params["text"]["token_embedding"] - drawn["text"]["token_embedding"])
    assert 0 < moved.max() < 0.1  # drawn, and trained for three steps
