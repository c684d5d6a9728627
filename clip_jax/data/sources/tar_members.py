"""The members of a tar, by their headers (ustar, GNU and pax), and the samples they form."""

import functools
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from clip_jax.data.images import SUFFIXES
from clip_jax.errors import InputError

IMAGES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
TEXTS = ("txt", "json", "cls")
MORE = ("paug.json", "syn.json", "npz", "pth.gz")  # of reinforced sets: they belong to a pair

_BLOCK = 512
_MAX_HEADER = 1 << 20  # maximum bytes of a long name; more means damage


class Member(NamedTuple):
    """A regular file in a tar."""

    name: bytes
    start: int  # of its first header
    offset: int  # of its content
    size: int
    end: int  # where the next member's headers start


class Sample(NamedTuple):
    """Members with one name, at most one of each kind."""

    key: bytes
    start: int
    end: int
    spans: dict[str, tuple[int, int]]  # offset and size by kind: image, or an extension


def samples(members: Iterable[Member], ignored: list[bytes] | None = None) -> Iterator[Sample]:
    """Group neighbouring members to samples; add other members, except dot files, to `ignored`.

    Of images of several kinds in a sample, such as a mask beside the photo, the first in `IMAGES`
    is used.
    """
    last_key = b""
    start = 0
    end = 0
    spans: dict[str, tuple[int, int]] = {}
    rank = -1  # of the image in IMAGES
    for name, begin, offset, size, after in members:
        folder, _, file = name.rpartition(b"/")
        stem, _, extension = file.partition(b".")
        kind, rank_of_member = _kind(extension)
        if not stem or kind is None:
            if ignored is not None and stem:
                ignored.append(name)
            continue
        key = folder + b"/" + stem if folder else stem
        is_image_beside = kind == "image" and kind in spans and rank_of_member != rank
        beside = key == last_key and is_image_beside
        if key != last_key or (kind in spans and not beside):
            if spans.keys() - MORE:
                yield Sample(last_key, start, end, spans)
            last_key = key
            start = begin
            spans = {}
        end = after
        if beside and ignored is not None:
            ignored.append(name)
        if not (beside and rank_of_member > rank):
            spans[kind] = (offset, size)
            if kind == "image":
                rank = rank_of_member
    if spans.keys() - MORE:
        yield Sample(last_key, start, end, spans)


@functools.lru_cache(maxsize=256)
def _kind(extension: bytes) -> tuple[str | None, int]:
    """Return the kind of a member, and for an image the index of its extension in `IMAGES`."""
    name = extension.lower().decode("ascii", "replace")
    if name in IMAGES:
        return "image", IMAGES.index(name)
    return (name if name in TEXTS + MORE else None), -1


def members(
    read: Callable[[int, int], bytes], start: int, end: int, size_of_file: int, at_once: int
) -> Iterator[Member]:
    """Yield the members from a header at `start` to before `end`, or to the end mark.

    `read(offset, size)` is called for `at_once` bytes at a header. Raises InputError if the tar is
    damaged.
    """
    at, of_member, long_name, long_size = start, start, None, None
    ahead, begin = b"", start  # bytes of the file, and where they start

    while at < end:
        if not begin <= at <= begin + len(ahead) - _BLOCK:
            ahead, begin = read(at, at_once), at
        header = ahead[at - begin : at - begin + _BLOCK]
        if len(header) < _BLOCK:
            raise InputError(f"truncated: ends at byte {size_of_file} without an end mark")
        if not header.strip(b"\0"):
            return
        if not _checksum_holds(header):
            raise InputError(f"damaged: no tar header at byte {at}")
        kind = header[156:157]
        size = _octal(header[124:136])
        if kind not in (b"x", b"g", b"L") and long_size is not None:
            size = long_size
        data, at = at + _BLOCK, at + _BLOCK + -(-size // _BLOCK) * _BLOCK
        if size < 0 or at > size_of_file:
            raise InputError(
                f"truncated: the member at byte {data} has {size} bytes, but the file ends at "
                f"{size_of_file}"
            )
        if kind in (b"L", b"x"):
            if size > _MAX_HEADER:
                raise InputError(f"damaged: a name of {size} bytes at byte {data}")
            content = ahead[data - begin : data - begin + size]
            content = content if len(content) == size else read(data, size)
            if kind == b"L":
                long_name = content.rstrip(b"\0")
            else:
                fields = _pax(content)
                long_name = fields.get(b"path", long_name)
                long_size = int(fields[b"size"]) if b"size" in fields else None
        elif kind != b"g":
            if kind in (b"0", b"\0"):
                yield Member(long_name or _name(header), of_member, data, size, at)
            long_name = long_size = None
            of_member = at


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _checksum_holds(header: bytes) -> bool:
    # Adler-32's lower half is one more than the sum of the bytes: ten times as fast as `sum`.
    total = zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF
    return total == (_octal(header[148:156]) + 1) % 65521


def _octal(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's binary numbers, for 8 GiB and more
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        return -1
    return int(digits or b"0", 8)


def _pax(content: bytes) -> dict[bytes, bytes]:
    """Parse the fields of an extended header: lines of "LENGTH name=value"."""
    fields = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not length[:20].isdigit() or not 0 < int(length[:20]) <= len(content):
            raise InputError("damaged: an extended header cannot be parsed")
        name, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[name] = value
        content = content[int(length) :]
    if not fields.get(b"size", b"0").isdigit() or len(fields.get(b"size", b"")) > 20:
        raise InputError("damaged: the size in an extended header is not a number")
    return fields
