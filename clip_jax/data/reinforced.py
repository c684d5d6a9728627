"""What a reinforced data set stores with a pair, in our ArrayRecords and in Apple's layout.

Both have augmentations, synthetic captions, and rows of embeddings of several teachers side by side
(MobileCLIP, 2311.17049, section 3). A row of int8 has for each teacher a float32 scale, and for
each value x the root of |x| / scale with the sign of x, in steps of 1/127. So an outlier costs the
small values little precision: the cosine with the original is above 0.999 up to 4,000 values.
"""

import contextlib
import functools
import io
import json
import zlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from clip_jax.data.augment import OPERATIONS, POSTERIZE, Augmentation
from clip_jax.data.sources import SampleError, captions_of, text_of
from clip_jax.storage.torch_pickle import read_torch

EmbeddingType = Literal["float16", "int8"]
SYNTHETIC = "synthetic"  # feature with the synthetic captions
MEMBERS = ("paug.json", "syn.json", "npz", "pth.gz")  # extensions in a tar

_ROWS = {"image_emb": "image", "text_emb": "text", "syn_text_emb": "synthetic_text"}
_MAX_BYTES = 1 << 26  # of unpacked embeddings; 36 rows of 1,536 float32 values have 220 kB
_absent = functools.partial(np.zeros, (0, 0), np.float32)


@dataclass(frozen=True, eq=False)
class Reinforcement:
    """What is stored with a pair. D is the width of all teachers together; absent embeddings have
    shape [0, 0]."""

    augmentations: tuple[Augmentation, ...] = ()
    size: int | None = None  # side of the images to which magnitudes in pixels refer
    image: Float32[np.ndarray, "A D"] = field(default_factory=_absent)
    synthetic: tuple[str, ...] = ()  # captions
    text: Float32[np.ndarray, "T _D"] = field(default_factory=_absent)
    synthetic_text: Float32[np.ndarray, "S _D"] = field(default_factory=_absent)


def to_features(
    r: Reinforcement, dtype: EmbeddingType, widths: Sequence[int]
) -> dict[str, list[bytes]]:
    """Return the features of an ArrayRecord's example; `widths` are the teachers', in order."""
    rows = {name: getattr(r, x) for name, x in _ROWS.items()}
    features = {name: _encode(x, dtype, widths) for name, x in rows.items() if x.size}
    if features:
        features["emb"] = [json.dumps({"dtype": dtype, "widths": list(widths)}).encode()]
    if r.augmentations:
        features["paug"] = [_to_json(r)]
    if r.synthetic:
        features[SYNTHETIC] = [text.encode() for text in r.synthetic]
    return features


def from_features(
    features: Mapping[str, Sequence[bytes]], captions: int | None = None
) -> Reinforcement | None:
    """Return what is stored with a pair of so many captions; None: nothing. Raises SampleError."""
    with _reading():
        rows = {}
        if "emb" in features:
            dtype, widths = (json.loads(features["emb"][0])[x] for x in ("dtype", "widths"))
            rows = {x: _decode(features[x], dtype, widths) for x in _ROWS if x in features}
        synthetic = [text_of(text) for text in features.get(SYNTHETIC, ())]
        return _join(features.get("paug", [b""])[0], synthetic, rows, captions)


def to_members(r: Reinforcement) -> dict[str, bytes]:
    """Return the members of a sample in Apple's tars by extension; embeddings are float16."""
    members = {}
    if r.augmentations:
        members["paug.json"] = _to_json(r)
    if r.synthetic:
        members["syn.json"] = json.dumps({"syn_text": r.synthetic}).encode()
    rows: dict[str, Any] = {name: getattr(r, x) for name, x in _ROWS.items()}
    if rows := {name: x.astype(np.float16) for name, x in rows.items() if x.size}:
        file = io.BytesIO()
        np.savez(file, **rows)
        members["npz"] = file.getvalue()
    return members


def from_members(members: Mapping[str, bytes], captions: int) -> Reinforcement | None:
    """Return what is stored with a pair of so many captions; None: nothing. Raises SampleError.

    The embeddings of synthetic captions have arrays of their own, or follow the true captions'.
    """
    with _reading():
        rows = _arrays(members)
        texts = _loads(members.get("syn.json", b"{}"))
        names = [name for name in texts if name.startswith("syn_text")]
        synthetic = [text for name in names for text in captions_of(texts[name])]
        if any(f"{name}_emb" in rows for name in names):
            rows["syn_text_emb"] = np.concatenate([rows[f"{name}_emb"] for name in names])
        elif len(both := rows.get("text_emb", ())) > captions:
            rows["text_emb"], rows["syn_text_emb"] = both[:captions], both[captions:]
        return _join(members.get("paug.json"), synthetic, rows, captions)


@contextlib.contextmanager
def _reading() -> Generator[None]:
    try:
        yield
    except SampleError:
        raise
    except Exception as error:  # zipfile, NumPy and JSON raise almost anything on damaged bytes
        raise SampleError(f"reinforcement: {error or type(error).__name__!s:.300}") from error


def _join(
    paug: bytes | None, synthetic: list[str], rows: dict[str, Any], captions: int | None
) -> Reinforcement | None:
    if not (paug or synthetic or rows):
        return None
    stored = _loads(paug) if paug else {"param_aug": []}
    listed = stored["param_aug"]  # in one release, JSON once more
    augmentations = tuple(map(_augmentation, _loads(listed) if isinstance(listed, str) else listed))
    counts = {"image_emb": len(augmentations), "text_emb": captions, "syn_text_emb": len(synthetic)}
    for name, count in counts.items():
        if name in rows and count not in (None, len(rows[name])):
            raise ValueError(f"{name} has {len(rows[name])} rows for {count} images or captions")
    embeddings = {_ROWS[name]: rows[name] for name in _ROWS if name in rows}
    if any(x.ndim != 2 or not np.isfinite(x).all() for x in embeddings.values()):
        raise ValueError("embeddings are not rows of finite numbers")
    if len({x.shape[1] for x in embeddings.values()}) > 1:
        raise ValueError("embeddings have several widths")
    size: Any = stored.get("size")
    return Reinforcement(augmentations, size, synthetic=tuple(synthetic), **embeddings)


def _loads(data: bytes | str) -> Any:
    value = json.loads(data)
    return json.loads(value) if isinstance(value, str) else value


def _augmentation(fields: Any) -> Augmentation:
    """Infer the fields, which have no names: four integers are a box, true or false is a flip, and
    a list of pairs, or null, are operations."""
    try:
        left = list(fields)
        is_box = left and isinstance(left[0], list) and [type(x) for x in left[0]] == [int] * 4
        box = tuple(left.pop(0)) if is_box else None
        flip = left.pop(0) if left and isinstance(left[0], bool) else None
        pairs = left.pop(0) if left else []
        operations = [
            x if x is None else _operation(*x) for x in ([None] if pairs is None else pairs)
        ]
        if not left:
            return Augmentation(box, flip, tuple(operations))
    except (TypeError, ValueError):
        pass
    raise SampleError(
        f"reinforcement: augmentation {json.dumps(fields):.200} is not [[top, left, height, "
        "width], flip, [[operation, magnitude], ...]], of which each may be absent"
    )


def _operation(which: Any, magnitude: Any) -> tuple[int, float]:
    largest = 8 if which == POSTERIZE else 1e6
    if type(which) is not int or not 0 <= which < OPERATIONS or not abs(magnitude) <= largest:
        raise ValueError
    return which, float(magnitude)


def _to_json(r: Reinforcement) -> bytes:
    rows = []
    for one in r.augmentations:
        operations = None if one.operations == (None,) else one.operations
        fields = (one.box, one.flip, operations)
        absent = (None, None, ())
        rows.append([x for x, none in zip(fields, absent, strict=True) if x != none])
    size = {} if r.size is None else {"size": r.size}
    return json.dumps({"param_aug": rows} | size).encode()


# -------------------------------------------------------------------------------------- embeddings


def _encode(
    rows: Float32[np.ndarray, "N D"], dtype: EmbeddingType, widths: Sequence[int]
) -> list[bytes]:
    if dtype == "float16":
        return [row.tobytes() for row in rows.astype("<f2")]
    starts = np.cumsum([0, *widths[:-1]])
    scales = np.maximum.reduceat(np.abs(rows), starts, axis=1).astype("<f4")
    unit = rows / np.repeat(np.maximum(scales, np.finfo("f4").tiny), widths, axis=1)
    steps = np.rint(np.copysign(np.sqrt(np.abs(unit)), unit) * 127).astype(np.int8)
    return [a.tobytes() + b.tobytes() for a, b in zip(scales, steps, strict=True)]


def _decode(
    rows: Sequence[bytes], dtype: EmbeddingType, widths: Sequence[int]
) -> Float32[np.ndarray, "N D"]:
    if dtype == "float16":
        return np.array([np.frombuffer(row, "<f2") for row in rows], np.float32)
    parts = len(widths) * 4
    scales = np.array([np.frombuffer(row[:parts], "<f4") for row in rows], np.float32)
    steps = np.array([np.frombuffer(row[parts:], np.int8) for row in rows], np.float32)
    return steps * np.abs(steps) / np.float32(127**2) * np.repeat(scales, widths, axis=1)


def _arrays(members: Mapping[str, bytes]) -> dict[str, Any]:
    """Read the embeddings of a sample, float32 if both kinds are present, as Apple's code does."""
    arrays: dict[str, Any] = {}
    if "npz" in members:
        with np.load(io.BytesIO(members["npz"])) as archive:
            if sum(entry.file_size for entry in archive.zip.infolist()) <= _MAX_BYTES:
                arrays = dict(archive)
    elif "pth.gz" in members:
        unpacked = zlib.decompressobj(31).decompress(members["pth.gz"], _MAX_BYTES)
        arrays = read_torch(memoryview(unpacked), "pth.gz")
    return {name: x.astype(np.float32) for name, x in arrays.items() if name.endswith("_emb")}
