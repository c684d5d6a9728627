"""Run a model over a data set's splits: each process decodes its shard of every batch, and the
results are on every process."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped, UInt8

from clip_jax import processes, sharding
from clip_jax.data.images import ImageError, Preprocess, read_ahead
from clip_jax.data.sources import SampleError
from clip_jax.display import Display
from clip_jax.errors import InputError
from clip_jax.evals import datasets
from clip_jax.evals.datasets import Data, OpenSplit, Split, spread
from clip_jax.evals.evaluator import Encoder, compiled, embed_images, name_of
from clip_jax.evals.ranks import check_finite
from clip_jax.models.images import Images, num_bytes, write_row, zeros

# Maximum number of images per process and batch. With 1,024, page faults of the new 150 MB arrays
# cost 0.4 ms per image, on top of 2 ms for decoding.
_BATCH = 128


@dataclass(frozen=True)
class LocalBatch:
    """One process's rows of a batch. Rows without an answer, padding or unreadable, are zeros."""

    images: Images
    answers: dict[int, Any]  # by index in the data set: a class, tags or captions
    skipped: dict[int, str]  # reasons, by index in the data set


def read_batches(data: Data, preprocess: Preprocess, mesh: Mesh) -> Iterator[LocalBatch]:
    """Read a data set's images in order; threads decode one batch ahead.

    All processes yield the same number of batches. A global batch is a multiple of the mesh's batch
    shards, and its row `i` is image `start + i` of the data set.
    """
    shards, (process, count) = sharding.batch_shards(mesh), sharding.data_part(mesh)
    rows = -(-min(_BATCH * count, data.count) // shards) * shards // count  # of this process

    def read(index: int) -> tuple[int, Images | None, Any]:
        try:
            image, answer = data.load(index)
            return index, preprocess.batch(image), answer
        except (ImageError, SampleError) as error:
            return index, None, f"{data.key(index)}: {error}"

    firsts = range(process * rows, process * rows + data.count, rows * count)
    mine = (range(first, min(first + rows, data.count)) for first in firsts)
    for results in read_ahead(mine, read, ahead=1):
        batch = LocalBatch(zeros(preprocess.image_spec, rows), {}, {})
        for row, (index, image, answer) in enumerate(results):
            if image is None:
                batch.skipped[index] = answer
            else:
                write_row(batch.images, row, image)
                batch.answers[index] = answer
        yield batch


class ImageCache:
    """Keeps decoded images in host memory between evaluations: complete splits, up to a budget."""

    def __init__(self, budget: int) -> None:
        """`budget` is in bytes, for this process."""
        self._free = budget
        self._stored: dict[Any, list[LocalBatch]] = {}

    def read(self, key: Any, batches: Iterable[LocalBatch]) -> Iterator[LocalBatch]:
        """Yield the batches stored under this key, or else these, and store them if they fit."""
        if key in self._stored:
            yield from self._stored[key]
            return
        stored: list[LocalBatch] = []
        size = 0
        for batch in batches:
            size += num_bytes(batch.images)
            if size <= self._free:
                stored.append(batch)
            else:
                stored.clear()
            yield batch
        if size <= self._free:
            self._stored[key] = stored
            self._free -= size


@dataclass(frozen=True)
class Embedded:
    """Embeddings and answers of the images that could be read, in order."""

    features: Shaped[np.ndarray, "B ..."]  # or another result of the model for each image
    indices: Int[np.ndarray, " B"]  # of the images in the data set
    answers: list  # for each image: a class, tags or captions
    skipped: list[str]  # images that could not be read, with the reason

    @functools.cached_property
    def labels(self) -> Int[np.ndarray, "B ..."]:
        return np.array(self.answers)


@dataclass(frozen=True, eq=False)
class Segments:
    """Details of a segmentation."""

    confusion: Int[np.ndarray, "C C"]  # pixels of each true class (rows) by predicted class
    # Key, image, predicted and true classes (−1: ignored) of some images.
    pictures: Sequence[tuple[str, UInt8[np.ndarray, "h w 3"], Any, Any]]


@dataclass(frozen=True)
class Outcome:
    """Results of one task on one data set: metrics, and details of a classification."""

    task: str  # CLIP_benchmark's name
    values: dict[str, float]
    skipped: list[str] = field(default_factory=list)
    names: Sequence[str] = ()
    logits: Float[np.ndarray, "B classes"] | None = None  # cosine × logit scale
    labels: Int[np.ndarray, " B"] | None = None
    indices: Int[np.ndarray, " B"] | None = None
    # Top-1 accuracy of each template alone.
    of_template: dict[str, float] = field(default_factory=dict)
    by_language: dict[str, dict[str, float]] = field(default_factory=dict)
    segments: Segments | None = None


class Splits:
    """A data set's splits, each opened and embedded at first use, once for all tasks."""

    def __init__(
        self,
        name: str,
        open_split: OpenSplit,
        encoder: Encoder,
        *,
        most: int | None = None,
        cache: ImageCache | None = None,
        templates: Sequence[str] | None = None,
    ) -> None:
        """`most` limits the images per split, spread over its classes; `cache` has images decoded
        before; `templates` replace the data set's own."""

        def opened(split: Split) -> Data:
            data = open_split(split)
            if not data.count:
                raise InputError(
                    f"{name}: no images with a class, mask or caption in its {split} split."
                )
            if templates and isinstance(data, datasets.Translated) and data.names:
                raise InputError("remove --templates: these classes have names in many languages.")
            if templates and isinstance(
                data, datasets.Labelled | datasets.Tagged | datasets.Segmented
            ):
                data = replace(data, templates=templates)
            return data if most is None else spread(data, most)

        self.name, self.encoder = name, encoder
        self.open = functools.cache(opened)
        self.embedded = functools.cache(
            lambda split, function=embed_images: self.compute(split, function)
        )
        self._cache = cache or ImageCache(0)

    def compute(
        self, split: Split, function: Callable[..., Array], *more: Any, **options: Any
    ) -> Embedded:
        """Run a function that `compiled` takes over all readable images of a split; return its
        results with each image's answer, on every process.

        `more` are further arrays that the function takes after the images. A terminal shows the
        progress. Raises Missing if the split is not on disk, InputError if no image can be read,
        and NotFinite for results with NaN or infinity.
        """
        encoder = self.encoder
        run, data = compiled(function, encoder.model, encoder.mesh, **options), self.open(split)
        local = read_batches(data, encoder.preprocess, encoder.mesh)
        rows = sharding.batch_sharding(encoder.mesh)
        put = functools.partial(jax.make_array_from_process_local_data, rows)
        answers: dict[int, Any] = {}
        skipped: dict[int, str] = {}

        def batches() -> Iterator[tuple[Any, ...]]:
            for batch in self._cache.read((self.name, split, encoder.preprocess), local):
                answers.update(batch.answers)
                skipped.update(batch.skipped)
                yield encoder.params, jax.tree.map(put, batch.images), *more

        quiet, title = not processes.is_lead(), f"{self.name}, {split}"
        with Display(title, data.count, quiet=quiet, fleeting=True) as display:
            features = sharding.compute_batches(run, batches(), display)
        answers, skipped = _of_all((answers, skipped))
        if not answers:
            raise InputError(
                f"none of {data.count} images can be read; the first: {list(skipped.values())[:1]}."
            )
        indices = np.array(list(answers))
        features = features[indices]
        check_finite(features, f"the model's outputs ({name_of(function)}) for {title}")
        return Embedded(features, indices, list(answers.values()), list(skipped.values()))


def _of_all(tables: tuple[dict[int, Any], ...]) -> list[dict[int, Any]]:
    """Merge what each process knows of its images, in the order of the data set."""
    rows = [[(i, np.asarray(x).tolist()) for i, x in table.items()] for table in tables]
    every = processes.gather(rows)
    return [dict(sorted(map(tuple, itertools.chain(*parts)))) for parts in zip(*every, strict=True)]
