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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from clip_jax.checkpoints.checksums import digest_of
from clip_jax.convert.formats import read_weights
from clip_jax.data import reinforced
from clip_jax.data.augment import Augmentation, center, draw, replay
from clip_jax.data.images import Item, decode, read_ahead
from clip_jax.data.reinforced import SYNTHETIC, Reinforcement
from clip_jax.data.sources import SampleError, StoredSource
from clip_jax.data.sources.array_record import decode_example, encode_example
from clip_jax.errors import InputError
from clip_jax.inference.loading import Model, load, model_of, unit
from clip_jax.models.clip import CLIP
from clip_jax.models.images import concatenate
from clip_jax.models.layers import DType
from clip_jax.optim import Tower
from clip_jax.prepare.layout import PrepareConfig
from clip_jax.step import of_tower
from clip_jax.storage.files import AnyPath

_Rows = Float32[np.ndarray, "_N _D"]

_ABSENT = np.zeros((0, 0), np.float32)
SEED = "synthetic_seed"  # feature: the seed with which `predict` repeats each synthetic caption

model = functools.lru_cache(maxsize=None)(load)  # once for all tasks of a process


@functools.cache
def teacher(path: AnyPath, dtype: DType) -> Model:
    """Load a teacher, which may be one tower alone, once for all tasks of a process."""
    weights = read_weights(path, one_tower=True)
    scalars = {"logit_scale": np.float32(0)}  # which a tower alone does not have
    if weights.config.has_logit_bias:
        scalars["logit_bias"] = np.float32(0)
    return model_of(replace(weights, params=scalars | weights.params), dtype)


@functools.cache
def origins(path: AnyPath, dtype: DType, towers: tuple[Tower, ...]) -> dict[str, Any]:
    """Return what the embeddings of a teacher's towers depend on besides the sample."""
    loaded = teacher(path, dtype)
    return {
        tower: reinforced.origin(
            loaded.clip.config, tower, digest_of(of_tower(tower, loaded.params))
        )
        for tower in towers
    }


@functools.cache
def describe_models(config: PrepareConfig) -> list[dict[str, Any]]:
    """Read the weights of the captioner, if any, and of the teachers; return what describes them:
    of a teacher, also its embeddings, and as `teacher` how a config names it.

    Raises InputError for a model that cannot be used.
    """
    models: list[dict[str, Any]] = []
    for path in filter(None, (config.captions, *config.reinforce)):
        is_captioner = bool(config.captions) and not models
        weights = read_weights(path, one_tower=not is_captioner)
        models.append({"model": str(path), "digest": digest_of(weights.params)})
        if is_captioner:
            CLIP(weights.config).needs_decoder()
            config.generation.within(weights.config.text)
            continue
        towers = config.reinforce_towers
        if weights.only_tower is not None and {*towers} != {weights.only_tower}:
            raise InputError(
                f"{path} holds the {weights.only_tower} tower of a model alone, and "
                f"reinforce_towers={towers}: set --reinforce-towers {weights.only_tower}"
            )
        if len({*towers}) == 1:
            (tower,) = {*towers}
            line = f"embeddings of the {tower} tower, for --stored {tower}"
            models[-1] |= {"embed_dim": weights.config.embed_dim, "teacher": line}
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
    captions *= "text" in config.reinforce_towers
    widths = [model["embed_dim"] for model in describe_models(config) if "teacher" in model]
    row = Reinforcement(text=np.zeros((1, sum(widths)), np.float32))
    (data,) = reinforced.to_features(row, config.embedding_type, widths)["text_emb"]
    each = (config.views_per_image + captions) * len(data)
    return (
        f"embeddings: {len(source):,} samples x ({config.views_per_image} images + "
        f"{captions:.4g} captions) x {len(data):,} bytes = {len(source) * each / 1e9:.4g} GB, "
        f"{each / 1e3:.4g} kB per sample"
    )


def extended(config: PrepareConfig, records: Iterator[bytes]) -> Iterator[bytes]:
    """Add captions and embeddings to the records of a shard; threads decode images meanwhile."""
    rows = config.batch_size * jax.local_device_count()
    size = config.augmentations.size
    captioner = model(config.captions) if config.captions else None
    teachers = [teacher(path, config.teacher_dtype) for path in config.reinforce]
    specs = [x.image_preprocess.image_spec for x in teachers]
    is_squashed = bool(teachers) and teachers[0].image_preprocess.resize_mode != "shortest"
    has_images, has_texts = (tower in config.reinforce_towers for tower in ("image", "text"))
    widths = [x.config.embed_dim for x in teachers]
    how = config.teacher_dtype, config.reinforce_towers
    described = tuple(origins(path, *how) for path in config.reinforce)

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
        for number in range(config.views_per_image if teachers else 0):
            if config.augmentations_per_image:
                rng = np.random.default_rng(_seed(config, key, number, b"augmentation"))
                augmentation = draw(*picture.size, rng, config.augmentations)
            else:
                augmentation = Augmentation() if is_squashed else center(*picture.size)
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
        of_images = _embed_images(teachers, views, rows) if has_images else [_ABSENT] * len(pairs)
        of_texts = _embed_texts(teachers, texts, rows) if has_texts else [_ABSENT] * len(pairs)
        stored = zip(pairs, chosen, texts, of_images, of_texts, strict=True)
        for pair, drawn, words, image, of_words in stored:
            true = len(pair["caption"])
            text, synthetic_text = np.split(of_words, [true])
            more = Reinforcement(
                tuple(drawn),
                size if drawn else None,
                image,
                tuple(words[true:]),
                text,
                synthetic_text,
                origins=described,
            )
            yield encode_example(pair | reinforced.to_features(more, config.embedding_type, widths))


def _embed_images(teachers: Sequence[Model], views: Any, rows: int) -> list[_Rows]:
    """Return the embeddings of each pair's views, of all teachers side by side."""
    of_teachers = []
    for i, each in enumerate(teachers):
        images = concatenate([view[i] for some in views for view in some])
        of_teachers.append(_embed(each.encode_image, images, rows))
    return np.split(np.concatenate(of_teachers, axis=1), len(views))


def _embed_texts(teachers: Sequence[Model], texts: list[list[str]], rows: int) -> list[_Rows]:
    """Return the embeddings of each pair's texts, of all teachers side by side."""
    flat = list(itertools.chain(*texts))
    of_teachers = [_embed(x.encode_text, x.tokenize(flat, True), rows) for x in teachers]
    ends = np.cumsum([len(words) for words in texts])
    return np.split(np.concatenate(of_teachers, axis=1), ends[:-1])


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
