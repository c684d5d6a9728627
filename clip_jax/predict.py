"""Use a finished model: zero-shot labels for images, a folder embedded, a folder searched."""

import functools
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float
from PIL import Image

from clip_jax import files
from clip_jax.data.embeddings import Embeddings, skipped_in
from clip_jax.data.images import ImageError, center_crop, decode
from clip_jax.data.sources import SampleError
from clip_jax.data.sources.folder import image_files
from clip_jax.data.sources.images import Images, absolute, fingerprint, open_images
from clip_jax.data.sources.shards import listed
from clip_jax.evals.pictures import contact_sheet, in_words
from clip_jax.files import Place
from clip_jax.loading import Model, load, unit
from clip_jax.models.generation import GenerationConfig
from clip_jax.refused import Refused, check_picture, check_ranges, read_part
from clip_jax.serialize import from_dict
from clip_jax.tasks import Counted, On, runner
from clip_jax.workdir import read_json

DTYPE = Literal["float32", "bfloat16"]
TILE = 112  # pixels of a picture on a contact sheet
SHEET = 240  # pictures on a sheet at most


# ------------------------------------------------------------------------------------ predict


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Which of your labels fits each image, by the nearest text; or a caption of its own."""

    model: Place  # a run's work directory, a model folder, or a foreign file
    images: tuple[Place, ...] = ()  # files, or folders of them
    labels: tuple[str, ...] = ()  # the classes to choose from
    template: str = "a photo of a {}."  # sentence around each label; {} alone: the label as it is
    caption: bool = False  # describe each image (a model with a decoder: CoCa, MaMMUT)
    generation: GenerationConfig = GenerationConfig()  # how captions are written
    sheet: Place | None = None  # picture of the images (the first 240) with what was predicted
    batch_size: int = 64  # images at a time
    dtype: DTYPE = "float32"  # of the computation

    def __post_init__(self) -> None:
        check_ranges(self, batch_size="[1, inf)")
        check_picture(self.sheet, "sheet")
        if self.labels or not self.caption:
            check_labels(self.labels, self.template)


def predict(config: PredictConfig) -> list[dict[str, Any]]:
    """Return for each readable image its path and all labels with probabilities, best first.

    With `caption` what the model writes of it. Unreadable images are named on standard error.
    Refused if no image is left.
    """
    files.check_destination(config.sheet, "--sheet", folder=False)
    paths = image_files(config.images)
    if not paths:
        given = ", ".join(map(str, config.images)) or "nothing"
        raise Refused(f"no images in {given}; --images takes files and folders of images.")
    model = load(config.model, dtype=config.dtype)
    if config.caption:
        model.clip.needs_decoder()
    labels = check_labels(config.labels, config.template) if config.labels else []
    classes = embed_labels(model, labels, config.template) if labels else None

    def describe(pixels: np.ndarray) -> list[dict[str, Any]]:
        found: dict[str, list] = {}
        if config.caption:
            written = model.caption(pixels, config.generation, batch_size=config.batch_size)
            found["caption"] = written
        if classes is not None:
            features = unit(model.encode_image(pixels, batch_size=config.batch_size))
            rows = probabilities(model, features, classes)
            found["labels"] = [ranked(labels, row) for row in rows]
        return [dict(zip(found, one, strict=True)) for one in zip(*found.values(), strict=True)]

    results, tiles = [], []
    for read, found, skipped in _computed(
        model, paths, lambda path: path, describe, config.batch_size, keep=config.sheet is not None
    ):
        for path, reason in skipped:
            print(f"skipped {path}: {reason}", file=sys.stderr)
        for (path, tile), result in zip(read, found, strict=True):
            results.append({"image": str(path), **result})
            tiles += [tile] if len(tiles) < SHEET else []
    if not results:
        raise Refused(f"none of the {len(paths)} images could be read.")
    if config.sheet:
        lines = [[Path(x["image"]).name, *in_words(x, 3, 0)] for x in results[:SHEET]]
        more = f"the first {SHEET} of {len(results)} images"
        with files.written_whole(config.sheet) as path:
            contact_sheet(path, tiles, lines, title="" if len(results) <= SHEET else more)
    return results


def check_labels(labels: Sequence[str], template: str) -> list[str]:
    """Return the labels, each once: two that are alike would share a probability. Raise Refused if
    there is none, an empty one, or no place for it in the template."""
    if not labels or not all(label.strip() for label in labels):
        raise Refused(f"labels={list(labels)}: give at least one label and none empty.")
    if "{}" not in template:
        raise Refused(f"template={template!r} has no {{}} where the label goes.")
    return list(dict.fromkeys(labels))


def embed_labels(
    model: Model, labels: Sequence[str], template: str
) -> Float[np.ndarray, "classes E"]:
    """Embed each label in its sentence, at unit length."""
    tokens = model.tokenize(prompts(labels, template), truncate=True)
    return unit(model.encode_text(tokens))


def prompts(labels: Sequence[str], template: str) -> list[str]:
    """Put each label into its sentence."""
    return [template.replace("{}", label) for label in labels]


def probabilities(
    model: Model, images: Float[np.ndarray, "B E"], classes: Float[np.ndarray, "classes E"]
) -> Float[np.ndarray, "B classes"]:
    """Probabilities of unit-length embeddings, as the model was trained: the softmax of the scaled
    similarities (CLIP paper, figure 3), or with a bias each label's own (SigLIP paper, 3.2)."""
    logits = images @ classes.T * float(np.exp(model.params["logit_scale"]))
    if "logit_bias" in model.params:
        return np.exp(-np.logaddexp(0, -(logits + float(model.params["logit_bias"]))))
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def ranked(labels: Sequence[str], shares: Float[np.ndarray, " classes"]) -> list[dict[str, Any]]:
    """Pair labels with probabilities, best first."""
    best = sorted(zip(shares, labels, strict=True), key=lambda x: -x[0])
    return [{"label": label, "probability": float(share)} for share, label in best]


def _computed(
    model: Model,
    items: Sequence[Any],
    read: Callable[[Any], Any],
    compute: Callable[[np.ndarray], Any],
    batch_size: int,
    keep: bool = False,
) -> Iterator[tuple[list[tuple[Any, Any]], Any, list[tuple[Any, str]]]]:
    """Yield items that could be read (each with a small picture if `keep`), what is computed of
    their pixels, and the others with the reason. Threads decode while the model computes."""

    def prepare(item: Any) -> tuple[Any, Any, str]:
        try:
            image = read(item)
            pixels = model.image_preprocess(image)
            tile = center_crop(decode(image), TILE) if keep else None
        except (ImageError, SampleError) as error:
            return None, None, str(error)
        return pixels, tile, ""

    def run(batch: Sequence[Any], futures: list[Future]) -> tuple[Any, Any, Any]:
        done = [future.result() for future in futures]
        good = [(item, x) for item, x in zip(batch, done, strict=True) if x[0] is not None]
        bad = [(item, x[2]) for item, x in zip(batch, done, strict=True) if x[0] is None]
        found = compute(np.stack([x[0] for _, x in good])) if good else []
        return [(item, x[1]) for item, x in good], found, bad

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        ahead: deque = deque()
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            ahead.append((batch, [threads.submit(prepare, item) for item in batch]))
            if len(ahead) > 2:
                yield run(*ahead.popleft())
        while ahead:
            yield run(*ahead.popleft())


# -------------------------------------------------------------------------------------- embed


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
    rows = _rows_of_files(len(source), number, parts, config.rows_per_file)
    missing = [some for some in rows if _is_missing(_path_of(config.output, some))] or [range(0)]
    work = functools.partial(_embed_rows, config)  # of no rows too: it compares models
    with runner(config.on) as does:
        does.run("embed", work, [(some, len(some)) for some in missing], model=True)
    skipped = [line for some in rows for line in skipped_in(_path_of(config.output, some)) or ()]
    count = sum(map(len, rows)) - len(skipped)
    return {"output": str(config.output), "images": count, "skipped": skipped}


def _rows_of_files(count: int, number: int, parts: int, each: int) -> list[range]:
    """Which of `count` rows each file holds that a part of the work writes."""
    first, end = ((i * count) // parts for i in (number, number + 1))
    return [range(start, min(start + each, end)) for start in range(first, end, each)]


def _path_of(folder: Place, rows: range) -> Place:
    return folder / f"rows-{rows.start:010d}-{rows.stop:010d}.parquet"


def _is_missing(path: Place) -> bool:
    if is_damaged := path.exists() and skipped_in(path) is None:
        print(f"{path} is damaged and made anew", file=sys.stderr)
    return is_damaged or not path.exists()


@functools.lru_cache(maxsize=1)
def _to_embed(config: EmbedConfig) -> tuple[Model, Images]:
    """What a process embeds, file after file. Refused if the folder has another's embeddings."""
    model = load(config.model, dtype=config.dtype)
    source = open_images(config.source, config.image_column)
    _check_manifest(config, model, source)
    return model, source


def _embed_rows(config: EmbedConfig, rows: range, counted: Counted) -> None:
    (model, source), path = _to_embed(config), _path_of(config.output, rows)
    size = config.batch_size
    if not rows:
        return
    files.remove_partial(path)  # of a run that was killed
    indices, skipped, features = [], [], [np.empty((0, model.config.embed_dim), np.float32)]
    embed = lambda pixels: unit(model.encode_image(pixels, batch_size=size))  # noqa: E731
    for read, found, failed in _computed(model, rows, source.image, embed, size):
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


def _check_manifest(config: EmbedConfig, model: Model, source: Images) -> None:
    """Say what the folder holds; Refused if it holds something else already."""
    wanted = {
        "model": absolute(str(config.model)), "source": absolute(config.source),
        "rows": len(source), "dtype": config.dtype, "parts": read_part(config.part)[1],
        "rows_per_file": config.rows_per_file, "batch_size": config.batch_size,
        "image_column": config.image_column, "weights": _sample(model),
        "fingerprint": fingerprint(source),
    }  # fmt: skip
    path = config.output / "embed.json"
    before = read_json(path)
    if path.exists():
        there = {"fingerprint": wanted["fingerprint"]} | before  # an older one has none
        if there | {"weights": wanted["weights"]} == wanted != there:
            raise Refused(
                f"{config.output} holds embeddings of another checkpoint of {config.model}; choose "
                "another output."
            )
        if there | {"fingerprint": wanted["fingerprint"]} == wanted != there:
            raise Refused(
                f"{config.source} has other images than those that {config.output} was begun with, "
                "or in another order: files were renamed or replaced. Choose another output."
            )
        for name, value in wanted.items():
            if there.get(name) != value:
                raise Refused(
                    f"{config.output} holds embeddings with {name}={there.get(name)!r}, now "
                    f"{value!r}; resume with the same, or choose another output."
                )
    if before != wanted:
        files.write_whole(path, json.dumps(wanted, indent=1))


def _sample(model: Model) -> list[float]:
    """One number of each of the image tower's parameters: it tells models and checkpoints apart."""
    leaves = map(np.asarray, jax.tree.leaves(model.params["visual"]))
    return [float(x.flat[x.size // 2]) for x in leaves]


# ------------------------------------------------------------------------------------- search


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The images of an embedded folder that are closest to a text or an image."""

    model: Place  # the model that embedded them
    embeddings: Place  # folder that `clip-jax embed` wrote
    text: str = ""  # what to look for, in words
    image: Place | None = None  # what to look for, as an image
    top: int = 10  # how many to return
    index: Literal["exact", "usearch"] = "exact"  # usearch: approximate, for very many (an extra)
    sheet: Place | None = None  # picture of what was found

    def __post_init__(self) -> None:
        if bool(self.text.strip()) == bool(self.image):
            raise Refused("search needs one of --text and --image, and no empty text.")
        check_ranges(self, top="[1, inf)")
        check_picture(self.sheet, "sheet")


def search(config: SearchConfig) -> list[dict[str, Any]]:
    """Return `key`, `similarity` (cosine) and `index` in the source of the best, best first."""
    files.check_destination(config.sheet, "--sheet", folder=False)
    searcher = Searcher(load(config.model), config.embeddings)
    results = searcher.search(config.image or config.text, config.top, config.index)
    if config.sheet:
        tiles = [center_crop(searcher.picture(x["index"]), TILE) for x in results[:SHEET]]
        lines = [[f"{x['similarity']:.3f}", x["key"]] for x in results]
        title = config.text or str(config.image)
        with files.written_whole(config.sheet) as path:
            contact_sheet(path, tiles, lines, columns=5, title=title)
    return results


class Searcher:
    """An embedded folder beside its model. Refused if another model embedded it."""

    def __init__(self, model: Model, folder: Place) -> None:
        self._model, self._folder = model, folder
        if not (folder / "embed.json").is_file():
            raise Refused(f"no embeddings in {folder} (embed.json); clip-jax embed writes them.")
        self._told = told = read_json(folder / "embed.json", advice="Embed the images anew.")
        kinds: dict[str, Any] = dict.fromkeys(("model", "source", "image_column"), str)
        kinds |= dict.fromkeys(("rows", "parts", "rows_per_file"), int)
        kinds |= {"weights": list[float]}
        where = f"{folder / 'embed.json'} is damaged, embed the images anew: its "
        for name, kind in kinds.items():
            from_dict(kind, told.get(name), where + name)
        self._check_files()
        sample = _sample(model)
        # Files keep numbers in float32, float16 or bfloat16: the same weights to 1 part in 256.
        if len(sample) != len(self._told["weights"]) or not np.allclose(
            sample, self._told["weights"], rtol=1 / 128, atol=1e-6
        ):
            raise Refused(
                f"the embeddings in {folder} are another model's: {self._told['model']} made them. "
                "Search with that, or embed the images anew."
            )
        self._embeddings = Embeddings(folder)

    def _check_files(self) -> None:
        """Raise Refused unless the files hold all rows."""
        rows, parts, each = (self._told[name] for name in ("rows", "parts", "rows_per_file"))
        written = {path.name for path in self._folder.iterdir()}
        of_parts = (_rows_of_files(rows, number, parts, each) for number in range(parts))
        names = [_path_of(self._folder, some).name for some in itertools.chain(*of_parts)]
        if missing := [name for name in names if name not in written]:
            raise Refused(
                f"{self._folder} lacks {len(missing)} of {len(names)} files of embeddings: "
                f"{listed(missing)}. Run the same clip-jax embed again (each of its parts), which "
                "makes what is missing."
            )

    def search(
        self, query: str | Place, top: int, index: Literal["exact", "usearch"] = "exact"
    ) -> list[dict[str, Any]]:
        """Find what is closest to a text, or to the image at a path; see `search`."""
        if isinstance(query, str):
            features = self._model.encode_text(self._model.tokenize([query], truncate=True))
        else:
            features = self._model.encode_image(self._model.preprocess([query]))
        return self.closest(unit(features)[0], top, index)

    def closest(
        self,
        features: Float[np.ndarray, " E"],
        top: int,
        index: Literal["exact", "usearch"] = "exact",
    ) -> list[dict[str, Any]]:
        """Find what is closest to an embedding of unit length; see `search`."""
        find = self._embeddings.exact if index == "exact" else self._embeddings.approximate
        results: list[dict[str, Any]] = []
        for row, similarity in zip(*find(features, top), strict=True):
            number, key = self._embeddings.row(int(row))
            results.append({"key": key, "similarity": float(similarity), "index": number})
        return results

    @functools.cached_property
    def _images(self) -> Images:
        told = self._told
        try:
            images = open_images(told["source"], told["image_column"])
        except Refused as error:
            raise Refused(
                f"the images that {self._folder} was made from are not where they were: {error}"
            ) from error
        known = told.get("fingerprint")  # None: of an older version
        if len(images) != told["rows"] or known not in (None, fingerprint(images)):
            raise Refused(
                f"{told['source']} has other images than {self._folder} was made from, or in "
                "another order; bring them back, or embed them anew."
            )
        return images

    def picture(self, index: int) -> Image.Image:
        """Read an image that was found, by its `index`; gray if it is no longer there."""
        try:
            return decode(self._images.image(index))
        except (SampleError, ImageError):
            return Image.new("RGB", (TILE, TILE), "gray")
