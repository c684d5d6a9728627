"""The state of step 0 is that of the weights that a config names, each of which is read once."""

import dataclasses

import jax
import numpy as np
import pytest

from clip_jax.convert.fitting import starting_params
from clip_jax.convert.formats import read_weights
from clip_jax.convert.weight_files import WeightFiles
from clip_jax.errors import InputError
from clip_jax.inference.starting import frozen_params, initial_params, initial_state
from clip_jax.losses import DistillationConfig, LiveTeacher
from clip_jax.sharding import make_mesh
from clip_jax.step import Program
from tests.conftest import tiny_digits, write_states


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step; no test changes it."""
    write_states(tiny(), workdir := tmp_path_factory.mktemp("run"))
    return workdir


def tiny(**changes):
    return tiny_digits(**{"steps": 1, "evals": ()} | changes)


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def begin(config, program):
    with WeightFiles() as weight_files:
        params = initial_params(config, weight_files)
        return initial_state(config, program, weight_files, params)


def test_a_live_teacher_computes_what_its_weights_were_trained_for(run):
    """Its activation and its token ids are those of the weights, which no shape shows."""
    config = tiny()
    text, mesh = config.model.text, make_mesh(config.mesh)
    rules = dataclasses.replace(text.tokenizer, clean="lower")
    for field, value, message in (
        ("activation", "relu", "text.activation is 'quick_gelu' in the weights and 'relu'"),
        ("tokenizer", rules, "text.tokenizer.clean is 'clip', this model's 'lower'"),
    ):
        other = dataclasses.replace(text, **{field: value})
        model = dataclasses.replace(config.model, text=other)
        wrong = LiveTeacher(weights=str(run), model=model)
        with pytest.raises(InputError, match=rf"teachers.weights=.*{message}"):
            frozen_params((DistillationConfig(teachers=(wrong,)),), mesh, WeightFiles())


def test_a_run_begins_with_other_settings_if_they_are_named(run):
    text = dataclasses.replace(tiny().model.text, activation="relu")
    model = dataclasses.replace(tiny().model, text=text, image_mean=(0.5, 0.5, 0.5))
    config = tiny(init_from=str(run), model=model)
    program = Program(config.recipe, make_mesh(config.mesh))
    with pytest.raises(InputError, match=r"image_mean is .*text.activation is .*--init-differen"):
        begin(config, program)
    named = dataclasses.replace(config, init_differences=("image_mean", "text.*"))
    assert_identical(begin(named, program).params, starting_params(read_weights(run), tiny().model))
