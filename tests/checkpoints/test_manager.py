"""Checkpoints give back what was saved, or say that they don't. In buckets: tests/contract."""

import contextlib
import errno
import gc
import json
import os
import shutil
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint._src.path import temporary_paths

from clip_jax import processes
from clip_jax.checkpoints import manager, orbax
from clip_jax.checkpoints.checksums import checksums
from clip_jax.checkpoints.manager import (
    CheckpointConfig,
    Checkpoints,
    Damaged,
    restore_params,
)
from clip_jax.checkpoints.retention import Unusable, steps_in
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIP
from tests.conftest import TINY, write_run

P = PartitionSpec
SHARDED = {"w": P("a", "b"), "half": P(None, "b"), "zero": P(), "step": P()}
EVERY = CheckpointConfig(every_steps=1)


def make_state(step=0, shape=(4, 2)):
    """Arrays of three kinds, laid out over eight devices."""
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("a", "b"))
    draw = np.random.default_rng(step).standard_normal
    arrays = {
        "w": draw((16, 8), np.float32),
        "half": jnp.asarray(draw((6, 4), np.float32), jnp.bfloat16),
        "zero": -np.zeros((4, 4), np.float32),
        "step": np.int32(step),
    }
    return {k: jax.device_put(x, NamedSharding(mesh, SHARDED[k])) for k, x in arrays.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two steps, to be copied."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder / "checkpoints", EVERY)
    for step in (2, 3):
        checkpoints.save(step, make_state(step), {"samples": 16 * step})
    checkpoints.close()
    return folder


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def restore(workdir):
    with contextlib.closing(Checkpoints(workdir / "checkpoints", EVERY)) as checkpoints:
        return checkpoints.restore(make_state())


# ------------------------------------------------------------------ damage


def flip_in_the_arrays(folder):
    for path in (folder / "state/d").iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def change_the_position(folder):
    path = folder / "position/metadata"
    path.write_text(path.read_text().replace("48", "64"))


def omit_the_checksums(folder):
    (folder / "position/metadata").write_text(json.dumps({"samples": 48}))


DAMAGES = [flip_in_the_arrays, empty, change_the_position, omit_the_checksums]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed(damage, workdir, capfd):
    damage(workdir / "checkpoints/3")
    target = manager.ocp.args.StandardRestore(make_state())
    with pytest.raises(Damaged) as error:
        manager._read(manager.retention.orbax_path(workdir) / "checkpoints/3", target)
    assert "\n" not in str(error.value)
    gc.collect()  # reads that failed beside the one that was raised
    assert "Traceback" not in capfd.readouterr().err


def test_where_no_checkpoint_is_intact_all_stay_and_each_is_named(workdir):
    for step in (2, 3):
        empty(workdir / f"checkpoints/{step}")
    with pytest.raises(InputError, match=r"step 3 is damaged \(.*step 2 is damaged \("):
        restore(workdir)
    assert steps_in(workdir / "checkpoints") == [2, 3]


def test_a_checkpoint_of_another_model_is_refused_by_name_and_none_is_moved(workdir, tmp_path):
    other = make_state() | {"w": jnp.zeros((16, 4))}
    checkpoints = Checkpoints(workdir / "checkpoints", EVERY)
    with pytest.raises(InputError, match=r"3 is a .* another model: w is \(16, 8\).*, \(16, 4\) h"):
        checkpoints.restore(other)
    assert checkpoints.restore(make_state()).step == 3
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "empty", EVERY)
    with pytest.raises(InputError, match="there is no checkpoint in"):
        checkpoints.restore(other)
    checkpoints.close()


def test_damage_that_another_process_meets_counts_for_all(workdir):
    other = iter(["its disk is broken"])  # of step 3; then all is well
    gather = mock.patch.object(processes, "gather", autospec=True)
    with gather as gathered:
        gathered.side_effect = lambda value: [value, next(other, value)]
        found = restore(workdir)
    assert found.step == 2
    assert "step 3 is damaged (its disk is broken)" in found.messages[0]


# The codes of Abseil's errors, which TensorStore's begin with.
OF_A_STORE = "UNAVAILABLE DEADLINE_EXCEEDED PERMISSION_DENIED UNAUTHENTICATED RESOURCE_EXHAUSTED"
OF_THE_DATA = "DATA_LOSS NOT_FOUND INVALID_ARGUMENT FAILED_PRECONDITION OUT_OF_RANGE UNIMPLEMENTED"


def test_a_store_out_of_reach_is_no_damage():
    codes = [*OF_A_STORE.split(), "ABORTED"]
    errors = [ValueError(f"{code}: Error reading: Connection refused") for code in codes]
    for error in (*errors, PermissionError("no"), MemoryError(), TimeoutError(), ConnectionError()):
        with pytest.raises(type(error)):
            manager._damaged(error)
    for code in OF_THE_DATA.split():
        damaged = manager._damaged(ValueError(f"{code}: Error reading"))
        assert str(damaged) == f"ValueError: {code}: Error reading"
    lost = manager._damaged(ValueError("DATA_LOSS: checksum\nmore"))
    assert str(lost) == "ValueError: DATA_LOSS: checksum"


def test_small_arrays_are_saved_without_a_program_for_each_replicas_part(tmp_path, caplog):
    mesh = Mesh(np.array(jax.devices()), ("a",))
    state = {"w": jax.device_put(np.ones((24, 3), np.float32), NamedSharding(mesh, P()))}
    with contextlib.closing(Checkpoints(tmp_path, EVERY)) as checkpoints, jax.log_compiles():
        checkpoints.save(1, state, {"samples": 1})
    assert "jit(checksums)" in caplog.text
    assert "jit(slice)" not in caplog.text


def test_checksums_are_the_same_on_every_mesh_and_no_change_escapes():
    state = make_state(5)
    expected = jax.device_get(checksums(state))
    assert jax.device_get(checksums(make_state(5, shape=(2, 4)))) == expected
    drawn = np.random.default_rng(0)
    host = {name: np.asarray(x) for name, x in state.items()}
    assert jax.device_get(checksums(host)) == expected
    for _ in range(8):
        changed = {}
        for name, data in host.items():
            content = np.frombuffer(data.tobytes(), np.uint8).copy()
            content[drawn.integers(content.size)] ^= 1 << drawn.integers(8)
            changed[name] = content.view(data.dtype).reshape(data.shape)
        sums = checksums(changed)
        assert all(sums[name] != expected[name] for name in state)
    swapped = host | {"w": host["w"][::-1]}
    assert checksums(swapped)["w"] != expected["w"]
    negated = host | {"w": host["w"] * np.where(np.arange(8) < 2, -1, 1).astype(np.float32)}
    assert checksums(negated)["w"] != expected["w"]


# ------------------------------------------------------------------ saving


def test_which_steps_are_saved(tmp_path):
    config = CheckpointConfig(every_steps=4, keep=1, also=(1, 3))
    checkpoints = Checkpoints(tmp_path / "checkpoints", config)
    assert [step for step in range(1, 9) if checkpoints.should_save(step)] == [1, 3, 4, 8]
    assert not checkpoints.is_best({"acc": 0.9})
    checkpoints.close()


def test_folders_of_unfinished_saves_are_deleted_when_checkpoints_are_closed(tmp_path):
    """Later, Orbax could delete the folder to which the run's next checkpoints are written."""
    unfinished = tmp_path / "checkpoints/4.orbax-checkpoint-tmp"
    unfinished.mkdir(parents=True)
    closing = threading.Event()
    delete = temporary_paths.cleanup_temporary_paths

    async def delete_late(*args, **options):
        closing.wait()
        await delete(*args, **options)

    def close(*args):
        closing.set()
        wait(*args)

    wait = orbax.wait_for_cleanup
    with mock.patch.object(temporary_paths, "cleanup_temporary_paths", delete_late):
        checkpoints = Checkpoints(tmp_path / "checkpoints", EVERY)
    with mock.patch.object(orbax, "wait_for_cleanup", close):
        checkpoints.close()
    assert not unfinished.exists()


def test_a_full_disk_is_one_message_and_what_was_saved_stays(workdir):
    reason = os.strerror(errno.ENOSPC)  # as tensorstore says it
    error = ValueError(f"RESOURCE_EXHAUSTED: Error writing local file: {reason}")
    checkpoints = Checkpoints(workdir / "checkpoints", EVERY)
    writes = mock.patch.object(manager._PositionHandler, "_write", autospec=True, side_effect=error)
    with writes:
        checkpoints.save(4, make_state(4), {"samples": 64})
        with pytest.raises(
            InputError, match=rf"^no space left for {workdir}/checkpoints: free some"
        ):
            checkpoints.wait()
    assert steps_in(workdir / "checkpoints") == [2, 3]


def test_parameters_that_are_not_what_was_saved_are_unusable(tmp_path):
    shapes = jax.eval_shape(CLIP(TINY).init, jax.random.key(0))
    workdir, _, params = write_run(TINY, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, restore_params(workdir, 2, shapes), params)
    path = workdir / "checkpoints/2/position/metadata"
    content = json.loads(path.read_text())
    name = "params/visual/proj"
    content["checksums"][name] ^= 1
    del content["checksum"]
    content["checksum"] = manager._crc(content)
    path.write_text(json.dumps(content))
    with pytest.raises(Unusable, match=rf"step 2 in .* is damaged \(1 of \d+ arrays .*{name}\)"):
        restore_params(workdir, 2, shapes)
