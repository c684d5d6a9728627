"""Results on data sets, as CLIP_benchmark's CSV, Markdown tables and pictures."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from clip_jax.data.images import center_crop, complete, decode
from clip_jax.display import plain, table
from clip_jax.evals.catalog import OPENAI_MODELS, ROWS
from clip_jax.evals.datasets import Data
from clip_jax.evals.pictures import contact_sheet, save, segments_sheet, with_probabilities
from clip_jax.evals.ranks import standing
from clip_jax.evals.reader import Outcome, Segments
from clip_jax.evals.segmentation import class_scores
from clip_jax.storage.files import AnyPath, write_whole

COLUMNS = (
    "acc1",
    "acc5",
    "mean_per_class_recall",
    "dataset",
    "model",
    "pretrained",
    "task",
    "mean_average_precision",
    "image_retrieval_recall@5",
    "text_retrieval_recall@5",
    "model_fullname",
    "language",
)
_WORST = 12  # number of rows of the confusion matrix

Outcomes = Sequence[tuple[str, Outcome]]  # (data set, outcome) in the order of the report


def main_metric(name: str, outcome: Outcome) -> str:
    """Return the metric by which the CLIP paper reports a data set, also for probes."""
    wanted = ROWS[name].metric if name in ROWS else ""
    usual = (x for x in outcome.values if x.endswith(("acc1", "image_retrieval_recall@5", "miou")))
    names = (wanted, f"linear_probe/{wanted}", *usual, *outcome.values)
    return next(metric for metric in names if metric in outcome.values)


def to_csv(outcomes: Outcomes, model: str, tokens: int | None = None) -> str:
    """Write a row for each data set, task and language in CLIP_benchmark's columns, and more."""
    rows = [
        {
            "dataset": name,
            "model": model,
            "pretrained": model,
            "task": outcome.task,
            "language": language,
            "model_fullname": f"{model} {model}",
            **{key.replace("linear_probe/", "lp_"): x for key, x in values.items()},
            **({} if tokens is None else {"tokens": tokens}),
        }
        for name, outcome in outcomes
        for language, values in (outcome.by_language or {"en": outcome.values}).items()
    ]
    columns = [*COLUMNS, *sorted({key for row in rows for key in row} - set(COLUMNS))]
    return _csv(columns, ([row.get(key, "") for key in columns] for row in rows))


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    return file.getvalue()


def to_markdown(outcomes: Outcomes, model: str) -> str:
    """Write the main metric of each data set and, for zero-shot tasks, that of OpenAI's models as
    open_clip measured it: not for VOC2007, which it measured on cropped objects. Without any such
    data set, OpenAI's models are left out."""
    published = [
        (name, ROWS[name].openai)
        for name, outcome in outcomes
        if name in ROWS and outcome.task.startswith("zeroshot")
    ]
    is_any = any(row for _, row in published)
    models = [model, *(f"OpenAI {x}" for x in OPENAI_MODELS if is_any)]
    rows = [("data set", "metric", *models), ("---",) * (2 + len(models))]
    for name, outcome in outcomes:
        metric = main_metric(name, outcome)
        beside = dict(published).get(name, ()) if outcome.task.startswith("zeroshot") else ()
        cells = [f"{100 * x:.1f}" for x in (outcome.values[metric], *beside)]
        rows.append((name, metric, *cells, *[""] * (len(models) - len(cells))))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def to_table(values: Mapping[str, float | int]) -> str:
    """Format names and numbers for a terminal, those of `evaluate --beside` in columns."""
    sides = ("", "original/", "change/")
    names = [name for name in values if not name.startswith(sides[1:])]
    if len(names) < len(values):
        rows = ([name, *(values.get(side + name, "") for side in sides)] for name in names)
        return table(("metric", "model", "original", "change"), rows)
    width = max(map(len, values), default=0)
    return "\n".join(
        f"{name:<{width}}  {value:{'10' if isinstance(value, int) else '10.4f'}}"
        for name, value in values.items()
    )


def write(directory: AnyPath, outcomes: Outcomes, model: str, tokens: int | None = None) -> None:
    """Write `results.csv`, `results.md` and, for data sets with several templates, the accuracy of
    each template alone, the best first, as `NAME/templates.csv`. `tokens` is the sequence length of
    a NaFlex model."""
    write_whole(directory / "results.csv", to_csv(outcomes, model, tokens))
    title = model if tokens is None else f"{model}, {tokens} tokens"
    write_whole(directory / "results.md", to_markdown(outcomes, title))
    for name, outcome in outcomes:
        if outcome.of_template:
            rows = sorted(outcome.of_template.items(), key=lambda row: -row[1])
            write_whole(directory / name / "templates.csv", _csv(("template", "acc1"), rows))


def draw(directory: AnyPath, data: Data, outcome: Outcome, *, crop: bool = True) -> None:
    """Write a classification's `images.csv`, `classes.csv` (worst first), and its pictures
    `confusion.png` and `errors.png`; of a segmentation, `classes.csv` and a picture of each image.

    Images are drawn as the model sees them: the central square of each, or without `crop` all.
    """
    from matplotlib.figure import Figure

    if outcome.segments is not None:
        _draw_segments(directory, outcome.segments, outcome.names)
    if outcome.logits is None or outcome.labels is None or outcome.indices is None:
        return
    names, labels, predicted = outcome.names, outcome.labels, outcome.logits.argmax(axis=1)
    present, drawn = np.unique(labels), [plain(name) for name in names]
    stands = standing(outcome.logits, labels)
    right = stands.within(1)
    by_image = [
        (data.key(int(outcome.indices[i])), names[labels[i]], names[predicted[i]], *hits)
        for i, hits in enumerate(zip(right, stands.within(5), strict=True))
    ]
    header = ("image", "class", "predicted", "acc1", "acc5")
    write_whole(directory / "images.csv", _csv(header, by_image))

    accuracy = np.array([right[labels == c].mean() for c in present])
    order = np.argsort(accuracy, kind="stable")

    by_class = [(names[present[i]], accuracy[i]) for i in order]
    write_whole(directory / "classes.csv", _csv(("class", "acc1"), by_class))

    # The worst classes (rows) and the classes predicted for their images (columns).
    worst = present[order[:_WORST]]
    columns = np.union1d(worst, predicted[np.isin(labels, worst)])
    counts = np.array([[((labels == r) & (predicted == c)).sum() for c in columns] for r in worst])
    busiest = np.sort(np.argsort(-counts.sum(axis=0), kind="stable")[: 2 * _WORST])
    columns, counts = columns[busiest], counts[:, busiest]
    size = (2.5 + 0.35 * len(columns), 2.5 + 0.3 * len(worst))
    figure = Figure(size, dpi=110, layout="constrained")
    axis = figure.subplots()
    axis.imshow(counts, cmap="Blues")
    for (row, column), value in np.ndenumerate(counts):
        if value:
            dark = value > counts.max() / 2
            axis.text(
                column,
                row,
                value,
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )
    axis.set_xticks(range(len(columns)), [drawn[c] for c in columns], rotation=90, fontsize=7)
    axis.set_yticks(range(len(worst)), [drawn[c] for c in worst], fontsize=7)
    title = f"The {len(worst)} classes with the lowest accuracy"
    if right.all():
        title = "No errors" + (
            f": {len(worst)} of the classes" if len(worst) < len(present) else ""
        )
    axis.set(xlabel="predicted", ylabel="true class", title=title)
    save(figure, directory / "confusion.png")

    wrong = np.flatnonzero(right == 0)
    wrong = wrong[:: max(-(-len(wrong) // 32), 1)]  # evenly spaced: data sets are sorted by class
    if len(wrong):
        fit = center_crop if crop else complete
        pictures = [fit(decode(data.load(int(outcome.indices[i]))[0]), 96) for i in wrong]
        lines = [
            [*with_probabilities(outcome.logits[i], names), f"true: {names[labels[i]]}"]
            for i in wrong
        ]
        contact_sheet(
            directory / "errors.png",
            pictures,
            lines,
            right=[False] * len(wrong),
            title="Errors: three nearest classes (softmax), true class",
        )


def _draw_segments(directory: AnyPath, segments: Segments, names: Sequence[str]) -> None:
    right = np.diag(segments.confusion)
    of_class = class_scores(segments.confusion)
    accuracy = right / np.maximum(segments.confusion.sum(axis=1), 1)
    order = np.argsort(of_class, kind="stable")  # classes without a pixel come last
    rows = [(names[i], of_class[i], accuracy[i]) for i in order if not np.isnan(of_class[i])]
    write_whole(directory / "classes.csv", _csv(("class", "iou", "accuracy"), rows))
    for number, (key, *drawn) in enumerate(segments.pictures):
        name = f"{number:03}_{PurePosixPath(key).stem}.png"
        segments_sheet(directory / "segments" / name, *drawn, names)
