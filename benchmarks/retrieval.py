"""Time image-text retrieval over N x N generated embeddings of width 512.

    python benchmarks/retrieval.py [N]

The script prints recalls and median ranks in both directions, seconds and peak memory.
"""

import argparse
import resource
import time

import numpy as np

from clip_jax import sharding
from clip_jax.evals.retrieval import retrieval

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("count", nargs="?", type=int, default=100_000, help="number of pairs")
count = parser.parse_args().count
rng = np.random.default_rng(0)
images = rng.standard_normal((count, 512), np.float32)
images /= np.linalg.norm(images, axis=1, keepdims=True)
texts = images + 0.12 * rng.standard_normal((count, 512), np.float32)
texts /= np.linalg.norm(texts, axis=1, keepdims=True)

mesh = sharding.make_mesh(sharding.MeshConfig())
start, cpu = time.perf_counter(), time.process_time()
values = retrieval(images, texts, np.arange(count), mesh)
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(*(f"{name} {value:.5g}" for name, value in values.items()), sep="\n")
print(f"{count} x {count}: {seconds:.0f} s, {cpu:.0f} s of CPU, peak {peak:.2f} GiB")
