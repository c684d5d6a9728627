"""The data sets that --dataset accepts: the CLIP paper's (tables 9 and 11), each with its class
names and metric; ARO and SugarCrepe; multilingual ones; the bundled ones; and one's own, as
KIND:PATH.

Any other named data set is searched for under one root: CLIP_benchmark's WebDataset layout
(`NAME/test/*.tar`, or `wds_NAME`), a folder of classes (`NAME/test/CLASS/` or `NAME/CLASS/`),
or a prepared TFDS builder (`TFDS_NAME/[config/]VERSION/dataset_info.json`).
"""

import functools
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from clip_jax import processes
from clip_jax.errors import InputError
from clip_jax.evals import languages, masks, prompts
from clip_jax.evals.compositions import open_aro, open_sugar_crepe
from clip_jax.evals.datasets import (
    Data,
    Labelled,
    Missing,
    OpenSplit,
    Split,
    Tagged,
    Translated,
    images_beside,
    open_captions,
    open_digits,
    open_folder,
    open_tfds,
    open_webdataset,
    split_folder,
)
from clip_jax.evals.pasted_icons import open_pasted_icons
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath, matching

# The models whose metrics are the `openai` of data_sets.json, in this order (see NOTICE).
OPENAI_MODELS = ("RN50", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")


@dataclass(frozen=True)
class DataSet:
    """A data set of the suite."""

    name: str  # as in CLIP_benchmark
    classes: int = 0  # number of classes; 0: it has texts instead
    tfds: str = ""  # builder[/config]; empty: none works without TensorFlow
    split: Split = "test"  # split of TFDS that is the test split
    metric: str = "acc1"  # as in the CLIP paper
    published: bool = False  # whether TFDS orders classes as the published names
    named_like: str = ""  # data set whose published names TFDS orders by; empty: this
    like: str = ""  # data set with its templates and class names; empty: this
    source: str = ""  # where to get it as a folder
    openai: Sequence[float] = ()  # metrics of OPENAI_MODELS, as measured by open_clip

    @property
    def prompts(self) -> str:
        return self.like or self.name


_FILE = resources.files("clip_jax.evals") / "data_sets.json"
SUITE = tuple(DataSet(**row) for row in json.loads(_FILE.read_text()))
_CAPTIONS = {  # multilingual captions, and where to get them
    "xtd10": "adobe-research/Cross-lingual-Test-Dataset-XTD10",
    "xtd200": "visheratin/nllb-clip, data/xtd200",
    "flickr30k-200": "visheratin/nllb-clip, data/flickr30k-200",
    "crossmodal3600": "google.github.io/crossmodal-3600",
}
ROWS = {row.name: row for row in SUITE}
_DIGITS, _PASTED = "digits", "pasted_icons"  # bundled
_NAMES = (*ROWS, languages.BABEL, *_CAPTIONS, _DIGITS, _PASTED)
_KINDS = ("folder", "webdataset", "languages", "segments")


def data_sets(
    names: Sequence[str], data_dir: str, codes: Sequence[str] = (), skip: bool = False
) -> dict[str, OpenSplit]:
    """Return a function that opens the splits of each data set, by name. Without `names` these are
    the suite's data sets in `data_dir`; how to get the others is printed.

    `codes` selects languages of multilingual data sets; empty: all. Raises InputError if a named
    data set is not on disk, or none is, unless `skip` is set.
    """
    opened: dict[str, OpenSplit] = {}
    for text, name in zip(names or ROWS, names_of(names), strict=True):
        kind, path = _kind_and_path(text)
        if path:
            folder = files.as_path(path)
            open_split = functools.partial(_open_by_path, kind, folder, name, codes)
        elif text in _NAMES:
            open_split = functools.partial(_open_named, name, files.as_path(data_dir), codes)
        else:
            raise InputError(
                f"no data set {text!r}; use {', '.join(f'{k}:PATH' for k in _KINDS)} or one of "
                f"{', '.join(_NAMES)}."
            )
        open_split = functools.cache(open_split)
        try:
            open_split("test")  # report errors before a model is loaded
        except Missing as error:
            if names and not skip:
                raise InputError(str(error)) from error
            processes.say_once(f"left out: {error}")
            continue
        if name in opened:
            raise InputError(f"two data sets are called {name}; rename a folder, or remove one.")
        opened[name] = open_split
    if not opened and not skip:
        raise InputError(
            f"none of the suite's {len(SUITE)} data sets is in {data_dir}; set --data-dir."
        )
    return opened


def names_of(texts: Sequence[str]) -> list[str]:
    """Return the names by which data sets are reported; without `texts`, those of the suite.

    One's own has the name of its folder or, if another folder is called the same, of the parent.
    """
    folders = {
        text: Path(os.path.expanduser(path)).absolute()
        for text in texts
        if (path := _kind_and_path(text)[1])
    }
    counts = Counter(folders[text].name for text in texts if text in folders)

    def name_of(text: str) -> str:
        folder = folders.get(text)
        if folder is None:
            return text
        return folder.name if counts[folder.name] == 1 else folder.parent.name

    return [name_of(text) for text in texts or ROWS]


def _kind_and_path(text: str) -> tuple[str, str]:
    """Return the kind and the path of one's own data set; two empty texts for a named one."""
    kind, _, path = text.partition(":")
    return (kind, path) if path and kind in _KINDS else ("", "")


def _open_by_path(kind: str, path: AnyPath, name: str, codes: Sequence[str], split: Split) -> Data:
    """Open the user's own data. Raises Missing if it has no such split."""
    if kind == "languages":
        _check_is_test(str(path), split)
        return languages.open_translated(path, codes)
    if kind == "segments":
        return masks.open_masks(path, split)
    part = split_folder(path, split)
    if part is None:
        raise Missing(f"{path} has no {split} split; put it in {path / split}.")
    if kind == "folder":
        return open_folder(part, name=name)
    return open_webdataset(path, split="test" if part == path else part.name)


def _check_is_test(name: str, split: Split) -> None:
    if split != "test":
        raise Missing(f"{name} has no {split} split.")


def _open_named(name: str, root: AnyPath, codes: Sequence[str], split: Split) -> Data:
    if name == _DIGITS:
        return open_digits(split)
    if name == _PASTED:
        return open_pasted_icons(split)
    if name in ROWS:
        return open_data_set(ROWS[name], root, split)
    _check_is_test(name, split)
    return open_languages(name, root, codes)


def open_languages(name: str, root: AnyPath, codes: Sequence[str] = ()) -> Translated:
    """Open a data set in some or all languages. Raises Missing, which says where to put it."""
    if name == languages.BABEL:
        imagenet = open_data_set(ROWS["imagenet1k"], root)
        assert isinstance(imagenet, Labelled)
        return languages.open_babel(imagenet, languages.babel_folder(root), codes)
    folder = root / name
    if not folder.is_dir():
        raise Missing(f"{name} is not in {root}: put {_CAPTIONS[name]} in {folder}, with images/.")
    return languages.open_translated(folder, codes)


def open_data_set(row: DataSet, root: AnyPath, split: Split = "test") -> Data:
    """Open one data set of the suite under `root`. Raises Missing, which says how to get it, and
    InputError if the number of classes on disk is wrong."""
    data = _open_row(row, root, split)
    if isinstance(data, Labelled | Tagged) and len(data.names) != row.classes:
        raise InputError(
            f"{row.name} has {row.classes} classes, but the one in {root} has "
            f"{len(data.names)}; replace it."
        )
    return data


def _open_row(row: DataSet, root: AnyPath, split: Split) -> Data:
    folder = root / row.name
    for tars in (folder, root / f"wds_{row.name}", root / f"wds_vtab-{row.name}"):
        part = split_folder(tars, split)
        if part and part != tars and any(part.glob("*.tar")):
            return open_webdataset(tars, split=part.name)
    if not row.classes:
        _check_is_test(row.name, split)
        return _open_texts(row, root)
    if row.tfds and (versions := sorted((root / row.tfds).glob("*/dataset_info.json"))):
        name = row.split if split == "test" else split
        if split != "test" and name == row.split:  # EuroSAT's only split is the test here
            raise Missing(f"{row.name} has no {split} split apart from its test.")
        names = prompts.class_names(row.named_like or row.prompts) if row.published else None
        templates = prompts.templates(row.prompts)
        return open_tfds(versions[-1].parent, split=name, names=names, templates=templates)
    part = split_folder(folder, split) if folder.is_dir() else None
    if part and any(entry.is_dir() for entry in part.iterdir()):
        return open_folder(part, name=row.prompts)
    if split != "test":  # the test split has been opened before: the data set is here
        raise Missing(f"{row.name} in {root} has no {split} split apart from its test.")
    raise Missing(_advice(row, root))


def _open_texts(row: DataSet, root: AnyPath) -> Data:
    folder = root / row.name
    if row.name == "sugar_crepe" and matching(folder, "*.json"):
        return open_sugar_crepe(folder)
    if annotations := matching(folder, "*test_karpathy.json"):
        return open_captions(annotations[0], images_beside(folder))
    file = f"visual_genome_{row.name.removeprefix('aro_')}.json"
    for aro in (folder, root / "aro"):
        if (aro / file).is_file():
            return open_aro(aro / file, aro / "images")
    raise Missing(
        f"{row.name}: put {row.source} in {folder}"
        + (", with val2014/ or images/." if row.metric.endswith("recall@5") else ".")
    )


def _advice(row: DataSet, root: AnyPath) -> str:
    ways = []
    if row.tfds:
        ways.append(
            f"python -m tensorflow_datasets build {row.tfds} --data_dir {root} "
            "--file_format array_record"
        )
    if row.name != "voc2007_multilabel":  # its images have several classes
        origin = f" (from {row.source})" if row.source else ""
        ways.append(f"a folder for each class in {root / row.name}/test{origin}")
        ways.append(f"CLIP_benchmark's tars in {root / row.name}/test")
    return f"{row.name} is not in {root}: " + "; or ".join(ways) + "."
