"""Tasks on Ray: the same files as by threads, whatever dies meanwhile."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clip_jax.cli.commands import main
from tests.conftest import ROOT, write_tiny_model
from tests.data.conftest import FORMATS
from tests.prepare.conftest import CHANGES, digests, jpeg, scene

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Scenes, of which every fifth is one of the first again, or a changed copy of it."""
    changes = [lambda x: x, *CHANGES.values()]
    images = [scene(i) for i in range(30)]
    images[5::5] = [changes[i % 5](images[i]) for i in range(5)]
    pairs = [(f"{i:03d}.jpg", jpeg(x), f"text {i}") for i, x in enumerate(images)]
    (tmp_path / "in").mkdir()
    return FORMATS["tar"](tmp_path / "in", pairs).path


def on_ray(source: str, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Prepare as a person does."""
    command = [sys.executable, "-m", "clip_jax", "prepare", source, out, "--on", "ray", *flags]
    return subprocess.run(command, cwd=out.parent, env=ENVIRONMENT, capture_output=True, text=True)


def test_every_stage_makes_the_files_that_threads_make(source, tmp_path, capsys):
    write_tiny_model(tmp_path / "model")
    (tmp_path / "test").mkdir()
    for i in (1, 2):
        scene(i).save(tmp_path / f"test/{i}.png")
    flags = [
        "--samples-per-shard",
        "20",
        "--samples-per-task",
        "6",
        "--drop-duplicates",
        "--drop-near-duplicates",
        "--shuffle",
        "--top-share",
        "0.7",
        "--score-with",
        f"{tmp_path}/model",
        "--decontaminate",
        f"test={tmp_path}/test",
        "--json",
    ]
    assert main(["prepare", source, f"{tmp_path}/here", *flags]) == 0
    here = json.loads(capsys.readouterr().out)
    done = on_ray(source, tmp_path / "there", *flags)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "there") == digests(tmp_path / "here")
    assert json.loads(done.stdout)["counts"] == here["counts"]
    assert len(here["counts"]) == 5


def test_invalid_input_that_a_worker_meets_is_one_message(source, tmp_path):
    first = min((tmp_path / "in").glob("*.tar"))
    os.truncate(first, first.stat().st_size // 2)
    done = on_ray(source, tmp_path / "out")
    assert done.returncode == 2
    assert f"{first.name} (truncated" in done.stderr
    assert "Traceback" not in done.stderr


DRIVER = """
import os
from pathlib import Path
from clip_jax.engine import runner

def work(task, counted):
    Path("begun").write_text(f"{os.getpid()}\\n")
    Path("go").read_text()
    Path(f"done-{task}").write_text(str(sum(counted(range(task)))))

if __name__ == "__main__":
    with runner("ray") as ray:
        ray.run("x", work, [(5, 5)])
        ray.run("x", work, [(6, 6)], model=True)
"""


def test_what_a_killed_worker_did_is_done_again(tmp_path):
    """Whether its tasks run a model or not."""
    (tmp_path / "driver.py").write_text(DRIVER)
    begun, go, log = (tmp_path / name for name in ("begun", "go", "log"))
    os.mkfifo(begun)
    os.mkfifo(go)
    with log.open("w") as file:
        driver = subprocess.Popen(
            [sys.executable, "driver.py"],
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    driver_end = os.pidfd_open(driver.pid)  # readable once the driver has ended

    def process_of_task() -> int:
        """Wait for a task to begin, or fail with what the driver printed if it ends before."""
        with open(begun, opener=lambda *_: os.open(begun, os.O_RDONLY | os.O_NONBLOCK)) as pipe:
            ready, _, _ = select.select([pipe, driver_end], [], [])
            assert pipe in ready, log.read_text()
            os.set_blocking(pipe.fileno(), True)
            return int(pipe.read())

    try:
        for _ in range(2):
            first = process_of_task()
            os.kill(first, signal.SIGKILL)
            assert process_of_task() != first
            go.write_text("")
        assert driver.wait() == 0, log.read_text()
    finally:
        os.close(driver_end)
        driver.kill()
        driver.wait()
    assert (tmp_path / "done-5").read_text() == "10"
    assert (tmp_path / "done-6").read_text() == "15"
