"""A ladder's queue, on disk and in buckets."""

import json
import os
import socket
from pathlib import Path
from unittest import mock

from clip_jax.checkpoints.claim import LEASE_SECONDS
from clip_jax.processes import Position
from clip_jax.scaling import jobs
from clip_jax.scaling.climb import LadderCommand, climb
from clip_jax.scaling.html_report import ReportConfig, report
from clip_jax.scaling.queue import Job, Queue, workers
from clip_jax.storage import files
from tests.clock import HandClock
from tests.scaling.conftest import train_all, write_spec


def test_workers_on_two_machines_share_a_queue(folder: str, tmp_path: Path):
    root, clock = files.as_path(folder), HandClock()

    def worker(host: str) -> Queue:
        some = [
            Job(name, [], root / name, tmp_path / host / name, (root / name / "done").exists)
            for name in ("a", "b", "c")
        ]
        with mock.patch.object(socket, "gethostname", autospec=True, return_value=host):
            return Queue(root, some, lambda names: "c" not in names, Position(), print, clock)

    def take(queue: Queue) -> Job | None:
        clock.advance(10)
        return queue.take()

    one, two = worker("one"), worker("two")
    a, b = take(one), take(two)
    assert a
    assert b
    assert (a.name, b.name) == ("a", "b")
    files.write_whole(root / "a" / "done", "")
    one.release(a, "done")
    assert take(one) is None
    b.unlock()  # its worker is killed
    assert workers(root, clock.unix())["b"].endswith("on two")
    clock.advance(LEASE_SECONDS)
    again = take(one)
    assert again
    assert again.name == "b"
    assert two.lost() == {"b"}
    assert one.left_out == ["c"]
    a.unlock()
    again.unlock()


def test_a_study_in_a_bucket(s3, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    spec, root = write_spec(tmp_path, "samples=(160, 320)"), files.as_path(f"{s3.url}/study")
    command = LadderCommand(spec=spec, root=root, limit="1.2e9")
    seen = []

    def train_three(source, at_a_time, environment, say):
        job = source.take()
        report(ReportConfig(paths=(root,), output=tmp_path / "page.html"))
        source.release(job, "failed", "exit code 1")
        job.unlock()
        seen.extend(train_all(source, at_a_time, environment, say))
        assert environment["JAX_COMPILATION_CACHE_DIR"] == f"{root}/compilation_cache"

    with mock.patch.object(jobs, "run", autospec=True, side_effect=train_three):
        points = climb(command, print)["points"]
    assert '"status": "running"' in (tmp_path / "page.html").read_text()
    assert [(x["name"], x["done"], x["left_out"]) for x in points] == [
        ("w32@320-seed0", False, False),
        ("w32@160-seed0", True, False),
        ("w16@320-seed0", True, False),
        ("w16@160-seed0", False, True),
    ]
    assert seen == ["w32@160-seed0", "w16@320-seed0"]
    config = json.loads(files.read(f"{root}/w32@160-seed0/config.json"))
    assert config["steps"] == 10


def test_a_log_is_copied_to_the_bucket(s3, tmp_path: Path):
    root, clock = files.as_path(f"{s3.url}/study"), HandClock(skips=True)
    job = Job("a", ["echo", "hello"], root / "a", tmp_path / "log.txt", lambda: False)
    with Queue(root, [job], bool, Position(), print, clock) as queue:
        jobs.run(queue, 1, {"PATH": os.environ["PATH"]}, print, clock)
    assert queue.failures["a"].endswith("log.txt ends: hello")
    assert files.read(f"{root}/a/log.txt") == b"hello\n"
