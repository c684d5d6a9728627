"""Complete runs with real training steps, which unit tests replace by `small_step`."""

import functools
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.errors import InputError
from clip_jax.inference.loading import load
from clip_jax.losses import DistillationConfig, LiveTeacher, SoftmaxConfig
from clip_jax.models.lora import LoRAConfig, merge
from clip_jax.models.text_lengths import TextLengths
from clip_jax.optim import OptimConfig
from clip_jax.train import train
from tests.conftest import by_path, rows, tiny_digits, train_shared, write_states


def test_adapters_with_a_live_teacher_resume_bit_for_bit_on_the_same_weights(tmp_path):
    """A resumed run reads the base model and the teacher again, and refuses other weights. The
    checkpoint has adapters, averaged weights and the term's own parameters, and nothing else."""
    weights = tmp_path / "weights"
    weights.mkdir()
    write_states(tiny_digits(steps=2), weights)
    lora = LoRAConfig(rank=2)

    def distilled(base=f"{weights}@2", teacher=f"{weights}@1", **changes):
        teachers = (LiveTeacher(weights=str(teacher)),)
        term = DistillationConfig(teachers=teachers, features_weight=1.0)
        options = {
            "steps": 3,
            "lora": lora,
            "objective": (SoftmaxConfig(), term),
            "optim": OptimConfig(learning_rate=2e-3, warmup_steps=1, ema_decay=0.5),
            "checkpoint": CheckpointConfig(every_steps=3),
            "evals": (),
        }
        return tiny_digits(init_from=str(base), **options | changes)

    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    train_shared(distilled(), unbroken)
    train_shared(distilled(stop_after=2), resumed)
    objective = json.loads((resumed / "config.json").read_text())["objective"]
    assert objective[1]["teachers"][0]["model"]["embed_dim"] == tiny_digits().model.embed_dim
    for other, says in (
        ({"base": f"{weights}@1"}, "trained with other frozen weights, .* at init_from .RUN@STEP"),
        ({"teacher": f"{weights}@2"}, r"with other frozen weights, .* at teachers.weights"),
        ({"base": tmp_path / "none"}, "none"),
    ):
        with pytest.raises(InputError, match=says):
            train(distilled(**other), resumed)
    copy = shutil.copytree(weights, tmp_path / "copy")
    train(distilled(base=weights, teacher=f"{copy}@1"), resumed)  # the same weights, other names

    states = []
    for workdir in (unbroken, resumed):
        with ocp.CheckpointManager(workdir / "checkpoints") as manager:
            how = ocp.args.Composite(state=ocp.args.StandardRestore())
            states.append(manager.restore(3, args=how)["state"])
        metrics = rows(workdir)
        assert [row["step"] for row in metrics if row["distillation_loss"] > 0] == [1, 2, 3]
    jax.tree.map(np.testing.assert_array_equal, *states)
    state = states[0]
    assert state.keys() == {"step", "params", "opt_state"}
    assert state["params"].keys() == {"visual", "text", "distillation"}
    towers = {tower: state["params"][tower] for tower in ("visual", "text")}
    assert {name.rpartition("/")[2] for name in by_path(towers)} == {"lora_a", "lora_b"}

    averaged = {tower: state["opt_state"]["ema"][tower] for tower in ("visual", "text")}
    assert np.any(by_path(averaged)["visual/transformer/resblocks/mlp/c_fc/lora_b"])
    model, base = load(resumed), load(weights)
    assert model.params.keys() == {"visual", "text", "logit_scale"}
    merged = merge(base.params, averaged, base.config, lora)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(model.params), merged)


def test_texts_by_length_resume_bit_for_bit_with_one_program(tmp_path):
    length = tiny_digits().model.text.context_length
    groups = TextLengths(tokens=(length - 1, length), shares=(0.5, 0.5))
    config = functools.partial(tiny_digits, steps=3, evals=(), text_lengths=groups, report_every=1)
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    train_shared(config(), unbroken)
    train_shared(config(stop_after=2), resumed)
    train_shared(config(), resumed)
    states = []
    for workdir in (unbroken, resumed):
        with ocp.CheckpointManager(workdir / "checkpoints") as manager:
            how = ocp.args.Composite(state=ocp.args.StandardRestore())
            states.append(manager.restore(3, args=how)["state"])
        assert {row["full_padding"] for row in rows(workdir)} <= {0, 1}
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert len(config().batches.kinds) == 1
