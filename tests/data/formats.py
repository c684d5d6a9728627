"""Write the same pairs in every format that a source reads."""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clip_jax.data.sources.array_record import ArrayRecordConfig, encode_example
from clip_jax.data.sources.folder import FolderConfig
from clip_jax.data.sources.parquet import ParquetConfig
from clip_jax.data.sources.saved_dataset import SavedDatasetConfig
from clip_jax.data.sources.table import TableConfig
from clip_jax.data.sources.tar import TarConfig
from clip_jax.data.sources.tfds import TfdsConfig

Pairs = Sequence[tuple[str, bytes, str]]  # file name of the image, its bytes, caption


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
