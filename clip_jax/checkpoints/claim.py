"""Exclusive access to a run directory, and a count of starts without progress."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Any

from etils import epath

from clip_jax import processes
from clip_jax.clock import CLOCK, Clock
from clip_jax.display import say
from clip_jax.errors import InputError
from clip_jax.storage import files
from clip_jax.storage.errors import Unreachable
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import content_of, parse

LEASE_SECONDS = 45  # without renewal, after which a lease in a bucket has expired
RENEW_SECONDS = 10
_OUT_OF_REACH = (OSError, InputError, Unreachable)
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class Claim(contextlib.ExitStack):
    """Exclusive claim of one training or watcher on a folder, from `take` until the context exits.

    On a disk it is a file lock, which ends with its process. In a bucket it is a lease: a chain of
    numbered objects, each of which only one process can create. The creator of the newest holds the
    lease, and renews it by creating the next every few seconds. An expired lease is taken over.
    """

    def __init__(self, workdir: epath.Path, work: str = "training", clock: Clock = CLOCK) -> None:
        super().__init__()
        self._workdir, self._work, self._clock = workdir, work, clock

    def take(self) -> None:
        """Claim the directory for all processes of the run. InputError if another run has it."""
        processes.gather("")  # connects all first: JAX's timeout for that is below a lease's
        processes.together(self._take, InputError)

    def _take(self) -> None:
        if processes.is_lead():
            take = _lease if files.is_remote(self._workdir) else _lock
            self.callback(take(self._workdir, self._work, self._clock))


def is_locked(workdir: AnyPath) -> bool:
    """Return whether a process on this machine holds the file lock of a run directory."""
    path = workdir / "lock"
    if files.is_remote(path) or not path.exists():
        return False
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "id": secrets.token_hex(8)}


def _taken(workdir: epath.Path, work: str, holder: dict[str, Any]) -> InputError:
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    or_else = ", or choose another --workdir for this run" if work == "training" else ""
    return InputError(f"{who} is {work} in {workdir}; stop it first{or_else}.")


def _lock(workdir: epath.Path, work: str, _: Clock) -> Callable[[], None]:
    """Lock a file and write the holder into it; return the function that unlocks it."""
    files.make_folder(workdir)
    path = workdir / "lock"
    with files.writing(path):
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:  # some cluster file systems have none: run without a lock
            return lambda: os.close(number)
        os.close(number)
        raise _taken(workdir, work, parse(path.read_bytes()) or {}) from error
    with files.writing(path):
        os.ftruncate(number, 0)
        os.pwrite(number, json.dumps(_me()).encode(), 0)
    return lambda: os.close(number)


def _lease(workdir: epath.Path, work: str, clock: Clock) -> Callable[[], None]:
    """Take the lease when it is free; return the function that releases it."""
    folder, me = f"{workdir}/lease", _me()
    number, holder = _newest(folder)
    free = not holder or holder.get("released")
    if not free:
        say(
            f"{workdir} is leased to process {holder['pid']} on {holder['host']}; if that is "
            f"dead, this {work} begins within {LEASE_SECONDS} seconds."
        )
    since = clock.now()
    while not free or not _extend(folder, number + 1, me):
        if not free:
            clock.sleep(RENEW_SECONDS / 5)
        seen = number
        number, holder = _newest(folder)
        free = holder.get("released") or clock.now() > since + LEASE_SECONDS
        if number != seen and not holder.get("released"):
            raise _taken(workdir, work, holder)
    return _Renewal(folder, number + 1, me, work, clock).end


def _numbers(folder: str) -> list[int]:
    return [int(path.rpartition("/")[2]) for path in files.walk(folder)]


def _newest(folder: str) -> tuple[int, dict[str, Any]]:
    """Return number and content of the newest object; 0 and {} where there is none."""
    while True:
        number = max(_numbers(folder), default=0)
        if not number:
            return 0, {}
        with contextlib.suppress(FileNotFoundError):  # the next one came while we looked
            return number, json.loads(files.read(f"{folder}/{number:012d}"))


def _extend(folder: str, number: int, content: dict[str, Any]) -> bool:
    """Create the next object and remove the previous one; False if another process was faster."""
    path = f"{folder}/{number:012d}"
    if not files.create(path, json.dumps(content).encode()):
        existing = parse(files.read(path)) or {}
        if existing.get("id") != content["id"]:  # else ours: a response was lost, and we retried
            return False
    if max(_numbers(folder)) > number:  # another process went further and removed this number
        files.remove(path)
        return False
    files.remove(f"{folder}/{number - 1:012d}")
    return True


class _Renewal:
    """A thread that renews the lease until `end`, and ends the process if the lease is lost."""

    def __init__(
        self, folder: str, number: int, me: dict[str, Any], work: str, clock: Clock
    ) -> None:
        self._folder, self._number, self._me, self._work = folder, number, me, work
        self._over, self._clock = threading.Event(), clock
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._clock.wait(self._over, RENEW_SECONDS):
            try:
                is_extended = _extend(self._folder, self._number + 1, self._me)
            except _OUT_OF_REACH:  # tried again at the next renewal
                continue
            if not is_extended:
                say(
                    f"another {self._work} has taken over {self._folder.rpartition('/')[0]}, since "
                    f"this one did not renew its lease for {LEASE_SECONDS} seconds."
                )
                os._exit(2)
            self._number += 1

    def end(self) -> None:
        """Release the lease."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(*_OUT_OF_REACH):  # then it expires
            _extend(self._folder, self._number + 1, self._me | {"released": True})


def count_start(path: AnyPath, step: int) -> int:
    """Record a start at `step` in a file; return the number of starts in a row at that step."""
    earlier = (parse(content_of(path)) if path.exists() else None) or {}
    starts = earlier.get("starts", 0) + 1 if earlier.get("step") == step else 1
    files.write_whole(path, json.dumps({"step": step, "starts": starts}))
    return starts
