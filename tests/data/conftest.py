"""Pictures as pairs, in every format that a source reads; batches of what a pipeline reads."""

import csv
import dataclasses
import io
import itertools
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clip_jax.data.digits import DigitsConfig
from clip_jax.data.pipeline import Batch, DataConfig, Pipeline, build
from clip_jax.data.sources.array_record import ArrayRecordConfig, encode_example
from clip_jax.data.sources.folder import FolderConfig
from clip_jax.data.sources.parquet import ParquetConfig
from clip_jax.data.sources.saved_dataset import SavedDatasetConfig
from clip_jax.data.sources.table import TableConfig
from clip_jax.data.sources.tar import TarConfig
from clip_jax.data.sources.tfds import TfdsConfig
from clip_jax.data.tokenizers.clip import ClipTokenizer

_rng = np.random.default_rng(0)
PICTURES = [_rng.integers(0, 256, (48, 48 + 8 * i, 3), np.uint8) for i in range(6)]

Pairs = Sequence[tuple[str, bytes, str]]  # file name of the image, its bytes, caption


def make_pairs(count: int) -> Pairs:
    """Pictures, shifted, as JPEG, PNG and WebP in turns."""
    pairs = []
    for i in range(count):
        file = io.BytesIO()
        suffix, how = (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))[i % 3]
        pixels = np.roll(PICTURES[i % len(PICTURES)], i, axis=1)
        Image.fromarray(pixels).save(file, how)
        pairs.append((f"{i:05d}.{suffix}", file.getvalue(), f'picture, "{i}"\nzwölf'))
    return pairs


def write_pairs(folder: Path, count: int, suffix: str = ".csv") -> Path:
    """Write image files and the table that lists them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for name, image, caption in make_pairs(count):
        (folder / "images" / name).write_bytes(image)
        rows.append((f"images/{name}", caption))
    path = folder / f"pairs{suffix}"
    with path.open("w", newline="") as out:
        if suffix == ".jsonl":
            lines = [json.dumps({"image": image, "caption": caption}) for image, caption in rows]
            out.write("\n".join(lines))
        else:
            writer = csv.writer(out, delimiter="," if suffix == ".csv" else "\t")
            writer.writerows([("image", "caption"), *rows])
    return path


# ------------------------------------------------------------------ every format


def parts(pairs: Pairs, count: int) -> list[Pairs]:
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


def table(folder: Path, pairs: Pairs) -> TableConfig:
    for name, image, _ in pairs:
        (folder / name).write_bytes(image)
    with (folder / "pairs.csv").open("w", newline="") as file:
        rows = [(name, caption) for name, _, caption in pairs]
        csv.writer(file).writerows([("image", "caption"), *rows])
    return TableConfig(path=str(folder / "pairs.csv"))


def hugging_face(pairs: Pairs) -> pa.Table:
    images = [{"bytes": image, "path": name} for name, image, _ in pairs]
    return pa.table({"image": images, "caption": [caption for _, _, caption in pairs]})


def parquet(folder: Path, pairs: Pairs) -> ParquetConfig:
    for number, part in enumerate(parts(pairs, 2)):
        pq.write_table(hugging_face(part), folder / f"{number}.parquet", row_group_size=30)
    return ParquetConfig(path=str(folder / "*.parquet"))


def img2dataset(folder: Path, pairs: Pairs) -> ParquetConfig:
    columns = {
        "jpg": [image for _, image, _ in pairs],
        "caption": [caption for _, _, caption in pairs],
        "key": [name for name, _, _ in pairs],
    }
    pq.write_table(pa.table(columns), folder / "00000.parquet")
    return ParquetConfig(path=str(folder / "00000.parquet"), image_column="jpg")


def array_record(folder: Path, pairs: Pairs) -> ArrayRecordConfig:
    from array_record.python.array_record_module import ArrayRecordWriter

    for number, part in enumerate(parts(pairs, 3)):
        writer = ArrayRecordWriter(str(folder / f"{number}.array_record"), "group_size:1")
        for _, image, caption in part:
            writer.write(encode_example({"image": [image], "caption": [caption.encode()]}))
        writer.close()
    return ArrayRecordConfig(path=str(folder / "*.array_record"))


def saved_dataset(folder: Path, pairs: Pairs) -> SavedDatasetConfig:
    names = []
    for number, part in enumerate(parts(pairs, 2)):
        rows = hugging_face(part)
        names.append(f"data-{number:05d}-of-00002.arrow")
        with (
            pa.OSFile(str(folder / names[-1]), "wb") as file,
            pa.ipc.new_stream(file, rows.schema) as writer,
        ):
            writer.write_table(rows, max_chunksize=7)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    return SavedDatasetConfig(path=str(folder))


def tfds(folder: Path, pairs: Pairs) -> TfdsConfig:
    import tensorflow_datasets

    class Pairs(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
        __module__ = "pairs"  # TFDS would look for files of its own in the package `tests`
        VERSION = tensorflow_datasets.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self):
            features = tensorflow_datasets.features
            return self.dataset_info_from_configs(
                features=features.FeaturesDict(
                    {"image": features.Image(shape=(None, None, 3)), "caption": features.Text()}
                ),
                disable_shuffling=True,
            )

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


# ------------------------------------------------------------------ batches

TOKENIZER = ClipTokenizer(1024)


def open_pipeline(
    config: DataConfig, batch_size: int = 12, process_index: int = 0, process_count: int = 1
) -> Pipeline:
    """A pipeline of pictures of 8 x 8 pixels."""
    return build(
        config,
        tokenizer=TOKENIZER,
        image_size=8,
        context_length=16,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )


def take(
    config: DataConfig, count: int, start: int = 0, doubled_at: Sequence[int] = (), **how: int
) -> list[Batch]:
    """So many batches from a step on."""
    batches = open_pipeline(config, **how).batches(start, doubled_at)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def digits(samples: int = 60, **fields: Any) -> DataConfig:
    """The bundled digits, as training data."""
    return DataConfig(source=DigitsConfig(samples=samples), **fields)


def tabular(path: Path, **fields: Any) -> DataConfig:
    """A table of pairs, as training data."""
    return DataConfig(source=TableConfig(path=str(path)), **fields)


def assert_same(wanted: Sequence[Batch], found: Sequence[Batch]) -> None:
    """Compare every field but `reading`, which says what was asked of buckets."""
    for first, second in zip(wanted, found, strict=True):
        for field in dataclasses.fields(first):
            if field.name != "reading":
                a, b = getattr(first, field.name), getattr(second, field.name)
                np.testing.assert_array_equal(a, b, err_msg=field.name)


def of_processes(config: DataConfig, count: int, processes: int, **how: Any) -> list[Batch]:
    """The global batches that so many processes read together."""
    parts = [
        take(config, count, process_index=index, process_count=processes, **how)
        for index in range(processes)
    ]
    return [join(part) for part in zip(*parts, strict=True)]


def join(parts: Sequence[Batch]) -> Batch:
    """The global batch of the processes' batches."""
    return Batch(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("image", "text")),
        np.concatenate([part.index for part in parts]),
        [key for part in parts for key in part.keys],
        [event for part in parts for event in part.skipped],
    )
