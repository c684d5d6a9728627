"""JSON and JSON Lines files of a command, which are recovered if a kill left them incomplete."""

import json
import os
from collections.abc import Mapping
from typing import Any

from clip_jax.clock import CLOCK, Clock
from clip_jax.display import say
from clip_jax.errors import InputError
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

_UPLOAD_SECONDS = 60  # between uploads of a file in a bucket, which cannot append
_LARGEST = 64 << 20  # bytes of a JSON file
_MOST_LINES = 4 << 30  # bytes of a JSONL file


def parse(data: bytes) -> dict[str, Any] | None:
    """Parse a JSON object; None if the bytes are not one, or nest too deeply for the parser."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def content_of(path: AnyPath, most: int = _LARGEST) -> bytes:
    """Read a file. Raises InputError if it has more than `most` bytes or cannot be read."""
    try:
        size, _ = files.stat(os.fspath(path))
        if size > most:
            raise InputError(
                f"{path} has {size:,} bytes; at most {most:,} are expected. Restore a copy."
            )
        return files.read(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path} cannot be read: {reason}. Restore a file that can.") from error


def read_json(path: AnyPath, *names: str, advice: str = "Restore a copy.") -> dict[str, Any]:
    """Read a command's JSON object, {} if there is no file.

    Raises InputError, with the advice, if it is not a JSON object or lacks one of the names.
    """
    if not path.exists():
        return {}
    value = parse(content_of(path))
    if value is None or not value.keys() >= {*names}:
        having = f" with {', '.join(names)}" if names else ""
        raise InputError(f"{path} is damaged: it is not a JSON object{having}. {advice}")
    return value


def check_version(content: Mapping[str, Any], reads: int, where: AnyPath | str) -> None:
    """Raise InputError if a newer clip_jax wrote an object: its `version` is above `reads`.

    An object without one has version 1. So a format needs the entry only once it has changed such
    that earlier code would misread it.
    """
    version = content.get("version", 1)
    if type(version) is not int or version < 1:
        raise InputError(
            f"{where} has version={version!r:.99}; it must be a positive integer. Restore a copy."
        )
    if version > reads:
        raise InputError(
            f"{where} was written by a newer clip_jax (format {version}; this one reads up to "
            f"{reads}): update clip_jax."
        )


def recover_json(path: AnyPath, *, saves: bool = True) -> dict[str, Any]:
    """Read a JSON object that is about to be rewritten; {} if it is damaged.

    The process that `saves` keeps a damaged file under another name.
    """
    try:
        return read_json(path, advice="It is created again; the damaged file is saved as")
    except InputError as error:
        if saves:
            say(f"{error} {_keep_damaged(path)}")
        return {}


def _keep_damaged(path: AnyPath) -> AnyPath:
    copy = path.with_name(path.name + ".damaged")
    files.write_whole(copy, content_of(path, _MOST_LINES))
    return copy


class Lines:
    """A JSONL file to which rows with a `step` are appended.

    A resumed run first drops the rows after `resume_step`, which it will write again; without one,
    only a line that a kill left incomplete is dropped. In a bucket, which cannot append, the rows
    are kept in memory, and the file is rewritten by `flush` or once a minute.
    """

    def __init__(
        self,
        path: AnyPath,
        resume_step: int | None,
        clock: Clock = CLOCK,
    ) -> None:
        self._path, self._appends = path, not files.is_remote(path)
        self._lines = []
        self._clock, self._written = clock, clock.now()
        if path.exists():
            rows, damaged = _rows(content_of(path, _MOST_LINES))
            earlier = [row for row in rows if resume_step is None or row["step"] <= resume_step]
            self._lines = [json.dumps(row) + "\n" for row in earlier]
            if damaged:
                copy = _keep_damaged(path)
                say(f"{path}: {damaged} damaged lines are left out; the old file is now {copy}")
            files.write_whole(path, "".join(self._lines))
        if self._appends:
            self._lines = []

    def write(self, *rows: dict[str, Any]) -> None:
        lines = [json.dumps(row) + "\n" for row in rows]
        if self._appends:
            with files.writing(self._path), self._path.open("a") as file:
                file.writelines(lines)
            return
        self._lines += lines
        if self._clock.now() > self._written + _UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write all rows to the file."""
        if self._lines:
            files.write_whole(self._path, "".join(self._lines))
        self._written = self._clock.now()


def read_rows(path: AnyPath) -> list[dict[str, Any]]:
    """Read the complete rows of a JSONL file; none if there is no file."""
    return _rows(content_of(path, _MOST_LINES))[0] if path.exists() else []


def _rows(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return the rows, and the number of damaged lines, except an incomplete last one."""
    complete, _, _ = content.rpartition(b"\n")
    lines = [parse(line) or {} for line in complete.splitlines()]
    rows = [row for row in lines if isinstance(row.get("step"), int)]
    return rows, len(lines) - len(rows)
