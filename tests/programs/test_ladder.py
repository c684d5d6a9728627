"""A ladder that two workers share, of which one is killed in the middle of a run."""

import fcntl
import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import losses
from tests.workflow.conftest import Command

SPEC = """\
from tests.scaling.conftest import tiny_ladder

def get_ladder():
    return tiny_ladder(samples=(800, 1_600))
"""
LONG, SHORT = "w32@1.6K-seed0", "w32@800-seed0"  # the two most expensive of the four runs


@pytest.fixture
def log(tmp_path: Path):
    """The log of the long run as a pipe, which soon blocks the run while nobody reads it."""
    path = tmp_path / "study" / LONG / "log.txt"
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(number, fcntl.F_SETPIPE_SZ, 4096)
    with open(number, "rb", buffering=0) as pipe:
        yield path, pipe


def test_every_run_is_trained_once_though_a_worker_is_killed_and_the_limit_holds(tmp_path, log):
    (tmp_path / "tiny.py").write_text(SPEC)
    # The four runs cost 3.0e9, 1.5e9, 1.3e9 and 0.6e9 FLOPs: the limit is for two of them.
    command = (
        "-m",
        "clip_jax",
        "scale",
        "ladder",
        tmp_path / "tiny.py",
        "--root",
        tmp_path / "study",
        "--limit",
        "4.7e9",
    )
    one = Command(*command)
    trainer = int(one.until(f"{LONG}: started as process").split()[-1])
    two = Command(*command)
    try:
        two.until(f"{SHORT}: started as process")
        path, pipe = log
        os.set_blocking(pipe.fileno(), True)
        text = b""
        while b"\nstep 10/" not in text:  # so the checkpoint of step 6 is complete
            text += (part := pipe.read(200))
            assert part, text.decode()
        path.unlink()  # the next process gets a file
        one.kill()
        os.kill(trainer, signal.SIGKILL)
        lines = two.end()
    finally:
        one.kill()
        two.kill()

    for name in ("w16@1.6K-seed0", "w16@800-seed0"):
        assert f"{name}: left out, since it would exceed the limit" in lines
        assert not (tmp_path / "study" / name / "checkpoints").exists()
    assert "resuming from step" in path.read_text()
    for name, steps in ((LONG, 100), (SHORT, 50)):
        assert list(losses(tmp_path / "study" / name)) == list(range(1, steps + 1))
    files = sorted((tmp_path / "study/queue/events").iterdir())
    events = [json.loads(file.read_text()) for file in files]
    assert [x["subject"] for x in events if x["kind"] == "claim"] == [LONG, SHORT, LONG]
    assert Counter(x["subject"] for x in events if x["kind"] == "done") == {LONG: 1, SHORT: 1}
    assert len({x["worker"] for x in events if x["subject"] == LONG}) == 2
