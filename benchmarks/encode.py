"""Compare the speed of ViT-B/32's image tower in clip_jax, open_clip and Hugging Face (float32).

    python benchmarks/encode.py [BATCH_SIZE]

The weights are random. The three alternate in one process; the medians of the rounds are printed.
"""

import argparse
import statistics
import time
import warnings

import jax
import numpy as np

BATCH, ROUNDS = 32, 5


def ours(pixels: np.ndarray):
    from clip_jax.convert.weights import default_preprocess
    from clip_jax.inference.loading import Model
    from clip_jax.models import zoo
    from clip_jax.models.clip import CLIP

    config = zoo.get("ViT-B-32")
    params = jax.jit(CLIP(config).init)(jax.random.key(0))
    import dataclasses

    model = Model(dataclasses.replace(config, dtype="float32"), params, default_preprocess(config))
    return lambda: np.asarray(model.encode_image(pixels, batch_size=len(pixels)))


def open_clip(pixels: np.ndarray):
    import open_clip
    import torch

    model = open_clip.create_model("ViT-B-32").eval()
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    def run():
        with torch.inference_mode():
            return model.encode_image(images).numpy()

    return run


def hugging_face(pixels: np.ndarray):
    import torch
    import transformers

    vision = transformers.CLIPVisionConfig(patch_size=32, projection_dim=512)
    model = transformers.CLIPVisionModelWithProjection(vision).eval()
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    def run():
        with torch.inference_mode():
            return model(images).image_embeds.numpy()

    return run


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("batch_size", nargs="?", type=int, default=BATCH, help="images per batch")
    batch = parser.parse_args().batch_size
    pixels = np.random.default_rng(0).normal(size=(batch, 224, 224, 3)).astype(np.float32)
    runs = {"clip_jax": ours, "open_clip": open_clip, "Hugging Face": hugging_face}
    runs = {name: make(pixels) for name, make in runs.items()}
    seconds = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        print(f"{name:<14} {batch / statistics.median(times):7.1f} images/s")


if __name__ == "__main__":
    main()
