"""Compare `clip-jax embed` with an open_clip script: JPEG files to embeddings on disk.

    python benchmarks/embed.py [IMAGES] [CHUNKS] [WORKERS]

Both use ViT-B/32 in float32 with the same random weights. The images are photographs that
scikit-image and scikit-learn ship, cropped at random to 640 x 480 pixels. Both embed the same
chunks of images, alternately.
"""

import argparse
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGES, CHUNKS, WORKERS, BATCH = 5_000, 10, 1, 64
NAMES = ("astronaut", "cat", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry")


def make_images(folder: Path, count: int) -> list[Path]:
    import skimage.data
    from sklearn.datasets import load_sample_images

    photos = [getattr(skimage.data, name)() for name in NAMES] + load_sample_images().images
    photos = [Image.fromarray(photo) for photo in photos]
    rng, paths = np.random.default_rng(0), []
    folder.mkdir()
    for i in range(count):
        photo = photos[i % len(photos)]
        width = rng.uniform(0.6, 1) * min(photo.width, photo.height * 4 / 3)
        left = rng.uniform(0, photo.width - width)
        top = rng.uniform(0, photo.height - width * 3 / 4)
        box = (left, top, left + width, top + width * 3 / 4)
        paths.append(folder / f"{i:05d}.jpg")
        photo.resize((640, 480), Image.Resampling.BICUBIC, box=box).save(paths[-1], quality=90)
    return paths


class Files:
    """A torch data set, at module level because the DataLoader's processes import it."""

    def __init__(self, paths: list[Path], preprocess) -> None:
        self.paths, self.preprocess = paths, preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        with Image.open(self.paths[index]) as image:
            return self.preprocess(image)


def open_clip_embed(model, preprocess, paths: list[Path], output: Path, workers: int) -> None:
    import torch

    loader = torch.utils.data.DataLoader(
        Files(paths, preprocess), batch_size=BATCH, num_workers=workers
    )
    with torch.inference_mode():
        features = [model.encode_image(batch, normalize=True).numpy() for batch in loader]
    flat = np.concatenate(features)
    columns = {
        "key": pa.array([path.name for path in paths]),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1]),
    }
    pq.write_table(pa.table(columns), output, compression="none")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, what in (
        ("images", IMAGES, "number of images"),
        ("chunks", CHUNKS, "number of chunks"),
        ("workers", WORKERS, "processes of open_clip's DataLoader (0: decode in the main process)"),
    ):
        parser.add_argument(name, nargs="?", type=int, default=default, help=what)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    import open_clip
    import torch

    from clip_jax.convert.conversion import ConvertConfig, convert
    from clip_jax.inference.embed import EmbedConfig, embed

    images, chunks, workers = args.images, args.chunks, args.workers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make_images(folder / "images", images)
        print(f"{images} images, {sum(x.stat().st_size for x in paths) / images / 1e3:.0f} kB each")
        model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32")
        torch.save(model.state_dict(), folder / "weights.bin")
        source = folder / "weights.bin"
        convert(
            ConvertConfig(
                source=source,
                destination=folder / "model",
                to="clip-jax",
                activation="gelu",
            )
        )
        seconds = {"clip_jax": [], "open_clip": []}
        for i in range(chunks):
            config = EmbedConfig(
                model=folder / "model",
                source=str(folder / "images"),
                output=folder / "ours",
                worker=f"{i + 1}/{chunks}",
                batch_size=BATCH,
            )
            some = paths[i * images // chunks : (i + 1) * images // chunks]
            theirs = folder / f"theirs-{i:03d}.parquet"
            runs = {
                "clip_jax": lambda config=config: embed(config),
                "open_clip": lambda some=some, theirs=theirs: open_clip_embed(
                    model, preprocess, some, theirs, workers
                ),
            }
            for who in sorted(runs, reverse=bool(i % 2)):
                start = time.perf_counter()
                runs[who]()
                seconds[who].append(time.perf_counter() - start)
            print(f"chunk {i}", {who: f"{times[-1]:.1f} s" for who, times in seconds.items()})
            sys.stdout.flush()
        for who, times in seconds.items():
            print(f"{who:<10} {images / sum(times):7.2f} images/s, {sum(times):.0f} s in all")
        rows = [
            np.concatenate(
                [np.stack(pq.read_table(p)["embedding"].to_numpy()) for p in sorted(paths)]
            )
            for paths in ((folder / "ours").glob("rows-*"), folder.glob("theirs-*"))
        ]
        print(f"smallest cosine between both {(rows[0] * rows[1]).sum(1).min():.6f}")
        shutil.rmtree(folder / "images")


if __name__ == "__main__":
    main()
