"""Embed many images into a folder of Parquet files."""

import functools
import json
import sys
from collections import deque
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_jax.data.sources import StoredSource, digest
from clip_jax.data.sources.any import absolute, open_images
from clip_jax.engine import Counted, On, runner
from clip_jax.errors import InputError, check_ranges, read_part
from clip_jax.inference.loading import Model, load, unit
from clip_jax.inference.predict import DTYPE, computed
from clip_jax.storage import files
from clip_jax.storage.files import Place
from clip_jax.storage.json_files import read_json


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Embeddings of many images, to a folder of Parquet files; the same command again resumes."""

    model: Place  # a run's work directory, a model folder, or a foreign file
    source: str  # a folder of images; a .csv, .tsv or .jsonl; tars: data/{00000..00041}.tar
    output: Place  # folder for rows-*.parquet with the columns index, key, embedding
    on: On = "here"  # ray: on the nodes of RAY_ADDRESS (ray://..., or `ray start`), or a local Ray
    part: str = "1/1"  # which of how many parts of the work this process takes: 1/4 to 4/4
    image_column: str = "image"  # of a table: the image's path
    rows_per_file: int = 1024  # images a file; a kill loses at most as many
    batch_size: int = 64  # images at a time
    dtype: DTYPE = "float32"  # of the computation

    def __post_init__(self) -> None:
        read_part(self.part)
        check_ranges(self, rows_per_file="[1, inf)", batch_size="[1, inf)")


def embed(config: EmbedConfig) -> dict[str, Any]:
    """Embed a source's images at unit length; return counts and what was skipped.

    Every file appears whole or not at all and its name says which rows it holds, so whatever was
    killed goes on where it stopped.
    """
    files.check_destination(config.output, "--output")
    _to_embed.cache_clear()  # the files may have changed
    source = open_images(config.source, config.image_column)
    number, parts = read_part(config.part)
    rows = rows_of_files(len(source), number, parts, config.rows_per_file)
    missing = [some for some in rows if _is_missing(path_of(config.output, some))] or [range(0)]
    work = functools.partial(_embed_rows, config)  # of no rows too: it compares models
    with runner(config.on) as does:
        does.run("embed", work, [(some, len(some)) for some in missing], model=True)
    skipped = [line for some in rows for line in skipped_in(path_of(config.output, some)) or ()]
    count = sum(map(len, rows)) - len(skipped)
    return {"output": str(config.output), "images": count, "skipped": skipped}


def rows_of_files(count: int, number: int, parts: int, each: int) -> list[range]:
    """Which of `count` rows each file holds that a part of the work writes."""
    first, end = ((i * count) // parts for i in (number, number + 1))
    return [range(start, min(start + each, end)) for start in range(first, end, each)]


def path_of(folder: Place, rows: range) -> Place:
    return folder / f"rows-{rows.start:010d}-{rows.stop:010d}.parquet"


def skipped_in(path: Place) -> list[dict[str, str]] | None:
    """Return what `clip-jax embed` left out of a file, and why; None if the file is damaged."""
    try:
        with files.open_file(path) as file:
            return json.loads((pq.read_schema(file).metadata or {})[b"skipped"])
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return None


def _is_missing(path: Place) -> bool:
    if is_damaged := path.exists() and skipped_in(path) is None:
        print(f"{path} is damaged and made anew", file=sys.stderr)
    return is_damaged or not path.exists()


@functools.lru_cache(maxsize=1)
def _to_embed(config: EmbedConfig) -> tuple[Model, StoredSource]:
    """What a process embeds, file after file. Raises InputError if the folder has another's
    embeddings."""
    model = load(config.model, dtype=config.dtype)
    source = open_images(config.source, config.image_column)
    _check_manifest(config, model, source)
    return model, source


def _embed_rows(config: EmbedConfig, rows: range, counted: Counted) -> None:
    (model, source), path = _to_embed(config), path_of(config.output, rows)
    size = config.batch_size
    if not rows:
        return
    files.remove_partial(path)  # of a run that was killed
    indices, skipped, features = [], [], [np.empty((0, model.config.embed_dim), np.float32)]
    embed = lambda pixels: unit(model.encode_image(pixels, batch_size=size))  # noqa: E731
    for read, found, failed in computed(model, rows, source.image, embed, size):
        indices += [index for index, _ in read]
        features += [found] if read else []
        skipped += [{"key": source.key(index), "reason": reason} for index, reason in failed]
    flat = pa.array(np.concatenate(features).ravel())
    table = pa.table(
        {
            "index": pa.array(indices, pa.int64()),
            "key": pa.array([source.key(index) for index in indices], pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, model.config.embed_dim),
        }
    ).replace_schema_metadata({"skipped": json.dumps(skipped)})
    with files.written_whole(path) as partial:
        pq.write_table(table, partial, compression="none", write_page_checksum=True)
    deque(counted(rows), maxlen=0)


def _check_manifest(config: EmbedConfig, model: Model, source: StoredSource) -> None:
    """Say what the folder holds; raises InputError if it holds something else already."""
    wanted = {
        "model": absolute(str(config.model)), "source": absolute(config.source),
        "rows": len(source), "dtype": config.dtype, "parts": read_part(config.part)[1],
        "rows_per_file": config.rows_per_file, "batch_size": config.batch_size,
        "image_column": config.image_column, "weights": sample(model),
        "digest": digest(source, blocks=False),
    }  # fmt: skip
    path = config.output / "embed.json"
    before = read_json(path)
    if path.exists():
        there = {"digest": wanted["digest"]} | before  # an older one has none
        if there | {"weights": wanted["weights"]} == wanted != there:
            raise InputError(
                f"{config.output} holds embeddings of another checkpoint of {config.model}; choose "
                "another output."
            )
        if there | {"digest": wanted["digest"]} == wanted != there:
            raise InputError(
                f"{config.source} has other images than those that {config.output} was begun with, "
                "or in another order: files were renamed or replaced. Choose another output."
            )
        for name, value in wanted.items():
            if there.get(name) != value:
                raise InputError(
                    f"{config.output} holds embeddings with {name}={there.get(name)!r}, now "
                    f"{value!r}; resume with the same, or choose another output."
                )
    if before != wanted:
        files.write_whole(path, json.dumps(wanted, indent=1))


def sample(model: Model) -> list[float]:
    """One number of each of the image tower's parameters: it tells models and checkpoints apart."""
    leaves = map(np.asarray, jax.tree.leaves(model.params["visual"]))
    return [float(x.flat[x.size // 2]) for x in leaves]
