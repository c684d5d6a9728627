"""What a reinforced data set stores with a pair (MobileCLIP, 2311.17049), in two layouts.

Embeddings are rows of all teachers' side by side; the tower that a run reads instead of computing
it is such a teacher. An int8 row has a float32 scale per teacher; the value x is stored as the root
of |x| / scale, with its sign, in steps of 1/127. So outliers cost small values little precision:
the cosine with the original is above 0.999 up to 4,000 values.
"""

import contextlib
import functools
import io
import json
import zlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from clip_jax.data.augment import OPERATIONS, POSTERIZE, Augmentation
from clip_jax.data.sources import SampleError, captions_of
from clip_jax.data.tokenizers import vocabulary
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.inputs import StoredInput
from clip_jax.serialize import to_dict
from clip_jax.storage.json_files import check_version
from clip_jax.storage.torch_pickle import read_torch

EmbeddingType = Literal["float32", "float16", "int8"]
Origin = Mapping[str, Any]  # what embeddings depend on besides the sample, by name; see `origin`
SYNTHETIC = "synthetic"  # feature with the synthetic captions

_VERSION = 1  # of the features of a pair; see `check_version`
_Rows = Float32[np.ndarray, "_N _D"]
_ROWS = {"image_emb": "image", "text_emb": "text", "syn_text_emb": "synthetic_text"}
_FLOATS = {"float32": "<f4", "float16": "<f2"}
_MAX_BYTES = 1 << 26  # of unpacked embeddings; 36 float32 rows of 1,536 values have 220 kB
_absent = functools.partial(np.zeros, (0, 0), np.float32)


@dataclass(frozen=True, eq=False)
class Reinforcement:
    """What is stored with a pair; D is the width of all teachers. Absent embeddings are [0, 0]."""

    augmentations: tuple[Augmentation, ...] = ()
    size: int | None = None  # side of the images to which magnitudes in pixels refer
    image: Float32[np.ndarray, "A D"] = field(default_factory=_absent)
    synthetic: tuple[str, ...] = ()  # captions
    text: Float32[np.ndarray, "T _D"] = field(default_factory=_absent)
    synthetic_text: Float32[np.ndarray, "S _D"] = field(default_factory=_absent)
    # The width of each teacher's part of D; empty if unknown, as in tars.
    widths: tuple[int, ...] = field(default=(), kw_only=True)
    # The origin of each teacher's embeddings, by "image" and "text"; empty if unknown.
    origins: tuple[Mapping[str, Origin], ...] = field(default=(), kw_only=True)

    @property
    def total(self) -> int:
        """The width of all teachers' embeddings together; 0 without embeddings."""
        return next((x.shape[1] for x in _rows(self).values()), 0)

    def fits(self, widths: tuple[int, ...]) -> bool:
        """Say whether the embeddings are of teachers of these widths, as far as the format says."""
        return self.widths == widths if self.widths else self.total == sum(widths)

    def misfit(self, x: StoredInput) -> str:
        """Name what makes these embeddings others than an input needs; empty if they are it."""
        if not self.fits(x.widths):
            return f"width {self.widths or self.total}, but need {x.widths}"
        if not x.origin:
            return ""
        kind = "image" if x.of == "image" else "text"
        stored = self.origins[0].get(kind, {}) if self.origins else {}
        for name, needed in x.origin:
            if stored.get(name) != needed:
                return f"{name} {stored.get(name, 'unknown')}, but need {needed}"
        return ""

    def check(self, row: Float32[np.ndarray, "_ _D"], x: StoredInput) -> None:
        """Raise SampleError if a row of these embeddings is missing, does not fit the input, or is
        zero for one of the teachers."""
        if not row.size:
            raise SampleError(f"the stored embedding of {x.of} is missing")
        if problem := self.misfit(x):
            raise SampleError(f"stored embeddings have {problem}")
        parts = np.split(row, np.cumsum(x.widths)[:-1], axis=1)
        if not all(part.any() for part in parts):
            raise SampleError(f"the stored embedding of {x.of} is zero")


def origin(config: CLIPConfig, tower: Literal["image", "text"], digest: str) -> dict[str, Any]:
    """Return what the embeddings of a tower depend on besides the sample, by name.

    `digest` is the hash of the tower's float32 parameters. Values are integers and short strings.
    """
    if tower == "image":
        colors = [config.image_mean, config.image_std]
        normalization = f"{zlib.crc32(json.dumps(colors).encode()):08x}"
        size = config.vision.max_patches or config.vision.image_size
        return {"resolution": size, "normalization": normalization, "weights": digest}
    rules = to_dict(config.text.tokenizer) | {"file": vocabulary.digest(config.text.tokenizer)}
    tokenizer = f"{zlib.crc32(json.dumps(rules, sort_keys=True).encode()):08x}"
    length = config.text.context_length
    return {"context length": length, "tokenizer": tokenizer, "weights": digest}


def to_features(
    r: Reinforcement, dtype: EmbeddingType, widths: Sequence[int]
) -> dict[str, list[bytes]]:
    """Return features of an ArrayRecord's example; `widths` are the teachers', in their order, or
    empty if they are unknown, as in tars."""
    features = {name: _encode(x, dtype, widths) for name, x in _rows(r).items()}
    if features:
        how: dict[str, Any] = {"dtype": dtype, "widths": list(widths)}
        if r.origins:
            how["origins"] = list(r.origins)
        features["emb"] = [json.dumps(how).encode()]
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
        stored = json.loads(features.get("emb", [b"{}"])[0])
        check_version(stored, _VERSION, "the pair")
        stored.pop("version", None)
        origins = [{kind: dict(y) for kind, y in x.items()} for x in stored.pop("origins", ())]
        rows = {x: _decode(features[x], **stored) for x in _ROWS if x in features}
        texts = captions_of(features[SYNTHETIC]) if SYNTHETIC in features else []
        joined = _join(features.get("paug", [b""])[0], texts, rows, captions)
        widths = tuple(stored["widths"]) if rows else ()
        if widths and sum(widths) != joined.total:
            raise SampleError(f"embeddings of width {joined.total} cannot be of {widths}")
        return joined and replace(joined, widths=widths, origins=tuple(origins if rows else ()))


def to_members(r: Reinforcement) -> dict[str, bytes]:
    """Return the members of a sample in Apple's tars by extension; embeddings are float16."""
    members = {}
    if r.augmentations:
        members["paug.json"] = _to_json(r)
    if r.synthetic:
        members["syn.json"] = json.dumps({"syn_text": r.synthetic}).encode()
    if rows := {name: x.astype(np.float16) for name, x in _rows(r).items()}:
        np.savez(file := io.BytesIO(), **rows)
        members["npz"] = file.getvalue()
    return members


def from_members(members: Mapping[str, bytes], captions: int) -> Reinforcement | None:
    """Return what is stored with a pair of so many captions; None: nothing. Raises SampleError.

    The embeddings of synthetic captions have arrays of their own, or follow the true captions'.
    """
    with _reading():
        rows, stored = _arrays(members), _parse(members.get("syn.json", b"{}"))
        names = [name for name in stored if name.startswith("syn_text")]
        texts = [text for name in names for text in captions_of(stored[name])]
        if any(f"{name}_emb" in rows for name in names):
            rows["syn_text_emb"] = np.concatenate([rows[f"{name}_emb"] for name in names])
        elif len(both := rows.get("text_emb", ())) > captions:
            rows["text_emb"], rows["syn_text_emb"] = both[:captions], both[captions:]
        rows = {name: rows[name] for name in _ROWS if name in rows}
        return _join(members.get("paug.json"), texts, rows, captions)


@contextlib.contextmanager
def _reading() -> Generator[None]:
    try:
        yield
    except SampleError:
        raise
    except Exception as error:  # zipfile, NumPy and JSON raise almost anything on damaged bytes
        raise SampleError(f"reinforcement: {error!s:.300} ({type(error).__name__})") from error


def _join(paug: bytes | None, texts: list[str], rows: dict[str, Any], captions: int | None) -> Any:
    if not (paug or texts or rows):
        return None
    stored = _parse(paug or b'{"param_aug": []}')
    augmentations = tuple(map(_augmentation, _parse(stored["param_aug"])))
    counts = {"image_emb": len(augmentations), "text_emb": captions, "syn_text_emb": len(texts)}
    for name, x in rows.items():
        count = len(x) if counts[name] is None else counts[name]
        wanted = (count, next(iter(rows.values())).shape[-1])
        if x.shape != wanted or not np.isfinite(x).all():
            raise SampleError(f"{name} has shape {x.shape}; finite numbers of {wanted} are needed")
    if (size := stored.get("size")) is not None and (type(size) is not int or size < 1):
        raise SampleError(f"augmentation: size {size!r:.99} is not a number of pixels")
    embeddings = {_ROWS[name]: x for name, x in rows.items()}
    return Reinforcement(augmentations, size, synthetic=tuple(texts), **embeddings)


def _parse(value: Any) -> Any:
    while isinstance(value, str | bytes):  # one release has JSON inside of JSON
        value = json.loads(value)
    return value


def _augmentation(fields: Any) -> Augmentation:
    """Infer the fields, which have no names: four integers are a box, true or false is a flip, and
    a list of pairs, or null, are operations."""
    with contextlib.suppress(TypeError, ValueError):
        left = list(fields)
        is_box = left and isinstance(left[0], list) and [*map(type, left[0])] == [int] * 4
        box = tuple(left.pop(0)) if is_box else None
        flip = left.pop(0) if left and isinstance(left[0], bool) else None
        pairs = left.pop(0) if left else ()
        operations = pairs and tuple(pair and _operation(*pair) for pair in pairs)
        if not left:
            return Augmentation(box, flip, operations)
    raise SampleError(
        f"augmentation: {json.dumps(fields):.200} is not [[top, left, height, width], flip, "
        "[[operation, magnitude], ...]], of which each may be absent"
    )


def _operation(which: Any, magnitude: Any) -> tuple[int, float]:
    largest = 8 if which == POSTERIZE else 1e6
    if type(which) is not int or which not in range(OPERATIONS) or not abs(magnitude) <= largest:
        raise ValueError
    return which, float(magnitude)


def _to_json(r: Reinforcement) -> bytes:
    augmentations = []
    for augmentation in r.augmentations:
        fields: list[Any] = []
        if augmentation.box is not None:
            fields.append(augmentation.box)
        if augmentation.flip is not None:
            fields.append(augmentation.flip)
        if augmentation.operations != ():
            fields.append(augmentation.operations)
        augmentations.append(fields)
    content: dict[str, Any] = {"param_aug": augmentations}
    if r.size:
        content["size"] = r.size
    return json.dumps(content).encode()


def _rows(r: Reinforcement) -> dict[str, Any]:
    return {name: x for name, field in _ROWS.items() if (x := getattr(r, field)).size}


def _encode(rows: _Rows, dtype: EmbeddingType, widths: Sequence[int]) -> list[bytes]:
    if dtype != "int8":
        return [row.tobytes() for row in rows.astype(_FLOATS[dtype])]
    widths = widths or (rows.shape[1],)
    starts = np.cumsum([0, *widths[:-1]])
    scales = np.maximum.reduceat(np.abs(rows), starts, axis=1).astype("<f4")
    unit = rows / np.repeat(np.maximum(scales, 1e-30), widths, axis=1)
    steps = np.rint(np.copysign(np.sqrt(np.abs(unit)), unit) * 127).astype(np.int8)
    return [a.tobytes() + b.tobytes() for a, b in zip(scales, steps, strict=True)]


def _decode(rows: Sequence[bytes], dtype: EmbeddingType, widths: Sequence[int]) -> _Rows:
    if dtype != "int8":
        return np.array([np.frombuffer(row, _FLOATS[dtype]) for row in rows], np.float32)
    widths = widths or (len(rows[0]) - 4,)
    at = 4 * len(widths)
    scales = np.array([np.frombuffer(row[:at], "<f4") for row in rows])
    steps = np.array([np.frombuffer(row[at:], np.int8) for row in rows], np.float32)
    return steps * np.abs(steps) / np.float32(127**2) * np.repeat(scales, widths, axis=1)


def _arrays(members: Mapping[str, bytes]) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    if "npz" in members:  # as in Apple's code before the other, since it may be float32
        with np.load(io.BytesIO(members["npz"])) as archive:
            if sum(entry.file_size for entry in archive.zip.infolist()) > _MAX_BYTES:
                raise SampleError(f"embeddings have more than {_MAX_BYTES} bytes")
            arrays = dict(archive)
    elif "pth.gz" in members:
        unpacked = zlib.decompressobj(31).decompress(members["pth.gz"], _MAX_BYTES)
        arrays = read_torch(memoryview(unpacked), "pth.gz")
    return {name: x.astype(np.float32) for name, x in arrays.items()}
