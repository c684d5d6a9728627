"""Labelled and captioned images on disk, in the layouts that the evaluators read."""

import contextlib
import functools
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, Int8, UInt8

from clip_jax.data import digits
from clip_jax.data.class_folders import SPLITS, read_class_names, read_classes, spaced
from clip_jax.data.images import SUFFIXES, ImageLike
from clip_jax.data.sources import SampleError, text_of
from clip_jax.data.sources.image_folder import image_files
from clip_jax.errors import InputError
from clip_jax.evals import prompts
from clip_jax.storage.files import AnyPath, escape, read_text

Split = Literal["train", "validation", "test"]
IGNORED = -1  # class of pixels that are not counted


class Missing(Exception):
    """The data set is not on disk; the message says how to get it."""


@dataclass(frozen=True)
class _Items:
    """Images with an answer each; `load` returns both, the image as `data.images` reads it."""

    count: int
    load: Callable[[int], tuple[ImageLike, Any]]
    key: Callable[[int], str] = field(default="image {}".format, kw_only=True)  # in messages

    def __iter__(self) -> Iterator[tuple[ImageLike, Any]]:
        return map(self.load, range(self.count))


@dataclass(frozen=True)
class Labelled(_Items):
    """Images with one class each; the answer is the class index."""

    names: Sequence[str]
    templates: Sequence[str]
    labels: Sequence[int] | None = None  # of all images, if known without reading them


@dataclass(frozen=True)
class Tagged(_Items):
    """Images with any number of classes; the answer is [classes], int8: 1 for a class in the image,
    −1 for one that is not, 0 for one with only objects marked as difficult."""

    names: Sequence[str]
    templates: Sequence[str]


@dataclass(frozen=True)
class Captioned(_Items):
    """Images with one or more captions each; the answer is the list of captions."""


@dataclass(frozen=True)
class Contrasted(_Items):
    """Images with a right and a wrong caption; the answer is both, the right one first."""

    groups: Sequence[str]  # one per image: a relation, pair of attributes or kind of change
    left_out: Set[str] = frozenset()  # groups excluded from the mean over groups
    fewest: int = 1  # minimum number of images of a group in that mean
    name_groups: bool = False  # whether each group is reported, too


@dataclass(frozen=True)
class Segmented(_Items):
    """Images with a mask each; the answer is the mask's integers [H, W], as they are in its file
    (see `SegmentationConfig` for what they mean)."""

    names: Sequence[str]
    templates: Sequence[str] = ()  # empty: those of the protocol


@dataclass(frozen=True)
class Translated(_Items):
    """The same images in several languages. `answer_in(language, answer)` extracts a language's
    captions or class index from an image's answer; None if the language has none."""

    languages: Sequence[str]
    answer_in: Callable[[str, Any], Any]
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)  # class names by language
    templates: Mapping[str, Sequence[str]] = field(default_factory=dict)


Compared = Labelled | Tagged | Captioned | Contrasted | Translated
Data = Compared | Segmented
OpenSplit = Callable[[Split], Data]


def spread(data: Data, most: int) -> Data:
    """Select at most `most` images: equally many per class if the labels are known without reading
    images, else evenly spaced in the order of the data set."""
    if most >= data.count:
        return data
    chosen = np.arange(most) * data.count // most
    if isinstance(data, Labelled) and data.labels is not None:
        labels = np.asarray(data.labels)
        by_class = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[by_class], labels[by_class])
        rank = np.empty_like(by_class)  # how many of its class come before
        rank[by_class] = np.arange(len(labels)) - starts
        rounds = np.lexsort((labels, rank))
        full = np.flatnonzero(rank < rank[rounds[most]])  # the last round is incomplete
        last = rounds[rank[rounds] == rank[rounds[most]]]
        count = most - len(full)
        chosen = np.sort([*full, *last[np.arange(count) * len(last) // max(count, 1)]])
    changes: dict[str, Any] = {
        name: [values[i] for i in chosen]
        for name in ("labels", "groups")
        if (values := getattr(data, name, None)) is not None
    }
    changes["load"] = lambda i: data.load(int(chosen[i]))
    changes["key"] = lambda i: data.key(int(chosen[i]))
    return replace(data, count=most, **changes)


def split_folder(path: AnyPath, split: Split) -> AnyPath | None:
    """Return the folder of a split; None if there is none.

    A folder either has `train`, `val` and `test`, or is the test split itself. Without `test`, the
    images in `val` are the test split, as in ImageNet. A folder with images directly in it is a
    class, whatever its name: trains, for example.
    """
    splits = {name: path / name for name in SPLITS if _is_split(path / name)}
    train, test = splits.get("train"), splits.get("test")
    validation = next((splits[name] for name in SPLITS[1:4] if name in splits), None)
    if split == "train":
        return train
    if split == "validation":
        return validation if test else None
    if test:
        return test
    return validation if train else path


def _is_split(folder: AnyPath) -> bool:
    """Return whether a folder exists and is not a class, with images directly in it."""
    if not folder.is_dir():
        return False
    visible = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return not any(entry.suffix.lower() in SUFFIXES for entry in visible)


def open_folder(path: AnyPath, *, name: str = "") -> Labelled:
    """Open a folder in ImageFolder's layout, whose classes are those of `read_classes`.

    `name` selects the published templates of a data set. Raises InputError for a folder with fewer
    than two classes or without images.
    """
    if not path.is_dir():
        raise InputError(
            f"there is no folder {path}; folder:PATH needs a folder with one folder per class."
        )
    classes = read_classes(path)
    if len(classes) < 2:
        raise InputError(f"{path} has {len(classes)} folders; it needs one per class, at least 2.")
    labels = {folder: label for label, folder in enumerate(classes)}
    images = image_files(path / folder for folder in classes)
    files = [(file, labels[file.relative_to(path).parts[0]]) for file in images]
    if not files:
        raise InputError(
            f"add images ({', '.join(SUFFIXES)}) to the folders of {path}: all are empty."
        )
    return Labelled(
        len(files),
        files.__getitem__,
        list(classes.values()),
        prompts.templates(name),
        [label for _, label in files],
        key=lambda i: str(files[i][0]),
    )


def open_webdataset(path: AnyPath, *, split: str = "test") -> Labelled | Captioned:
    """Open CLIP_benchmark's layout: `{split}/*.tar` with `.cls`, or `.txt` with a caption per line.

    `classnames.txt`, `zeroshot_classification_templates.txt` and `dataset_type.txt` are in `path`.
    """
    from clip_jax.data.sources.tar import TarConfig, TarSource

    if not any((path / split).glob("*.tar")):
        raise InputError(
            f"there are no tars in {path / split}; webdataset:PATH needs PATH/test/*.tar."
        )
    kind = path / "dataset_type.txt"
    captions = kind.exists() and read_text(kind).strip().lower() == "retrieval"
    shards = f"{escape(str(path / split))}/*.tar"
    source = TarSource(TarConfig(path=shards, caption="txt" if captions else "cls"))
    rng = np.random.default_rng(0)  # unused: each image has one text

    if captions:

        def load_captions(index: int) -> tuple[ImageLike, Sequence[str]]:
            image, text = source.load(index, rng)
            return image, [line for line in text.splitlines() if line.strip()]

        return Captioned(len(source), load_captions, key=source.key)

    names = read_class_names(path / "classnames.txt")

    def load(index: int) -> tuple[ImageLike, int]:
        image, label = source.load(index, rng)
        if not (label.isascii() and label.isdigit() and int(label) < len(names)):
            raise SampleError(f".cls is {label!r:.40}, not a number below {len(names)}")
        return image, int(label)

    templates = path / "zeroshot_classification_templates.txt"
    chosen = prompts.read_templates(templates) if templates.exists() else prompts.templates("")
    return Labelled(len(source), load, names, chosen, key=source.key)


def open_tfds(
    path: AnyPath, *, split: str, names: Sequence[str] | None, templates: Sequence[str]
) -> Labelled | Tagged:
    """Open the folder of a prepared TFDS builder, which has `dataset_info.json`: images with one
    class each or, as in VOC2007, with any number.

    `names` replaces the builder's class names. Raises Missing if there is no such split, and
    InputError for a wrong number of names.
    """
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(str(path))
    if split not in builder.info.splits:
        raise Missing(f"{path} has no {split} split, only {', '.join(builder.info.splits)}.")
    features, decoders = builder.info.features, {"image": tfds.decode.SkipDecoding()}
    examples = builder.as_data_source(split=split, decoders=decoders)

    def image_of(example: Any) -> bytes:
        image = example["image"]
        return image if isinstance(image, bytes) else image.item()

    if "labels_no_difficult" in features:
        classes = features["labels"].feature.names

        def load_tags(index: int) -> tuple[ImageLike, Int8[np.ndarray, " classes"]]:
            example = examples[index]
            truth = np.full(len(classes), -1, np.int8)
            truth[np.asarray(example["labels"], np.int64)] = 0
            truth[np.asarray(example["labels_no_difficult"], np.int64)] = 1
            return image_of(example), truth

        return Tagged(len(examples), load_tags, classes, templates)

    def load(index: int) -> tuple[ImageLike, int]:
        example = examples[index]
        return image_of(example), int(example["label"])

    count = features["label"].num_classes
    names = names or [spaced(name) for name in features["label"].names]
    if len(names) != count:
        raise InputError(f"{path} has {count} classes, but the published list {len(names)} names.")
    return Labelled(len(examples), load, names, templates)


def open_captions(annotations: AnyPath, images: AnyPath) -> Captioned:
    """Open COCO's annotation format, which Karpathy's splits of COCO and Flickr30k use.

    Raises InputError for a file of another shape. Images without a caption are left out.
    """
    layout = "COCO's format: images with id and file_name, annotations with image_id and caption"
    captions: dict[Any, list[str]] = {}
    with checked(annotations, layout):
        content = json.loads(read_text(annotations))
        files = {row["id"]: images / row["file_name"] for row in content["images"]}
        for row in content["annotations"]:
            captions.setdefault(row["image_id"], []).append(text_of(row["caption"]))
    if unlisted := [key for key in captions if key not in files]:
        raise InputError(
            f"{annotations} has captions of {len(unlisted)} images that it does not list, such as "
            f"image_id={unlisted[0]!r}; add an entry with id and file_name to images for each."
        )
    rows = [(files[key], texts) for key, texts in captions.items()]
    return Captioned(len(rows), rows.__getitem__, key=lambda i: str(rows[i][0]))


def images_beside(folder: AnyPath) -> AnyPath:
    """Return the folder of the images that a folder of texts describes: below it, or itself."""
    names = ("images", "val2014", "val2017")
    return next((images for name in names if (images := folder / name).is_dir()), folder)


_WRONG = (
    AttributeError,
    LookupError,
    OverflowError,
    RecursionError,
    SampleError,
    TypeError,
    ValueError,
)


@contextlib.contextmanager
def checked(path: AnyPath, layout: str) -> Generator[None]:
    """Raise InputError if a part of the layout is missing or has the wrong type."""
    try:
        yield
    except InputError:
        raise
    except _WRONG as error:
        raise InputError(f"{path} is not in {layout} ({error!r}).") from error


_DIGITS_SIZE = 16  # pixels, as in configs/digits.py
_PER_NUMBER = 20  # images of each number in each split of the digits
# Those of the digits' captions that write the number in words.
_DIGITS_TEMPLATES = (
    "{c}",
    "a photo of the number {c}",
    "the number {c} on paper",
    "a handwritten {c}",
    "somebody wrote {c}",
)


def open_digits(split: Split) -> Labelled:
    """Draw the bundled digits as labelled images: numbers of two digits, every number a class.

    Training and validation images are by the training writers, test images by the held-out ones.
    Probes are fitted to every number, also to those that the model has not seen in training.
    """
    config = digits.DigitsConfig()
    numbers = range(10**config.digits)
    if split == "test":
        images, labels = _drawn_digits(_PER_NUMBER, "held out")
    else:
        images, labels = _drawn_digits(2 * _PER_NUMBER, "training")
        mine = np.arange(len(labels)) % 2 == (split == "train")
        images, labels = images[mine], labels[mine]
    names = [digits.number_words(number, config.digits) for number in numbers]
    return Labelled(
        len(labels),
        lambda i: (images[i], int(labels[i])),
        names,
        _DIGITS_TEMPLATES,
        labels.tolist(),
    )


@functools.cache  # the training and the validation split share their images
def _drawn_digits(
    per_number: int, hands: Literal["held out", "training"]
) -> tuple[UInt8[np.ndarray, "B H W 3"], Int[np.ndarray, " B"]]:
    config = digits.DigitsConfig()
    numbers = range(10**config.digits)
    return digits.evaluation_set(config, numbers, per_number, _DIGITS_SIZE, hands)
