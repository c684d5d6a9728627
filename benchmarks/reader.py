"""Compare the evaluation of images by a tiny tower with decoding them alone, to measure the reader.

    JAX_NUM_CPU_DEVICES=8 python benchmarks/reader.py FOLDER [IMAGES]

500 JPEG files of 500 x 375 pixels are written to FOLDER and read again and again. The tower has
one layer, four patches and a width of four, so that decoding takes nearly all the time.
"""

import argparse
import dataclasses
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from clip_jax import sharding
from clip_jax.data.images import Preprocess
from clip_jax.evals.datasets import open_folder
from clip_jax.evals.evaluator import Encoder
from clip_jax.evals.reader import Splits
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

FILES = 500
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("folder", type=Path, help="folder for the JPEG files")
parser.add_argument("images", nargs="?", type=int, default=50_000, help="images to read")
args = parser.parse_args()
folder, count = args.folder, args.images
rng = np.random.default_rng(0)
for i in range(FILES):
    file = folder / f"{i % 5}/{i}.jpg"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(file, quality=90)
few = open_folder(folder)
data = dataclasses.replace(few, count=count, load=lambda i: few.load(i % FILES))

config = CLIPConfig(
    embed_dim=16,
    vision=ViTConfig(image_size=224, patch_size=112, width=4, depth=1, num_heads=1),
    text=TextConfig(vocab_size=600, context_length=8, width=16, depth=1, num_heads=2),
    dtype="float32",
)
model, mesh = CLIP(config), sharding.make_mesh(sharding.MeshConfig())
shapes = jax.eval_shape(model.init, jax.random.key(0))
params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
encoder = Encoder(
    model,
    jax.device_put(params, sharding.replicated(mesh)),
    mesh,
    Preprocess(image_size=224),
    lambda texts: np.zeros((len(texts), 8), np.int32),
)


def evaluated(images: int) -> None:
    Splits("images", lambda _: data, encoder, most=images).embedded("test")


def decoded(images: int) -> None:
    with ThreadPoolExecutor() as threads:
        for start in range(0, images, 1_024):
            indices = range(start, min(start + 1_024, images))
            list(threads.map(lambda i: encoder.preprocess.pixels(data.load(i)[0]), indices))


def rate(work, images: int) -> float:
    start = time.perf_counter()
    work(images)
    return images / (time.perf_counter() - start)


part = count // 5
evaluated(2_048)  # compiles, and reads all files once
alone, full = [], []
for _ in range(5):  # alternately, since the speed of the machine varies
    alone.append(rate(decoded, part))
    full.append(rate(evaluated, part))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
a, b = np.median(alone), np.median(full)
print(f"decoded alone {a:,.0f} images/s, evaluated {b:,.0f}: ratio {b / a:.2f}; {peak:.2f} GiB")
