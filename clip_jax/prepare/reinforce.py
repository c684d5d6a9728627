"""Reinforced data: captions of a captioner and embeddings of teachers, stored with their pairs.

MobileCLIP, section 3 (arXiv 2311.17049). What is random in a pair is a function of seed, key and
number. Each device computes full batches of a shard's pairs, so that the bytes of a shard depend
neither on the number of devices nor on who writes it.
"""

import functools
import hashlib
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from clip_jax.convert.formats import read_weights
from clip_jax.data.augment import Augmentation, draw, replay
from clip_jax.data.images import Item, decode, read_ahead
from clip_jax.data.reinforced import (
    SYNTHETIC,
    Reinforcement,
    from_features,
    to_features,
    to_members,
)
from clip_jax.data.sources import SampleError, StoredSource
from clip_jax.data.sources.array_record import decode_example, encode_example
from clip_jax.inference.loading import Model, load, unit
from clip_jax.models.clip import CLIP
from clip_jax.models.images import Images, concatenate
from clip_jax.prepare.layout import PrepareConfig
from clip_jax.storage.files import AnyPath

SEED = "synthetic_seed"  # feature: the seed with which `predict` repeats each synthetic caption
_SAMPLED = 32  # samples whose captions are counted before the work starts

model = functools.lru_cache(maxsize=None)(load)  # once for all tasks of a process


def describe_models(config: PrepareConfig) -> dict[str, list[dict[str, Any]]]:
    """Read the weights of the captioner and of the teachers; return what describes them.

    Raises InputError for a model that cannot be used.
    """
    result: dict[str, list[dict[str, Any]]] = {}
    if config.captions:
        weights = read_weights(config.captions)
        CLIP(weights.config).needs_decoder()
        config.generation.within(weights.config.text)
        one = {"model": str(config.captions), "digest": _digest(weights.params)}
        result["captioners"] = [one]
    for path in config.reinforce:
        weights = read_weights(path)
        values = {"embed_dim": weights.config.embed_dim}
        values["logit_scale"] = float(np.exp(np.float32(weights.params["logit_scale"])))
        values["logit_bias"] = float(weights.params.get("logit_bias", 0))
        line = ", ".join(f"{name}={value:.6g}" for name, value in values.items())
        teacher = {"model": str(path), "digest": _digest(weights.params), **values}
        teacher["config"] = f"StoredTeacher({line})"
        result.setdefault("teachers", []).append(teacher)
    return result


def _digest(params: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def sizes(config: PrepareConfig, source: StoredSource, widths: Sequence[int]) -> str:
    """Describe the size of all embeddings; captions are counted in a few samples, evenly spread."""
    counts = []
    for index in np.unique(np.linspace(0, len(source) - 1, _SAMPLED).astype(int)).tolist():
        try:
            record = source.record(index)
            more = None if config.captions else record.more()
            true = 1 if config.shards == "tar" else len(record.captions())
            counts.append(true + (len(more.synthetic) if more else 0))
        except SampleError:
            continue
    captions = float(np.mean(counts or [1])) + config.captions_per_image * bool(config.captions)
    row = Reinforcement(text=np.zeros((1, sum(widths)), np.float32))
    (data,) = to_features(row, config.embedding_type, widths)["text_emb"]
    each = (config.augmentations_per_image + captions) * len(data)
    return (
        f"embeddings: {len(source):,} samples x ({config.augmentations_per_image} images + "
        f"{captions:.4g} captions) x {len(data):,} bytes = {len(source) * each / 1e9:.4g} GB, "
        f"{each / 1e3:.4g} kB per sample"
    )


def extended(config: PrepareConfig, records: Iterator[bytes]) -> Iterator[bytes]:
    """Add captions and embeddings to the records of a shard; threads decode images meanwhile."""
    if not config.has_models:
        yield from records
        return
    rows = config.batch_size * jax.local_device_count()
    captioner = model(config.captions) if config.captions else None
    teachers = [model(path, dtype=config.teacher_dtype) for path in config.reinforce]
    widths = [teacher.config.embed_dim for teacher in teachers]
    specs = list(dict.fromkeys(teacher.image_preprocess.image_spec for teacher in teachers))

    def read(record: bytes) -> tuple[dict[str, list[bytes]], Any, list[Augmentation], list[Any]]:
        pair = decode_example(record)
        (data,), (key,) = pair["image"], pair["key"]
        picture = decode(data)
        chosen, views = [], []
        for number in range(config.augmentations_per_image if teachers else 0):
            rng = np.random.default_rng(_hash(config, key, number, b"augmentation", 16))
            chosen.append(draw(*picture.size, rng, config.augmentations))
            pixels = replay(picture, chosen[-1], specs, config.augmentations.size)
            views.append([spec.pack(x[None]) for spec, x in zip(specs, pixels, strict=True)])
        return pair, captioner and captioner.image_preprocess.batch(data), chosen, views

    for batch in read_ahead(batches(records, rows), read):
        pairs, images, chosen, views = zip(*batch, strict=True)
        if captioner:
            _add_captions(config, captioner, pairs, concatenate(images), rows)
        true, synthetic = (
            [[text.decode() for text in pair.get(name, ())] for pair in pairs]
            for name in ("caption", SYNTHETIC)
        )
        texts = list(itertools.chain(*true, *synthetic))
        of_images, of_texts = [], []
        for teacher in teachers:
            at = specs.index(teacher.image_preprocess.image_spec)
            pixels = concatenate([view[at] for some in views for view in some])
            of_images.append(_embed(teacher.encode_image, pixels, rows))
            of_texts.append(_embed(teacher.encode_text, teacher.tokenize(texts, True), rows))
        if teachers:
            ends = np.cumsum([len(some) for some in (*true, *synthetic)])[:-1]
            split = np.split(np.concatenate(of_texts, axis=1), ends)
            embedded = np.split(np.concatenate(of_images, axis=1), len(pairs))
            for i, pair in enumerate(pairs):
                pair |= to_features(
                    Reinforcement(
                        augmentations=tuple(chosen[i]), size=config.augmentations.size,
                        image=embedded[i], synthetic=tuple(synthetic[i]), text=split[i],
                        synthetic_text=split[len(pairs) + i],
                    ),
                    config.embedding_type, widths,
                )  # fmt: skip
        yield from map(encode_example, pairs)


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items; the last may be shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _hash(config: PrepareConfig, key: bytes, number: int, purpose: bytes, size: int) -> int:
    """Return the random integer of `size` bytes from which a pair's caption or augmentation of this
    number is drawn."""
    data, seed = number.to_bytes(8) + key, config.seed.to_bytes(8)
    digest = hashlib.blake2b(data, digest_size=size, key=seed, person=purpose).digest()
    return int.from_bytes(digest)


def _add_captions(
    config: PrepareConfig, captioner: Model, pairs: Sequence[dict[str, list[bytes]]],
    images: Images, rows: int,
) -> None:  # fmt: skip
    """Add synthetic captions, each with the seed that repeats it."""
    numbers = range(config.captions_per_image)
    seeds = np.array(
        [[_hash(config, pair["key"][0], x, b"caption", 4) for x in numbers] for pair in pairs],
        np.uint32,
    )
    images = jax.tree.map(lambda x: _full(np.repeat(x, len(numbers), axis=0), rows), images)
    captions = captioner.caption(
        images, config.generation, batch_size=rows, seeds=_full(seeds.ravel(), rows)
    )
    for pair, row, first in zip(pairs, seeds, itertools.count(step=len(numbers)), strict=False):
        pair[SYNTHETIC] = [x.encode() for x in captions[first : first + len(numbers)]]
        pair[SEED] = [b"%d" % seed for seed in row]


def _embed(encode: Any, x: Any, rows: int) -> Float32[np.ndarray, "B E"]:
    """Embed images or texts in full batches."""
    count = len(jax.tree.leaves(x)[0])
    return unit(encode(jax.tree.map(lambda y: _full(y, rows), x), batch_size=rows)[:count])


def _full(x: np.ndarray, rows: int) -> np.ndarray:
    """Pad with zeros to full batches, so that all have one shape."""
    return np.concatenate([x, np.zeros((-len(x) % rows, *x.shape[1:]), x.dtype)])


# -------------------------------------------------------------------------------------- tars


def write_tar(path: AnyPath, shard: str, records: Iterable[bytes]) -> None:
    """Write records as a WebDataset tar in the layout of Apple's reinforced data sets."""
    with open(path, "wb") as file:
        for number, record in enumerate(records):
            pair = decode_example(record)
            (image,), (text,) = pair["image"], pair["caption"]
            members = {suffix_of(image): image, "txt": text}
            if more := from_features(pair, 1):
                members |= to_members(more)
            if SEED in pair:
                captions = json.loads(members["syn.json"])
                captions[SEED] = [int(seed) for seed in pair[SEED]]
                members["syn.json"] = json.dumps(captions).encode()
            for name, content in members.items():
                header = tarfile.TarInfo(f"{shard}{number:07d}.{name}")
                header.size = len(content)
                file.write(header.tobuf(tarfile.USTAR_FORMAT) + content)
                file.write(bytes(-len(content) % tarfile.BLOCKSIZE))
        file.write(bytes(2 * tarfile.BLOCKSIZE))


def suffix_of(image: bytes) -> str:
    """Return the suffix of an image that tars store as it is; empty for other formats."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return {b"\xff\xd8": "jpg", b"\x89P": "png"}.get(image[:2], "")
