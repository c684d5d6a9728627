"""Checkpoints give back what was saved, or say that they don't."""

import asyncio
import errno
import gc
import json
import os
import random
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax import checkpoint, processes
from clip_jax.checkpoint import CheckpointConfig, Checkpoints, checksums, restore_params
from clip_jax.models.clip import CLIP
from clip_jax.refused import Refused
from clip_jax.retention import steps_in
from tests.conftest import TINY

P = PartitionSpec
SHARDED = {
    "w": P("a", "b"),
    "moment": P(("a", "b")),
    "half": P(None, "b"),
    "zero": P(),
    "step": P(),
}


def make_state(step=0, shape=(4, 2)):
    """Arrays of three kinds, laid out over eight devices."""
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("a", "b"))
    draw = np.random.default_rng(step).standard_normal
    arrays = {
        "w": draw((16, 8), np.float32),
        "moment": draw((8, 3, 4), np.float32),
        "half": jnp.asarray(draw((6, 4), np.float32), jnp.bfloat16),
        "zero": -np.zeros((4, 4), np.float32),
        "step": np.int32(step),
    }
    return {k: jax.device_put(x, NamedSharding(mesh, SHARDED[k])) for k, x in arrays.items()}


def shapes(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def bits(state):
    return {name: np.asarray(x).tobytes() for name, x in state.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three steps, to be copied."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(every_steps=1))
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), {"samples": 16 * step})
    checkpoints.close()
    return folder


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def restore(workdir):
    checkpoints = Checkpoints(workdir / "checkpoints", CheckpointConfig(every_steps=1))
    try:
        return checkpoints.restore(shapes(make_state()))
    finally:
        checkpoints.close()


def largest(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


def flip(path, at, bit=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def flip_in_the_arrays(folder):
    for path in (folder / "state/d").iterdir():
        flip(path, path.stat().st_size // 2)


def cut(folder):
    path = largest(folder / "state/d")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def halve(folder):
    shutil.rmtree(folder / "state/d")


def change_the_position(folder):
    path = folder / "position/metadata"
    path.write_text(path.read_text().replace("48", "64"))


@pytest.mark.parametrize("damage", [flip_in_the_arrays, cut, empty, halve, change_the_position])
def test_a_damaged_checkpoint_is_named_and_put_aside_and_an_older_one_taken(damage, workdir, capfd):
    damage(workdir / "checkpoints/3")
    found = restore(workdir)
    assert (found.step, found.position) == (2, {"samples": 32})
    assert bits(found.state) == bits(make_state(2))
    (said,) = found.said
    assert said.startswith("the checkpoint of step 3 is damaged (")
    assert said.count("\n") == 0
    assert "Traceback" not in capfd.readouterr().err
    assert steps_in(workdir / "checkpoints") == [1, 2]
    assert (workdir / "damaged/3").is_dir()
    assert restore(workdir).said == ()
    shutil.copytree(workdir / "damaged/3", workdir / "checkpoints/3")
    assert str(workdir / "damaged/3-2") in restore(workdir).said[0]


@pytest.mark.slow
def test_a_damaged_checkpoint_in_a_bucket_is_put_aside_there(gs):
    workdir = epath.Path(gs.url) / "run"
    checkpoints = Checkpoints(workdir / "checkpoints", CheckpointConfig(every_steps=1))
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), {"samples": 16 * step})
    checkpoints.close()
    (workdir / "checkpoints/3/position/metadata").write_text("{")
    (workdir / "checkpoints/2/commit_success.txt").unlink()  # as one that was never finished
    found = restore(workdir)
    assert found.step == 1
    assert bits(found.state) == bits(make_state(1))
    assert str(workdir / "damaged/3") in found.said[0]
    assert (workdir / "damaged/3/position/metadata").read_text() == "{"
    assert steps_in(workdir / "checkpoints") == [1]


@pytest.mark.long
def test_whatever_byte_is_flipped_the_state_is_as_saved_or_called_damaged(workdir):
    """In every file; what Orbax keeps twice or does not read may change."""
    drawn = random.Random(0)
    folder = workdir / "checkpoints/3"
    read = {"damaged": 0, "same": 0}
    target = checkpoint.ocp.args.StandardRestore(shapes(make_state()))
    for path in [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]:
        kept = path.read_bytes()
        for _ in range(2):
            flip(path, drawn.randrange(len(kept)), drawn.randrange(8))
            try:
                state, position = checkpoint._read(epath.Path(folder), target)
            except checkpoint.Damaged:
                read["damaged"] += 1
            else:
                assert bits(state) == bits(make_state(3))
                assert position == {"samples": 48}
                read["same"] += 1
            path.write_bytes(kept)
    assert read["damaged"] > 5


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError(
            'RESOURCE_EXHAUSTED: Error writing local file "x": Failed to write 15138 bytes to '
            f"file 10: {os.strerror(errno.ENOSPC)} [os_error_code='28']"
        ),  # as tensorstore says it
    ],
)
def test_a_full_disk_is_one_message_and_what_was_saved_stays(error, workdir, monkeypatch, caplog):
    async def full(*_):
        raise error

    checkpoints = Checkpoints(workdir / "checkpoints", CheckpointConfig(every_steps=1))
    with monkeypatch.context() as disk:
        disk.setattr(checkpoint._PositionHandler, "_write", full)
        checkpoints.save(4, make_state(4), {"samples": 64})
        with pytest.raises(Refused, match=rf"^no space left for {workdir}/checkpoints: free some"):
            checkpoints.wait()
    assert not [record for record in caplog.records if record.exc_info]
    assert restore(workdir).step == 3
    again = Checkpoints(workdir / "checkpoints", CheckpointConfig(every_steps=1))
    again.save(4, make_state(4), {"samples": 64})
    again.close()
    assert restore(workdir).step == 4


class Straggler:
    def __del__(self):
        raise RuntimeError("Event loop is closed")  # as a read or write that ends too late


def test_what_ends_after_its_save_has_failed_says_nothing(workdir, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    Checkpoints(workdir / "checkpoints", CheckpointConfig()).close()
    restore(workdir)
    Straggler()
    assert not told
    other = SimpleNamespace(exc_value=ValueError("another loop"))
    sys.unraisablehook(other)
    assert told == [other]


@pytest.mark.parametrize(("file", "said"), [("orbax/read.py", 0), ("elsewhere.py", 1)])
def test_a_read_that_fails_when_nobody_waits_says_nothing(file, said, workdir, caplog):
    """However late, of Orbax; tasks of others do."""
    Checkpoints(workdir / "checkpoints", CheckpointConfig()).close()
    names = {}
    exec(compile("async def read():\n    raise ValueError('too late')", file, "exec"), names)

    async def main():
        asyncio.create_task(names["read"]())  # noqa: RUF006
        await asyncio.sleep(0)

    asyncio.run(main())
    gc.collect()
    assert len([x for x in caplog.records if "never retrieved" in x.message]) == said


@pytest.mark.long
def test_where_no_checkpoint_is_intact_all_stay_and_each_is_named(workdir):
    for step in (1, 2, 3):
        cut(workdir / f"checkpoints/{step}")
    with pytest.raises(Refused, match=r"step 3 is damaged \(.*step 1 is damaged \("):
        restore(workdir)
    assert steps_in(workdir / "checkpoints") == [1, 2, 3]


def test_damage_that_another_process_meets_counts_for_all(workdir, monkeypatch):
    other = iter(["its disk is broken"])  # of step 3; then all is well
    monkeypatch.setattr(processes, "gather", lambda value: [value, next(other, value)])
    found = restore(workdir)
    assert found.step == 2
    assert "step 3 is damaged (its disk is broken)" in found.said[0]


def test_a_store_out_of_reach_is_no_damage(workdir, monkeypatch):
    def unavailable(*_, **__):
        raise ValueError("UNAVAILABLE: Error reading: Connection refused")

    monkeypatch.setattr(checkpoint.ocp.CompositeCheckpointHandler, "restore", unavailable)
    with pytest.raises(ValueError, match="UNAVAILABLE"):
        restore(workdir)
    assert steps_in(workdir / "checkpoints") == [1, 2, 3]


def test_a_checkpoint_of_before_has_no_checksums(workdir):
    path = workdir / "checkpoints/3/position/metadata"
    content = json.loads(path.read_text())
    assert content.keys() == {"samples", "checksums", "checksum"}
    path.write_text(json.dumps({"samples": 48}))
    found = restore(workdir)
    assert (found.step, found.position) == (3, {"samples": 48})


def test_checksums_are_the_same_on_every_mesh_and_no_change_escapes():
    state = make_state(5)
    expected = jax.device_get(checksums(state))
    assert jax.device_get(checksums(make_state(5, shape=(2, 4)))) == expected
    assert jax.device_get(checksums(jax.tree.map(np.asarray, state))) == expected
    drawn = np.random.default_rng(0)
    for name, x in state.items():
        data = np.asarray(x)
        for _ in range(8):
            changed = bytearray(data.tobytes())
            changed[drawn.integers(len(changed))] ^= 1 << drawn.integers(8)
            other = np.frombuffer(bytes(changed), data.dtype).reshape(data.shape)
            assert checksums({name: other})[name] != expected[name]
    swapped = np.asarray(state["w"])[::-1]
    assert checksums({"w": swapped})["w"] != expected["w"]
    negated = np.asarray(state["w"]) * np.where(np.arange(8) < 2, -1, 1).astype(np.float32)
    assert checksums({"w": negated})["w"] != expected["w"]


def test_parameters_that_are_not_what_was_saved_are_refused(tmp_path):
    params = jax.jit(CLIP(TINY).init)(jax.random.key(0))
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    checkpoints.save(7, {"params": params}, {"samples": 7})
    checkpoints.close()
    found = restore_params(tmp_path, 7, CLIP(TINY))
    jax.tree.map(np.testing.assert_array_equal, found, params)
    path = tmp_path / "checkpoints/7/position/metadata"
    content = json.loads(path.read_text())
    name = "params/visual/proj"
    content["checksums"][name] ^= 1
    del content["checksum"]
    content["checksum"] = checkpoint._crc(content)
    path.write_text(json.dumps(content))
    with pytest.raises(Refused, match=rf"step 7 in .* is damaged \(1 of \d+ arrays .*{name}\)"):
        restore_params(tmp_path, 7, CLIP(TINY))
