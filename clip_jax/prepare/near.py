"""Near-duplicates: perceptual hashes of images, and a search for those near an earlier image.

The hash is pHash (imagehash's: the signs of the 16 x 16 lowest cosine frequencies, 256 bits); two
images are near if few bits differ. Only images with one of 16 bands in common are compared: fixed
selections of the bits of the lowest 8 x 8 frequencies, which change least. The more images, the
longer the bands, so that few have one in common by chance.
"""

import functools
import itertools

import numpy as np
from jaxtyping import Int64, UInt16, UInt64
from PIL import Image

from clip_jax.errors import needing
from clip_jax.prepare import buckets

BANDS = 16
_SIDE = 16  # frequencies in each direction
_LOW = 8  # frequencies in each direction that bands use
# In a plain image no two of 8 x 8 parts differ by 8 of 256 gray levels.
_PLAIN = 8
_CONTRAST = 8
_BAND_BITS = (12, 28)  # minimum and maximum

Hash = UInt64[np.ndarray, " 4"]
Hashes = UInt64[np.ndarray, "N 4"]
ROW: np.dtype = np.dtype([("index", "<u8"), ("hash", "<u8", 4)])  # as stored in files


def check() -> None:
    """Raise InputError if imagehash is not installed."""
    with needing(
        "drop_near_duplicates and decontaminate need imagehash: pip install "
        "'clip-jax-pods[prepare]'"
    ):
        import imagehash  # noqa: F401


def perceptual_hash(picture: Image.Image) -> Hash | None:
    """Hash an image by its content; None for a plain one, since all of those would be near."""
    import imagehash

    gray = picture.convert("L")
    if np.ptp(np.asarray(gray.resize((_PLAIN, _PLAIN), Image.Resampling.BOX))) < _CONTRAST:
        return None
    bits = imagehash.phash(gray, hash_size=_SIDE).hash
    return np.packbits(bits).view(np.uint64)


def distances(
    hashes: UInt64[np.ndarray, "*N 4"], others: UInt64[np.ndarray, "*M 4"]
) -> UInt16[np.ndarray, "*N"]:
    """Count the differing bits of rows, word by word, since NumPy sums short rows slowly."""
    words = (np.bitwise_count(hashes[..., i] ^ others[..., i]) for i in range(hashes.shape[-1]))
    return sum((word.astype(np.uint16) for word in words), np.zeros(hashes.shape[:-1], np.uint16))


def band_bits(samples: int) -> int:
    """Return the bits of a band for a number of images to compare."""
    low, high = _BAND_BITS
    return int(np.clip(np.ceil(np.log2(max(samples, 1))), low, high))


@functools.cache
def _places(bits: int) -> Int64[np.ndarray, "bands bits"]:
    """Return the positions of each band's bits; the first, of the average, is in none."""
    low = [row * _SIDE + column for row in range(_LOW) for column in range(_LOW)][1:]
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(low)[:bits] for _ in range(BANDS)])


def bands(hashes: Hashes, bits: int) -> UInt64[np.ndarray, "bands N"]:
    """Return each hash's value in every band, mixed so that its ranges are equally full."""
    unpacked = np.unpackbits(np.ascontiguousarray(hashes).view(np.uint8), axis=-1)
    powers = np.uint64(1) << np.arange(bits, dtype=np.uint64)
    values = np.stack([unpacked[:, chosen] @ powers for chosen in _places(bits)])
    return (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd


def sorted_in(rows: np.ndarray, bits: int, count: int) -> list[bytes]:
    """Return rows as the buckets of a file: `count` buckets for each band."""
    result = []
    for band in bands(rows["hash"], bits):
        numbers = buckets.number_of(band, count)
        result += [rows[numbers == number].tobytes() for number in range(count)]
    return result


def near_earlier(
    rows: np.ndarray, band: int, bits: int, distance: int
) -> tuple[UInt64[np.ndarray, " n"], UInt64[np.ndarray, " n"]]:
    """Return the indices of images near an earlier one with the same band value, and of that one.

    It does not matter whether the earlier one is kept itself: so the result does not depend on the
    order of work, and bands, and parts of a band, are compared independently.
    """
    rows = rows[np.argsort(rows["index"], kind="stable")]
    hashes = rows["hash"]
    _, firsts, which = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    first = firsts[which.reshape(-1)]  # of equal hashes; placeholders have thousands
    is_later = first != np.arange(len(rows))
    pairs = [(rows["index"][is_later], rows["index"][first[is_later]])]
    rows = rows[~is_later]
    values = bands(rows["hash"], bits)[band]
    order = np.argsort(values, kind="stable")
    rows = rows[order]
    values = values[order]
    active = np.arange(len(rows))
    for shift in itertools.count(1):
        active = active[: np.searchsorted(active, len(rows) - shift)]
        active = active[values[active] == values[active + shift]]
        if not len(active):
            break
        close = distances(rows["hash"][active], rows["hash"][active + shift]) <= distance
        active_near = active[close]
        pairs.append((rows["index"][active_near + shift], rows["index"][active_near]))
    later, earlier = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return later, earlier
