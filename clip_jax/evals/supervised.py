"""What labels add to frozen features: linear probe, few-shot probes, nearest neighbours.

CLIP paper, section 3.2 and appendix A.3. Every number needs a training split; where there is no
validation split, a fifth of the training images is held out to choose λ, and trained on afterwards.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from clip_jax.errors import InputError
from clip_jax.evals.datasets import Labelled, Missing
from clip_jax.evals.linear_probe import Problem, few_per_class, nearest_neighbours, search
from clip_jax.evals.measure import Outcome, Splits
from clip_jax.evals.zero_shot import classification

Task = Literal["probe", "few-shot", "neighbours"]
TASKS: tuple[Task, ...] = get_args(Task)
Part = tuple[Float[np.ndarray, "B D"], Int[np.ndarray, " B"]]

SHOTS = (1, 2, 4, 8, 16)  # figure 6 of the paper
_HELD_OUT = 5  # one in so many, of a training set without a validation split


def supervised(
    splits: Splits,
    tasks: Sequence[Task],
    *,
    shots: Sequence[int] = SHOTS,
    neighbours: int = 20,
    seed: int = 0,
) -> Outcome:
    """Train on the train split, choose on the validation split, measure on the test split.

    `seed` decides what is held out and which samples few-shot probes see. `few_shot/{k}` are left
    out where a class has fewer than k. Missing where there is no training split; raises InputError
    where splits have other classes.
    """
    test_data, train_data = splits.open("test"), splits.open("train")
    if not isinstance(test_data, Labelled) or not isinstance(train_data, Labelled):
        raise Missing(f"{splits.name}: probes are for images of one class each.")
    if list(test_data.names) != list(train_data.names):
        raise InputError(
            f"{splits.name}: train has {len(train_data.names)} classes, test {len(test_data.names)}"
            ", and their names or order differ; both splits need the same folders."
        )
    mesh, classes, rng = splits.encoder.mesh, len(test_data.names), np.random.default_rng(seed)
    train, test = _part(splits, "train"), _part(splits, "test")
    if len(np.unique(train[1])) < 2:
        raise InputError(
            f"{splits.name}: all training images that were read are of one class, of {classes}; "
            f"{' and '.join(tasks)} need two classes at least (--images may be too few)."
        )
    try:
        validation = _part(splits, "validation")
    except Missing:
        held_out = hold_out(train[1], rng)
        if not len(held_out) and {"probe", "few-shot"} & set(tasks):
            raise Missing(
                f"{splits.name}: one training image a class leaves none to choose λ with; add "
                "images, or a validation split."
            ) from None
        rest = np.setdiff1d(np.arange(len(train[1])), held_out)
        train, validation = ((train[0][some], train[1][some]) for some in (rest, held_out))
    both = np.concatenate([train[0], validation[0]]), np.concatenate([train[1], validation[1]])
    values: dict[str, float] = {}

    if "probe" in tasks:
        strength = search(train, validation, mesh, classes=classes)
        probe = Problem(*both, mesh, classes=classes).fit(strength)
        measured = classification(probe.logits(test[0]), test[1])
        values |= {f"linear_probe/{name}": value for name, value in measured.items()}
        values["linear_probe/lambda"] = strength
    if "few-shot" in tasks:
        fewest = np.bincount(train[1], minlength=classes).min()
        for k in (k for k in shots if k <= fewest):
            some = few_per_class(train[1], k, np.random.default_rng([seed, k]))
            few = train[0][some], train[1][some]
            strength = search(few, validation, mesh, classes=classes)
            probe = Problem(*few, mesh, classes=classes).fit(strength)
            values[f"few_shot/{k}"] = probe.accuracy(*test)
    if "neighbours" in tasks:
        votes = nearest_neighbours(both, test[0], mesh, k=min(neighbours, len(both[1])))
        values["neighbours/acc1"] = float((votes == test[1]).mean())
    return Outcome("linear_probe", values)


def hold_out(labels: Int[np.ndarray, " B"], rng: np.random.Generator) -> Int[np.ndarray, " some"]:
    """Choose a fifth of the images, one at least, of no class the last; none, if none can."""
    order = rng.permutation(len(labels))
    _, last = np.unique(labels[order][::-1], return_index=True)
    spare = np.delete(order, len(order) - 1 - last)  # without one of each class, the last in order
    return spare[: max(len(order) // _HELD_OUT, 1)]


def _part(splits: Splits, split: Literal["train", "validation", "test"]) -> Part:
    embedded = splits.embedded(split, before_projection=True)
    return embedded.features, embedded.labels
