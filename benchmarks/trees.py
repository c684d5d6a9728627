"""Compare the speed of two source trees of the package, such as two commits in `git worktree`s.

    PYTHONPATH=. python benchmarks/trees.py OLD_TREE NEW_TREE [--rounds 5] [--only NAME ...]

Each measurement is a process of its own that imports one tree's package; those of the two trees
alternate. For each, the script prints the ratio of the new tree's speed to the old one's: the
geometric mean over the rounds, and its 95% interval (Student's t of the logarithms).

- `import`: `import clip_jax`, the fastest of three processes.
- `first step`: until the first step of `digits` has run, from the start of the process.
- `step`: training steps of `digits` on synthetic data (`clip-jax bench step`).
- `disk`, `bucket`: the input pipeline of `pairs` over drawn shapes (`clip-jax bench input`), from
  tar files on disk and in a fake-gcs-server.
- `encoding`: ViT-B/32's image tower, float32, random weights.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats

sys.path[:0] = [str(Path(__file__).parents[1])]

from clip_jax.storage import files  # noqa: E402
from tests.contract.servers import Server  # noqa: E402

ENCODING = """
import dataclasses, time, jax, numpy as np
from clip_jax.convert.weights import default_preprocess
from clip_jax.inference.loading import Model
from clip_jax.models import zoo
from clip_jax.models.clip import CLIP
config = dataclasses.replace(zoo.get("ViT-B-32"), dtype="float32")
params = jax.jit(CLIP(config).init)(jax.random.key(0))
model = Model(config, params, default_preprocess(config))
pixels = np.random.default_rng(0).normal(size=(16, 224, 224, 3)).astype(np.float32)
times = []
for _ in range(6):
    start = time.perf_counter()
    np.asarray(model.encode_image(pixels, batch_size=16))
    times.append(time.perf_counter() - start)
print(16 / min(times[1:]))
"""


def output(tree: str, *arguments: str) -> str:
    """Return what a Python process prints that imports a tree's package."""
    environment = os.environ | {"PYTHONPATH": os.path.abspath(tree), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{done.stderr}\n{' '.join(arguments)[:200]} failed in {tree}")
    return done.stdout


def command(tree: str, *arguments: str) -> dict[str, float]:
    """Return the JSON that a command prints."""
    return json.loads(output(tree, "-m", "clip_jax", *arguments, "--json"))


def imports(tree: str) -> float:
    """Return imports of the package per second."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        output(tree, "-c", "import clip_jax")
        times.append(time.perf_counter() - start)
    return 1 / min(times)


def first_steps(tree: str) -> float:
    """Return first steps per second, set-up and compilation included."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ("train", "digits", "--steps", "1", "--optim.warmup-steps", "0")
        output(tree, "-m", "clip_jax", *arguments, "--workdir", folder)
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if "loss" in row)
    return 1 / sum(row[f"seconds/{part}"] for part in ("init", "compile", "input", "steps"))


def steps(tree: str) -> float:
    """Return pairs per second of training steps."""
    arguments = ("bench", "step", "digits", "--rounds", "3", "--calls", "5")
    return command(tree, *arguments)["samples_per_second"]


def pipelines(path: str) -> Callable[[str], float]:
    """Return a function that measures samples per second of the pipeline that reads `path`."""

    def measure(tree: str) -> float:
        arguments = ("bench", "input", "pairs", "--data.source.path", path, "--seconds", "4")
        return command(tree, *arguments, "--batch-size", "32")["samples_per_second"]

    return measure


def encodings(tree: str) -> float:
    """Return images per second."""
    return float(output(tree, "-c", ENCODING))


def interval(old: list[float], new: list[float]) -> tuple[float, float, float]:
    """Return the geometric mean of the ratios new / old, and its 95% interval."""
    logs = np.log(np.array(new) / np.array(old))
    mean = logs.mean()
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old_tree", help="source tree to compare with")
    parser.add_argument("new_tree", help="source tree to measure")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each tree")
    parser.add_argument("--only", nargs="*", help="names of the measurements (default: all)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Server("gs") as server:
        os.environ.update(server.environment())
        shapes = f"{folder}/shapes"
        output(arguments.new_tree, "-m", "clip_jax", "sample-data", shapes, "--train", "400")
        url = server.make_bucket("shapes")
        for path in sorted(Path(shapes, "tars").iterdir()):
            files.write_whole(f"{url}/{path.name}", path.read_bytes())
        measurements = {
            "import": imports,
            "first step": first_steps,
            "step": steps,
            "disk": pipelines(f"{shapes}/tars"),
            "bucket": pipelines(url),
            "encoding": encodings,
        }
        print("| | new / old | 95% interval |\n|---|---|---|")
        for name in arguments.only or measurements:
            old, new = [], []
            for _ in range(arguments.rounds):
                old.append(measurements[name](arguments.old_tree))
                new.append(measurements[name](arguments.new_tree))
                print(f"{name}: {old[-1]:.4g} → {new[-1]:.4g} per second", file=sys.stderr)
            ratio, low, high = interval(old, new)
            print(f"| {name} | {ratio:.3f} | {low:.3f} … {high:.3f} |", flush=True)


if __name__ == "__main__":
    main()
