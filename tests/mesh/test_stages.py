"""A run of several stages is the runs of each stage, one after the other."""

import json
import shutil
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.checkpoints.manager import CheckpointConfig, restore_step
from clip_jax.checkpoints.retention import steps_in
from clip_jax.config import StageConfig
from clip_jax.data.batch_plan import SigLIP2Lengths
from clip_jax.errors import InputError
from clip_jax.inference.loading import load
from clip_jax.losses import (
    CaptionConfig,
    Context,
    MaskedPredictionConfig,
    SelfDistillationConfig,
    SigmoidConfig,
    SoftmaxConfig,
    Term,
)
from clip_jax.models.cappa import CapPaConfig
from clip_jax.optim import OptimConfig
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Program, Recipe
from tests.conftest import OPTIM, TINY, losses, parameters, rows, tiny_digits, train_shared

# Stages begin after steps 3 and 6 of 8 in the schedule, of which the last 2 take 4 steps.
LENGTHS = SigLIP2Lengths(patches=(9,), fixed_share=0.75, stretch=2.0)
STAGES = (
    StageConfig(begin=0.375, weights=(1.0, 1.0, 0.5, 0.25)),
    StageConfig(begin=0.75, weights=(1.0, 0.5, 0.0, 0.0)),
)
SMALL = {"hidden": 16, "bottleneck": 8, "prototypes": 16}


def run_of(captions=0.0, crops=0.0, masked=0.0, **changes):
    """A NaFlex model with a sigmoid loss, a decoder and a teacher, whose images have a fixed
    resolution before step 6. The arguments are the weights of the losses."""
    model = tiny_digits().model
    model = replace(
        model,
        vision=replace(model.vision, max_patches=4, pool="mean"),
        decoder=CapPaConfig(width=16, depth=1, num_heads=2, parallel=0.5),
        init_logit_bias=-10.0,
    )
    options = {
        "model": model,
        "objective": (
            SigmoidConfig(),
            CaptionConfig(weight=captions),
            SelfDistillationConfig(weight=crops, views=2, view_size=4, **SMALL),
            MaskedPredictionConfig(weight=masked, **SMALL),
        ),
        "optim": OptimConfig(learning_rate=1e-2, warmup_steps=1, weight_decay=0.5),
        "steps": 10,
        "lengths": LENGTHS,
        "report_every": 1,
        "checkpoint": CheckpointConfig(every_steps=100),
        "evals": (),
    }
    return tiny_digits(**options | changes)


def in_stages(**changes):
    return run_of(stages=STAGES, **changes)


def plain(**changes):
    """A run without a teacher."""
    return run_of(objective=(SigmoidConfig(), CaptionConfig()), **changes)


def assert_same(run, other, step=10):
    """Check that two runs have the same state, with what their teachers carry."""
    shapes = Program(in_stages().recipe, make_mesh(MeshConfig())).state.saved()
    got, expected = (restore_step(each, step, shapes).state for each in (run, other))
    assert "moving_average" in got["carried"]
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_stages_are_runs_that_branch_from_each_other_and_a_stopped_run_resumes(tmp_path, capsys):
    """At the same bits, and on another mesh to rounding."""
    whole = tmp_path / "whole"
    train_shared(in_stages(), whole)
    printed = capsys.readouterr().err
    assert "stage 2 of 3 begins after step 3: contrastive 1, caption 1, self_dist" in printed
    assert steps_in(whole / "checkpoints") == [3, 6, 10]
    reports = [row for row in rows(whole) if "loss" in row]
    assert [row["stage"] for row in reports] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert [("caption_loss" in row) for row in reports] == [False] * 3 + [True] * 7

    train_shared(plain(stop_after=1), tmp_path / "plain")
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    train_shared(run_of(stop_after=3), first)
    train_shared(run_of(1.0, 0.5, 0.25, stop_after=6, branch_from=f"{first}@3"), second)
    train_shared(run_of(0.5, branch_from=f"{second}@6"), third)
    assert_same(whole, third)
    assert losses(whole) == losses(first) | losses(second) | losses(third)

    # What no term trains is as drawn, without weight decay.
    drawn = Program(run_of().recipe, make_mesh(MeshConfig())).draw().params["decoder"]
    for step, is_equal in ((3, True), (6, False)):
        got = load(f"{whole}@{step}").params["decoder"]
        table = (x["token_embedding"] for x in (got, drawn))
        assert np.array_equal(*table) == is_equal

    # The teacher's image tower is its average at the end of the stage, which later steps keep.
    teacher, last = (load(f"{whole}@{name}").params for name in ("6:teacher", "teacher"))
    jax.tree.map(np.testing.assert_array_equal, teacher["visual"], last["visual"])
    student = load(f"{whole}@6").params
    jax.tree.map(np.testing.assert_array_equal, teacher["text"], student["text"])
    assert (teacher["visual"]["proj"] != student["visual"]["proj"]).any()
    with pytest.raises(InputError, match="has no teacher"):
        load(f"{tmp_path / 'plain'}@teacher")

    # A branch with its parent's stages, from the first step of one.
    train_shared(in_stages(branch_from=f"{whole}@6"), tmp_path / "again")
    assert_same(whole, tmp_path / "again")
    with pytest.raises(InputError, match=r"after the steps \[3\].*the shares \[0.1875\]"):
        train_shared(in_stages(steps=20, branch_from=f"{whole}@6"), tmp_path / "longer")

    for stop in (3, 5):  # before a stage, and within one
        train_shared(in_stages(stop_after=stop), tmp_path / f"{stop}")
        copy = shutil.copytree(tmp_path / f"{stop}", tmp_path / f"{stop}-copy")
        train_shared(in_stages(), tmp_path / f"{stop}")
        assert_same(whole, tmp_path / f"{stop}")
    train_shared(in_stages(mesh=MeshConfig(data=2, fsdp=2, tensor=2)), copy)
    assert [*losses(copy).values()] == pytest.approx([*losses(whole).values()], rel=1e-5)
    recorded = json.loads((copy / "config.json").read_text())["stages"]
    assert recorded[0]["weights"] == [1, 1, 0.5, 0.25]


@pytest.mark.usefixtures("unchecked_types")
def test_what_a_term_carries_is_initialised_when_its_stage_begins():
    @dataclass(frozen=True, kw_only=True)
    class Average(Term):
        name: ClassVar[str] = "average"

        def init(self, params):
            return {"scale": params["logit_scale"]}

        def loss(self, x: Context):
            return x.carried["scale"], {}

    recipe = Recipe(model=TINY, objective=(SoftmaxConfig(), Average()), optim=OPTIM, batch_size=16)
    program = Program(recipe, make_mesh(MeshConfig()))
    state = program.init(parameters(TINY))
    moved = replace(state, params=state.params | {"logit_scale": jnp.float32(3)})
    assert moved.carried["average"]["scale"] != 3
    assert program.begin(moved, (SoftmaxConfig(),)).carried["average"]["scale"] == 3
