"""Image retrieval: find images of the same class by an image."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from clip_jax.errors import InputError, check_ranges
from clip_jax.evals.datasets import Labelled, Split, open_folder
from clip_jax.evals.evaluator import Encoder, EvaluatorConfig
from clip_jax.evals.reader import Splits
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath


@dataclass(frozen=True, kw_only=True)
class ImageRetrievalConfig(EvaluatorConfig):
    """Retrieval of images of one class by each image: recall@k and mean average precision."""

    folder: str  # Folder with one folder of images per class.
    recall_at: tuple[int, ...] = (1, 5)  # Numbers k of the best images of which one must be right.
    every_steps: int = 1_000  # Steps between evaluations; the last step is always evaluated.
    name: str = "images"  # Prefix of the metrics' names.

    def __post_init__(self) -> None:
        check_ranges(self, "evals.", recall_at="[1, inf)", every_steps="[1, inf)")

    def measures(self) -> list[str]:
        """Return the prefix of the metrics."""
        return [f"{self.name} (image retrieval)"]

    def make(self) -> "ImageRetrieval":
        return ImageRetrieval(self)


class ImageRetrieval:
    """Yields `NAME/image_recall@k` and `NAME/mAP`."""

    def __init__(self, config: ImageRetrievalConfig) -> None:
        self.config, self.every_steps = config, config.every_steps
        self._images = open_folder(files.as_path(config.folder))

    def run(self, encoder: Encoder, output: AnyPath | None = None) -> Iterator[tuple[str, float]]:
        """Embed all images and rank them by their similarity to each."""

        def open_split(split: Split) -> Labelled:
            return self._images

        embedded = Splits(self.config.name, open_split, encoder).embedded("test")
        values = retrieval(embedded.features, embedded.labels, self.config.recall_at)
        for metric, value in values.items():
            yield f"{self.config.name}/{metric}", value


def retrieval(
    features: Float[np.ndarray, "B E"], labels: Int[np.ndarray, " B"], recall_at: tuple[int, ...]
) -> dict[str, float]:
    """Return recall@k and mean average precision of unit vectors, each compared with the others.

    An image that is the only one of its class is no query.
    """
    similarity = features @ features.T
    np.fill_diagonal(similarity, -np.inf)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :-1]
    right = labels[order] == labels[:, None]
    right = right[right.any(axis=1)]
    if not len(right):
        raise InputError("no class has two images; image retrieval needs classes with several.")
    precision = np.cumsum(right, axis=1) / np.arange(1, right.shape[1] + 1)
    recalls = {f"image_recall@{k}": float(right[:, :k].any(axis=1).mean()) for k in recall_at}
    average = (precision * right).sum(axis=1) / right.sum(axis=1)
    return recalls | {"mAP": float(average.mean())}
