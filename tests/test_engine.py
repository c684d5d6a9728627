"""Tasks by the threads of this process."""

import sys
import threading
from concurrent.futures import wait

import pytest

from clip_jax import engine
from clip_jax.engine import Here, runner


def test_threads_do_each_task_once_and_say_lines(capsys):
    done = []

    def work(task, counted):
        done.append((task, list(counted(range(7, 10)))))
        return f"line {task}" if task else None

    with runner("here", 3) as does:
        does.run("x", work, [(i, 3) for i in range(5)])
        does.run("x", work, [])
    assert sorted(done) == [(i, [7, 8, 9]) for i in range(5)]
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == [f"clip-jax: line {i}" for i in range(1, 5)]


def test_work_with_a_model_is_done_by_one_thread():
    threads = set()
    Here(4).run("x", lambda *_: threads.add(threading.get_ident()), [(0, 1)] * 9, model=True)
    assert len(threads) == 1


def test_an_error_stops_the_others_at_their_next_sample():
    begun, failed = threading.Event(), threading.Event()

    def work(task, counted):
        if task == "fails":
            begun.wait()
            failed.set()
            raise ValueError("no such luck")
        for index in counted(range(1_000_000_000)):
            begun.set()
            assert index < 10 or failed.wait()

    with pytest.raises(ValueError, match="no such luck"):
        Here(2).run("x", work, [("fails", 1), ("goes on", 1_000_000_000), ("is not begun", 1)])


def test_a_thread_whose_task_failed_begins_no_other(monkeypatch):
    """Even if the main thread sees the error only when all tasks have ended."""
    begun = []

    def work(task, counted):
        begun.append(task)
        raise ValueError("no such luck")

    monkeypatch.setattr(engine, "as_completed", lambda futures: wait(futures).done)
    with pytest.raises(ValueError, match="no such luck"):
        Here(1).run("x", work, [(0, 1), (1, 1), (2, 1)])
    assert begun == [0]


def test_without_ray_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'clip-jax-pods\[ray\]'"), runner("ray"):
        pass
