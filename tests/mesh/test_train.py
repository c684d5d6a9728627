"""Complete runs with real training steps, which unit tests replace by `small_step`."""

import dataclasses

import jax
import numpy as np
import orbax.checkpoint as ocp

from clip_jax.checkpoints.manager import CheckpointConfig
from clip_jax.losses import DistillationConfig, LiveTeacher, SoftmaxConfig
from clip_jax.models.lora import LoRAConfig
from clip_jax.optim import OptimConfig
from tests.conftest import by_path, rows, tiny_digits, train_shared, write_states


def test_adapters_with_a_live_teacher_resume_bit_for_bit(tmp_path):
    """A resumed run reads the base model and the teacher again. Adapters, averaged weights and the
    term's own parameters are in the checkpoint."""
    (tmp_path / "weights").mkdir()
    write_states(tiny_digits(steps=2), tmp_path / "weights")
    teacher = LiveTeacher(weights=f"{tmp_path}/weights@1")
    config = tiny_digits(
        steps=3,
        init_from=f"{tmp_path}/weights@2",
        lora=LoRAConfig(rank=2),
        objective=(
            SoftmaxConfig(),
            DistillationConfig(teachers=(teacher,), features_weight=1.0),
        ),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=1, ema_decay=0.5),
        checkpoint=CheckpointConfig(every_steps=3),
        evals=(),
    )
    train_shared(config, tmp_path / "unbroken")
    train_shared(dataclasses.replace(config, stop_after=2), tmp_path / "resumed")
    train_shared(config, tmp_path / "resumed")
    states = []
    for name in ("unbroken", "resumed"):
        with ocp.CheckpointManager(tmp_path / name / "checkpoints") as manager:
            how = ocp.args.Composite(state=ocp.args.StandardRestore())
            states.append(manager.restore(config.steps, args=how)["state"])
        metrics = rows(tmp_path / name)
        assert [row["step"] for row in metrics if row["distillation_loss"] > 0] == [1, 2, 3]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert states[0].keys() == {"step", "params", "opt_state"}
    trained = {path.rpartition("/")[2] for path in by_path(states[0]["params"])}
    assert trained >= {"lora_a", "lora_b"}
    assert states[0]["params"].keys() == {"visual", "text", "distillation"}
