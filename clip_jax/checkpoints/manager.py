"""Save and restore the training state and the data position, atomically and with checksums."""

import asyncio
import contextlib
import functools
import itertools
import json
import logging
import operator
import traceback
import zlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array
from orbax.checkpoint import checkpoint_managers as policies

from clip_jax import processes
from clip_jax.checkpoints import orbax, retention
from clip_jax.checkpoints.checksums import checksums
from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.errors import InputError
from clip_jax.models.clip import Params, path_name, split_batch_stats
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import read_json, read_rows

Position = dict[str, Any]  # samples seen and the like, by name

# Errors of a store that is out of reach for a while; they say nothing about the checkpoint.
_OUT_OF_REACH = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "RESOURCE_EXHAUSTED",
    "ABORTED",
)


class Damaged(Exception):
    """A checkpoint that cannot be read, or does not contain what was saved."""


@dataclass(frozen=True)
class Restored:
    """A restored checkpoint."""

    step: int
    state: Any
    position: Position
    messages: tuple[str, ...] = ()  # about newer checkpoints, which are damaged


class Checkpoints:
    """`<workdir>/checkpoints/<step>/`, written in the background.

    Saves are atomic: Orbax writes to a temporary folder and renames it (on buckets: marks it as
    committed), so a process killed while saving leaves the previous checkpoint. Checksums of the
    arrays are saved too, to detect later damage.
    """

    def __init__(self, directory: epath.PathLike, config: CheckpointConfig) -> None:
        orbax.write_small_arrays_once()
        self._directory = retention.orbax_path(directory)
        self._config = config
        if config.best:
            _drop_damaged_results(self._directory)
        due = [
            policies.FixedIntervalPolicy(config.every_steps),
            policies.SpecificStepsPolicy(config.also),
            policies.PreemptionCheckpointingPolicy(),
        ]
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=policies.AnySavePolicy(due),
                # Without it Orbax doesn't keep the results, by which the policy finds the best.
                best_fn=config.value if config.best else None,
                preservation_policy=Retention(self._directory.parent, config),
                cleanup_tmp_directories=True,
            ),
        )
        self._best_value = self._best_stored()

    def _best_stored(self) -> float:
        """Return the best result among the existing checkpoints; -inf without any."""
        if not self._config.best or self._config.best_of == "watcher":
            return float("inf")
        steps = self._manager.all_steps()
        results = (retention.stored(self._directory, step) or {} for step in steps)
        return max(map(self._config.value, results), default=float("-inf"))

    def is_best(self, results: retention.Results) -> bool:
        """Say whether a step with these results must be saved as the best so far."""
        return self._config.value(results) > self._best_value

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def should_save(self, step: int) -> bool:
        """Say whether this step is due, or the platform has announced a preemption."""
        return step != self.latest_step() and self._manager.should_save(step)

    def reached_preemption(self, step: int) -> bool:
        """Say whether all processes agreed to stop at this step. Call it at every step."""
        return self._manager.reached_preemption(step)

    def save(
        self, step: int, state: Any, position: Position, results: retention.Results | None = None
    ) -> None:
        """Save now, unless this step is saved already. Returns when the arrays are copied.

        `results` are those of the step's evaluation, which decide on the best checkpoint.
        """
        if step != self.latest_step():
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                position=_PositionSave(position, checksums(state)),
            )
            metrics = dict(results or {}) if self._config.best else None
            with files.writing(self._directory):  # errors may be of the previous save's thread
                self._manager.save(step, args=items, metrics=metrics, force=True)
            self._best_value = max(self._best_value, self._config.value(metrics or {}))

    def restore(self, state: Any) -> Restored:
        """Restore the newest intact checkpoint, with the shapes and shardings of `state`.

        Newer ones, which are damaged, are moved aside. All processes must call this. Raises
        InputError if none is intact, or if they are of another model; then none is moved.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self._directory / str(step)
            if difference := _difference(folder, state):
                raise InputError(
                    f"{folder} is a checkpoint of another model: {difference}. Use the settings "
                    "that it was trained with."
                )
            read = functools.partial(_read, folder, _restoring(folder, state))
            try:
                restored = processes.together(read, Damaged)
            except Damaged as error:
                damaged[step] = str(error)
                continue
            messages = [self._put_aside(*each) for each in damaged.items() if processes.is_lead()]
            processes.gather(None)  # no process lists the steps before that is done
            self._manager.reload()
            self._best_value = self._best_stored()
            return Restored(step, *restored, tuple(messages))
        if not damaged:
            raise InputError(f"there is no checkpoint in {self._directory}.")
        each = "; ".join(f"that of step {step} is damaged ({why})" for step, why in damaged.items())
        raise InputError(
            f"no checkpoint in {self._directory} is intact: {each}. Restore a copy of one, or "
            "start a new run in another --workdir."
        )

    def _put_aside(self, step: int, why: str) -> str:
        """Move a step's folder to `damaged/` in the run directory; return a message about it."""
        aside = self._directory.parent / "damaged"
        names = itertools.chain([str(step)], (f"{step}-{i}" for i in itertools.count(2)))
        target = next(aside / name for name in names if not (aside / name).exists())
        files.move_folder(self._directory / str(step), target)
        return f"the checkpoint of step {step} is damaged ({why}); it was moved to {target}"

    def wait(self) -> None:
        """Block until all saves are on disk."""
        with files.writing(self._directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and release the background threads."""
        with files.writing(self._directory):
            orbax.wait_for_cleanup(self._manager)
            self._manager.close()


def _drop_damaged_results(directory: epath.Path) -> None:
    """Delete the results of checkpoints that can no longer be read."""
    if processes.is_lead():
        for step in retention.steps_in(directory):
            if retention.stored(directory, step) is None:
                files.remove(directory / str(step) / "metrics" / "metrics")
    processes.gather(None)  # no process reads them before that is done


def restore_step(workdir: AnyPath, step: int, state: Any) -> Restored:
    """Restore one checkpoint of a run, without changing anything: the run may still be training.

    Raises InputError if that step does not exist or is damaged.
    """
    step = retention.named_step(workdir, str(step))
    with _refusing(workdir, step) as folder:
        return Restored(step, *_read(folder, _restoring(folder, state)))


def restore_params(
    workdir: AnyPath,
    step: int,
    shapes: Params,
    shardings: Any = None,
    ema: bool = True,
    teacher: tuple[str, ...] = (),
) -> Params:
    """Restore only the parameters of a checkpoint, whatever mesh they were trained on.

    With `shardings`, each device reads only its own shard. By default all go to the first device.
    `shapes` are those of the parameters to restore, of which the checkpoint may have more. If the
    run averages its weights (optim.ema_decay), the average is returned unless `ema` is off. With
    `teacher`, the path of some towers' averages in the state, these are read instead, and the
    others as trained. Raises Unusable if the checkpoint is damaged, and InputError if it has no
    teacher.
    """
    if shardings is None:
        first = jax.device_put(0, jax.local_devices()[0]).sharding
        shardings = jax.tree.map(lambda _: first, shapes)
    shapes = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings
    )
    with _refusing(workdir, step) as folder:
        saved = _tree_in(folder)
        locked = {name: x for name, x in shapes.items() if name not in saved.get("params", {})}
        rest = {name: x for name, x in shapes.items() if name not in locked}
        params = _read_params(_locked_folder(workdir), locked) if locked else {}
        if teacher:
            averages: Any = functools.reduce(lambda tree, x: tree.get(x, {}), teacher, saved)
            averaged = {name: x for name, x in rest.items() if name in averages}
            if not {"visual", "text"} & averages.keys():
                raise InputError(
                    f"{workdir} has no teacher: none of its losses averages a tower. Leave out "
                    "teacher after the @."
                )
            if averaged:
                params |= _read_params(folder, averaged, teacher)
            rest = {name: x for name, x in rest.items() if name not in averaged}
        if rest:
            average = _average_in(saved) if ema and not teacher else ()
            params |= _read_params(folder, rest, average)
    return params


def _read_params(folder: epath.Path, shapes: Params, average: tuple[str, ...] = ()) -> Params:
    """Read parameters, or their average, which is at this path of the saved state."""
    trainable, batch_stats = split_batch_stats(shapes)
    target: Any = {"params": shapes}
    if average:  # of the trained parameters, without BatchNorm's statistics
        target = functools.reduce(lambda tree, name: {name: tree}, reversed(average), trainable)
        target |= {"params": {"batch_stats": batch_stats}} if batch_stats else {}
    restored, _ = _read(folder, _partial(target))
    averaged = functools.reduce(operator.getitem, average, restored) if average else {}
    return restored.get("params", {}) | averaged


def _restoring(folder: epath.Path, state: Any) -> ocp.args.CheckpointArgs:
    """Restore a state. Earlier versions saved locked towers with it, which are left out."""
    with contextlib.suppress(Damaged):
        before, now = (tree.get("params", {}).keys() for tree in (_tree_in(folder), state))
        if before > now:
            return _partial(state)
    return ocp.args.StandardRestore(state)


def _partial(target: Any) -> ocp.args.CheckpointArgs:
    """Restore the arrays of `target`; a checkpoint may have more."""
    how = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True)


def _locked_folder(workdir: AnyPath) -> epath.Path:
    """Return where a run directory has the towers that the run does not train."""
    return retention.orbax_path(workdir) / "locked"


def write_locked(workdir: AnyPath, params: Params) -> None:
    """Write the towers that a run does not train. Its checkpoints leave them out.

    `restore_params` reads them. All processes must call this.
    """
    folder, content = _locked_folder(workdir), {"params": params}
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(content), position=_PositionSave({}, checksums(content))
    )
    with files.writing(folder), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(folder, args=items, force=True)


def has_locked(workdir: AnyPath) -> bool:
    """Return whether `write_locked` has written a run's towers."""
    return _locked_folder(workdir).is_dir()


def position_of(workdir: AnyPath, step: int) -> Position:
    """Read what a checkpoint says of its data position, and of the frozen weights in use."""
    path = retention.orbax_path(workdir) / "checkpoints" / str(step) / "position" / "metadata"
    return read_json(path, advice="Restore a copy of the checkpoint, or choose another step.")


@contextlib.contextmanager
def _refusing(workdir: AnyPath, step: int) -> Generator[epath.Path]:
    """Yield the folder of a step; raise Unusable if a file in it is damaged."""
    try:
        yield retention.orbax_path(workdir) / "checkpoints" / str(step)
    except Damaged as error:
        raise retention.Unusable(
            f"the checkpoint of step {step} in {workdir} is damaged ({error}). The training "
            "command moves it aside and resumes from the newest intact one."
        ) from error


def _difference(folder: epath.Path, state: Any) -> str:
    """Say how the arrays of a saved state differ in shape from those of `state`.

    Empty if they do not, or if the checkpoint does not tell.
    """
    try:
        saved = ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
    except Exception:
        return ""
    shapes, expected = (
        {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (saved, state)
    )
    for name, shape in expected.items():
        if shapes.get(name, shape) != shape:
            return f"{name} is {shapes[name]} there, {shape} here"
    return ""


def _tree_in(folder: epath.Path) -> Any:
    """Return the tree of a saved state, with the metadata of arrays. Raises Damaged."""
    try:
        return ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
    except Exception as error:
        raise _damaged(error) from error


def _average_in(saved: Any) -> tuple[str, ...]:
    """Return the path of the averaged weights in a saved state; () if there are none."""
    optimizer = saved.get("opt_state")
    for path in (("ema",), ("inner", "ema")):  # the latter where updates may be skipped
        tree = optimizer
        for name in path:
            tree = tree.get(name) if isinstance(tree, Mapping) else None
        if tree:
            return ("opt_state", *path)
    return ()


class Retention(policies.PreservationPolicy):
    """Keeps the newest checkpoints, the steps named, the best, and those a watcher has yet to read.

    All processes must call it together.
    """

    def __init__(self, workdir: AnyPath, config: CheckpointConfig) -> None:
        self._workdir, self._config = workdir, config
        rules = [policies.LatestN(config.keep), policies.CustomSteps(config.also)]
        if config.best:
            rules.append(
                policies.BestN(
                    get_metric_fn=config.value, n=1, keep_checkpoints_without_metrics=False
                )
            )
        self._policy = policies.AnyPreservationPolicy(rules)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [x.step for x in checkpoints]
        unwatched, rows = processes.gather(self._look(steps) if processes.is_lead() else None)[0]
        results: Sequence[retention.Results] = [x.metrics or {} for x in checkpoints]
        if self._config.best_of == "watcher":
            results = rows
        infos: list[Any] = [
            SimpleNamespace(
                step=x.step, time=x.time, metrics=dict(row) if self._config.has_value(row) else None
            )
            for x, row in zip(checkpoints, results, strict=True)
        ]
        preserved = self._policy.should_preserve(infos, context=context)
        return [
            is_preserved or step in unwatched
            for step, is_preserved in zip(steps, preserved, strict=True)
        ]

    def _look(self, steps: Sequence[int]) -> tuple[list[int], list[retention.Results]]:
        """List the oldest steps that a watcher has yet to finish, and its rows of all steps.

        Both come from one read, so that a step without a row is always among the former.
        """
        rows = {row["step"]: row for row in read_rows(self._workdir / retention.WATCHED)}
        unwatched = [x for x in sorted(steps) if x not in rows][: self._config.keep_unwatched]
        is_watched = (self._workdir / retention.WATCH).exists()
        return unwatched if is_watched else [], [rows.get(step, {}) for step in steps]


class _PositionHandler(ocp.JsonCheckpointHandler):
    """Writes position and checksums as JSON in the background, once the latter are computed."""

    async def async_save(
        self, directory: epath.Path, item: Any = None, args: Any = None
    ) -> list[Any]:
        return [ocp.future.CommitFutureAwaitingContractedSignals(self._write(directory, args))]

    async def _write(self, directory: epath.Path, args: "_PositionSave") -> None:
        if processes.is_lead():
            sums = await asyncio.to_thread(jax.device_get, args.checksums)
            content = args.position | {"checksums": {name: int(x) for name, x in sums.items()}}
            text = json.dumps(content | {"checksum": _crc(content)})
            (directory / "metadata").write_text(text)


@ocp.args.register_with_handler(_PositionHandler, for_save=True, for_restore=True)
@dataclass
class _PositionSave(ocp.args.CheckpointArgs):
    position: Position
    checksums: dict[str, Array]


def _crc(content: Position) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _is_news(record: logging.LogRecord) -> bool:
    """Say whether a traceback that Orbax or asyncio logs adds to the error that is raised.

    It does not for a full disk, nor for further reads that failed with the one that raises.
    """
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, Exception):
        return True
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    is_orbax = any("orbax" in frame.f_code.co_filename for frame in frames)
    return not (files.is_full(error) or (is_orbax and "never retrieved" in record.getMessage()))


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_is_news)


def _read(folder: epath.Path, state: ocp.args.CheckpointArgs) -> tuple[Any, Position]:
    """Read a step's state and position, and compare the checksums. Raises Damaged.

    No process waits for another here, so that an error in one does not block the others.
    """
    args = ocp.args.Composite(state=state, position=ocp.args.JsonRestore())
    try:
        items = ocp.CompositeCheckpointHandler().restore(folder, args=args)
        position = dict(items["position"])
    except Exception as error:  # a broken file has made Orbax and tensorstore raise a dozen kinds
        raise _damaged(error) from error
    checksum = position.pop("checksum", None)
    if checksum != _crc(position):
        raise Damaged("position/metadata does not match its checksum")
    expected = position.pop("checksums")
    sums = jax.device_get(checksums(items["state"]))
    wrong = [name for name, x in sums.items() if int(x) != expected.get(name, int(x))]
    if wrong:
        raise Damaged(f"{len(wrong)} of {len(sums)} arrays fail their checksums: {wrong[0]}")
    return items["state"], position


def _damaged(error: Exception) -> Damaged:
    """Return a read error as Damaged, in one line; re-raise errors unrelated to the checkpoint."""
    outside = isinstance(error, MemoryError | ConnectionError | TimeoutError | PermissionError)
    if outside or any(word in str(error) for word in _OUT_OF_REACH):
        raise error
    first = next(iter(str(error).strip().splitlines()), "")
    return Damaged(f"{type(error).__name__}: {first[:200]}")
