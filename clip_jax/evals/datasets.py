"""Labelled images and captioned images on disk, in the layouts that evaluators meet."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax.data.images import ImageLike
from clip_jax.evals import prompts

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".ppm", ".tif", ".tiff")


class Missing(Exception):
    """The data set is not on this disk; the message says how to get it."""


@dataclass(frozen=True)
class Labelled:
    """Images of classes. `load` gives what `data.images` reads, and the class's number."""

    names: Sequence[str]
    templates: Sequence[str]
    count: int
    load: Callable[[int], tuple[ImageLike, int]]

    def __iter__(self) -> Iterator[tuple[ImageLike, int]]:
        return map(self.load, range(self.count))


@dataclass(frozen=True)
class Captioned:
    """Images with one or several captions each."""

    count: int
    load: Callable[[int], tuple[ImageLike, Sequence[str]]]

    def __iter__(self) -> Iterator[tuple[ImageLike, Sequence[str]]]:
        return map(self.load, range(self.count))


def open_folder(path: Path, *, name: str = "", names_file: Path | None = None) -> Labelled:
    """Open a folder in ImageFolder's layout: one folder a class, in the order of their names.

    Classes are called by `names_file` (default: `classnames.txt` in the folder, one a line); by
    OpenAI's names where the folders are ImageNet's WordNet ids or numbers of its classes; else as
    the folders are. `name` is the data set's, for its published templates. ValueError for a folder
    without classes and for a wrong number of names.
    """
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}; folder:PATH needs one folder a class in it.")
    folders = sorted(f.name for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
    if len(folders) < 2:
        raise ValueError(f"{path} has {len(folders)} folders; it needs one a class, two at least.")
    wnids, imagenet = prompts.imagenet_wnids(), prompts.class_names("imagenet1k") or []
    numbers = {wnid: number for number, wnid in enumerate(wnids)}
    if len(folders) == len(imagenet) and all(folder.isdigit() for folder in folders):
        folders.sort(key=int)  # ImageNetV2
        names = imagenet
    elif all(folder in numbers for folder in folders):
        names = [imagenet[numbers[folder]] for folder in folders]
    else:
        names = [_spaced(folder) for folder in folders]
    names_file = names_file or path / "classnames.txt"
    if names_file.exists():
        names = _lines(names_file)
        if len(names) != len(folders):
            raise ValueError(
                f"{names_file} has {len(names)} names, but {path} has {len(folders)} folders of "
                "classes; it needs one a line, in the order of the folders' names."
            )
    files = [
        (file, label)
        for label, folder in enumerate(folders)
        for file in sorted((path / folder).rglob("*"))
        if file.suffix.lower() in _IMAGES
    ]
    if not files:
        raise ValueError(f"no images ({', '.join(_IMAGES)}) in the folders of {path}.")
    return Labelled(names, _templates(name), len(files), files.__getitem__)


def open_webdataset(path: Path, *, split: str = "test") -> Labelled | Captioned:
    """Open CLIP_benchmark's layout: `{split}/*.tar` with `.cls`, or `.txt` of one caption a line.

    `classnames.txt`, `zeroshot_classification_templates.txt` and `dataset_type.txt` stand beside.
    """
    import numpy as np

    from clip_jax.data.sources.tar import TarConfig, TarSource

    kind = path / "dataset_type.txt"
    captions = kind.exists() and kind.read_text().strip().lower() == "retrieval"
    shards = str(path / split / "*.tar")
    source = TarSource(TarConfig(path=shards, caption="txt" if captions else "cls"))
    rng = np.random.default_rng(0)  # draws nothing: there is one text

    if captions:

        def load_captions(index: int) -> tuple[ImageLike, Sequence[str]]:
            image, text = source.load(index, rng)
            return image, [line for line in text.splitlines() if line.strip()]

        return Captioned(len(source), load_captions)

    def load(index: int) -> tuple[ImageLike, int]:
        image, label = source.load(index, rng)
        return image, int(label)

    names = _lines(path / "classnames.txt")
    templates = path / "zeroshot_classification_templates.txt"
    chosen = prompts.read_templates(templates) if templates.exists() else _templates("")
    return Labelled(names, chosen, len(source), load)


def open_tfds(
    path: Path, *, split: str, image: str = "image", label: str = "label",
    names: Sequence[str] | None = None, templates: Sequence[str] = (prompts.PLAIN_TEMPLATE,),
) -> Labelled:  # fmt: skip
    """Open a prepared TFDS builder's folder, the one with `dataset_info.json`.

    Class names are the builder's unless given. ValueError for a split or feature that is not there.
    """
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(str(path))
    for what, wanted, there in (
        ("split", split, builder.info.splits), ("feature", image, builder.info.features),
        ("feature", label, builder.info.features),
    ):  # fmt: skip
        if wanted.partition("[")[0] not in there:
            raise ValueError(f"{path} has no {what} {wanted!r}, only {', '.join(there)}.")
    feature = builder.info.features[label]
    if names is None:
        names = [_spaced(name) for name in feature.names]
    if len(names) != feature.num_classes:
        raise ValueError(f"{path} has {feature.num_classes} classes, but {len(names)} are named.")
    examples = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})

    def load(index: int) -> tuple[ImageLike, int]:
        example = examples[index]
        encoded = example[image]
        return encoded if isinstance(encoded, bytes) else encoded.item(), int(example[label])

    return Labelled(names, templates, len(examples), load)


def open_captions(annotations: Path, images: Path) -> Captioned:
    """Open COCO's annotation format (Karpathy's splits of COCO and Flickr30k come in it).

    ValueError for a file of another shape. Images without a caption are left out.
    """
    content = json.loads(annotations.read_text())
    try:
        files = {row["id"]: row["file_name"] for row in content["images"]}
        captions: dict[Any, list[str]] = {}
        for row in content["annotations"]:
            captions.setdefault(row["image_id"], []).append(row["caption"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{annotations} is not in COCO's format: images with id and file_name, annotations "
            f"with image_id and caption ({error!r})."
        ) from error
    rows = [(images / files[key], texts) for key, texts in captions.items()]
    return Captioned(len(rows), rows.__getitem__)


def _templates(name: str) -> Sequence[str]:
    return prompts.templates(name) or (prompts.PLAIN_TEMPLATE,)


def _lines(path: Path) -> list[str]:
    if not path.exists():
        raise ValueError(f"there is no {path}; it has one class name a line.")
    return path.read_text(encoding="utf-8").splitlines()  # CLEVR has a class without a name


def _spaced(name: str) -> str:
    return name.replace("_", " ")
