"""Labelled images and captioned images on disk, in the layouts that evaluators meet."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Int8

from clip_jax.data import digits
from clip_jax.data.images import SUFFIXES, ImageLike
from clip_jax.data.sources import SampleError, text_of
from clip_jax.data.sources.image_folder import image_files
from clip_jax.errors import InputError
from clip_jax.evals import prompts
from clip_jax.storage.files import Place, matching

Split = Literal["train", "validation", "test"]

_SPLITS = ("train", "val", "validation", "valid", "test")

_NUMBERED = "image {}".format


class Missing(Exception):
    """The data set is not on this disk; the message says how to get it."""


@dataclass(frozen=True)
class Labelled:
    """Images of classes. `load` gives what `data.images` reads, and the class's number."""

    names: Sequence[str]
    templates: Sequence[str]
    count: int
    load: Callable[[int], tuple[ImageLike, int]]
    key: Callable[[int], str] = _NUMBERED  # names one image, so that a person finds it
    labels: Sequence[int] | None = None  # of all, where they are known without reading images

    def __iter__(self) -> Iterator[tuple[ImageLike, int]]:
        return map(self.load, range(self.count))


@dataclass(frozen=True)
class Tagged:
    """Images with any number of classes: `load` gives 1 for each that is there, −1 for the others,
    and 0 where only objects too difficult to count are of it."""

    names: Sequence[str]
    templates: Sequence[str]
    count: int
    load: Callable[[int], tuple[ImageLike, Int8[np.ndarray, " classes"]]]
    key: Callable[[int], str] = _NUMBERED  # names one image, so that a person finds it

    def __iter__(self) -> Iterator[tuple[ImageLike, Int8[np.ndarray, " classes"]]]:
        return map(self.load, range(self.count))


@dataclass(frozen=True)
class Captioned:
    """Images with one or several captions each."""

    count: int
    load: Callable[[int], tuple[ImageLike, Sequence[str]]]
    key: Callable[[int], str] = _NUMBERED  # names one image, so that a person finds it

    def __iter__(self) -> Iterator[tuple[ImageLike, Sequence[str]]]:
        return map(self.load, range(self.count))


@dataclass(frozen=True)
class Contrasted:
    """Images with a right and a wrong caption: `load` gives both, the right one first."""

    count: int
    load: Callable[[int], tuple[ImageLike, tuple[str, str]]]
    groups: Sequence[str]  # of each case: a relation, a pair of attributes, a kind of change
    in_mean: Callable[[str, int], bool]  # whether a group of so many cases counts in the mean
    name_groups: bool = False  # whether there are few enough to report each
    key: Callable[[int], str] = _NUMBERED

    def __iter__(self) -> Iterator[tuple[ImageLike, tuple[str, str]]]:
        return map(self.load, range(self.count))


@dataclass(frozen=True)
class Translated:
    """The same images in several languages. `said` reads what `load` gives with an image: a
    language's captions, or its number of the class; None where it says nothing of the image."""

    languages: Sequence[str]
    names: Mapping[str, Sequence[str]]  # of classes, by language; empty: there are captions
    templates: Mapping[str, Sequence[str]]
    count: int
    load: Callable[[int], tuple[ImageLike, Any]]
    said: Callable[[str, Any], Any]
    key: Callable[[int], str] = _NUMBERED

    def __iter__(self) -> Iterator[tuple[ImageLike, Any]]:
        return map(self.load, range(self.count))


Data = Labelled | Tagged | Captioned | Contrasted | Translated


def spread(data: Data, most: int) -> Data:
    """Take at most so many items: as many of each class, where the classes are known without
    reading, else evenly from the order of the data."""
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
        whole = np.flatnonzero(rank < rank[rounds[most]])  # the last round has some classes only
        last = rounds[rank[rounds] == rank[rounds[most]]]
        count = most - len(whole)
        chosen = np.sort([*whole, *last[np.arange(count) * len(last) // max(count, 1)]])
    changes: dict[str, Any] = {
        name: [values[i] for i in chosen]
        for name in ("labels", "groups")
        if (values := getattr(data, name, None)) is not None
    }
    changes["load"] = lambda i: data.load(int(chosen[i]))
    changes["key"] = lambda i: data.key(int(chosen[i]))
    return replace(data, count=most, **changes)


def split_folder(path: Place, split: Split) -> Place | None:
    """Return where a folder keeps a split; None where it has none.

    Either `train`, `val` and `test` lie in it, or it is the test split itself. Without `test` the
    images of `val` are the test, as ImageNet's are.
    """
    train, test = path / "train", path / "test"
    validation = next((f for n in _SPLITS[1:4] if (f := path / n).is_dir()), None)
    if split == "train":
        return train if train.is_dir() else None
    if split == "validation":
        return validation if test.is_dir() else None
    if test.is_dir():
        return test
    return validation if train.is_dir() else path


def open_folder(path: Place, *, name: str = "", names: Sequence[str] | None = None) -> Labelled:
    """Open a folder in ImageFolder's layout: one folder a class, in the order of their names.

    Classes are called by `classnames.txt` in the folder (of a split: or beside it), one a line;
    else by `names`; else as published where the folders are the WordNet ids of ImageNet's classes
    or numbers of those of the data set `name`; else as the folders are. `name` also decides on
    templates. Raises InputError for a folder without classes and for a wrong number of names.
    """
    if not path.is_dir():
        raise InputError(f"there is no folder {path}; folder:PATH needs one folder a class in it.")
    folders = sorted(f.name for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
    if len(folders) < 2:
        raise InputError(f"{path} has {len(folders)} folders; it needs one a class, two at least.")
    imagenet = prompts.class_names("imagenet1k") or []
    wnids = dict(zip(prompts.imagenet_wnids(), imagenet, strict=True))
    numbers = all(folder.isdecimal() for folder in folders)
    if numbers:
        folders.sort(key=int)
    published = prompts.class_names(name) or imagenet  # ImageNetV2's folders are numbers, too
    beside = [path, path.parent] if path.name in _SPLITS else [path]
    listed = next((f for f in beside if (f / "classnames.txt").is_file()), None)
    if listed:
        names = _lines(listed / "classnames.txt")
    elif names is None and numbers and len(folders) == len(published):
        names = published
    elif names is None:
        names = [wnids.get(folder) or _spaced(folder) for folder in folders]
    if len(names) != len(folders):
        where = listed / "classnames.txt" if listed else "its published list"
        raise InputError(
            f"{where} has {len(names)} names, but {path} has {len(folders)} folders of classes; "
            "it needs one a line, in the order of the folders' names."
        )
    labels = {folder: label for label, folder in enumerate(folders)}
    images = image_files(path / folder for folder in folders)
    files = [(file, labels[file.relative_to(path).parts[0]]) for file in images]
    if not files:
        raise InputError(f"no images ({', '.join(SUFFIXES)}) in the folders of {path}.")
    return Labelled(
        names, _templates(name), len(files), files.__getitem__, lambda i: str(files[i][0]),
        [label for _, label in files],
    )  # fmt: skip


def open_webdataset(path: Place, *, split: str = "test") -> Labelled | Captioned:
    """Open CLIP_benchmark's layout: `{split}/*.tar` with `.cls`, or `.txt` of one caption a line.

    `classnames.txt`, `zeroshot_classification_templates.txt` and `dataset_type.txt` stand beside.
    """
    from clip_jax.data.sources.tar import TarConfig, TarSource

    if not any((path / split).glob("*.tar")):
        raise InputError(f"there are no tars in {path / split}; CLIP_benchmark's layout has them.")
    kind = path / "dataset_type.txt"
    captions = kind.exists() and "\n".join(_lines(kind)).strip().lower() == "retrieval"
    shards = str(path / split / "*.tar")
    source = TarSource(TarConfig(path=shards, caption="txt" if captions else "cls"))
    rng = np.random.default_rng(0)  # draws nothing: there is one text

    if captions:

        def load_captions(index: int) -> tuple[ImageLike, Sequence[str]]:
            image, text = source.load(index, rng)
            return image, [line for line in text.splitlines() if line.strip()]

        return Captioned(len(source), load_captions, source.key)

    names = _lines(path / "classnames.txt")

    def load(index: int) -> tuple[ImageLike, int]:
        image, label = source.load(index, rng)
        if not (label.isascii() and label.isdigit() and int(label) < len(names)):
            raise SampleError(f".cls is {label!r:.40}, not a number below {len(names)}")
        return image, int(label)

    templates = path / "zeroshot_classification_templates.txt"
    chosen = prompts.read_templates(templates) if templates.exists() else _templates("")
    return Labelled(names, chosen, len(source), load, source.key)


def open_tfds(
    path: Place, *, split: str, image: str = "image", label: str = "label",
    names: Sequence[str] | None = None, templates: Sequence[str] = (prompts.PLAIN_TEMPLATE,),
) -> Labelled:  # fmt: skip
    """Open a prepared TFDS builder's folder, the one with `dataset_info.json`.

    Class names are the builder's unless given. Raises InputError for a split or feature that is not
    there.
    """
    builder, examples = _open_tfds(path, split, image, label)
    feature = builder.info.features[label]
    if names is None:
        names = [_spaced(name) for name in feature.names]
    if len(names) != feature.num_classes:
        raise InputError(f"{path} has {feature.num_classes} classes, but {len(names)} are named.")

    def load(index: int) -> tuple[ImageLike, int]:
        example = examples[index]
        return _encoded(example[image]), int(example[label])

    return Labelled(names, templates, len(examples), load)


def open_tfds_voc(
    path: Place, *, split: str, templates: Sequence[str] = (prompts.PLAIN_TEMPLATE,)
) -> Tagged:
    """Open TFDS's `voc/2007`, whose images have any number of the 20 classes."""
    builder, examples = _open_tfds(path, split, "image", "labels_no_difficult")
    names = builder.info.features["labels"].feature.names

    def load(index: int) -> tuple[ImageLike, Int8[np.ndarray, " classes"]]:
        example = examples[index]
        truth = np.full(len(names), -1, np.int8)
        truth[np.asarray(example["labels"], np.int64)] = 0
        truth[np.asarray(example["labels_no_difficult"], np.int64)] = 1
        return _encoded(example["image"]), truth

    return Tagged(names, templates, len(examples), load)


def tfds_splits(path: Place) -> Sequence[str]:
    """Return the names of a prepared TFDS builder's splits."""
    content = json.loads((path / "dataset_info.json").read_text())
    return [split["name"] for split in content.get("splits", [])]


def _open_tfds(path: Place, split: str, image: str, label: str) -> tuple[Any, Any]:
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(str(path))
    for what, wanted, there in (
        ("split", split, builder.info.splits), ("feature", image, builder.info.features),
        ("feature", label, builder.info.features),
    ):  # fmt: skip
        if wanted.partition("[")[0] not in there:
            raise InputError(f"{path} has no {what} {wanted!r}, only {', '.join(there)}.")
    decoders = {image: tfds.decode.SkipDecoding()}
    return builder, builder.as_data_source(split=split, decoders=decoders)


def _encoded(image: Any) -> bytes:
    return image if isinstance(image, bytes) else image.item()


def open_captions(annotations: Place, images: Place) -> Captioned:
    """Open COCO's annotation format (Karpathy's splits of COCO and Flickr30k come in it).

    Raises InputError for a file of another shape. Images without a caption are left out.
    """
    content = read_json(annotations)
    try:
        files = {row["id"]: images / row["file_name"] for row in content["images"]}
        captions: dict[Any, list[str]] = {}
        for row in content["annotations"]:
            captions.setdefault(row["image_id"], []).append(text_of(row["caption"]))
    except (KeyError, TypeError, SampleError) as error:
        raise InputError(
            f"{annotations} is not in COCO's format: images with id and file_name, annotations "
            f"with image_id and caption ({error!r})."
        ) from error
    if unlisted := [key for key in captions if key not in files]:
        raise InputError(
            f"{annotations} has captions of {len(unlisted)} images that it does not list, such as "
            f"image_id={unlisted[0]!r}; each needs an entry in images, with id and file_name."
        )
    rows = [(files[key], texts) for key, texts in captions.items()]
    return Captioned(len(rows), rows.__getitem__, lambda i: str(rows[i][0]))


def read_json(path: Place) -> Any:
    """Read a file of annotations. Raises InputError where it is not there or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error


def open_voc(path: Place, *, split: Split) -> Tagged:
    """Open `VOCdevkit/VOC2007`: `ImageSets/Main/{class}_{split}.txt` and `JPEGImages`.

    Raises InputError where lists are missing or differ in their images.
    """
    part = {"train": "train", "validation": "val", "test": "test"}[split]
    lists = matching(path / "ImageSets" / "Main", f"*_{part}.txt")
    if not lists:
        raise InputError(f"{path} has no ImageSets/Main/*_{part}.txt, one a class.")
    rows = [[line.split() for line in _lines(file) if line.strip()] for file in lists]
    images = [row[0] for row in rows[0]]
    for file, labels in zip(lists, rows, strict=True):
        if [row[0] for row in labels] != images:
            raise InputError(f"{file} lists other images than {lists[0]}.")
        if not all(row[1:] in (["1"], ["0"], ["-1"]) for row in labels):
            raise InputError(f"{file} needs an image and 1, 0 or -1 in each line.")
    truth = np.array([[row[1] for row in labels] for labels in rows]).astype(np.int8).T
    names = [file.name.removesuffix(f"_{part}.txt") for file in lists]

    def load(index: int) -> tuple[ImageLike, Int8[np.ndarray, " classes"]]:
        return path / "JPEGImages" / f"{images[index]}.jpg", truth[index]

    return Tagged(
        names, _templates("voc2007"), len(images), load, lambda i: f"JPEGImages/{images[i]}.jpg"
    )


# Of the digits' captions, those that say the number in words.
_DIGITS_TEMPLATES = (
    "{c}", "a photo of the number {c}", "the number {c} on paper", "a handwritten {c}",
    "somebody wrote {c}",
)  # fmt: skip


def open_digits(
    config: digits.DigitsConfig, split: Split, *, per_number: int, image_size: int
) -> Labelled:
    """Draw the digits that ship inside as images of classes, every number one.

    Train and validation are in the training writers' hands, test in those held out. Probes are
    shown every number, also those that the model itself never was.
    """
    numbers = list(range(10**config.digits))
    hands = "held out" if split == "test" else "training"
    count = 2 * per_number if split != "test" else per_number
    images, labels = digits.evaluation_set(config, numbers, count, image_size, hands)
    if split != "test":
        mine = np.arange(len(labels)) % 2 == (split == "train")
        images, labels = images[mine], labels[mine]
    names = [digits.number_words(number, config.digits) for number in numbers]
    return Labelled(
        names, _DIGITS_TEMPLATES, len(labels), lambda i: (images[i], int(labels[i])),
        labels=labels.tolist(),
    )  # fmt: skip


def _templates(name: str) -> Sequence[str]:
    return prompts.templates(name) or (prompts.PLAIN_TEMPLATE,)


def _lines(path: Place) -> list[str]:
    if not path.exists():
        raise InputError(f"there is no {path}; it has one class name a line.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from error
    return text.splitlines()  # CLEVR has a class without a name


def _spaced(name: str) -> str:
    """Turn a folder's or TFDS's name into words: SUN397's `/a/apse/indoor` is "apse indoor"."""
    if name[:1] == name[2:3] == "/":
        name = name[3:]
    return name.replace("_", " ").replace("/", " ")
