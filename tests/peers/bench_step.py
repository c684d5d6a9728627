"""Training steps a second of ViT-B/32 in float32 on CPU cores: clip_jax and open_clip in turn.

    python tests/peers/bench_step.py [batch size]

Both in one process, alternating, each with all cores; the median of the rounds counts. A step is
the whole update (both towers, loss, gradients, AdamW) on pixels that are already in memory. Before
that, clip_jax's towers alone: forward, and forward with backward.
"""

import dataclasses
import functools
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import jax
import numpy as np

BATCH, ROUNDS = 64, 5


def batch(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    text = rng.integers(1, 49_407, (size, 77), dtype=np.int32)
    text[:, -1] = 49_407
    return {"image": rng.integers(0, 256, (size, 224, 224, 3), dtype=np.uint8), "text": text}


def ours(data: dict[str, np.ndarray]) -> Callable[[], float]:
    from clip_jax import sharding
    from clip_jax.losses import SoftmaxConfig
    from clip_jax.models import zoo
    from clip_jax.models.clip import CLIP
    from clip_jax.optim import OptimConfig, make_optimizer
    from clip_jax.step import init_state, jit_step, state_shardings

    model = CLIP(dataclasses.replace(zoo.get("ViT-B-32"), dtype="float32"))
    optim, steps = OptimConfig(), 10_000
    mesh = sharding.make_mesh(sharding.MeshConfig())
    optimizer = make_optimizer(optim, steps)
    shardings = state_shardings(model, optimizer, mesh)
    init = functools.partial(init_state, model=model, optimizer=optimizer)
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    step = jit_step(model, optim, steps, SoftmaxConfig(), mesh, shardings)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, data)
        return float(metrics["loss"])

    return run


def print_towers(data: dict[str, np.ndarray]) -> None:
    """Print the seconds of each tower alone."""
    from clip_jax.models import zoo
    from clip_jax.models.clip import CLIP

    model = CLIP(dataclasses.replace(zoo.get("ViT-B-32"), dtype="float32"))
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
            print(f"{name} tower, {what}: {min(times[1:]):.2f} s", flush=True)


def open_clip(data: dict[str, np.ndarray]) -> Callable[[], float]:
    import open_clip
    import torch

    model = open_clip.create_model("ViT-B-32").train()
    named = list(model.named_parameters())
    plain = [p for n, p in named if p.ndim < 2 or "ln" in n or "bias" in n or "logit_scale" in n]
    decayed = [p for _, p in named if not any(p is q for q in plain)]
    optimizer = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}],
        lr=5e-4, betas=(0.9, 0.98), eps=1e-6,
    )  # fmt: skip
    loss_fn = open_clip.ClipLoss()
    mean, std = (
        torch.tensor(x) for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    pixels, text = torch.from_numpy(data["image"]), torch.from_numpy(data["text"]).long()

    def run() -> float:
        images = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
        loss = loss_fn(*model(images, text))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss.item()

    return run


def main() -> None:
    warnings.simplefilter("ignore")
    size = int(sys.argv[1]) if len(sys.argv) > 1 else BATCH
    data = batch(size)
    print_towers(data)
    runs = {"open_clip": open_clip(data), "clip_jax": ours(data)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # compiles, allocates
        run()
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name:<10} {seconds[name][-1]:6.2f} s", file=sys.stderr, flush=True)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:<10} {median:6.2f} s a step, {size / median:6.2f} pairs/s")
    print(f"clip_jax takes {medians['clip_jax'] / medians['open_clip']:.2f} of open_clip's time")


if __name__ == "__main__":
    main()
