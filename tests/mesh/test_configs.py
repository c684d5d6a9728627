"""Every config of the repository can start. One of each kind also traces a step and evaluation."""

import jax
import pytest

from clip_jax.evals import evaluator
from tests.mesh.conftest import CONFIGS, program_of, read_config

# They have every kind of tower, pool, decoder, loss, remat policy and gradient clipping.
TRACED = (
    *("clipa_l14", "coca_l14", "digits", "mammut_l14", "pairs", "rn50x64", "siglip2_b16"),
    *("convnext_large", "dinotxt_l16", "eva02_l14", "pe_core_l14", "shapes_naflex", "vit_l14"),
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_state_is_laid_out_and_of_each_kind_a_step_and_evaluation_trace(path):
    config = read_config(path)
    run = program_of(config)
    assert {x.shape[0] for x in jax.tree.leaves(run.batch["image"])} == {config.batch_size}
    assert all(x.sharding.mesh == run.mesh for x in jax.tree.leaves(run.state))
    if path.stem not in TRACED:
        return
    after, metrics = jax.eval_shape(run.step, run.state, run.batch)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in (after, run.state)]
    assert shapes[0] == shapes[1]
    assert metrics["loss"].shape == ()
    # Evaluation uses the parameters as the step has sharded them.
    image = evaluator.compiled(evaluator.embed_images, run.model, run.mesh)
    text = evaluator.compiled(evaluator.embed_texts, run.model, run.mesh)
    params = run.recipe.complete(run.state, run.state.params)
    images = jax.eval_shape(image, params, run.batch["image"])
    texts = jax.eval_shape(text, params, run.batch["text"])
    assert images.shape == texts.shape == (config.batch_size, config.model.embed_dim)
