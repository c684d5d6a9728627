"""One step is the same as ever (golden); what a recipe refuses; which patches are dropped."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.errors import InputError
from clip_jax.losses import CaptionConfig, SoftmaxConfig
from clip_jax.models.clip import CLIP
from clip_jax.models.lora import LoRAConfig
from clip_jax.models.text_lengths import TextLengths
from clip_jax.optim import Muon, OptimConfig
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Program, State, context, encode
from tests.conftest import MAMMUT, NAFLEX_SIGLIP, TINY, batch, parameters, sums_of_step
from tests.mesh.conftest import compiled, recipe

VISUAL = LoRAConfig(targets=("visual/*",))


def test_the_golden_step():
    """The numbers of one step, held to what they were. Regenerate only with a reason."""
    expected = json.loads((Path(__file__).parent / "golden/step.json").read_text())
    state, metrics = compiled(TINY)()
    got = sums_of_step(state.params, metrics)
    assert got["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    assert got["parameters"] == pytest.approx(expected["parameters"], rel=1e-5)


def test_the_logit_scale_is_capped():
    params = parameters(TINY) | {"logit_scale": np.float32(np.log(150))}
    step = compiled(TINY)
    _, metrics = step(step.start(params))
    assert float(metrics["logit_scale"]) == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optim": OptimConfig(locked=("image", "text"))}, r"locked=\('image', 'text'\) leaves"),
        ({"optim": OptimConfig(locked=("image",)), "lora": VISUAL}, "or choose other lora.targets"),
        ({"optim": OptimConfig(optimizer=Muon()), "lora": VISUAL}, "Muon does not train adapters"),
    ],
    ids=["both towers", "the tower with adapters", "Muon"],
)
def test_a_recipe_that_would_train_nothing_is_refused(options, says):
    with pytest.raises(InputError, match=says):
        recipe(TINY, **options)


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        (NAFLEX_SIGLIP, {}, r"TextConfig with text.pool=\w+\) depend on the padding"),
        (MAMMUT, {"objective": (CaptionConfig(),)}, "depend on the padding"),
        (
            dataclasses.replace(MAMMUT, text=dataclasses.replace(TINY.text, depth=4)),
            {"objective": (CaptionConfig(),)},
            r"needs the states of all tokens \(caption_states\)",
        ),
        (TINY, {"stored": "text"}, "stored=text reads embeddings"),
        (
            dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, context_length=8)),
            {},
            "10 tokens are more than model.text.context_length=8",
        ),
    ],
    ids=["SigLIP", "MaMMUT", "captions", "stored texts", "a shorter context"],
)
def test_texts_by_length_are_refused_where_another_length_is_another_result(config, options, says):
    lengths = TextLengths(tokens=(4, 10), shares=(0.5, 0.5))
    with pytest.raises(InputError, match=says):
        recipe(config, **{"objective": (SoftmaxConfig(),)} | options, text_lengths=lengths)


def test_patch_dropout_drops_by_row_and_key_and_a_step_by_the_runs_seed():
    vision = dataclasses.replace(TINY.vision, patch_dropout=0.75, depth=1)
    config = dataclasses.replace(TINY, vision=vision)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    inputs = batch(config)
    data = {"image": jnp.asarray(inputs["image"][[0] * 4]), "text": jnp.asarray(inputs["text"][:4])}
    params = jax.tree.map(jnp.asarray, parameters(config))

    @jax.jit
    def images(key, rows):
        inputs = data | {"row": rows}
        x = context(CLIP(config), mesh, State(0, params, None), params, inputs, {})
        return encode(x, (), key=key)[0]["image"]

    key = jax.random.key(0, impl="threefry2x32")
    first = images(key, jnp.arange(4))
    assert np.abs(first[0] - first[1]).max() > 1e-3  # one image, other patches
    np.testing.assert_allclose(images(key, jnp.full(4, 2)), first[jnp.full(4, 2)], atol=1e-6)
    assert np.abs(images(jax.random.fold_in(key, 1), jnp.arange(4)) - first).max() > 1e-3

    def traced(seed):
        program = Program(recipe(config, seed=seed), mesh)
        return str(jax.make_jaxpr(program.step)(program.state, program.batch))

    assert traced(0) != traced(1)
