"""Zero-shot classification (CLIP paper, 3.1): the nearest averaged prompt embedding wins."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_jax.errors import InputError
from clip_jax.evals.evaluator import Encoder
from clip_jax.evals.prompts import ensemble


def classifier(
    encoder: Encoder, prompts: Sequence[Sequence[str]]
) -> Float[np.ndarray, "classes E"]:
    """Embed every class as the mean of its prompts' unit embeddings, scaled to unit length."""
    if not prompts or not all(prompts):
        raise InputError("zero-shot classification needs at least one class, each with a prompt.")
    features = encoder.texts([prompt for group in prompts for prompt in group])
    ends = np.cumsum([len(group) for group in prompts])
    return np.concatenate([ensemble(group[:, None]) for group in np.split(features, ends[:-1])])


def ranks_of_own(
    logits: Float[np.ndarray, "B classes"], labels: Int[np.ndarray, " B"]
) -> Int[np.ndarray, " B"]:
    """Rank each row's own label among its logits, 1 the best; ties count against."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    return (logits >= own).sum(axis=1)


def top_k_accuracy(
    logits: Float[np.ndarray, "B classes"], labels: Int[np.ndarray, " B"], k: int = 1
) -> float:
    """Return the share of rows whose label is among their k largest logits; ties count against."""
    return float((ranks_of_own(logits, labels) <= k).mean())


def classification(
    logits: Float[np.ndarray, "B classes"], labels: Int[np.ndarray, " B"]
) -> dict[str, float]:
    """Return `acc1`, `acc5` and `mean_per_class_recall`, CLIP_benchmark's names.

    Fewer than five classes have no `acc5`; two have `roc_auc`, by which the CLIP paper reports
    Hateful Memes. Classes without a sample do not count in the mean.
    """
    right = ranks_of_own(logits, labels) == 1
    per_class = np.bincount(labels, right) / np.maximum(np.bincount(labels), 1)
    values = {"acc1": top_k_accuracy(logits, labels, 1)}
    if logits.shape[1] >= 5:
        values["acc5"] = top_k_accuracy(logits, labels, 5)
    if logits.shape[1] == 2 and 0 < labels.sum() < len(labels):
        values["roc_auc"] = roc_auc(logits[:, 1] - logits[:, 0], labels == 1)
    return values | {"mean_per_class_recall": float(per_class[np.unique(labels)].mean())}


def average_precision(scores: Float[np.ndarray, " B"], truth: Bool[np.ndarray, " B"]) -> float:
    """Return the mean, over the true samples, of the precision among those ranked as high."""
    ordered = truth[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    return float(precision[ordered].sum() / max(ordered.sum(), 1))


def average_precision_11(
    scores: Float[np.ndarray, " B"], truth: Bool[np.ndarray, " B"]
) -> float:  # fmt: skip
    """Return VOC2007's: the mean of the best precision from each recall of 0, 0.1, ..., 1 on.

    Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", 2010, section 4.2.
    """
    ordered = truth[np.argsort(-scores, kind="stable")]
    hits = np.cumsum(ordered)
    precision, recall = hits / np.arange(1, len(ordered) + 1), hits / max(ordered.sum(), 1)
    best = [precision[recall >= step / 10 - 1e-9].max(initial=0) for step in range(11)]
    return float(np.mean(best))


def multi_label(
    logits: Float[np.ndarray, "B classes"], truth: Int[np.ndarray, "B classes"]
) -> dict[str, float]:
    """Return `mean_average_precision` and VOC2007's, `mean_average_precision_11`, over classes.

    Truth is 1, −1, or 0 for an image that does not count for a class (VOC: only difficult objects).
    The CLIP paper reports VOC2007 by the latter (table 9).
    """
    values = {}
    for name, measure in (
        ("mean_average_precision", average_precision),
        ("mean_average_precision_11", average_precision_11),
    ):
        of_class = [
            measure(scores[real != 0], real[real != 0] > 0)
            for scores, real in zip(logits.T, truth.T, strict=True)
            if (real > 0).any()
        ]
        values[name] = float(np.mean(of_class))
    return values


def roc_auc(scores: Float[np.ndarray, " B"], truth: Bool[np.ndarray, " B"]) -> float:
    """Return how often a true sample scores above a false one; ties count half."""
    negatives = np.sort(scores[~truth])
    below = np.searchsorted(negatives, scores[truth], "left")
    not_above = np.searchsorted(negatives, scores[truth], "right")
    return float((below + not_above).sum() / (2 * truth.sum() * len(negatives)))
