"""A path on disk or in a bucket: list, open, ranges, written whole. The only room that asks which.

What it does of a bucket is in `bucket`.
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
from typing import IO, Any

from etils import epath

from clip_jax.errors import InputError
from clip_jax.storage import bucket
from clip_jax.storage.bucket import Stat
from clip_jax.storage.errors import Unreachable, explain, of_client, summary

AnyPath = Path | epath.Path  # what `place` makes of what a person gives

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_MOST_FILES = 1_000_000  # of one pattern
_FEW = 8  # objects of one folder, up to which each is asked for; above, the folder is listed


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Say whether a path is a bucket's, rather than a file system's."""
    return "://" in os.fspath(path)


def as_path(path: str | os.PathLike[str]) -> AnyPath:
    """Make of what a person gave a path that joins, globs, opens: pathlib's, or for a URL epath's.

    Raises InputError for a kind of URL that nothing here reads, and one whose package is not
    installed.
    """
    path = os.fspath(path)
    if not is_remote(path):
        return Path(path).expanduser()
    bucket.check(path)
    return epath.Path(path)


# ------------------------------------------------------------------------------------- reading


def expand(pattern: str) -> list[str]:
    """Paths that a pattern stands for: {00000..00041}, {a,b}, *, ?; sorted where it has * or ?.

    Raises InputError if it stands for nothing. A path without * and ? need not exist.
    """
    paths = []
    for number, path in enumerate(_expand_braces(os.path.expanduser(pattern))):
        if number == _MOST_FILES:
            raise InputError(
                f"{pattern!r} stands for more than {_MOST_FILES:,} files, the most that are read"
            )
        if not any(sign in path for sign in "*?"):
            paths.append(path)
        elif is_remote(path):
            paths += bucket.glob(path)
        else:
            paths += sorted(glob.glob(path, recursive=True))
    if not paths:
        raise InputError(f"nothing matches {pattern!r}")
    return paths


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
    """Size in bytes and time of the last change. FileNotFoundError."""
    if not is_remote(path):
        status = os.stat(path)
        return status.st_size, status.st_mtime
    return bucket.stat(path)


def stats(paths: Sequence[str]) -> list[Stat | None]:
    """Ask for many at once, None for what is not there; folders of bucket are listed instead."""
    folders = Counter(path.rpartition("/")[0] for path in paths if is_remote(path))
    listed = {folder for folder, count in folders.items() if count > _FEW}
    known = {path: entry for folder in listed for path, entry in bucket.listed(folder)}

    def one(path: str) -> Stat | None:
        if path.rpartition("/")[0] in listed:
            return known.get(path)
        with contextlib.suppress(FileNotFoundError):
            return stat(path)
        return None

    return [one(path) for path in paths]


def walk(folder: str | os.PathLike[str]) -> Iterator[str]:
    """All files in a folder and the folders in it, by path in alphabetical order.

    Links are followed, but no folder is walked twice.
    """
    folder = os.fspath(folder)
    if is_remote(folder):
        yield from sorted(path for path, _ in bucket.listed(folder.rstrip("/"), deep=True))
        return
    paths, seen = [], set()
    for inside, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(inside)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        paths += [os.path.join(inside, name) for name in names]
    yield from sorted(paths)


def matching(folder: AnyPath, pattern: str) -> list[AnyPath]:
    """List a folder's files that match a pattern, sorted; dot files, such as macOS's, are not."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def open_file(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open for reading from any place; of a bucket, 8 MiB at a time are fetched."""
    path = os.fspath(path)
    if is_remote(path):
        return bucket.open_object(path)
    return open(path, "rb")  # the caller closes it


def read(path: str | os.PathLike[str]) -> bytes:
    """All bytes of a file."""
    path = os.fspath(path)
    return bucket.read(path) if is_remote(path) else Path(path).read_bytes()


def read_ranges(path: str, ranges: list[tuple[int, int]]) -> list[bytes]:
    """Bytes (offset, size) of one file; fewer where the file ends sooner.

    Of a bucket in one request where the ranges are near each other, as a pair's members are.
    """
    if not is_remote(path):
        with open(path, "rb", buffering=0) as file:
            return [os.pread(file.fileno(), size, at) for at, size in ranges]
    return bucket.read_ranges(path, ranges)


@contextlib.contextmanager
def local(path: AnyPath) -> Generator[Path]:
    """A file or a whole folder as a path on disk; what is in a bucket is copied for a while."""
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
    """A path on disk to write a file or a folder of files to, which become `path` at the end.

    So `path` holds all of it, or what it held before; each file of a folder does. The path given
    ends as `path` does; folders above are made. Raises InputError where nothing can be written or
    the disk is full.
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


PARTIAL = ".partial."  # stands in the names of files that a kill leaves half written


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
    """Delete what killed processes have left of a file that they were writing."""
    if not is_remote(path):
        for old in Path(path).parent.glob(f".*{PARTIAL}{glob.escape(path.name)}"):
            _discard(old)


def write_whole(
    path: str | os.PathLike[str], content: str | bytes | Callable[[Any], object]
) -> None:
    """Write text, bytes, or what a function writes to the file given; see `written_whole`."""
    if isinstance(content, str):
        content = content.encode()
    if isinstance(content, bytes) and is_remote(path):
        with writing(path):
            bucket.filesystem(os.fspath(path)).pipe_file(os.fspath(path), content)
        return
    with written_whole(path) as partial, partial.open("wb") as file:
        file.write(content) if isinstance(content, bytes) else content(file)


def create(path: str | os.PathLike[str], content: bytes) -> bool:
    """Write a file that nobody has written yet; False where it is there. Of several, one wins."""
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
    """Say whether there is a file or a folder."""
    return os.path.exists(path) if not is_remote(path) else epath.Path(path).exists()


def remove(path: str | os.PathLike[str]) -> None:
    """Delete a file, if it is there."""
    with contextlib.suppress(FileNotFoundError), writing(path):
        if is_remote(path):
            bucket.filesystem(os.fspath(path)).rm_file(os.fspath(path))
        else:
            os.remove(path)


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder and those above it; a bucket has none to make."""
    if not is_remote(path):
        with writing(path):
            os.makedirs(path, exist_ok=True)


def beside(folder: AnyPath, name: str) -> Path:
    """A folder on disk for what is made of the files in another and can be made anew.

    It lies in that one, or for a bucket's in the user's cache folder.
    """
    if not is_remote(folder):
        return Path(folder) / name
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(os.fspath(folder).encode()).hexdigest()
    return home / "clip_jax" / name / digest[:24]


def move_folder(source: AnyPath, target: AnyPath) -> None:
    """Give a folder another name, in the same place; in a bucket each object is copied there."""
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
    """Copy a folder's files into another, which may be in a bucket; each appears whole."""
    with written_whole(target) as partial:
        shutil.copytree(source, partial)


def check_destination(path: AnyPath | None, option: str, folder: bool = True) -> None:
    """Raise InputError where no file can be written to a folder, or as a file, that a person chose.

    Asked before the work whose result goes there. None passes.
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
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
)  # fmt: skip


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Generator[None]:
    """Turn a full disk, a place not to be written and a bucket's refusal into one message."""
    try:
        yield
    except (InputError, Unreachable, FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        if meaning := is_remote(path) and explain(error, f"{path} cannot be written"):
            raise meaning from error
        if is_full(error):
            raise InputError(f"no space left for {path}: free some and go on.") from error
        if isinstance(error, OSError) and error.errno in _NOT_TO_BE_WRITTEN:
            raise InputError(f"{path} cannot be written: {error.strerror}.") from error
        if of_client(error):
            raise InputError(f"{path} cannot be written: {summary(error)}") from error
        raise


def is_full(error: Exception) -> bool:
    """Say whether a disk is full; tensorstore, which writes Orbax's arrays, has only words."""
    if isinstance(error, OSError):
        return error.errno in _ALL_USED
    return any(os.strerror(number) in str(error) for number in _ALL_USED)
