"""Orbax checkpoints: the state and the data position in one atomic unit."""

import functools
import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from clip_jax.models.clip import CLIP, Params, split_batch_stats


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and how much to keep."""

    every_steps: int = 1_000  # steps between checkpoints; the last step is always saved
    keep: int = 3  # newest checkpoints kept


class Checkpoints:
    """`<workdir>/checkpoints/<step>/`, written in the background.

    A checkpoint exists whole or not at all: Orbax writes beside it and renames (on buckets: marks
    it as committed), so a process killed while saving leaves the one before.
    """

    def __init__(self, directory: epath.PathLike, config: CheckpointConfig) -> None:
        self._manager = ocp.CheckpointManager(
            epath.Path(directory),
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=policies.AnySavePolicy(
                    [
                        policies.FixedIntervalPolicy(config.every_steps),
                        policies.PreemptionCheckpointingPolicy(),
                    ]
                ),
                preservation_policy=policies.LatestN(config.keep),
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        """Return the newest complete checkpoint's step, None when there is none."""
        return self._manager.latest_step()

    def should_save(self, step: int) -> bool:
        """Say whether this step is due, or the platform has announced a preemption."""
        return step != self.latest_step() and self._manager.should_save(step)

    def reached_preemption(self, step: int) -> bool:
        """Say whether all processes agreed to stop at this step. Ask at every step."""
        return self._manager.reached_preemption(step)

    def save(self, step: int, state: Any, position: dict[str, int | float]) -> None:
        """Save now, unless this step is saved already. Returns when the arrays are copied."""
        if step != self.latest_step():
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
            )
            self._manager.save(step, args=items, force=True)

    def restore(self, state: Any, shardings: Any, step: int) -> tuple[Any, dict[str, int | float]]:
        """Read a state of the given shapes onto the given shardings, and its data position."""
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
        )
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), position=ocp.args.JsonRestore()
            ),
        )
        return items["state"], items["position"]

    def wait(self) -> None:
        """Block until what was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and release the background threads."""
        self._manager.close()


def count_start(path: epath.Path, step: int) -> int:
    """Note in a file that the run begins at `step`; return how often in a row it began there."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    starts = earlier["starts"] + 1 if earlier.get("step") == step else 1
    path.write_text(json.dumps({"step": step, "starts": starts}))
    return starts


def restore_params(directory: epath.PathLike, model: CLIP) -> Params:
    """Read the newest checkpoint's parameters alone, whatever mesh they were trained on.

    Where the run keeps an average of its weights (optim.ema_decay), that. Raises ValueError if
    there is no complete checkpoint.
    """
    directory = epath.Path(directory).absolute()
    steps = [int(p.name) for p in directory.iterdir() if p.name.isdigit()]
    if not steps:
        raise ValueError(f"{directory} holds no checkpoint: the run has saved nothing yet.")
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    trainable, batch_stats = split_batch_stats(shapes)
    # Of a whole step's handler, not of the state's alone, which would miss a file and warn.
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(), position=ocp.JsonCheckpointHandler()
    )
    with ocp.Checkpointer(handler) as checkpointer:
        saved = directory / str(max(steps))
        average = _average_in(checkpointer.metadata(saved).item_metadata["state"].tree)
        target: Any = {"params": shapes}
        if average:  # of what is trained, to which BatchNorm's statistics belong
            target = functools.reduce(lambda tree, name: {name: tree}, reversed(average), trainable)
            target |= {"params": {"batch_stats": batch_stats}} if batch_stats else {}
        restored = checkpointer.restore(
            saved,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    target,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                    partial_restore=True,
                )
            ),
        )["state"]
    found = functools.reduce(operator.getitem, average, restored) if average else {}
    return restored.get("params", {}) | found


def _average_in(saved: Any) -> tuple[str, ...]:
    """Return where in a saved state the average of the weights lies; () if there is none."""
    optimizer = saved.get("opt_state")
    for path in (("ema",), ("inner", "ema")):  # the latter where updates may be skipped
        tree = optimizer
        for name in path:
            tree = tree.get(name) if isinstance(tree, Mapping) else None
        if tree:
            return ("opt_state", *path)
    return ()
