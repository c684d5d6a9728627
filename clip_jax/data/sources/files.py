"""Files on this machine or in a bucket (anything fsspec reads), by pattern and by byte range."""

import glob
import itertools
import logging
import os
import re
from collections.abc import Iterable
from typing import Any, Literal

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_SHOWN = 5
_NEAR = 1 << 16  # bytes between ranges: sooner transferred than asked for in a second request

BadShards = Literal["error", "skip"]

_log = logging.getLogger(__name__)


def is_remote(path: str) -> bool:
    return "://" in path


def _filesystem(path: str) -> Any:
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)[0]
    except ImportError as error:  # fsspec says which package reads this kind of bucket
        raise ValueError(f"{path} cannot be read: {error}") from error


def expand(pattern: str) -> list[str]:
    """Paths that a pattern stands for: {00000..00041}, {a,b}, *, ?; sorted where it has * or ?.

    ValueError if it stands for nothing. A path without * and ? need not exist.
    """
    paths = []
    for path in _expand_braces(os.path.expanduser(pattern)):
        if not any(sign in path for sign in "*?"):
            paths.append(path)
        elif is_remote(path):
            system = _filesystem(path)
            paths += sorted(system.unstrip_protocol(found) for found in system.glob(path))
        else:
            paths += sorted(glob.glob(path, recursive=True))
    if not paths:
        raise ValueError(f"nothing matches {pattern!r}; set data.source.path to files that exist")
    return paths


def _expand_braces(pattern: str) -> Iterable[str]:
    found = _BRACES.search(pattern)
    if not found:
        return [pattern]
    inside, (start, end) = found[1], found.span()
    numbers = _RANGE.fullmatch(inside)
    if numbers:
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = inside.split(",")
    return itertools.chain.from_iterable(
        _expand_braces(pattern[:start] + choice + pattern[end:]) for choice in choices
    )


def listed(names: Iterable[str]) -> str:
    """The first few of many names, for a message."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def settle(pattern: str, shards: Iterable[str], what: str, bad_shards: BadShards) -> None:
    """Name shards that cannot be read (each with its reason, if any): ValueError, or a warning."""
    shards = list(shards)
    if not shards:
        return
    message = f"{len(shards)} shards of data.source.path={pattern} are {what}: {listed(shards)}"
    if bad_shards == "error":
        raise ValueError(f"{message}. Repair them, or set data.source.bad_shards to skip")
    _log.warning("%s; skipped", message)


def stat(path: str) -> tuple[int, float]:
    """Size in bytes and, on this machine, time of the last change. FileNotFoundError."""
    if is_remote(path):
        return int(_filesystem(path).size(path)), 0.0
    found = os.stat(path)
    return found.st_size, found.st_mtime


def open_file(path: str) -> Any:
    """Open for reading from any place; of a bucket, 8 MiB at a time are fetched."""
    if is_remote(path):
        return _filesystem(path).open(path, "rb", block_size=1 << 23)
    return open(path, "rb")  # the caller closes it


def read_ranges(path: str, ranges: list[tuple[int, int]]) -> list[bytes]:
    """Bytes (offset, size) of one file; fewer where the file ends sooner.

    Of a bucket in one request where the ranges are near each other, as a pair's members are.
    """
    if is_remote(path):
        system = _filesystem(path)
        start, end = min(at for at, _ in ranges), max(at + size for at, size in ranges)
        if end - start <= sum(size for _, size in ranges) + _NEAR:
            whole = system.cat_file(path, start=start, end=end)
            return [whole[at - start : at - start + size] for at, size in ranges]
        return [system.cat_file(path, start=at, end=at + size) for at, size in ranges]
    with open(path, "rb", buffering=0) as file:
        return [os.pread(file.fileno(), size, at) for at, size in ranges]


def write_whole(path: str, write: Any) -> None:
    """Call `write(file)` so that the path holds all of what it writes, or what it held before."""
    if is_remote(path):
        with _filesystem(path).open(path, "wb") as file:  # appears when closed
            write(file)
        return
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as file:
            write(file)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
