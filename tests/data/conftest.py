"""Pairs in every format that a source reads, and batches of a pipeline."""

import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clip_jax.data.batch_plan import BatchPlan, constant, doubling
from clip_jax.data.digits import DigitsConfig
from clip_jax.data.pipeline import Batch, DataConfig, Pipeline, build
from clip_jax.data.sources import SampleError
from clip_jax.data.sources.array_record import ArrayRecordConfig, encode_example
from clip_jax.data.sources.image_folder import FolderConfig
from clip_jax.data.sources.parquet import ParquetConfig
from clip_jax.data.sources.saved_dataset import SavedDatasetConfig
from clip_jax.data.sources.tar import TarConfig
from clip_jax.data.sources.text_table import TableConfig
from clip_jax.data.sources.tfds import TfdsConfig
from clip_jax.data.tokenizers.clip_bpe import ClipTokenizer
from clip_jax.models.images import Square

_rng = np.random.default_rng(0)
PICTURES = [_rng.integers(0, 256, (48, 48 + 8 * i, 3), np.uint8) for i in range(6)]

Pairs = Sequence[tuple[str, bytes, str]]  # file name of the image, its bytes, caption


@functools.cache
def make_pairs(count: int) -> Pairs:
    """Return pairs whose images are shifted PICTURES, as JPEG, PNG and WebP in turn."""
    pairs = []
    for i in range(count):
        file = io.BytesIO()
        suffix, how = (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))[i % 3]
        pixels = np.roll(PICTURES[i % len(PICTURES)], i, axis=1)
        Image.fromarray(pixels).save(file, how)
        pairs.append((f"{i:05d}.{suffix}", file.getvalue(), f'picture, "{i}"\nzwölf'))
    return tuple(pairs)


# ------------------------------------------------------------------ every format


def parts(pairs: Sequence[Any], count: int) -> list[Sequence[Any]]:
    size = -(-len(pairs) // count)
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], **options: Any) -> None:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def tar(folder: Path, pairs: Pairs) -> TarConfig:
    for number, part in enumerate(parts(pairs, 3)):
        members = []
        for name, image, caption in part:
            members += [(name, image), (f"{name.split('.')[0]}.txt", caption.encode())]
        write_tar(folder / f"{number:05d}.tar", members)
    return TarConfig(path=str(folder / "{00000..00002}.tar"))


def tar_json(folder: Path, pairs: Pairs) -> TarConfig:
    for number, part in enumerate(parts(pairs, 2)):
        members = []
        for name, image, caption in part:
            fields = json.dumps({"caption": [caption], "width": 1}).encode()
            members += [(f"{name.split('.')[0]}.json", fields), (name, image)]
        write_tar(folder / f"{number}.tar", members, format=tarfile.PAX_FORMAT)
    return TarConfig(path=str(folder / "*.tar"), caption="json")


def images_beside(folder: Path, pairs: Pairs) -> FolderConfig:
    for name, image, caption in pairs:
        (folder / name).write_bytes(image)
        (folder / name).with_suffix(".txt").write_bytes(caption.encode())
    return FolderConfig(path=str(folder))


def table(folder: Path, pairs: Pairs, suffix: str = ".csv") -> TableConfig:
    for name, image, _ in pairs:
        (folder / name).write_bytes(image)
    rows = [(name, caption) for name, _, caption in pairs]
    with (folder / f"pairs{suffix}").open("w", newline="") as file:
        if suffix == ".jsonl":
            lines = [json.dumps({"image": name, "caption": caption}) for name, caption in rows]
            file.write("\n".join(lines))
        else:
            writer = csv.writer(file, delimiter="," if suffix == ".csv" else "\t")
            writer.writerows([("image", "caption"), *rows])
    return TableConfig(path=str(folder / f"pairs{suffix}"))


def hugging_face(pairs: Pairs) -> pa.Table:
    images = [{"bytes": image, "path": name} for name, image, _ in pairs]
    return pa.table({"image": images, "caption": [caption for _, _, caption in pairs]})


def parquet(folder: Path, pairs: Pairs) -> ParquetConfig:
    for number, part in enumerate(parts(pairs, 2)):
        pq.write_table(hugging_face(part), folder / f"{number}.parquet", row_group_size=30)
    return ParquetConfig(path=str(folder / "*.parquet"))


def img2dataset(folder: Path, pairs: Pairs) -> ParquetConfig:
    names, images, captions = map(list, zip(*pairs, strict=True))
    rows = pa.table({"image.jpg": images, "caption": captions, "key": names})
    pq.write_table(rows, folder / "00000.parquet")
    return ParquetConfig(path=str(folder / "00000.parquet"), image_column="image.jpg")


def write_records(path: Path, options: str, records: Iterable[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()


def array_record(folder: Path, pairs: Pairs) -> ArrayRecordConfig:
    for number, part in enumerate(parts(pairs, 3)):
        examples = [{"image": [image], "caption": [text.encode()]} for _, image, text in part]
        path = folder / f"{number}.array_record"
        write_records(path, "group_size:1", map(encode_example, examples))
    return ArrayRecordConfig(path=str(folder / "*.array_record"))


def saved_dataset(folder: Path, pairs: Pairs) -> SavedDatasetConfig:
    names = []
    for number, part in enumerate(parts(pairs, 2)):
        rows = hugging_face(part)
        names.append(f"data-{number:05d}-of-00002.arrow")
        with pa.ipc.new_stream(str(folder / names[-1]), rows.schema) as writer:
            writer.write_table(rows, max_chunksize=7)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    return SavedDatasetConfig(path=str(folder))


def tfds(folder: Path, pairs: Pairs) -> TfdsConfig:
    import tensorflow_datasets as datasets

    kinds = {"image": datasets.features.Image(), "caption": datasets.features.Text()}

    class Pairs(datasets.core.GeneratorBasedBuilder, skip_registration=True):
        __module__ = "pairs"  # else TFDS looks for its files in the package `tests`
        VERSION = datasets.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self):
            features = datasets.features.FeaturesDict(kinds)
            return self.dataset_info_from_configs(features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, (_, image, caption) in enumerate(pairs):
                yield i, {"image": io.BytesIO(image), "caption": caption}

    builder = Pairs(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return TfdsConfig(path=str(builder.data_dir))


FORMATS: dict[str, Callable[[Path, Pairs], Any]] = {
    function.__name__: function
    for function in (
        *(tar, tar_json, images_beside, table, parquet, img2dataset),
        *(array_record, saved_dataset, tfds),
    )
}
# Settings that `PathConfig` needs besides the path.
COLUMNS = {"tar_json": {"caption_column": "caption"}, "img2dataset": {"image_column": "image.jpg"}}


# ------------------------------------------------------------------ samples and batches

TOKENIZER = ClipTokenizer(1024)


class Numbers:
    """A source whose captions and keys are the numbers of its samples."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return str(index)

    def load(self, index: int, rng: np.random.Generator) -> tuple[bytes, str]:
        return b"image", str(index)


def outcome(load: Callable[[], Any]) -> Any:
    """Return the result of `load`, or the text of its error."""
    try:
        return load()
    except SampleError as error:
        return str(error)


def open_pipeline(
    config: DataConfig, batch_size: int = 12, plan: BatchPlan | None = None, **how: Any
) -> Pipeline:
    """Open a pipeline with images of 8 x 8 pixels."""
    plan = plan or constant(batch_size, Square(8))
    return build(config, plan, tokenizer=TOKENIZER, context_length=16, **how)


def take(
    config: DataConfig, count: int, start: int = 0, doubled_at: Sequence[int] = (), **how: Any
) -> list[Batch]:
    """Return `count` batches, from a step on."""
    if doubled_at:
        how["plan"] = doubling(how.get("batch_size", 12), Square(8), doubled_at)
    with contextlib.closing(open_pipeline(config, **how).batches(start)) as batches:
        return list(itertools.islice(batches, count))


def digits(samples: int = 60, **fields: Any) -> DataConfig:
    """Return the settings for training on the bundled digits."""
    return DataConfig(source=DigitsConfig(samples=samples), **fields)


def assert_same(wanted: Sequence[Batch], found: Sequence[Batch]) -> None:
    """Compare every field except `reading`, the statistics of reading."""
    names = [field.name for field in dataclasses.fields(Batch) if field.name != "reading"]
    for first, second in zip(wanted, found, strict=True):
        for name in names:
            a, b = getattr(first, name), getattr(second, name)
            np.testing.assert_array_equal(a, b, err_msg=name)


def of_processes(config: DataConfig, count: int, processes: int, **how: Any) -> list[Batch]:
    """Return the global batches that several processes read together."""
    parts = [take(config, count, process=(i, processes), **how) for i in range(processes)]
    return [join(part) for part in zip(*parts, strict=True)]


def join(parts: Sequence[Batch]) -> Batch:
    """Join the batches of all processes to the global batch."""
    arrays = (
        np.concatenate([getattr(x, name) for x in parts]) for name in ("image", "text", "index")
    )
    lists = ([y for x in parts for y in getattr(x, name)] for name in ("keys", "skipped"))
    return Batch(*arrays, *lists, first=parts[0].first)
