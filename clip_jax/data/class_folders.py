"""Labelled folders, with one subfolder of images per class: their order and the classes' names.

The published names are CLIP_benchmark's, ImageNet's are OpenAI's (see NOTICE).
"""

import functools
import json
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from typing import Any

from clip_jax.data.sources.shards import listed
from clip_jax.errors import InputError
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

SPLITS = ("train", "val", "validation", "valid", "test")

# Data sets whose folders have the order of the published names, with the first and the last folder.
_PUBLISHED_ORDER = {
    "caltech101": ("BACKGROUND_Google", "yin_yang"),
    "country211": ("AD", "ZW"),
    "eurosat": ("AnnualCrop", "SeaLake"),
    "fer2013": ("angry", "surprise"),
}


def read_classes(path: AnyPath) -> dict[str, str]:
    """Return the name of each class by its subfolder, in the order of the labels.

    Every subfolder that is not hidden is a class. They are sorted by name, or by number if all are
    numbers. The classes are named, in this order of preference, by:

    - `classnames.txt` in the folder or, of a split such as `train`, beside it;
    - the published names of a data set called like the folder, or ImageNet's, if the subfolders
      are its class indices or have its published order;
    - the published names of ImageNet's WordNet ids;
    - the subfolders' own names, with spaces for "_".

    Raises InputError for a wrong number of names, and for subfolders with equal names.
    """
    folders = sorted(name for name in files.subfolders(path) if not name.startswith("."))
    if all(folder.isdecimal() for folder in folders):
        folders.sort(key=int)
    return dict(zip(folders, _names_of(path, folders), strict=True))


def _names_of(path: AnyPath, folders: Sequence[str]) -> Sequence[str]:
    path = path if files.is_remote(path) else path.absolute()
    parents = [path, path.parent] if path.name in SPLITS else [path]
    for folder in parents:
        if (file := folder / "classnames.txt").is_file():
            names = read_class_names(file)
            if len(names) != len(folders):
                raise InputError(
                    f"{file} has {len(names)} lines for {len(folders)} class folders of "
                    f"{path}; list one name per line, in the order of the folders' names."
                )
            return names
    imagenet, data_set = class_names("imagenet1k") or [], parents[-1].name
    published = class_names(data_set) or imagenet  # ImageNetV2's folders are class indices, too
    edges = (folders[0], folders[-1]) if folders else ()
    is_ordered = all(map(str.isdecimal, folders)) or edges == _PUBLISHED_ORDER.get(data_set)
    if is_ordered and len(folders) == len(published):
        return published
    wnids = dict(zip(imagenet_wnids(), imagenet, strict=True))
    names = [wnids.get(folder) or spaced(folder) for folder in folders]
    counts = Counter(names)
    pairs = zip(folders, names, strict=True)
    if equal := [folder for folder, name in pairs if counts[name] > 1 and folder not in wnids]:
        raise InputError(
            f"class folders of {path} have equal names once '_' is read as a space: "
            f"{listed(equal)}; rename or join them, or name the classes in classnames.txt."
        )
    return names


def read_class_names(file: AnyPath) -> list[str]:
    """Read one name per line; an empty line counts, since CLEVR has a class without a name."""
    return files.read_text(file).splitlines()


def spaced(name: str) -> str:
    """Turn a folder's or TFDS's name into words: SUN397's `/a/apse/indoor` is "apse indoor"."""
    if name[:1] == name[2:3] == "/":
        name = name[3:]
    return name.replace("_", " ").replace("/", " ")


def class_names(data_set: str) -> list[str] | None:
    """Return the published class names in the order of the labels; None if there are none."""
    return _published("class_names.json").get(data_set)


def imagenet_wnids() -> list[str]:
    """Return the WordNet ids of ImageNet's classes in order; its folders have these names."""
    return _published("imagenet_wnids.json")


@functools.cache
def _published(file: str) -> Any:
    content = resources.files("clip_jax.data").joinpath(file).read_text(encoding="utf-8")
    return json.loads(content)
