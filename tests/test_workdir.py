"""Who may write to a work directory, and what in it is damaged."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from clip_jax import workdir
from clip_jax.refused import Refused
from clip_jax.train import train
from clip_jax.workdir import Claim, Lines, count_start, read_json, recover_json
from tests.conftest import ROOT, tiny_digits


@pytest.fixture(params=["disk", "gs", "s3"])
def folder(request, tmp_path):
    if request.param == "disk":
        return epath.Path(tmp_path)
    return epath.Path(request.getfixturevalue(request.param).url) / "run"


@pytest.fixture
def quick(monkeypatch):
    """A lease that lapses soon."""
    monkeypatch.setattr(workdir, "LEASE_SECONDS", 4)
    monkeypatch.setattr(workdir, "RENEW_SECONDS", 0.25)


def test_a_second_training_is_refused_by_name_until_the_first_ends(folder, quick, monkeypatch):
    monkeypatch.setattr(workdir, "LEASE_SECONDS", 30)
    with Claim(folder) as first:
        first.take()
        with pytest.raises(Refused, match=rf"process {os.getpid()} on .* is training in {folder}"):
            Claim(folder).take()
    begun = time.monotonic()
    with Claim(folder) as second:
        second.take()
    assert time.monotonic() - begun < 15  # it waits for no lease


def test_a_refused_training_touches_nothing(tmp_path):
    with Claim(epath.Path(tmp_path)) as claim:
        claim.take()
        with pytest.raises(Refused, match="is training in"):
            train(tiny_digits(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_killed_training_leaves_no_lock(tmp_path):
    code = (
        "import sys, time; from etils import epath; from clip_jax.workdir import Claim\n"
        "with Claim(epath.Path(sys.argv[1])) as claim:\n"
        "    claim.take(); print('taken', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "taken\n"
    with pytest.raises(Refused, match=f"process {process.pid} on"):
        Claim(epath.Path(tmp_path)).take()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with Claim(epath.Path(tmp_path)) as claim:
        claim.take()


def test_a_restart_waits_for_the_lease_of_the_dead_who_ends_should_he_live(
    gs, quick, monkeypatch, capsys
):
    folder = epath.Path(gs.url) / "run"
    ended = []
    renewals = []
    plain = workdir._Renewal
    monkeypatch.setattr(workdir, "_Renewal", lambda *a: renewals.append(plain(*a)) or renewals[-1])
    Claim(folder).take()
    (lost,) = renewals
    monkeypatch.setattr(workdir.os, "_exit", lambda code: ended.append(code) or lost._over.set())
    stands_still, taken = threading.Event(), threading.Event()

    def wait(_):
        stands_still.set()
        return lost._over.is_set() or not taken.wait(60)

    monkeypatch.setattr(lost._over, "wait", wait)
    assert stands_still.wait(30)
    begun = time.monotonic()
    with Claim(folder) as claim:
        claim.take()
        assert 1 < time.monotonic() - begun < 15  # a minute, were the lease not looked at
        assert "this training begins within 4 seconds" in capsys.readouterr().err
        taken.set()
        lost._thread.join(timeout=10)
        assert ended == [2]
        assert "another training has taken over" in capsys.readouterr().err


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def writes(bucket):
    """Count what was written since the last call."""
    return sum(request["method"] in ("POST", "PUT") for request in bucket.server.requests())


def test_lines_grow_and_a_resumed_run_drops_what_it_will_redo(folder):
    lines = Lines(folder / "a.jsonl", 0, print)
    lines.write({"step": 1}, {"step": 2})
    lines.write({"step": 3})
    lines.flush()
    assert steps(folder / "a.jsonl") == [1, 2, 3]
    torn = (folder / "a.jsonl").read_text() + '{"step": 3, "lo'
    (folder / "a.jsonl").write_text(torn)
    resumed = Lines(folder / "a.jsonl", 2, print)
    assert steps(folder / "a.jsonl") == [1, 2]
    resumed.write({"step": 3})
    resumed.flush()
    assert steps(folder / "a.jsonl") == [1, 2, 3]
    Lines(folder / "a.jsonl", 0, print)
    assert not (folder / "a.jsonl").read_text()


def test_lines_that_a_full_disk_does_not_take_are_one_message(tmp_path):
    lines = Lines(epath.Path(tmp_path / "a.jsonl"), 0, print)
    (tmp_path / "a.jsonl").symlink_to("/dev/full")
    with pytest.raises(Refused, match=rf"^no space left for {tmp_path}/a\.jsonl: free some"):
        lines.write({"step": 1})


def test_a_bucket_is_written_now_and_then_and_whole(gs, monkeypatch):
    folder = epath.Path(gs.url) / "run"
    lines = Lines(folder / "a.jsonl", 0, print)
    writes(gs)
    for step in range(100):
        lines.write({"step": step})
    assert writes(gs) == 0
    monkeypatch.setattr(workdir, "_UPLOAD_SECONDS", 0)
    lines.write({"step": 100})
    assert writes(gs) == 1
    assert len(steps(folder / "a.jsonl")) == 101


def test_lines_that_are_damaged_are_counted_and_kept_beside(folder):
    path, said = folder / "metrics.jsonl", []
    whole = ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": NaN}']
    bad = [b"\xff\xfe", b"[1]", b'{"loss": 2.0}', b'{"step": "2"}', b""]
    path.write_bytes(
        b"\n".join([whole[0].encode(), *bad, whole[1].encode(), b'{"step": 9}', b'{"st'])
    )
    Lines(path, 2, said.append)
    assert path.read_text().splitlines() == whole
    (line,) = said
    assert line.startswith(f"{path}: 5 damaged lines are left out")
    assert (folder / "metrics.jsonl.damaged").read_bytes().startswith(whole[0].encode())
    Lines(path, 2, said.append)
    assert len(said) == 1


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b"\xff", b"null"])
def test_a_damaged_json_file_is_refused_or_kept_beside(content, tmp_path):
    path, said = epath.Path(tmp_path / "result.json"), []
    assert read_json(path) == {}
    assert recover_json(path, said.append) == {}
    assert said == []
    path.write_bytes(content)
    with pytest.raises(Refused, match=r"result\.json is damaged"):
        read_json(path)
    assert recover_json(path, said.append) == {}
    assert len(said) == 1
    assert (tmp_path / "result.json.damaged").read_bytes() == content


def test_starts_are_counted_also_after_damage(folder):
    path = folder / "starts.json"
    assert [count_start(path, 3), count_start(path, 3), count_start(path, 6)] == [1, 2, 1]
    path.write_text('{"step": 6, "st')
    assert count_start(path, 6) == 1
    assert json.loads(path.read_text()) == {"step": 6, "starts": 1}
