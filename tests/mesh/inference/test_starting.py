"""The initial state of a run that takes one tower from another run."""

import jax
import numpy as np

from clip_jax.convert.fitting import starting_params
from clip_jax.convert.formats import read_weights
from clip_jax.convert.weight_files import WeightFiles
from clip_jax.inference.starting import initial_params, initial_state
from clip_jax.sharding import make_mesh
from clip_jax.step import Program
from tests.conftest import larger, tiny_digits, write_states


def test_a_run_begins_with_the_tower_that_it_takes_from_another(tmp_path):
    write_states(tiny_digits(steps=1), tmp_path)
    model = larger(tiny_digits().model)
    config = tiny_digits(
        steps=1, init_from=str(tmp_path), init_towers=("image",), model=model, evals=()
    )
    program = Program(config.recipe, make_mesh(config.mesh))
    with WeightFiles() as weight_files:
        params = initial_params(config, weight_files)
        params = initial_state(config, program, weight_files, params).params
    expected = {
        "visual": starting_params(read_weights(tmp_path), model)["visual"],
        "text": program.init().params["text"],
    }
    for name, tower in expected.items():
        jax.tree.map(np.testing.assert_array_equal, params[name], tower)
