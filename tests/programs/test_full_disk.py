"""A disk that fills while a run writes to it: `unshare` mounts one that is small."""

import os
import subprocess
import sys

import pytest

from tests.conftest import DIGITS, FLAGS, ROOT


@pytest.mark.parametrize("size", ["400k", "60k"])
def test_a_disk_that_fills_is_named_once_and_the_run_goes_on(size, tmp_path):
    """Somewhere: in a checkpoint, a line of metrics, TensorBoard, config.json. Then it grows."""
    script = (
        f'mount -t tmpfs -o size={size} tmpfs {tmp_path}; "$@"; echo "exit code $?" >&2; '
        f'mount -o remount,size=100M {tmp_path}; "$@"'
    )
    command = ["train", str(DIGITS), "--workdir", str(tmp_path / "run"), *FLAGS, "--steps", "9"]
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script, "sh", sys.executable, "-m", "clip_jax", *command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    first, _, second = done.stderr.partition("exit code 2\n")
    # Besides, threads of TensorStore may print that their event loop is closed.
    assert first.count(f"clip-jax: no space left for {tmp_path}/run") == 1
    assert str(ROOT / "clip_jax") not in done.stderr  # no traceback of ours
    assert done.returncode == 0
    assert "done in" in second
