"""Checkpoints on s3://, and on gs:// beside it: kept, found again, never taken half written."""

import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import files, orbax_s3
from clip_jax.checkpoint import CheckpointConfig, Checkpoints, steps_in
from clip_jax.refused import Refused

SAVE = """
import sys
import jax.numpy as jnp
from clip_jax.checkpoint import CheckpointConfig, Checkpoints

checkpoints = Checkpoints(sys.argv[1], CheckpointConfig())
for step in (1, 2):
    checkpoints.save(step, {"w": jnp.full(1000, step)}, {"samples": step})
    checkpoints.wait()
    print(step, flush=True)
"""


def state(step):
    return {"w": jnp.full(1000, step)}


@pytest.mark.long
def test_steps_are_kept_found_and_put_aside(s3):
    folder = f"{s3.url}/run/checkpoints"
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=2))
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"samples": step})
    checkpoints.wait()
    assert steps_in(folder) == [2, 3]
    files.remove(next(path for path in files.walk(f"{folder}/3/state") if "/d/" in path))
    found = checkpoints.restore(state(0))
    checkpoints.close()
    assert (found.step, found.position) == (2, {"samples": 2})
    np.testing.assert_array_equal(found.state["w"], 2)
    assert f"it is kept in {s3.url}/run/damaged/3" in found.said[0]
    assert steps_in(folder) == [2]


def test_a_step_whose_save_was_killed_is_never_taken(s3):
    """At the last thing that is written: the file that says that the step is whole."""
    kill_while_saving(s3, "2/commit_success")


@pytest.mark.slow
@pytest.mark.parametrize("at", ["2/commit_success", "2/state/commit", "2/state/.*d/"])
def test_wherever_a_save_is_killed_the_step_is_never_taken(at, bucket):
    kill_while_saving(bucket, at)


def kill_while_saving(bucket, at):
    folder = f"{bucket.url}/run/checkpoints"
    only = f"^(PUT|POST).*{at}".replace("/", "(/|%2F)")
    bucket.server.behave(faults={"hang": 1.0}, only=only)
    saving = subprocess.Popen([sys.executable, "-c", SAVE, folder], stdout=subprocess.PIPE)
    assert saving.stdout
    assert saving.stdout.readline() == b"1\n"
    while not any(files.walk(f"{folder}/2/state")):
        time.sleep(0.05)
    time.sleep(0.5)
    saving.send_signal(signal.SIGKILL)
    saving.communicate()
    bucket.server.behave()
    assert list(files.walk(f"{folder}/2"))
    assert steps_in(folder) == [1]
    checkpoints = Checkpoints(folder, CheckpointConfig())
    assert checkpoints.latest_step() == 1
    assert checkpoints.restore(state(0)).position == {"samples": 1}
    checkpoints.save(2, state(2), {"samples": 2})
    checkpoints.close()
    assert steps_in(folder) == [1, 2]


def test_a_version_of_orbax_that_is_built_otherwise_is_named(monkeypatch):
    monkeypatch.setattr(orbax_s3, "_ARRAYS", "json")
    with pytest.raises(Refused, match=r"orbax-checkpoint \S+ cannot be led to s3:// \(.*json"):
        orbax_s3.enable.__wrapped__()
