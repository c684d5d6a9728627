"""Compare the linear probe's solver with scikit-learn's L-BFGS in float64 on a large problem.

    python benchmarks/linear_probe.py

The problem has 20,000 generated embeddings of width 512 in 100 classes, and four values of λ. The
script prints the seconds that both take, compilation included, and for each λ by how much the
objective of our solution exceeds scikit-learn's. It takes minutes.
"""

import argparse
import time

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression

from clip_jax import sharding
from clip_jax.evals.linear_probe import Problem


def objective(features, labels, weights, bias, strength):
    """Compute the objective in float64."""
    logits = features.astype(np.float64) @ weights.astype(np.float64) + bias
    shifted = logits - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - np.take_along_axis(shifted, labels[:, None], 1)[:, 0]
    return losses.sum() + strength / 2 * np.square(weights.astype(np.float64)).sum()


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((100, 512)) * 0.25
    labels = rng.integers(0, 100, 24_000)
    mixing = rng.standard_normal((512, 512)) / 512**0.5
    features = ((centres[labels] + rng.standard_normal((24_000, 512))) @ mixing).astype(np.float32)
    train, test = (features[:20_000], labels[:20_000]), (features[20_000:], labels[20_000:])
    grid = np.logspace(3, 0, 4)

    start = time.perf_counter()
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    problem = Problem(*train, mesh)
    ours = [problem.fit(float(strength)) for strength in grid]
    our_seconds = time.perf_counter() - start

    start = time.perf_counter()
    theirs = [
        LogisticRegression(C=1 / strength, tol=1e-8, max_iter=20_000).fit(
            train[0].astype(np.float64), train[1]
        )
        for strength in grid
    ]
    their_seconds = time.perf_counter() - start

    print(f"clip_jax {our_seconds:.1f} s, scikit-learn {their_seconds:.1f} s")
    for strength, our, their in zip(grid, ours, theirs, strict=True):
        best = objective(*train, their.coef_.T, their.intercept_, strength)
        gap = objective(*train, our.weights, our.bias, strength) / best - 1
        accuracies = our.accuracy(*test), their.score(*test)
        print(f"λ {strength:g}: {our.steps} steps, relative gap {gap:.1e}, accuracy {accuracies}")


if __name__ == "__main__":
    main()
