"""Filter mismatched captions by a model's own scores: make the data, train on it, and compare.

    python benchmarks/mismatched.py digits           # 20,000 pairs, 20% with exchanged captions
    clip-jax train benchmarks/mismatched.py --workdir raw
    clip-jax prepare digits/pairs.parquet filtered --score-with raw --top-share 0.8
    clip-jax train benchmarks/mismatched.py --workdir second --data.source.path filtered
    python benchmarks/mismatched.py digits filtered  # count the pairs that the filter dropped

The second command trains on all pairs; the third drops the 20% with the lowest scores.
"""

import argparse
import dataclasses
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.data.digits import DigitsConfig, DigitsSource
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.any import PathConfig
from clip_jax.data.sources.array_record import ArrayRecordConfig, ArrayRecordSource, decode_example

COUNT, SHARE = 20_000, 5


def get_config() -> Config:
    digits = load_config(Path(__file__).parent.parent / "configs/digits.py")
    data = DataConfig(source=PathConfig(path="digits/pairs.parquet"), threads=1)
    optim = dataclasses.replace(digits.optim, warmup_steps=150)
    return dataclasses.replace(digits, data=data, optim=optim, steps=1_200)


def make(folder: Path) -> None:
    source, rng = DigitsSource(DigitsConfig(digits=2), 16), np.random.default_rng(0)
    images, captions = [], []
    for i in range(COUNT):
        pixels, caption = source.load(i, np.random.default_rng([7, i]))
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        images.append(file.getvalue())
        captions.append(caption)
    changed = rng.permutation(COUNT)[: COUNT // SHARE]
    changed_captions = np.array(captions, object)
    changed_captions[changed] = changed_captions[np.roll(changed, 1)]
    columns = {"image": images, "caption": changed_captions.tolist(), "true": captions}
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "pairs.parquet", row_group_size=100)


def compare(folder: Path, filtered: Path) -> None:
    table = pq.read_table(folder / "pairs.parquet", columns=["caption", "true"]).to_pydict()
    wrong = np.array([a != b for a, b in zip(table["caption"], table["true"], strict=True)])
    source = ArrayRecordSource(ArrayRecordConfig(path=str(filtered / "*.array_record")))
    kept = np.zeros(COUNT, bool)
    for index in range(len(source)):
        key = decode_example(source._read(index, index + 1)[0])["key"][0]
        kept[int(key.rpartition(b":")[2])] = True
    print(f"{wrong.sum():,} mismatched of {COUNT:,}; dropped {(~kept).sum():,}, of them mismatched")
    print(f"{wrong[~kept].sum():,}: {wrong[~kept].mean():.1%}; left {wrong[kept].mean():.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of the pairs")
    parser.add_argument("filtered", type=Path, nargs="?", help="output of `prepare`, to compare")
    args = parser.parse_args()
    compare(args.folder, args.filtered) if args.filtered else make(args.folder)
