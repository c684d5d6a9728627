"""A run and its watcher side by side, each killed and started again."""

import os
import signal
import subprocess
import sys

from clip_jax.checkpoints.retention import WATCHED, named_step, steps_in
from tests.conftest import ROOT, rows
from tests.workflow import watching


def test_a_run_and_its_watcher_are_killed_and_go_on(tmp_path):
    """Every step that stays has one row, and the best of all that were evaluated stays."""
    workdir = tmp_path / "run"
    os.mkfifo(f"{workdir}.steps")
    steps = os.open(f"{workdir}.steps", os.O_RDWR)  # a byte lets the run do a step

    def start(name):
        command = [sys.executable, "-m", "tests.workflow.watching", name, workdir]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=stderr, text=True)

    def kill(process, line):
        """Kill it when it says this."""
        assert any(said.strip() == line for said in process.stdout), f"it ended without {line!r}"
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL

    with (tmp_path / "stderr").open("w") as stderr:
        run = start("run")
        os.write(steps, b"...")
        assert any(said.strip() == "saved 3" for said in run.stdout)
        kill(start("evaluate"), "row 2")  # the oldest that is kept
        watcher = start("evaluate")
        os.write(steps, b"..")
        kill(run, "saving 5")
        run = start("run")
        os.write(steps, b"." * watching.STEPS)
        ended = [process.communicate() and process.returncode for process in (run, watcher)]
    os.close(steps)
    said = (tmp_path / "stderr").read_text()
    assert (ended, "Traceback" in said) == ([0, 0], False), said
    found, left = rows(workdir, WATCHED), steps_in(workdir / "checkpoints")
    assert len({row["step"] for row in found}) == len(found)
    assert {*left} <= {row["step"] for row in found}
    for row in found:
        assert (row["made/step"], row["made/up"]) == (row["step"], watching.result(row["step"]))
    best = max(found, key=lambda row: (row["made/up"], row["step"]))["step"]
    assert named_step(workdir, "best") == best
    assert {best, watching.STEPS - 1, watching.STEPS} <= {*left}
