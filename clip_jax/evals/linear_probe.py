"""Classify with frozen features and labels: linear probe, few-shot probes, nearest neighbours.

CLIP paper, section 3.2 and appendix A.3. All need a training split. Without a validation split, a
fifth of the training images is held out to choose λ; the final fit includes it.

Logistic regression minimises  Σ cross-entropy + λ/2 ‖W‖²  with an unpenalised intercept, which is
scikit-learn's objective at C = 1/λ. The same problem is solved in better coordinates: features are
centred and rotated onto their principal axes, which changes neither objective nor optimum, and each
axis is scaled by the curvature expected there, so that L-BFGS needs tens of steps, not hundreds.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from clip_jax import processes, sharding
from clip_jax.errors import InputError
from clip_jax.evals.datasets import Labelled, Missing, Split
from clip_jax.evals.evaluator import embed_for_probe
from clip_jax.evals.ranks import check_finite, top_k_accuracy
from clip_jax.evals.reader import Outcome, Splits
from clip_jax.evals.zero_shot import classification
from clip_jax.models.clip import l2_normalize

SHOTS = (1, 2, 4, 8, 16)  # figure 6 of the paper
LAMBDAS = np.logspace(-6, 6, 96).tolist()  # the paper's grid
_COARSE_STEP = 16  # in indices of the grid, in the first round of the search
_CHECK_EVERY = 8  # L-BFGS steps between tests for convergence
_HELD_OUT = 5  # one in five images, of a training set without a validation split

Part = tuple[Float[np.ndarray, "_B _D"], Int[np.ndarray, " _B"]]  # features and labels


def probe(splits: Splits, seed: int = 0) -> Outcome:
    """Fit a linear probe, with λ chosen on validation images, and measure it on the test split.

    `seed` selects the training images that replace a missing validation split. Raises Missing
    without a training split, and InputError for splits with different classes.
    """
    train, validation, (features, labels), names = _examples(splits, seed)
    mesh, classes = splits.encoder.mesh, len(names)
    strength = search(train, validation, mesh, classes=classes)
    fitted = Problem(*_joined(train, validation), mesh, classes=classes).fit(strength)
    logits = fitted.logits(features)
    values = classification(logits, labels) | {"lambda": strength}
    test = splits.embedded("test", embed_for_probe)
    return Outcome(
        "linear_probe",
        {f"linear_probe/{name}": x for name, x in values.items()},
        names=names,
        logits=logits,
        labels=labels,
        indices=test.indices,
    )


def few_shot(splits: Splits, shots: Sequence[int] = SHOTS, seed: int = 0) -> Outcome:
    """Fit probes to k images per class; a k that exceeds the images of some class is left out.

    `seed` also selects these images. Raises as `probe` does.
    """
    (features, labels), validation, test, names = _examples(splits, seed)
    mesh, classes, values = splits.encoder.mesh, len(names), {}
    fewest = np.bincount(labels, minlength=classes).min()
    for k in shots:
        if k > fewest:
            processes.say_once(
                f"{splits.name}: few-shot of {k} left out: a class has fewer training images"
            )
            continue
        rows = few_per_class(labels, k, np.random.default_rng([seed, k]))
        few = features[rows], labels[rows]
        strength = search(few, validation, mesh, classes=classes)
        fitted = Problem(*few, mesh, classes=classes).fit(strength)
        values[f"few_shot/{k}"] = fitted.accuracy(*test)
    return Outcome("few_shot", values)


def neighbours(splits: Splits, k: int = 20, seed: int = 0) -> Outcome:
    """Classify test images by the vote of the k nearest training images; raises as `probe` does."""
    train, validation, test, names = _examples(splits, seed)
    train, mesh = _joined(train, validation), splits.encoder.mesh
    votes = neighbour_votes(train, test[0], mesh, classes=len(names), k=min(k, len(train[1])))
    return Outcome("neighbours", {"neighbours/acc1": top_k_accuracy(votes, test[1])})


def _examples(splits: Splits, seed: int) -> tuple[Part, Part, Part, Sequence[str]]:
    """Return the training, validation and test splits, and the names of the classes."""
    test_data, train_data = splits.open("test"), splits.open("train")
    if not isinstance(test_data, Labelled) or not isinstance(train_data, Labelled):
        raise Missing("probes and neighbours need images with one class each.")
    classes = len(test_data.names)
    if list(test_data.names) != list(train_data.names):
        raise InputError(
            f"{splits.name}: train has {len(train_data.names)} classes and test has {classes}, and "
            "their names or order differ; use the same folders in both splits."
        )
    train, test = _part(splits, "train"), _part(splits, "test")
    if len(np.unique(train[1])) < 2:
        raise InputError(
            f"{splits.name}: all training images that could be read have one class, of {classes}; "
            "probes and neighbours need at least two. Raise --images, or add training images."
        )
    try:
        validation = _part(splits, "validation")
    except Missing:
        held_out = hold_out(train[1], np.random.default_rng(seed))
        rest = np.setdiff1d(np.arange(len(train[1])), held_out)
        train, validation = ((train[0][rows], train[1][rows]) for rows in (rest, held_out))
    return train, validation, test, test_data.names


def _part(splits: Splits, split: Split) -> Part:
    images = splits.embedded(split, embed_for_probe)
    return images.features, images.labels


def _joined(first: Part, second: Part) -> Part:
    return np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])


def hold_out(labels: Int[np.ndarray, " B"], rng: np.random.Generator) -> Int[np.ndarray, " rows"]:
    """Choose a fifth of the images, at least one if possible, but never all of a class."""
    order = rng.permutation(len(labels))
    _, last = np.unique(labels[order][::-1], return_index=True)
    spare = np.delete(order, len(order) - 1 - last)  # without the last image of each class
    return spare[: max(len(order) // _HELD_OUT, 1)]


@dataclass(frozen=True, eq=False)
class Probe:
    """A fitted classifier of raw features."""

    weights: Float[np.ndarray, "D classes"]
    bias: Float[np.ndarray, " classes"]
    objective: float  # Σ cross-entropy + λ/2 ‖W‖² on the training data
    steps: int  # L-BFGS steps taken

    def logits(self, features: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "B classes"]:
        return features @ self.weights + self.bias

    def accuracy(self, features: Float[np.ndarray, "B D"], labels: Int[np.ndarray, " B"]) -> float:
        """Return the top-1 accuracy; raises NotFinite."""
        logits = self.logits(features)
        check_finite(logits, "a probe's logits")
        return top_k_accuracy(logits, labels)


class Problem:
    """A training set on the mesh; `fit` solves it for any λ, starting from the last solution."""

    def __init__(
        self,
        features: Float[np.ndarray, "B D"],
        labels: Int[np.ndarray, " B"],
        mesh: Mesh,
        *,
        classes: int | None = None,
    ) -> None:
        self._classes = classes or int(labels.max()) + 1
        self._count = count = len(features)
        features = np.asarray(features, np.float32)
        self._mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
        centred = features - self._mean
        with np.errstate(over="ignore", invalid="ignore"):
            covariance = centred.T @ centred
        check_finite(covariance, "the covariance of features")
        spread, axes = np.linalg.eigh(covariance)
        self._axes, spread = axes.astype(np.float32), np.maximum(spread, 0)
        # Curvature of the cross-entropy at uniform predictions: p(1 - p) of each class.
        self._curvature = spread * (1 / self._classes) * (1 - 1 / self._classes)

        shards = sharding.batch_shards(mesh)
        padded = -(-count // shards) * shards
        split, self._replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        rows = (centred @ self._axes, labels.astype(np.int32), np.ones(count, bool))
        self._data = tuple(sharding.put_rows(part, padded, split) for part in rows)
        self._start = np.zeros((features.shape[1] + 1, self._classes), np.float32)

    def fit(self, strength: float, *, max_steps: int = 1_000, tolerance: float = 2e-7) -> Probe:
        """Solve for λ = `strength`, until eight steps lower the objective by less than `tolerance`,
        relative to it. 2e-7 is three float32 roundings: a slow problem (λ = 1e-3 on digits) ends
        3e-6 above its optimum, and with 1e-6 it ended 1e-5 above."""
        scale = np.append((self._curvature + strength) / self._count, 1 / self._classes) ** -0.5
        scale = jax.device_put(scale[:, None].astype(np.float32), self._replicated)
        start = jax.device_put(self._start, self._replicated)
        weights, value, steps = _solve(
            start / scale,
            scale,
            np.float32(strength / self._count),
            *self._data,
            np.int32(max_steps),
            np.float32(tolerance),
        )
        solution = np.asarray(weights)
        if np.isfinite(solution).all():
            self._start = solution
        turned = self._axes @ solution[:-1]
        bias = solution[-1] - self._mean @ turned
        return Probe(turned, bias, float(value) * self._count, int(steps))


@jax.jit
def _solve(
    scaled: Float[Array, "D1 classes"],
    scale: Float[Array, "D1 1"],
    strength: Float[Array | np.float32, ""],
    features: Float[Array, "B D"],
    labels: Int[Array, " B"],
    real: Bool[Array, " B"],
    max_steps: Int[Array | np.int32, ""],
    tolerance: Float[Array | np.float32, ""],
) -> tuple[Float[Array, "D1 classes"], Float[Array, ""], Int[Array, ""]]:
    solver = optax.lbfgs(memory_size=10)

    def objective(scaled: Float[Array, "D1 classes"]) -> Float[Array, ""]:
        """Mean cross-entropy + λ/2n ‖W‖² of weights `scaled × scale`; the last row is the bias."""
        weights = scaled * scale
        logits = jnp.einsum("BD,DV->BV", features, weights[:-1], precision="highest") + weights[-1]
        # log(1 + Σ exp(others − target)): log Σ exp − target loses all digits of a nearly solved
        # sample.
        target = jnp.take_along_axis(logits, labels[:, None], axis=1)
        others = jnp.where(
            labels[:, None] == jnp.arange(logits.shape[1]), -jnp.inf, logits - target
        )
        losses = jax.nn.softplus(jax.nn.logsumexp(others, axis=1))
        return (losses * real).sum() / real.sum() + strength / 2 * jnp.square(weights[:-1]).sum()

    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: Any) -> Any:
        x, state, before, count, _ = carry
        value, grad = value_and_grad(x, state=state)
        updates, state = solver.update(grad, state, x, value=value, grad=grad, value_fn=objective)
        # Progress since the last test; tests are rare, since a single step may make none.
        looking = count % _CHECK_EVERY == 0
        going = ~looking | (before - value > tolerance * jnp.abs(value))
        before = jnp.where(looking, value, before)
        return optax.apply_updates(x, updates), state, before, count + 1, going

    def unfinished(carry: Any) -> Array:
        return carry[4] & (carry[3] < max_steps)

    start = (scaled, solver.init(scaled), jnp.float32(jnp.inf), jnp.int32(0), jnp.bool_(True))
    x, _, _, count, _ = jax.lax.while_loop(unfinished, step, start)
    return x * scale, objective(x), count


def search(
    train: Part,
    validation: Part,
    mesh: Mesh,
    *,
    lambdas: Sequence[float] = LAMBDAS,
    classes: int | None = None,
) -> float:
    """Return the λ with the best validation accuracy: search a coarse grid, then finer ones.

    Of equal accuracies the larger λ, the simpler model, wins. A λ whose logits are not finite is
    never chosen; NotFinite if there is no other. Each round begins with large λ, whose problems are
    easy, since each solution is the start of the next.
    """
    if not len(validation[1]):
        raise Missing(
            "choosing λ needs validation images, and no training image can be spared for them; add "
            "training images or a validation split."
        )
    problem, (features, labels) = Problem(*train, mesh, classes=classes), validation
    accuracies: dict[int, float] = {}
    step = min(_COARSE_STEP, len(lambdas))
    ask = {*range(0, len(lambdas), step), len(lambdas) - 1}
    while True:
        for index in sorted(ask - accuracies.keys(), reverse=True):
            logits = problem.fit(lambdas[index]).logits(features)
            is_finite = np.isfinite(logits).all()
            accuracies[index] = top_k_accuracy(logits, labels) if is_finite else -math.inf
        best = max(accuracies, key=lambda i: (accuracies[i], i))
        if accuracies[best] == -math.inf:
            check_finite(logits, "the logits of probes with any λ")
        if step == 1:
            return lambdas[best]
        step = max(step // 2, 1)
        ask = {i for i in (best - step, best + step) if 0 <= i < len(lambdas)}


def few_per_class(
    labels: Int[np.ndarray, " B"], k: int, rng: np.random.Generator
) -> Int[np.ndarray, " some"]:
    """Draw the indices of k samples of each class, or of all if it has fewer."""
    order = rng.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    classes = np.split(by_class, np.cumsum(np.bincount(labels)))
    return np.concatenate([rows[:k] for rows in classes])


def neighbour_votes(
    train: Part,
    test_features: Float[np.ndarray, "T D"],
    mesh: Mesh,
    *,
    classes: int,
    k: int,
    batch_size: int = 1_024,
) -> Int[np.ndarray, "T classes"]:
    """Count the classes of each test row's k nearest training rows in cosine similarity."""
    features, labels = train
    rows, queries = (_unit(x) for x in (features, test_features))
    replicated = sharding.replicated(mesh)

    @functools.partial(jax.jit, out_shardings=replicated)
    def vote(train: Any, queries: Float[Array, "T D"]) -> Int[Array, "T classes"]:
        rows, labels = train
        similarity = jnp.einsum("TD,BD->TB", queries, rows, precision="highest")
        _, nearest = jax.lax.top_k(similarity, k)
        return jax.nn.one_hot(labels[nearest], classes, dtype=jnp.int32).sum(1)

    train = jax.device_put((rows, labels.astype(np.int32)), replicated)
    return sharding.in_batches(vote, mesh, train, queries, batch_size=batch_size)


def _unit(features: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "B D"]:
    """Scale to unit length; raises NotFinite for features whose length overflows."""
    features = np.asarray(features, np.float32)
    with np.errstate(over="ignore"):
        check_finite(np.linalg.norm(features, axis=1), "the lengths of features")
    return l2_normalize(features)
