"""A disk that fills while a run writes to it: `unshare` mounts one that is small."""

import os
import subprocess
import sys

import pytest

from tests.conftest import DIGITS, FLAGS, ROOT


@pytest.mark.parametrize("size", ["400k", "60k"])
def test_a_disk_that_fills_ends_a_run_with_one_line_and_it_goes_on(size, tmp_path):
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
    assert first.splitlines()[-1].startswith(f"clip-jax: no space left for {tmp_path}/run")
    assert "Traceback" not in done.stderr
    assert done.returncode == 0
    assert "done in" in second
