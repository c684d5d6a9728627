"""Zero-shot tasks for each kind of data set.

Classification (CLIP paper, section 3.1) predicts the class with the nearest mean prompt embedding.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_jax import processes
from clip_jax.display import Display
from clip_jax.errors import InputError
from clip_jax.evals import prompts
from clip_jax.evals.compositions import composition
from clip_jax.evals.datasets import Captioned, Compared, Contrasted, Labelled, Tagged, Translated
from clip_jax.evals.evaluator import Encoder
from clip_jax.evals.languages import average
from clip_jax.evals.ranks import check_finite, cosines, standing, top_k_accuracy
from clip_jax.evals.reader import Embedded, Outcome
from clip_jax.evals.retrieval import retrieval


def zero_shot(data: Compared, images: Embedded, encoder: Encoder) -> Outcome:
    """Run the zero-shot task of a data set: classify, tag, retrieve, or choose a caption."""
    match data:
        case Labelled():
            return classify(data, images, encoder)
        case Tagged():
            return tag(data, images, encoder)
        case Captioned():
            return retrieve(images, encoder)
        case Contrasted():
            return contrast(data, images, encoder)
        case Translated():
            return translate(data, images, encoder)


def classify(data: Labelled, images: Embedded, encoder: Encoder) -> Outcome:
    """Classify every image by class names × templates, averaged in embedding space.

    With several templates, also measure each alone: mean, spread and the ensemble's gain. A model's
    own classifier is measured, too, if it has all of these classes: `classifier/acc1`.
    """
    labels = images.labels
    texts = encoder.classes(data.templates, data.names)
    logits = cosines(images.features, prompts.ensemble(texts))
    values, of_template = classification(logits, labels), {}
    rows = encoder.head and rows_of_classes(data.names, encoder.head.classes)
    if rows is not None:
        trained = classification(cosines(images.features, encoder.head.kernel[rows]), labels)
        values |= {f"classifier/{name}": value for name, value in trained.items()}
    if len(data.templates) > 1:
        sensitivity, alone = prompts.sensitivity(images.features, labels, texts)
        values |= sensitivity
        of_template = dict(zip(data.templates, alone, strict=True))
    return Outcome(
        "zeroshot_classification",
        values,
        images.skipped,
        data.names,
        logits * encoder.logit_scale,
        labels,
        images.indices,
        of_template,
    )


def rows_of_classes(names: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """Return where a classifier has each class of a data set; None if it lacks one.

    Of equal names, the first of the data set is the first of the classifier, and so on: ImageNet's
    list has "missile" and "sunglasses" twice.
    """
    rows = dict(zip(_numbered(classes), range(len(classes)), strict=True))
    numbered = _numbered(names)
    return [rows[name] for name in numbered] if rows.keys() >= set(numbered) else None


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """Number the occurrences of each name from 0."""
    counts = Counter[str]()
    numbered = []
    for name in names:
        numbered.append((name, counts[name]))
        counts[name] += 1
    return numbered


def tag(data: Tagged, images: Embedded, encoder: Encoder) -> Outcome:
    """Rank all images for each class: mean average precision as in CLIP_benchmark and VOC2007."""
    texts = prompts.ensemble(encoder.classes(data.templates, data.names))
    values = multi_label(cosines(images.features, texts), images.labels)
    return Outcome("zeroshot_classification", values, images.skipped)


def retrieve(images: Embedded, encoder: Encoder) -> Outcome:
    """Find images by captions and captions by images; an image may have several."""
    owner = np.repeat(np.arange(len(images.answers)), [len(texts) for texts in images.answers])
    texts = encoder.texts([text for group in images.answers for text in group])
    values = retrieval(images.features, texts, owner, encoder.mesh)
    return Outcome("zeroshot_retrieval", values, images.skipped)


def contrast(data: Contrasted, images: Embedded, encoder: Encoder) -> Outcome:
    """Count how often the right caption is closer to its image than the wrong one; ties lose."""
    texts = encoder.texts([text for pair in images.answers for text in pair])
    of_right, of_wrong = ((images.features * x).sum(axis=1) for x in (texts[::2], texts[1::2]))
    groups = [data.groups[i] for i in images.indices]
    values = composition(of_right > of_wrong, groups, data)
    return Outcome("image_caption_selection", values, images.skipped)


def translate(data: Translated, images: Embedded, encoder: Encoder) -> Outcome:
    """Classify or retrieve in each language, with images embedded once, and average over languages.

    Languages without an answer for any of the images are left out.
    """
    results: dict[str, dict[str, float]] = {}
    quiet = not processes.is_lead()
    with Display("languages", len(data.languages), quiet=quiet, fleeting=True) as display:
        for language in data.languages:
            answers = [data.answer_in(language, answer) for answer in images.answers]
            mine = [i for i, answer in enumerate(answers) if answer is not None]
            part = Embedded(
                images.features[mine], images.indices[mine], [answers[i] for i in mine], []
            )
            if mine and data.names:
                templates, names = data.templates[language], data.names[language]
                texts = [[prompts.fill(t, name) for t in templates] for name in names]
                logits = cosines(part.features, classifier(encoder, texts))
                results[language] = classification(logits, part.labels)
            elif mine:
                results[language] = retrieve(part, encoder).values
            display.add(1)
    if not results:
        raise InputError("no language has a class or caption for the images read; raise --images.")
    task = "zeroshot_classification" if data.names else "zeroshot_retrieval"
    return Outcome(task, average(results), images.skipped, by_language=results)


def classifier(encoder: Encoder, texts: Sequence[Sequence[str]]) -> Float[np.ndarray, "classes E"]:
    """Embed every class as the mean of its prompts' unit embeddings, scaled to unit length."""
    features = encoder.texts([text for group in texts for text in group])
    groups = np.split(features, np.cumsum([len(group) for group in texts])[:-1])
    classes = np.concatenate([prompts.ensemble(group[:, None]) for group in groups])
    check_finite(classes, "class embeddings")
    return classes


def classification(
    logits: Float[np.ndarray, "B classes"], labels: Int[np.ndarray, " B"]
) -> dict[str, float]:
    """Return `acc1`, `acc5` and `mean_per_class_recall`, CLIP_benchmark's names.

    Below five classes there is no `acc5`. For two classes there is `roc_auc`, which the CLIP paper
    reports for Hateful Memes. Classes without a sample do not count in the mean. Of t equal best
    classes each counts 1/t (see `ranks`). Raises NotFinite for logits with NaN or infinity.
    """
    check_finite(logits, "logits")
    right = standing(logits, labels).within(1)
    per_class = np.bincount(labels, right) / np.maximum(np.bincount(labels), 1)
    values = {"acc1": float(right.mean())}
    if logits.shape[1] >= 5:
        values["acc5"] = top_k_accuracy(logits, labels, 5)
    if logits.shape[1] == 2 and 0 < labels.sum() < len(labels):
        from scipy.stats import mannwhitneyu  # takes half a second to import

        margins = (logits[:, 1] - logits[:, 0]).astype(np.float64)
        above, below = margins[labels == 1], margins[labels == 0]
        wins = mannwhitneyu(above, below, method="asymptotic").statistic  # a tie is half a win
        values["roc_auc"] = float(wins / (len(above) * len(below)))
    return values | {"mean_per_class_recall": float(per_class[np.unique(labels)].mean())}


def average_precisions(
    scores: Float[np.ndarray, " B"], truth: Bool[np.ndarray, " B"]
) -> tuple[float, float]:
    """Return two average precisions: the mean precision at the ranks of the true samples, and
    VOC2007's mean of the best precision at recall ≥ r, over r = 0, 0.1, ..., 1.

    Samples with equal scores share a rank, the last of theirs, as in scikit-learn. NaN for scores
    that are not finite. Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge",
    2010, section 4.2.
    """
    if not np.isfinite(scores).all():
        return math.nan, math.nan
    order = np.argsort(-scores, kind="stable")
    is_last = np.append(np.diff(scores[order]) != 0, True)  # of the samples with its score
    hits, ranks = np.cumsum(truth[order])[is_last], np.flatnonzero(is_last) + 1
    precision, recall = hits / ranks, hits / truth.sum()
    best = [precision[recall >= step / 10 - 1e-9].max() for step in range(11)]
    return float((precision * np.diff(recall, prepend=0)).sum()), float(np.mean(best))


def multi_label(
    logits: Float[np.ndarray, "B classes"], truth: Int[np.ndarray, "B classes"]
) -> dict[str, float]:
    """Return `mean_average_precision` and VOC2007's, `mean_average_precision_11`, over classes.

    `truth` is 1, −1, or 0 for an image that does not count for a class (VOC: only difficult
    objects). The CLIP paper reports VOC2007 by the 11-point mean (table 9). Classes without an
    image do not count. Raises InputError if no class has one, and NotFinite.
    """
    check_finite(logits, "logits")
    if not (truth > 0).any():
        raise InputError(
            f"none of the {len(truth):,} images read shows one of the {truth.shape[1]:,} classes, "
            "so there is no mean average precision; raise --images, or correct the labels."
        )
    of_classes = [
        average_precisions(scores[real != 0], real[real != 0] > 0)
        for scores, real in zip(logits.T, truth.T, strict=True)
        if (real > 0).any()
    ]
    plain, eleven = np.mean(of_classes, axis=0)
    return {"mean_average_precision": float(plain), "mean_average_precision_11": float(eleven)}
