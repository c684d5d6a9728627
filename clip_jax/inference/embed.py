"""Write embeddings of many images to a folder of Parquet files."""

import functools
import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float

from clip_jax.data.sources import StoredSource, digest
from clip_jax.data.sources.any import absolute, open_images
from clip_jax.display import say
from clip_jax.engine import Counted, On, runner
from clip_jax.errors import InputError, check_ranges, naming, read_worker, renamed_fields
from clip_jax.inference.loading import Model, load, unit
from clip_jax.inference.predict import read_images
from clip_jax.inference.stored import Floats
from clip_jax.models.layers import DType
from clip_jax.serialize import from_dict
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import check_version, read_json

_VERSION = 1  # of the format of a folder of embeddings; see `check_version`
KEYS = 1_000_000  # up to so many images, all names are in the digest: one renamed file is noticed
_LENGTH = 0.05  # largest difference of an embedding's length from 1; bfloat16 rounds to 1/256


@renamed_fields("0.3.0", part="worker")
@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Embed images into a folder of Parquet files; running the command again resumes."""

    # Run directory, RUN@STEP, RUN@best, model folder, weights in another format, or icons, the
    # bundled model.
    model: AnyPath
    # Images: folder; .csv, .tsv or .jsonl table; tars: data/{00..41}.tar; Parquet; ArrayRecord.
    source: str
    output: AnyPath  # Folder for rows-*.parquet with columns index, key, embedding.
    # Where to run. ray: nodes of RAY_ADDRESS (ray://..., or `ray start`), by default a local Ray.
    on: On = "here"
    worker: str = "1/1"  # Worker i of n that share the work, as i/n: 1/4 to 4/4.
    image_column: str = "image"  # Column of a table with the image paths.
    rows_per_file: int = 1024  # Images per file; a killed worker loses at most so many.
    batch_size: int = 64  # Images computed at once.
    dtype: DType = "float32"  # Data type of the computation.
    # Type of the stored embeddings. float16 takes half the space of float32.
    store: Floats = "float32"
    # Patches per image of a NaFlex model (sequence length). None: the model's own.
    tokens: int | None = None
    # Number of first channels of embeddings, for a model trained for it (Matryoshka). None: all.
    dim: int | None = None

    def __post_init__(self) -> None:
        read_worker(self.worker)
        check_ranges(
            self, rows_per_file="[1, inf)", batch_size="[1, inf)", tokens="[1, inf)", dim="[1, inf)"
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Model, source and settings of a folder of embeddings: its `embed.json`."""

    model: str
    source: str
    rows: int
    dtype: str
    parts: int
    rows_per_file: int
    batch_size: int
    image_column: str
    weights: list[float]  # see `sample`
    digest: str = ""  # of the image names; empty in older folders
    tokens: int | None = None  # sequence length of a NaFlex model
    dim: int | None = None  # channels of the embeddings; None in older folders
    store: Floats = "float32"  # type of the embeddings

    def __post_init__(self) -> None:
        check_ranges(
            self,
            rows="[1, inf)",
            parts="[1, inf)",
            rows_per_file="[1, inf)",
            batch_size="[1, inf)",
            tokens="[1, inf)",
        )

    @property
    def files(self) -> int:
        """Number of files of all workers."""
        size, larger = divmod(self.rows, self.parts)
        each = self.rows_per_file
        return larger * -(-(size + 1) // each) + (self.parts - larger) * -(-size // each)

    def file_of(self, row: int) -> range:
        """Return the rows of the file that has this row, as in `rows_of_files`."""
        number = ((row + 1) * self.parts - 1) // self.rows
        first, end = ((i * self.rows) // self.parts for i in (number, number + 1))
        start = row - (row - first) % self.rows_per_file
        return range(start, min(start + self.rows_per_file, end))

    def each_file(self) -> Iterator[range]:
        """Yield the rows of each file in order."""
        row = 0
        while row < self.rows:
            yield (rows := self.file_of(row))
            row = rows.stop


def embed(config: EmbedConfig) -> dict[str, Any]:
    """Embed the images of a source, normalised; return counts and the skipped images.

    Files are written atomically and named after their rows, so a killed run resumes where it
    stopped.
    """
    files.check_destination(config.output, "--output")
    _opened.cache_clear()  # the files may have changed
    source = open_images(config.source, config.image_column)
    number, parts = read_worker(config.worker)
    rows = rows_of_files(len(source), number, parts, config.rows_per_file)
    missing = [some for some in rows if _is_missing(path_of(config.output, some), some)] or [
        range(0)
    ]
    work = functools.partial(_embed_rows, config)  # also with no rows: it checks the manifest
    with runner(config.on) as tasks:
        tasks.run("embed", work, [(some, len(some)) for some in missing], model=True)
    skipped = [line for some in rows for line in _skipped_in(path_of(config.output, some), some)]
    count = sum(map(len, rows)) - len(skipped)
    return {"output": str(config.output), "images": count, "skipped": skipped}


def rows_of_files(count: int, number: int, parts: int, each: int) -> list[range]:
    """Return the rows, out of `count`, of each file that worker `number` of `parts` writes."""
    first, end = ((i * count) // parts for i in (number, number + 1))
    return [range(start, min(start + each, end)) for start in range(first, end, each)]


def path_of(folder: AnyPath, rows: range) -> AnyPath:
    return folder / f"rows-{rows.start:010d}-{rows.stop:010d}.parquet"


def read_skipped(
    metadata: Mapping[bytes, bytes] | None, embedded: int, rows: range
) -> list[dict[str, str]]:
    """Return the images skipped in a file, with reasons. Raises ValueError unless these and the
    embedded ones are as many as the rows."""
    try:
        skipped = json.loads((metadata or {})[b"skipped"])
        count = len(skipped)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("it does not list its skipped images") from error
    if embedded + count != len(rows):
        raise ValueError(f"{embedded} embedded and {count} skipped images of {len(rows)}")
    return skipped


def _skipped_in(path: AnyPath, rows: range) -> list[dict[str, str]]:
    with files.open_file(path) as file:
        footer = pq.read_metadata(file)
    return read_skipped(footer.metadata, footer.num_rows, rows)


def _is_missing(path: AnyPath, rows: range) -> bool:
    try:
        _skipped_in(path, rows)
    except FileNotFoundError:
        return True
    except (pa.ArrowException, OSError, ValueError) as error:
        why, _, _ = str(error).partition("\n")
        say(f"{path} is damaged ({why}); its rows are embedded again")
        return True
    return False


@functools.lru_cache(maxsize=1)
def _opened(config: EmbedConfig) -> tuple[Model, StoredSource]:
    """Return model and source, cached for all files of a process; check the folder's manifest."""
    model = load(config.model, dtype=config.dtype, tokens=config.tokens, dim=config.dim)
    source = open_images(config.source, config.image_column)
    _check_manifest(config, model, source)
    return model, source


def _embed_rows(config: EmbedConfig, rows: range, counted: Counted) -> None:
    (model, source), path = _opened(config), path_of(config.output, rows)
    size = config.batch_size
    if not rows:
        return
    files.remove_partial(path)  # left by a killed run
    indices, skipped, features = [], {}, [np.empty((0, model.config.embed_dim), np.float32)]
    for readable, images, failed in read_images(model, rows, source.image, size):
        skipped |= dict(failed)
        if images is not None:
            indices += readable
            features.append(unit(model.encode_image(images, batch_size=size)))
    embeddings = np.concatenate(features)
    usable = are_unit(embeddings)
    unusable = [index for index, good in zip(indices, usable, strict=True) if not good]
    if len(unusable) == len(indices) > 1:
        raise InputError(
            f"the embeddings of all {len(indices)} readable images of {path.name} are not finite, "
            f"or zero. Check the weights of {config.model}, or use --dtype float32."
        )
    skipped |= dict.fromkeys(unusable, "its embedding is not finite, or zero")
    indices = [index for index in indices if index not in skipped]
    flat = pa.array(embeddings[usable].ravel().astype(config.store))
    lines = [{"key": source.key(i), "reason": reason} for i, reason in sorted(skipped.items())]
    table = pa.table(
        {
            "index": pa.array(indices, pa.int64()),
            "key": pa.array([source.key(index) for index in indices], pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, model.config.embed_dim),
        }
    ).replace_schema_metadata({"skipped": json.dumps(lines)})
    with files.written_whole(path) as partial:
        pq.write_table(table, partial, compression="none", write_page_checksum=True)
    deque(counted(rows), maxlen=0)


def are_unit(embeddings: Float[np.ndarray, "B E"]) -> Bool[np.ndarray, " B"]:
    """Return which rows have length 1, which NaN, infinity and zeros have not."""
    return np.abs(np.linalg.norm(embeddings, axis=1) - 1) < _LENGTH


def _check_manifest(config: EmbedConfig, model: Model, source: StoredSource) -> None:
    """Write `embed.json`; raise InputError if the folder has other embeddings."""
    manifest = Manifest(
        model=absolute(str(config.model)),
        source=absolute(config.source),
        rows=len(source),
        dtype=config.dtype,
        parts=read_worker(config.worker)[1],
        rows_per_file=config.rows_per_file,
        batch_size=config.batch_size,
        image_column=config.image_column,
        weights=sample(model),
        digest=digest(source, keys=KEYS),
        tokens=model.tokens,
        dim=model.config.embed_dim,
        store=config.store,
    )
    before = read_manifest(config.output)
    if before == manifest:
        return
    if before is not None:
        new, old = asdict(manifest), asdict(before)
        for name in ("digest", "dim"):
            old[name] = old[name] or new[name]
        if different := [name for name in new if new[name] != old[name]]:
            name = different[0]
            what = {
                "weights": f"of another checkpoint of {config.model}",
                "digest": f"of other images than {config.source} has now, or in another order",
            }.get(name, f"with {name}={old[name]!r}, now {new[name]!r}")
            raise InputError(
                f"{config.output} holds embeddings {what}; to resume, use the same settings, "
                "otherwise choose another output folder."
            )
    files.write_whole(config.output / "embed.json", json.dumps(asdict(manifest), indent=1))


def read_manifest(folder: AnyPath) -> Manifest | None:
    """Read a folder's `embed.json`; None if there is none. Raises InputError if it is damaged,
    or of a newer format."""
    path, advice = folder / "embed.json", "Delete the folder and embed the images again."
    if not path.exists():
        return None
    content = read_json(path, advice=advice)
    check_version(content, _VERSION, path)
    values = {x.name: content[x.name] for x in fields(Manifest) if x.name in content}
    try:
        with naming(path):
            return from_dict(Manifest, values, str(path))
    except InputError as error:
        raise InputError(f"{error} It is damaged. {advice}") from error


def sample(model: Model) -> list[float]:
    """Return one value of each parameter of images, to tell models and checkpoints apart."""
    trees = [model.params[name] for name in ("visual", "image_head") if name in model.params]
    leaves = map(np.asarray, jax.tree.leaves(trees))
    return [float(x.flat[x.size // 2]) for x in leaves]
