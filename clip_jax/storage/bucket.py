"""Objects in buckets (gs:// and s3://): list them, read ranges, upload.

Reading uses obstore, which takes half of gcsfs' and a third of s3fs' CPU time for a request,
releases the GIL and retries. Writing uses gcsfs and s3fs, as Orbax's paths do.
"""

import asyncio
import bisect
import contextlib
import errno
import fnmatch
import functools
import importlib.util
import itertools
import os
import re
import statistics
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from datetime import timedelta
from typing import Any

from clip_jax.clock import CLOCK
from clip_jax.errors import InputError
from clip_jax.storage.errors import LOGIN, explain, of_client, summary

_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # besides obstore; each scheme has an extra

NEAR = 1 << 16  # bytes between ranges that transfer faster than a second request takes
BUFFER = 1 << 23  # bytes fetched at a time when an object is read from front to back
REQUEST_SECONDS = 60  # timeout of one request, including its body
RETRY_SECONDS = 180  # timeout of a request with all its retries
_RETRIES = 20  # with random pauses that double from 0.1 to 15 s: about the same time
_LATE = (1.0, 4.0)  # repeat a request after 1 s, or 4 times the usual time
_AT_ONCE = 4  # maximum concurrent requests for one range
_USUAL = 64  # newest answers, whose median time is the usual time

_lock = threading.Lock()
_requests = _bytes = 0


Stat = tuple[int, float]  # bytes, and time of the last change


def stat(path: str) -> Stat:
    """Return size in bytes and time of the last change. Raises FileNotFoundError."""
    import obstore

    store, key = _store(path)
    with reading(path):
        return _stat(obstore.head(store, key))


def read(path: str) -> bytes:
    """Read an object."""
    import obstore

    store, key = _store(path)
    with reading(path):
        content = bytes(obstore.get(store, key).bytes())
    count(len(content))
    return content


def read_ranges(path: str, ranges: list[tuple[int, int]]) -> list[bytes]:
    """Read ranges (offset, size), near ones in one request; shorter at the object's end."""
    import obstore

    store, key = _store(path)
    spans: list[list[int]] = []  # start and end of each request
    for at, size in sorted(ranges):
        if not size:  # no request: the client refuses an empty range
            continue
        if spans and at <= spans[-1][1] + NEAR:
            spans[-1][1] = max(spans[-1][1], at + size)
        else:
            spans.append([at, at + size])
    starts, ends = [start for start, _ in spans], [end for _, end in spans]
    with reading(path):
        try:
            answers = _answers(store, key, starts, ends)
        except Exception:
            total = stat(path)[0]
            if ends[-1] <= total:
                raise
            answers = [
                obstore.get_range(store, key, start=start, end=min(end, total))
                if start < total
                else b""
                for start, end in spans
            ]
    parts = [bytes(part) for part in answers]
    for part in parts:
        count(len(part))

    def cut(at: int, size: int) -> bytes:
        number = bisect.bisect(starts, at) - 1
        return parts[number][at - starts[number] : at - starts[number] + size]

    return [cut(at, size) if size else b"" for at, size in ranges]


def _answers(store: Any, key: str, starts: list[int], ends: list[int]) -> list[Any]:
    """Request all ranges concurrently."""

    async def all_of_them() -> list[Any]:
        requests = (_range(store, key, *span) for span in zip(starts, ends, strict=True))
        return await asyncio.gather(*requests)

    return asyncio.run_coroutine_threadsafe(all_of_them(), _loop(os.getpid())).result()


async def _range(store: Any, key: str, start: int, end: int) -> Any:
    """Request one range, and request it again if the answer is late; use the first answer.

    The client itself retries, after pauses, if a request fails or its answer is incomplete.
    """
    import obstore

    def ask() -> "asyncio.Future[Any]":
        return asyncio.ensure_future(obstore.get_range_async(store, key, start=start, end=end))

    begun, requests = CLOCK.now(), {ask()}
    usual = statistics.median(_seconds) if _seconds else 0.0
    late = max(_LATE[0], _LATE[1] * usual)
    try:
        while True:
            done, waiting = await CLOCK.first(requests, late if len(requests) < _AT_ONCE else None)
            good = next((task for task in done if task.exception() is None), None)
            if good is not None or (done and not waiting):
                _seconds.append(CLOCK.now() - begun)
                return (good or done.pop()).result()
            if not done:
                late *= 2
            requests = waiting if done else waiting | {ask()}
    finally:
        for task in requests:
            task.cancel()


_seconds: deque[float] = deque(maxlen=_USUAL)  # duration of the newest answers


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """Start the event loop that waits for answers, in a separate thread of this process."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="bucket").start()
    return loop


def glob(pattern: str) -> list[str]:
    """List objects that match; *, ? and [0-9] match within a folder, **/ any folders or none.

    An object whose name is the pattern is the only match.
    """
    folder = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    wanted = pattern[len(folder) + 1 :].split("/")
    paths = [path for path, _ in listed(folder, deep=len(wanted) > 1)]
    if pattern in paths:
        return [pattern]
    names = {path: path[len(folder) + 1 :].split("/") for path in paths}
    return sorted(
        path
        for path, parts in names.items()
        if not any(part.startswith(".") for part in parts) and _matches(parts, wanted)
    )


def _matches(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    """Return whether the parts of a path match those of a pattern."""
    if not (parts and wanted):
        return not parts and not wanted
    if wanted[0] == "**" and wanted[1:]:
        return any(_matches(parts[start:], wanted[1:]) for start in range(len(parts)))
    return fnmatch.fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


def requested() -> tuple[int, int]:
    """Return the requests and bytes read by this process since the last call."""
    global _requests, _bytes
    with _lock:
        counts = _requests, _bytes
        _requests = _bytes = 0
    return counts


def count(size: int) -> None:
    """Count a request and its bytes."""
    global _requests, _bytes
    with _lock:
        _requests += 1
        _bytes += size


def open_object(path: str) -> Any:
    """Open an object for reading, with read-ahead. Raises FileNotFoundError."""
    from fsspec.spec import AbstractBufferedFile

    class Object(AbstractBufferedFile):
        def _fetch_range(self, start: int, end: int) -> bytes:
            return read_ranges(path, [(start, end - start)])[0]

    return Object(None, path, block_size=BUFFER, size=stat(path)[0])


@contextlib.contextmanager
def reading(path: str) -> Generator[None]:
    """Convert errors of a bucket's client to OSError, InputError or Unreachable."""
    try:
        yield
    except FileNotFoundError as error:  # the client's own message has twenty lines
        raise FileNotFoundError(errno.ENOENT, "no such object", path) from error
    except Exception as error:
        if (meaning := explain(error, f"{path} cannot be read")) is not None:
            raise meaning from error
        if isinstance(error, OSError) or not of_client(error):
            raise
        raise OSError(errno.EIO, summary(error), path) from error


def listed(folder: str, deep: bool = False) -> Iterator[tuple[str, Stat]]:
    """Yield the objects in a folder, with `deep` also in its subfolders; unsorted."""
    import obstore

    store, key = _store(folder)
    root = folder.removesuffix(key)
    with reading(folder):
        if deep:
            entries = itertools.chain.from_iterable(obstore.list(store, key or None))
        else:
            entries = obstore.list_with_delimiter(store, key or None)["objects"]
        for entry in entries:
            yield f"{root.rstrip('/')}/{entry['path']}", _stat(entry)


def subfolders(folder: str) -> list[str]:
    """List the names of a folder's subfolders; unsorted."""
    import obstore

    store, key = _store(folder)
    with reading(folder):
        prefixes = obstore.list_with_delimiter(store, key or None)["common_prefixes"]
    return [prefix.rstrip("/").rpartition("/")[2] for prefix in prefixes]


def _stat(entry: Any) -> Stat:
    return entry["size"], entry["last_modified"].timestamp()


def check(path: str) -> str:
    """Return a URL's scheme. Raises InputError if it is unsupported or its client not installed."""
    scheme = path.partition("://")[0]
    if scheme not in _PACKAGES:
        raise InputError(f"{path}: {scheme}:// is not supported; use a path, gs:// or s3://.")
    if any(importlib.util.find_spec(name) is None for name in (_PACKAGES[scheme], "obstore")):
        raise InputError(f"{path} needs more packages: pip install 'clip-jax-pods[{scheme}]'.")
    import fsspec.config

    # Other processes write there too, so listings must not be cached, nor by Orbax's paths.
    fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
    return scheme


def filesystem(path: str) -> Any:
    """Return the client that writes. Raises InputError at once without credentials."""
    import fsspec

    if not _may_write(path.partition("://")[0]):
        raise InputError(f"{path} cannot be written: no credentials. {LOGIN}")
    return fsspec.filesystem(check(path))


def check_bucket(path: str) -> None:
    """Raise InputError if the bucket of a URL does not exist."""
    client, (name, _, key) = filesystem(path), path.partition("://")[2].partition("/")
    try:  # only below the path: some users may not list the bucket
        if path.startswith("s3://"):
            client.call_s3("list_objects_v2", Bucket=name, Prefix=key, MaxKeys=1)
        else:
            client.call("GET", "b/{}/o", name, prefix=key, maxResults=1)
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no bucket {name!r}; correct its name.") from error


@functools.cache
def _may_write(scheme: str) -> bool:
    if scheme == "s3":
        import botocore.session

        return botocore.session.Session().get_credentials() is not None
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return True
    import google.auth

    try:
        google.auth.default()
    except google.auth.exceptions.DefaultCredentialsError:
        return False
    return True


def _store(url: str) -> tuple[Any, str]:
    """Return the client that reads a bucket, and the object's name in it."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    return _bucket(scheme, bucket, os.getpid()), key


@functools.cache
def _bucket(scheme: str, bucket: str, process: int) -> Any:
    """Open a bucket, once in each process, since threads do not survive a fork."""
    check(f"{scheme}://{bucket}")
    from obstore import store

    options: dict[str, Any] = {"timeout": timedelta(seconds=REQUEST_SECONDS)}
    retry = {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=RETRY_SECONDS)}
    how: dict[str, Any] = {"client_options": options, "retry_config": retry}
    if scheme == "s3":
        options["allow_http"] = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
        return store.S3Store(bucket, **_aws(), **how)
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        options["allow_http"] = True
        return store.GCSStore(bucket, base_url=emulator, skip_signature=True, **how)
    import google.auth
    from obstore.auth.google import GoogleCredentialProvider

    try:
        return store.GCSStore(bucket, credential_provider=GoogleCredentialProvider(), **how)
    except google.auth.exceptions.DefaultCredentialsError:
        return store.GCSStore(bucket, skip_signature=True, **how)  # it may be public


def _aws() -> dict[str, Any]:
    """Return region and credentials as botocore and s3fs do: variables, ~/.aws, a role."""
    import botocore.session

    session = botocore.session.Session()
    region = {"region": name} if (name := session.get_config_variable("region")) else {}
    credentials = session.get_credentials()
    if credentials is None:
        return region | {"skip_signature": True}  # it may be public

    def provide() -> Any:
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": getattr(credentials, "_expiry_time", None),
        }

    return region | {"credential_provider": provide}
