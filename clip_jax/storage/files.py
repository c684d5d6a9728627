"""Paths on a disk or in a bucket: list files, open them, read ranges, write atomically.

Only this module distinguishes the two; the operations in a bucket are in `bucket`.
"""

import contextlib
import errno
import glob
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import IO, Any

from etils import epath

from clip_jax.errors import InputError
from clip_jax.storage import bucket
from clip_jax.storage.bucket import Stat
from clip_jax.storage.errors import Unreachable, explain, of_client, summary

AnyPath = Path | epath.Path  # the result of `as_path`

_BRACES = re.compile(r"(?<!\[)\{([^{}]*)\}")  # [{] is a brace in a name
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_MOST_FILES = 1_000_000  # maximum for one pattern
_FEW = 8  # up to so many objects of a folder are requested singly; else it is listed


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is in a bucket, not in a file system."""
    return "://" in os.fspath(path)


def as_path(path: str | os.PathLike[str]) -> AnyPath:
    """Convert a user's path to pathlib's, or a URL to epath's, which has the same methods.

    Raises InputError for an unsupported kind of URL, and for one whose package is not installed.
    """
    path = os.fspath(path)
    if not is_remote(path):
        return Path(path).expanduser()
    bucket.check(path)
    return epath.Path(path)


# ------------------------------------------------------------------------------------- reading


def is_pattern(path: str) -> bool:
    """Return whether `expand` reads signs of a pattern in a path."""
    return any(sign in path for sign in "*?[{")


def escape(path: str) -> str:
    """Quote the signs of a pattern in a path, as a part of a pattern."""
    return re.sub(r"[*?\[{]", r"[\g<0>]", path)


def expand(pattern: str) -> list[str]:
    """List the paths that match a pattern of {00000..00041}, {a,b}, *, ?, [0-9] or [!0-9]; sorted
    for the last four.

    A file whose name is the pattern is the only match. Raises InputError if nothing matches. A path
    without *, ? and [ need not exist.
    """
    paths = []
    pattern = os.path.expanduser(pattern)
    if not is_remote(pattern) and os.path.exists(pattern):
        return [pattern]
    for number, path in enumerate(_expand_braces(pattern)):
        if number == _MOST_FILES:
            raise InputError(
                f"{pattern!r} stands for more than {_MOST_FILES:,} files, the maximum; use a "
                "narrower pattern"
            )
        if not any(sign in path for sign in "*?["):
            paths.append(path)
        elif is_remote(path):
            paths += bucket.glob(path)
        else:
            paths += _glob(path)
    if not paths:
        raise InputError(f"nothing matches {pattern!r}; correct the path")
    return paths


def _glob(pattern: str) -> list[str]:
    if os.path.exists(pattern):
        return [pattern]
    folder, name = os.path.split(pattern)
    if os.path.isdir(folder):  # its name may have signs of a pattern
        pattern = os.path.join(glob.escape(folder), name)
    return sorted(glob.glob(pattern, recursive=True))


def _expand_braces(pattern: str) -> Iterator[str]:
    brace = _BRACES.search(pattern)
    if not brace:
        yield pattern
        return
    choices: Iterable[str] = brace[1].split(",")
    if numbers := _RANGE.fullmatch(brace[1]):
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") else 0
        choices = (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
    for choice in choices:
        yield from _expand_braces(pattern[: brace.start()] + choice + pattern[brace.end() :])


def stat(path: str) -> Stat:
    """Return size in bytes and time of the last change. Raises FileNotFoundError."""
    if not is_remote(path):
        status = os.stat(path)
        return status.st_size, status.st_mtime
    return bucket.stat(path)


def stats(paths: Sequence[str]) -> list[Stat | None]:
    """Return `stat` of many paths, None for missing ones; lists a bucket's folders if faster."""
    folders = Counter(path.rpartition("/")[0] for path in paths if is_remote(path))
    listed = {folder for folder, count in folders.items() if count > _FEW}
    listed_stats = {path: entry for folder in listed for path, entry in bucket.listed(folder)}

    def stat_of(path: str) -> Stat | None:
        if path.rpartition("/")[0] in listed:
            return listed_stats.get(path)
        with contextlib.suppress(FileNotFoundError):
            return stat(path)
        return None

    return [stat_of(path) for path in paths]


def walk(folder: str | os.PathLike[str]) -> Iterator[str]:
    """List all files in a folder and its subfolders, by path in alphabetical order.

    Links are followed, but no folder is walked twice.
    """
    folder = os.fspath(folder)
    if is_remote(folder):
        yield from sorted(path for path, _ in bucket.listed(folder.rstrip("/"), deep=True))
        return
    paths, seen = [], set()
    for inside, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(inside)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder that was walked
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        paths += [os.path.join(inside, name) for name in names]
    yield from sorted(paths)


def subfolders(folder: AnyPath) -> list[str]:
    """List the names of a folder's subfolders, with a single request in a bucket; unsorted."""
    if is_remote(folder):
        return bucket.subfolders(os.fspath(folder).rstrip("/"))
    return [entry.name for entry in folder.iterdir() if entry.is_dir()]


def matching(folder: AnyPath, pattern: str) -> list[AnyPath]:
    """List a folder's files that match a pattern, sorted, without dot files such as macOS's."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def check_kind(path: str | os.PathLike[str]) -> None:
    """Raise OSError for a pipe on a disk, which might block, and for a device, which might have no
    end."""
    kind = os.stat(path).st_mode
    if not (S_ISREG(kind) or S_ISDIR(kind)):
        raise OSError(errno.EINVAL, "a pipe or a device, not a file", os.fspath(path))


def open_file(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading; from a bucket, 8 MiB are fetched at a time. See `check_kind`."""
    path = os.fspath(path)
    if is_remote(path):
        return bucket.open_object(path)
    check_kind(path)
    return open(path, "rb")  # the caller closes it


def read(path: str | os.PathLike[str]) -> bytes:
    """Read a file; see `open_file`."""
    path = os.fspath(path)
    if is_remote(path):
        return bucket.read(path)
    with open_file(path) as file:
        return file.read()


def read_text(path: AnyPath) -> str:
    """Read a text file in UTF-8. Raises InputError if it is missing or in another encoding."""
    try:
        return read(path).decode("utf-8-sig")
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} cannot be read as text: byte {error.start} is not UTF-8; save the file in "
            "UTF-8."
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as text: {error}; correct the path.") from error


def read_ranges(path: str, ranges: list[tuple[int, int]]) -> list[bytes]:
    """Read ranges (offset, size) of one file; they are shorter where the file ends.

    In a bucket, ranges near each other, such as a pair's members, take one request.
    """
    if not is_remote(path):
        with open(path, "rb", buffering=0) as file:
            return [os.pread(file.fileno(), size, at) for at, size in ranges]
    return bucket.read_ranges(path, ranges)


@contextlib.contextmanager
def local(path: AnyPath) -> Generator[Path]:
    """Yield a path on disk of a file or a folder; from a bucket, a temporary copy."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / path.name
        if path.is_dir():
            copy.mkdir()
            for file in walk(path):
                target = copy / os.path.relpath(file, os.fspath(path))
                target.parent.mkdir(parents=True, exist_ok=True)
                _download(file, target)
        elif path.exists():
            _download(path, copy)
        yield copy


def _download(source: AnyPath | str, target: Path) -> None:
    with open_file(source) as file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy, bucket.BUFFER)


# ------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Generator[Path]:
    """Yield a path on disk for writing a file or a folder, which becomes `path` at the end.

    So `path` (in a folder, each file) has either the complete new content or its old one. The
    yielded path ends as `path` does; parent folders are created. Raises InputError if `path`
    cannot be written or the disk is full.
    """
    path = os.fspath(path)
    folder, name = os.path.split(path)
    with writing(path), contextlib.ExitStack() as stack:
        if is_remote(path):
            partial = Path(stack.enter_context(tempfile.TemporaryDirectory())) / name
        else:
            os.makedirs(folder or ".", exist_ok=True)
            partial = Path(folder, f".{secrets.token_hex(4)}{PARTIAL}{name}")
            stack.callback(_discard, partial)
        yield partial
        _put(partial, path)


PARTIAL = ".partial."  # part of the names of files that a kill leaves incomplete


def _put(partial: Path, path: str) -> None:
    if partial.is_dir():
        for file in sorted(partial.rglob("*")):
            if file.is_file():
                _put(file, f"{path}/{file.relative_to(partial).as_posix()}")
    elif is_remote(path):
        bucket.filesystem(path).put_file(str(partial), path)
    else:
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        os.replace(partial, path)


def _discard(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(OSError):
        partial.unlink()


def remove_partial(path: AnyPath) -> None:
    """Delete incomplete copies of a file that killed processes have left."""
    if not is_remote(path):
        for old in Path(path).parent.glob(f".*{PARTIAL}{glob.escape(path.name)}"):
            _discard(old)


def write_whole(
    path: str | os.PathLike[str], content: str | bytes | Callable[[Any], object]
) -> None:
    """Write text, bytes, or a function's output atomically; see `written_whole`."""
    if isinstance(content, str):
        content = content.encode()
    if isinstance(content, bytes) and is_remote(path):
        with writing(path):
            bucket.filesystem(os.fspath(path)).pipe_file(os.fspath(path), content)
        return
    with written_whole(path) as partial, partial.open("wb") as file:
        file.write(content) if isinstance(content, bytes) else content(file)


def create(path: str | os.PathLike[str], content: bytes) -> bool:
    """Write a file unless it exists, else return False. Of concurrent writers, one succeeds."""
    path = os.fspath(path)
    with writing(path):
        try:
            if is_remote(path):
                bucket.filesystem(path).pipe_file(path, content, mode="create")
                return True
            partial = f"{path}.{secrets.token_hex(4)}"
            write_whole(partial, content)
            try:
                os.link(partial, path)
            finally:
                os.remove(partial)
        except FileExistsError:
            return False
    return True


def exists(path: str | os.PathLike[str]) -> bool:
    """Return whether a file or a folder exists."""
    return os.path.exists(path) if not is_remote(path) else epath.Path(path).exists()


def remove(path: str | os.PathLike[str]) -> None:
    """Delete a file, if it exists."""
    with contextlib.suppress(FileNotFoundError), writing(path):
        if is_remote(path):
            bucket.filesystem(os.fspath(path)).rm_file(os.fspath(path))
        else:
            os.remove(path)


def make_folder(path: str | os.PathLike[str]) -> None:
    """Create a folder and its parents; does nothing in a bucket, which needs none."""
    if not is_remote(path):
        with writing(path):
            os.makedirs(path, exist_ok=True)


def user_cache(name: str) -> Path:
    """Return the folder of that name in the user's cache, for what can be computed again."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "clip_jax" / name


def beside(folder: AnyPath, name: str) -> Path:
    """Return a folder on disk for a cache of data derived from the files in `folder`.

    It is in `folder` itself, or if that is in a bucket, in the user's cache folder.
    """
    if not is_remote(folder):
        return Path(folder) / name
    digest = hashlib.sha256(os.fspath(folder).encode()).hexdigest()
    return user_cache(name) / digest[:24]


def move_folder(source: AnyPath, target: AnyPath) -> None:
    """Rename a folder; in a bucket, copy each object and delete the old ones."""
    with writing(target):
        if not is_remote(source):
            os.makedirs(target.parent, exist_ok=True)
            os.rename(source, target)
            return
        names = list(walk(source))
        for name in names:
            with written_whole(os.fspath(target) + name[len(os.fspath(source)) :]) as partial:
                _download(as_path(name), partial)
        for name in names:
            remove(name)


def copy_tree(source: Path, target: AnyPath) -> None:
    """Copy a folder's files to another, which may be in a bucket; each appears atomically."""
    with written_whole(target) as partial:
        shutil.copytree(source, partial)


def check_destination(path: AnyPath | None, option: str, folder: bool = True) -> None:
    """Raise InputError if the folder (or file) that a user chose for output cannot be written.

    Called before the work starts whose result is written there. None passes.
    """
    if path is None:
        return
    above: AnyPath = path if folder else path.parent
    if not folder and path.is_dir():
        raise InputError(f"{path} is a folder; {option} takes a file.")
    if is_remote(above):
        with writing(path):
            bucket.check_bucket(os.fspath(path))
        return
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        reason = "" if above == path else f", and {path} is below it"
        raise InputError(f"{above} is a file{reason}; {option} needs a folder.")
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise InputError(
            f"{above} cannot be written ({error.strerror}); choose another {option}."
        ) from error


_ALL_USED = (errno.ENOSPC, errno.EDQUOT)
_NOT_TO_BE_WRITTEN = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Generator[None]:
    """Convert errors of a full disk, a read-only path or a bucket to one message."""
    try:
        yield
    except (InputError, Unreachable, FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        if meaning := is_remote(path) and explain(error, f"{path} cannot be written"):
            raise meaning from error
        if is_full(error):
            raise InputError(
                f"no space left for {path}: free some space and run the command again."
            ) from error
        if isinstance(error, OSError) and error.errno in _NOT_TO_BE_WRITTEN:
            raise InputError(f"{path} cannot be written: {error.strerror}.") from error
        if of_client(error):
            raise InputError(f"{path} cannot be written: {summary(error)}") from error
        raise


def is_full(error: Exception) -> bool:
    """Return whether a disk is full; TensorStore, used by Orbax, says so only in its message."""
    if isinstance(error, OSError):
        return error.errno in _ALL_USED
    return any(os.strerror(number) in str(error) for number in _ALL_USED)
