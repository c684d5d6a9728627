"""Processes a few at a time: failures, cores, locks, signals."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from clip_jax.scaling.jobs import Job, Stopped, _listening, _on, run


def job(folder: Path, name: str, code: str) -> Job:
    """A process that leaves `done` in its directory if all went well."""
    directory = folder / name
    directory.mkdir(exist_ok=True)
    text = f"{code}\nopen({str(directory / 'done')!r}, 'w').close()"
    return Job(name, [sys.executable, "-c", text], directory, (directory / "done").exists, 1.0)


def test_one_that_fails_is_told_with_its_last_line_and_the_rest_go_on(tmp_path):
    codes = {
        "a": "print('fine')",
        "b": "import sys; print('reading'); sys.exit('no such file')",
        "c": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "d": "import os; print('early', flush=True); os._exit(0)",  # says 0, left nothing
        "e": "",
    }
    jobs, said = [job(tmp_path, name, code) for name, code in codes.items()], []
    failures = run(jobs, 2, os.environ, said.append)
    assert failures.keys() == {"b", "c", "d"}
    assert failures["b"].startswith("exit code 1; ")
    assert failures["b"].endswith("log.txt ends: no such file")
    assert failures["c"].startswith("killed by SIGKILL")
    assert failures["d"].endswith("ends: early")
    assert (tmp_path / "a" / "log.txt").read_text() == "fine\n"
    assert len(said) == 5
    assert run(jobs[:1], 1, os.environ, said.append) == {}
    assert said[-1] == "a: another process did it"
    assert (tmp_path / "a" / "log.txt").read_text() == "fine\n"


def test_what_another_makes_is_waited_for_and_not_begun_where_that_failed(tmp_path):
    made = tmp_path / "a" / "made"
    first = job(tmp_path, "a", f"open({str(made)!r}, 'w').close()")
    broken = job(tmp_path, "c", "import sys; sys.exit('no')")
    second, third, last = (job(tmp_path, name, "") for name in "bde")
    second = second._replace(after="a", is_ready=made.exists)
    third = third._replace(after="c", is_ready=lambda: False)
    last = last._replace(after="done before", is_ready=lambda: False)  # it will say what it misses
    said: list[str] = []
    failures = run([second, third, last, first, broken], 1, os.environ, said.append)
    assert [line.partition(":")[0] for line in said] == ["e", "a", "b", "c"]
    assert failures.keys() == {"c", "d"}
    assert failures["d"] == "not begun, for c failed"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="pinning is Linux's")
def test_jobs_share_the_cores(tmp_path):
    code = "import os, time; print(*os.sched_getaffinity(0)); time.sleep(0.3)"
    ours = os.sched_getaffinity(0)
    run([job(tmp_path, name, code) for name in "ab"], 2, os.environ, print)
    a, b = ({*map(int, (tmp_path / n / "log.txt").read_text().split())} for n in "ab")
    assert a | b == ours
    assert len(a & b) == (0 if len(ours) > 1 else 1)
    assert os.sched_getaffinity(0) == ours


def test_no_second_process_starts_beside_an_orphan(tmp_path):
    """A runner is killed; the next waits for the process that it left behind."""
    text = (
        "import os, sys; from pathlib import Path; from tests.scaling.test_jobs import job, run\n"
        "one = job(Path(sys.argv[1]), 'a', \"import os, time; print(os.getpid(), flush=True); "
        'time.sleep(1.5)")\n'
        "run([one], 1, os.environ, print)"
    )
    root = Path(__file__).parents[2]
    runner = subprocess.Popen(
        [sys.executable, "-c", text, str(tmp_path)], cwd=root, stdout=subprocess.DEVNULL
    )
    log = tmp_path / "a" / "log.txt"
    while not (log.exists() and log.read_text()):
        time.sleep(0.01)
    runner.kill()
    runner.wait()
    said: list[str] = []
    assert run([job(tmp_path, "a", "print('second')")], 1, os.environ, said.append) == {}
    assert said == ["a: another process did it"]
    assert "second" not in log.read_text()


def test_sigterm_reaches_the_running_and_starts_no_others(tmp_path):
    text = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit('saved'))\n"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN\n"
        "print('ready', flush=True)\n"
        "time.sleep(30)"
    )
    jobs = [job(tmp_path, name, text) for name in "ab"]
    log = tmp_path / "a" / "log.txt"

    def interrupt() -> None:
        while not (log.exists() and log.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=r"stopped by SIGINT; .* goes on"):
        run(jobs, 1, os.environ, print)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert log.read_text() == "ready\nsaved\n"
    assert not (tmp_path / "b" / "log.txt").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere one that is blocked may be lost")
def test_ctrl_c_while_a_process_starts_is_heard_afterwards():
    with _listening() as came:
        with _on(set()):
            signal.raise_signal(signal.SIGINT)
            assert not came
        assert came == [signal.SIGINT]
