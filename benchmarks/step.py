"""Compare the training steps of clip_jax and open_clip in float32 on CPU cores.

    python benchmarks/step.py [small] [BATCH_SIZE]

The model is ViT-B/32 with 64 pairs per step, or with `small` a model of width 128 (four image
blocks over 64 patches, two text blocks) with 256 pairs.

A step is a complete update (both towers, loss, gradients, AdamW) on pixels in memory. The two
alternate in one process, each with all cores, and the medians of the rounds are compared. Before
that, the script times clip_jax's towers alone: forward, and forward with backward.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from clip_jax.models import zoo
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

ROUNDS = 5
B32 = dataclasses.replace(zoo.get("ViT-B-32"), dtype="float32")
SMALL = CLIPConfig(
    embed_dim=128,
    vision=ViTConfig(
        image_size=32, patch_size=4, width=128, depth=4, num_heads=4, activation="gelu"
    ),
    text=TextConfig(
        vocab_size=4_096, context_length=32, width=128, depth=2, num_heads=4, activation="gelu"
    ),
    dtype="float32",
)


def batch(model: CLIPConfig, size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    last, pixels = model.text.vocab_size - 1, model.vision.image_size
    text = rng.integers(1, last, (size, model.text.context_length), dtype=np.int32)
    text[:, -1] = last
    return {"image": rng.integers(0, 256, (size, pixels, pixels, 3), dtype=np.uint8), "text": text}


def ours(model: CLIPConfig, data: dict[str, np.ndarray]) -> Callable[[], float]:
    from clip_jax import sharding
    from clip_jax.losses import SoftmaxConfig
    from clip_jax.optim import OptimConfig
    from clip_jax.step import Program, Recipe

    recipe = Recipe(
        model=model,
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(),
        steps=10_000,
        batch_size=len(data["text"]),
    )
    program = Program(recipe, sharding.make_mesh(sharding.MeshConfig()))
    state, batch = program.init(), program.put(data)

    def run() -> float:
        nonlocal state
        state, metrics = program.step(state, batch)
        return float(metrics["loss"])

    return run


def print_towers(config: CLIPConfig, data: dict[str, np.ndarray]) -> None:
    """Print the seconds of each tower alone."""
    model = CLIP(config)
    params = jax.jit(model.init)(jax.random.key(0))
    pixels = np.float32(data["image"]) / 255
    for name, encode, x in (
        ("image", model.encode_image, pixels),
        ("text", model.encode_text, data["text"]),
    ):
        gradient = jax.grad(lambda params, x, encode=encode: encode(params, x).sum())
        for what, function in (("forward", encode), ("forward and backward", gradient)):
            times, jitted = [], jax.jit(function)
            for _ in range(3):  # the first compiles
                start = time.perf_counter()
                jax.block_until_ready(jitted(params, x))
                times.append(time.perf_counter() - start)
            print(f"{name} tower, {what}: {min(times[1:]):.3f} s", flush=True)


def ours_embedding(model: CLIPConfig, data: dict[str, np.ndarray]) -> Callable[[], object]:
    clip = CLIP(model)
    params = jax.jit(clip.init)(jax.random.key(0))
    encode, images = jax.jit(clip.encode_image), jax.device_put(np.float32(data["image"]) / 255)
    return lambda: jax.block_until_ready(encode(params, images))


def open_clip_model(config: CLIPConfig, device: str) -> Any:
    import open_clip

    vision, text = config.vision, config.text
    model = open_clip.CLIP(
        config.embed_dim,
        open_clip.CLIPVisionCfg(
            layers=vision.depth,
            width=vision.width,
            head_width=vision.width // vision.num_heads,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
        ),
        open_clip.CLIPTextCfg(
            context_length=text.context_length,
            vocab_size=text.vocab_size,
            width=text.width,
            heads=text.num_heads,
            layers=text.depth,
        ),
    )
    return model.to(device)


def open_clip(
    config: CLIPConfig,
    data: dict[str, np.ndarray],
    *,
    device: str = "cpu",
    autocast: bool = False,
    compiled: bool = False,
) -> Callable[[], float]:
    import open_clip
    import torch

    model = open_clip_model(config, device).train()
    named = list(model.named_parameters())
    plain = [p for n, p in named if p.ndim < 2 or "ln" in n or "bias" in n or "logit_scale" in n]
    decayed = [p for _, p in named if not any(p is q for q in plain)]
    optimizer = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}],
        lr=5e-4,
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    loss_fn = open_clip.ClipLoss()
    mean, std = (
        torch.tensor(x, device=device)
        for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    pixels = torch.from_numpy(data["image"]).to(device)
    text = torch.from_numpy(data["text"]).long().to(device)
    forward = torch.compile(model) if compiled else model

    def run() -> float:
        images = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = loss_fn(*forward(images, text))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss.item()

    return run


def open_clip_embedding(
    config: CLIPConfig,
    data: dict[str, np.ndarray],
    *,
    device: str = "cpu",
    autocast: bool = False,
    compiled: bool = False,
) -> Callable[[], object]:
    import torch

    model = open_clip_model(config, device).eval()
    images = torch.from_numpy(np.float32(data["image"]) / 255).permute(0, 3, 1, 2).to(device)
    encode = torch.compile(model.encode_image) if compiled else model.encode_image

    def run() -> float:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast):
            return encode(images).sum().item()  # waits for the device

    return run


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("options", nargs="*", help="`small` and the batch size, both optional")
    options = parser.parse_args().options
    model, size = (SMALL, 256) if "small" in options else (B32, 64)
    for number in filter(str.isdigit, options):
        size = int(number)
    data = batch(model, size)
    print_towers(model, data)
    runs = {"open_clip": open_clip(model, data), "clip_jax": ours(model, data)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # compiles, allocates
        run()
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name:<10} {seconds[name][-1]:7.3f} s", file=sys.stderr, flush=True)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:<10} {median:7.3f} s/step, {size / median:6.2f} pairs/s")
    print(f"clip_jax takes {medians['clip_jax'] / medians['open_clip']:.2f} of open_clip's time")


if __name__ == "__main__":
    main()
