"""Who may write to a work directory, and what in it is damaged."""

import errno
import fcntl
import json
import os
import queue
from typing import Any, cast
from unittest import mock

import pytest
from etils import epath

from clip_jax import processes
from clip_jax.checkpoints import claim
from clip_jax.checkpoints.claim import Claim, count_start
from clip_jax.errors import InputError
from clip_jax.storage import files
from clip_jax.storage.json_files import Lines, read_json, recover_json
from clip_jax.train import train
from tests.clock import HandClock
from tests.conftest import tiny_digits


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path) / "run"


# ------------------------------------------------------------------ the lock of a disk


def test_a_second_training_is_refused_by_name_and_touches_nothing(folder):
    with Claim(folder) as first:
        first.take()
        with pytest.raises(
            InputError, match=rf"process {os.getpid()} on .* is training in {folder}"
        ):
            train(tiny_digits(), folder)
        assert [path.name for path in folder.iterdir()] == ["lock"]
    with Claim(folder) as second:
        second.take()


def test_a_file_system_without_locks_goes_unlocked(folder):
    none = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    with Claim(folder) as own, mock.patch.object(fcntl, "flock", autospec=True, side_effect=none):
        own.take()


# ------------------------------------------------------------------ the lease of a bucket


def holder(folder, number, **content):
    """Write a lease's object as another process does, and remove the one before."""
    other = {"host": "far", "pid": 7, "id": "other"} | content
    (folder / "lease").mkdir(parents=True, exist_ok=True)
    (folder / f"lease/{number:012d}").write_text(json.dumps(other))
    (folder / f"lease/{number - 1:012d}").unlink(missing_ok=True)


def newest(folder):
    (path,) = (folder / "lease").iterdir()  # those before are removed
    return int(path.name), json.loads(path.read_text()).get("released", False)


def test_a_lease_is_renewed_until_it_is_given_back(folder):
    clock, again, made, plain = HandClock(), HandClock(), queue.Queue(), claim._extend

    def extend(*arguments):
        try:
            made.put(plain(*arguments) and arguments[1])
        except OSError:
            made.put("out of reach")
            raise
        return True

    def renew(error=None):
        clock.until_waiting()
        with mock.patch.object(files, "create", autospec=True, side_effect=error or files.create):
            clock.advance(claim.RENEW_SECONDS)
            return made.get(timeout=60)

    with mock.patch.object(claim, "_extend", autospec=True, side_effect=extend):
        release = claim._lease(folder, "training", clock)
        assert made.get(timeout=60) == 1
        assert [renew(), renew(OSError), renew()] == [2, "out of reach", 3]
        assert newest(folder) == (3, False)
        release()
    assert newest(folder) == (4, True)
    claim._lease(folder, "training", again)()
    assert again.slept == []  # nothing to wait for


def test_a_lease_that_is_renewed_meanwhile_is_refused(folder):
    holder(folder, 4)
    with mock.patch.object(HandClock, "sleep", autospec=True) as sleep:
        sleep.side_effect = lambda clock, seconds: clock.advance(seconds) or holder(folder, 5)
        with pytest.raises(InputError, match="process 7 on far is training in"):
            claim._lease(folder, "training", HandClock())
    assert newest(folder) == (5, False)


def test_of_two_who_take_over_at_once_one_is_refused(folder):
    holder(folder, 1, released=True)
    plain = claim._extend

    def another_is_faster(path, number, content):
        holder(folder, number)
        return plain(path, number, content)

    faster = mock.patch.object(claim, "_extend", autospec=True, side_effect=another_is_faster)
    with faster, pytest.raises(InputError, match="process 7 on far"):
        claim._lease(folder, "training", HandClock(skips=True))
    assert newest(folder) == (2, False)


def test_a_creation_whose_answer_was_lost_counts(folder):
    me = {"id": "me"}
    assert claim._extend(f"{folder}/lease", 1, me)
    assert claim._extend(f"{folder}/lease", 1, me)
    assert not claim._extend(f"{folder}/lease", 1, {"id": "you"})
    holder(folder, 9)
    assert not claim._extend(f"{folder}/lease", 5, me)  # whoever was asleep since
    assert 5 not in claim._numbers(f"{folder}/lease")


def test_a_lease_that_ends_is_taken_over_and_its_holder_ends_should_it_live(folder, capsys):
    stood_still, clock = HandClock(), HandClock(skips=True)
    lost = cast(Any, claim._lease(folder, "training", stood_still)).__self__
    release = claim._lease(folder, "training", clock)
    assert claim.LEASE_SECONDS < sum(clock.slept) <= claim.LEASE_SECONDS + 2
    assert "this training begins within 45 seconds" in capsys.readouterr().err
    with mock.patch.object(os, "_exit", autospec=True) as ended:
        ended.side_effect = lambda _: lost._over.set()  # as if it ended here
        stood_still.until_waiting()
        stood_still.advance(claim.RENEW_SECONDS)
        lost._thread.join(timeout=60)
    ended.assert_called_once_with(2)
    assert "another training has taken over" in capsys.readouterr().err
    release()


# ------------------------------------------------------------------ what is in it


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_processes_connect_before_one_of_them_waits_for_a_lease(folder):
    """JAX's processes wait 30 seconds for each other to connect, and a lease ends after 45."""
    order = mock.Mock()
    order.gather.side_effect = lambda value: [value]
    order.lock.return_value = lambda: None
    with (
        mock.patch.object(processes, "gather", autospec=True, side_effect=order.gather),
        mock.patch.object(claim, "_lock", autospec=True, side_effect=order.lock),
        Claim(folder) as own,
    ):
        own.take()
    assert [name for name, *_ in order.mock_calls] == ["gather", "lock", "gather"]


def test_lines_grow_and_a_resumed_run_drops_what_it_will_redo(tmp_path):
    path = epath.Path(tmp_path) / "a.jsonl"
    lines = Lines(path, 0)
    lines.write({"step": 1}, {"step": 2})
    lines.write({"step": 3})
    assert steps(path) == [1, 2, 3]
    path.write_text(path.read_text() + '{"step": 3, "lo')
    Lines(path, 2).write({"step": 3})
    assert steps(path) == [1, 2, 3]
    Lines(path, None)
    assert steps(path) == [1, 2, 3]
    lines = Lines(path, 0)
    assert not path.read_text()
    path.unlink()
    (tmp_path / "a.jsonl").symlink_to("/dev/full")
    with pytest.raises(InputError, match=rf"^no space left for {path}: free some"):
        lines.write({"step": 1})


def test_lines_that_are_damaged_are_counted_and_kept_beside(tmp_path, capsys):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    whole = ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": NaN}']
    bad = [b"\xff\xfe", b"[1]", b'{"loss": 2.0}', b'{"step": "2"}', b""]
    path.write_bytes(
        b"\n".join([whole[0].encode(), *bad, whole[1].encode(), b'{"step": 9}', b'{"st'])
    )
    Lines(path, 2)
    assert path.read_text().splitlines() == whole
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"clip-jax: {path}: 5 damaged lines are left out")
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes().startswith(whole[0].encode())
    Lines(path, 2)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b"\xff"])
def test_a_damaged_json_file_is_refused_or_kept_beside(content, tmp_path, capsys):
    path = epath.Path(tmp_path / "result.json")
    assert read_json(path) == recover_json(path) == {}
    assert not capsys.readouterr().err
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"result\.json is damaged"):
        read_json(path)
    assert recover_json(path) == {}
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "result.json.damaged").read_bytes() == content


def test_starts_are_counted_also_after_damage(tmp_path):
    path = epath.Path(tmp_path) / "starts.json"
    assert [count_start(path, 3), count_start(path, 3), count_start(path, 6)] == [1, 2, 1]
    path.write_text('{"step": 6, "st')
    assert count_start(path, 6) == 1
    assert json.loads(path.read_text()) == {"step": 6, "starts": 1}
