"""Reinforced data: captions of a captioner and embeddings of teachers, stored with their pairs.

MobileCLIP, section 3 (arXiv 2311.17049). What is drawn is a function of seed, key and number. Each
device computes full batches, so a shard's bytes depend on neither devices nor who writes it.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from clip_jax.checkpoints.manager import digest_of
from clip_jax.convert.formats import read_weights
from clip_jax.data import reinforced
from clip_jax.data.augment import Augmentation, draw, replay
from clip_jax.data.images import Item, decode, read_ahead
from clip_jax.data.reinforced import SYNTHETIC, Reinforcement
from clip_jax.data.sources import SampleError, StoredSource
from clip_jax.data.sources.array_record import decode_example, encode_example
from clip_jax.inference.loading import load, unit
from clip_jax.models.clip import CLIP
from clip_jax.models.images import concatenate
from clip_jax.prepare.layout import PrepareConfig

SEED = "synthetic_seed"  # feature: the seed with which `predict` repeats each synthetic caption

model = functools.lru_cache(maxsize=None)(load)  # once for all tasks of a process


@functools.cache
def describe_models(config: PrepareConfig) -> list[dict[str, Any]]:
    """Read the weights of the captioner, if any, and of the teachers; return what describes them:
    of a teacher, also its embeddings, and as `teacher` how a config names it.

    Raises InputError for a model that cannot be used.
    """
    models = []
    for path in filter(None, (config.captions, *config.reinforce)):
        weights = read_weights(path)
        models.append({"model": str(path), "digest": digest_of(weights.params)})
        if config.captions and len(models) == 1:
            CLIP(weights.config).needs_decoder()
            config.generation.within(weights.config.text)
            continue
        values: dict[str, Any] = {
            "embed_dim": weights.config.embed_dim,
            "logit_scale": math.exp(float(weights.params.get("logit_scale", 0))),
            "logit_bias": float(weights.params.get("logit_bias", 0)),
        }
        line = ", ".join(f"{name}={value:.6g}" for name, value in values.items())
        models[-1] |= values | {"teacher": f"StoredTeacher({line})"}
    return models


def sizes(config: PrepareConfig, source: StoredSource) -> str:
    """Describe the size of all embeddings; captions are counted in a few samples, evenly spread."""
    counts = []
    for index in np.linspace(0, len(source) - 1, 32).astype(int).tolist():
        with contextlib.suppress(SampleError):
            record = source.record(index)
            more = None if config.captions else record.more()
            true = 1 if config.shards == "tar" else len(record.captions())
            counts.append(true + (len(more.synthetic) if more else 0))
    captions = float(np.mean(counts or [1])) + config.captions_per_image * bool(config.captions)
    widths = [model["embed_dim"] for model in describe_models(config) if "teacher" in model]
    row = Reinforcement(text=np.zeros((1, sum(widths)), np.float32))
    (data,) = reinforced.to_features(row, config.embedding_type, widths)["text_emb"]
    each = (config.augmentations_per_image + captions) * len(data)
    return (
        f"embeddings: {len(source):,} samples x ({config.augmentations_per_image} images + "
        f"{captions:.4g} captions) x {len(data):,} bytes = {len(source) * each / 1e9:.4g} GB, "
        f"{each / 1e3:.4g} kB per sample"
    )


def extended(config: PrepareConfig, records: Iterator[bytes]) -> Iterator[bytes]:
    """Add captions and embeddings to the records of a shard; threads decode images meanwhile."""
    rows = config.batch_size * jax.local_device_count()
    size = config.augmentations.size
    captioner = model(config.captions) if config.captions else None
    teachers = [model(path, dtype=config.teacher_dtype) for path in config.reinforce]
    specs = [teacher.image_preprocess.image_spec for teacher in teachers]

    def read(record: bytes) -> tuple[dict[str, list[bytes]], Any, list[Augmentation], list[Any]]:
        pair = decode_example(record)
        (image,) = pair["image"]
        (key,) = pair["key"]
        picture = decode(image)
        uncropped = None
        drawn = []
        views = []
        if captioner:
            uncropped = captioner.image_preprocess.batch(image)
            seeds = [_seed(config, key, x, b"caption") for x in range(config.captions_per_image)]
            pair[SEED] = [b"%d" % seed for seed in seeds]
        for number in range(config.augmentations_per_image if teachers else 0):
            rng = np.random.default_rng(_seed(config, key, number, b"augmentation"))
            augmentation = draw(*picture.size, rng, config.augmentations)
            pixels = replay(picture, augmentation, specs, size)
            drawn.append(augmentation)
            views.append([spec.pack(x[None]) for spec, x in zip(specs, pixels, strict=True)])
        return pair, uncropped, drawn, views

    for batch in read_ahead(batches(records, rows), read):
        pairs, uncropped, chosen, views = zip(*batch, strict=True)
        if captioner:
            each = [x for x in uncropped for _ in range(config.captions_per_image)]
            seeds = np.array([int(x) for pair in pairs for x in pair[SEED]], np.uint32)
            images, seeds = _full((concatenate(each), seeds), rows)
            new = iter(captioner.caption(images, config.generation, batch_size=rows, seeds=seeds))
            for pair in pairs:
                pair[SYNTHETIC] = [next(new).encode() for _ in pair[SEED]]
        if not teachers:
            yield from map(encode_example, pairs)
            continue
        texts = [[x.decode() for x in (*y["caption"], *y.get(SYNTHETIC, ()))] for y in pairs]
        flat = list(itertools.chain(*texts))
        of_images = []
        of_texts = []
        for i, teacher in enumerate(teachers):
            images = concatenate([view[i] for some in views for view in some])
            of_images.append(_embed(teacher.encode_image, images, rows))
            of_texts.append(_embed(teacher.encode_text, teacher.tokenize(flat, True), rows))
        widths = [x.shape[1] for x in of_images]
        images = iter(np.split(np.concatenate(of_images, axis=1), len(pairs)))
        rest = np.concatenate(of_texts, axis=1)
        for pair, drawn, words in zip(pairs, chosen, texts, strict=True):
            true = len(pair["caption"])
            of_pair, rest = np.split(rest, [len(words)])
            text, synthetic_text = np.split(of_pair, [true])
            more = Reinforcement(
                tuple(drawn), size, next(images), tuple(words[true:]), text, synthetic_text
            )
            yield encode_example(pair | reinforced.to_features(more, config.embedding_type, widths))


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items; the last may be shorter."""
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, size)), [])


def _seed(config: PrepareConfig, key: bytes, number: int, purpose: bytes) -> int:
    """Return the 32-bit seed of the caption or augmentation of this number of a pair."""
    data = number.to_bytes(8) + key
    seed = config.seed.to_bytes(8)
    return int.from_bytes(hashlib.blake2b(data, digest_size=4, key=seed, person=purpose).digest())


def _embed(encode: Any, x: Any, rows: int) -> Float32[np.ndarray, "B E"]:
    return unit(encode(_full(x, rows), batch_size=rows)[: len(jax.tree.leaves(x)[0])])


def _full(tree: Any, rows: int) -> Any:
    """Pad with zeros to full batches, so that all have one shape."""
    padded = len(jax.tree.leaves(tree)[0]) % -rows
    return jax.tree.map(lambda x: np.pad(x, [(0, -padded)] + [(0, 0)] * (x.ndim - 1)), tree)


def add_to_tar(tar: tarfile.TarFile, name: str, record: bytes) -> None:
    """Add a record as the members of a sample, in the layout of Apple's reinforced data sets."""
    pair = decode_example(record)
    members = {suffix_of(pair["image"][0]): pair["image"][0], "txt": pair["caption"][0]}
    if more := reinforced.from_features(pair):
        members |= reinforced.to_members(more)
    if SEED in pair:
        captions = json.loads(members["syn.json"]) | {SEED: [int(x) for x in pair[SEED]]}
        members["syn.json"] = json.dumps(captions).encode()
    for suffix, content in members.items():
        header = tarfile.TarInfo(f"{name}.{suffix}")  # of time 0, and no owner
        header.size = len(content)
        tar.addfile(header, io.BytesIO(content))


def suffix_of(image: bytes) -> str:
    """Return the suffix of an image that tars store as it is; empty for other formats."""
    starts = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}
    return starts.get(image[:2], "")
