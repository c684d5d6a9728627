"""Compare training steps and image embeddings of clip_jax and open_clip on one GPU.

    python benchmarks/gpu.py [--small] [CASE ...]

Needs `pip install -e '.[gpu,peers]'` with a PyTorch for CUDA, and takes about ten minutes. It
prints the table for BENCHMARKS.md. Each number is measured in a process of its own, since JAX and
PyTorch do not share a card's memory. If a batch does not fit, it is halved until it does.

A step is a complete update in bfloat16 (both towers, loss, gradients, AdamW) on pixels in the
card's memory; embeddings are those of images in the card's memory. PyTorch computes in autocast,
with its own attention, and with `torch.compile` in a row of its own. `--small` has tiny models,
with which the script also runs on CPUs.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS = 10
CASES = {  # architecture, pairs of a step, and images of a batch that is embedded
    "vit_b32": ("ViT-B-32", 2_048, 1_024),
    "vit_b16": ("ViT-B-16", 512, 512),
    "vit_l14": ("ViT-L-14", 256, 256),
}
KINDS = ("clip_jax", "open_clip", "open_clip, compiled")
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory")


def model_of(case: str, *, is_small: bool) -> Any:
    from benchmarks.step import SMALL
    from clip_jax.models import zoo

    model = SMALL if is_small else zoo.get(CASES[case][0])
    return dataclasses.replace(model, dtype="bfloat16", remat="none")


def seconds(run: Callable[[], object]) -> float:
    """Return the median time of a call, after two that compile."""
    times = []
    for _ in range(ROUNDS + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def measure(kind: str, task: str, case: str, size: int, *, is_small: bool) -> dict[str, Any]:
    """Measure one cell in this process."""
    from benchmarks import step

    model = model_of(case, is_small=is_small)
    data = step.batch(model, size)
    if kind == "clip_jax":
        run = step.ours(model, data) if task == "step" else step.ours_embedding(model, data)
        result = {"seconds": seconds(run)}
        import jax

        device = jax.devices()[0]
        memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
        return result | {"memory": memory, "device": device.device_kind}
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = kind.endswith("compiled")
    make = step.open_clip if task == "step" else step.open_clip_embedding
    run = make(model, data, device=device, autocast=True, compiled=compiled)
    result = {"seconds": seconds(run)}
    is_cuda = device == "cuda"
    return result | {
        "memory": torch.cuda.max_memory_allocated() if is_cuda else 0,
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
    }


def in_process(kind: str, task: str, case: str, size: int, *, is_small: bool) -> dict[str, Any]:
    """Measure one cell in a process of its own, with the largest batch up to `size` that fits."""
    arguments = [*("--cell", kind, task, str(size)), *["--small"] * is_small, case]
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1]) | {"size": size}
    if size > 8 and any(words in done.stderr for words in OUT_OF_MEMORY):
        return in_process(kind, task, case, size // 2, is_small=is_small)
    raise RuntimeError(f"{kind}, {task} of {case}: {done.stderr[-2_000:]}")


def row(kind: str, task: str, case: str, cell: dict[str, Any], *, is_small: bool) -> str:
    from clip_jax import chips, flops

    model = model_of(case, is_small=is_small)
    rate, size = cell["size"] / cell["seconds"], cell["size"]
    work = flops.training(model, size).total
    if task == "embed":
        work = size * flops.forward(model).image
    chip = chips.find(cell["device"])
    mfu = f"{100 * work / cell['seconds'] / chip.device.peak_flops:.1f}" if chip else ""
    memory = f"{cell['memory'] / 1e9:.1f}" if cell["memory"] else ""
    what = {"step": "training", "embed": "embedding"}[task]
    names = (f"`{case}`", what, kind, f"{size:,}", f"{1e3 * cell['seconds']:,.1f}")
    return f"| {' | '.join((*names, f'{rate:,.0f}', mfu, memory))} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help=f"{', '.join(CASES)}; by default all")
    parser.add_argument("--small", action="store_true", help="tiny models, for a try on CPUs")
    parser.add_argument("--cell", nargs=3, metavar=("KIND", "TASK", "SIZE"), help="one number")
    args = parser.parse_args()
    if args.cell:
        kind, task, size = args.cell
        print(json.dumps(measure(kind, task, args.cases[0], int(size), is_small=args.small)))
        return
    header = ("model", "what", "library", "batch", "time, ms", "images/s", "MFU, %", "memory, GB")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for case in args.cases or CASES:
        for task, size in zip(("step", "embed"), CASES[case][1:], strict=True):
            size = 32 if args.small else size
            cells = {
                kind: in_process(kind, task, case, size, is_small=args.small) for kind in KINDS
            }
            smallest = min(cell["size"] for cell in cells.values())
            for kind, cell in cells.items():  # all with the batch that fits for all
                if cell["size"] > smallest:
                    cell = in_process(kind, task, case, smallest, is_small=args.small)
                print(row(kind, task, case, cell, is_small=args.small), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
