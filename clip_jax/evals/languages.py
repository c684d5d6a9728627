"""The same images in many languages: Babel-ImageNet's classes (Geigle et al., 2023,
arXiv:2306.08658), and captions of XTD10, XTD200, Flickr30k-200 and Crossmodal-3600.

The names of the data sets, and the images and captions that count, are CLIP_benchmark's.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from clip_jax.errors import InputError
from clip_jax.evals.datasets import Labelled, Missing, Translated, checked, images_beside
from clip_jax.storage.files import AnyPath, as_path, read_text, walk

BABEL = "babel_imagenet"
_BABEL_FILES = (f"{BABEL}.json", "nllb_dist13b_prompts.json")
_INDICES = ("filenames.txt", "test_image_names.txt")  # of Flickr30k-200, and of XTD10 and XTD200
_XTD10 = "test_1kcaptions_"  # prefix of a file's name, before the language
_CROSSMODAL = "captions.jsonl"


def babel_folder(root: AnyPath) -> AnyPath:
    """Find Babel-ImageNet's texts, not bundled since their license excludes commercial use."""
    spec = importlib.util.find_spec("clip_benchmark")
    folders = [root / BABEL]
    if spec and spec.submodule_search_locations:
        folders += [Path(x) / "datasets" for x in spec.submodule_search_locations]
    for folder in folders:
        if all((folder / file).is_file() for file in _BABEL_FILES):
            return folder
    raise Missing(
        f"{BABEL}: put {' and '.join(_BABEL_FILES)} from gregor-ge/Babel-ImageNet in {folders[0]}, "
        "or pip install clip-benchmark, which has them. Their license excludes commercial use."
    )


def open_babel(imagenet: Labelled, folder: AnyPath, languages: Sequence[str] = ()) -> Translated:
    """Open ImageNet's images with the class names and prompts of each language in `folder`.

    A language has names for some of the 1,000 classes; images of the others do not count in it.
    """
    layout = (
        "Babel-ImageNet's format: by language classes and their names, and prompts with {} for "
        "the class"
    )
    with checked(folder, layout):
        texts = (json.loads(read_text(folder / file)) for file in _BABEL_FILES)
        class_names, prompts = ({code.lower(): x for code, x in part.items()} for part in texts)
        numbers = {code: [int(x) for x in row[0]] for code, row in class_names.items()}
        names = {code: [str(x) for x in row[1]] for code, row in class_names.items()}
        prompts = {code: [str(line) for line in lines] for code, lines in prompts.items() if lines}
        last = len(imagenet.names) - 1
        for code, classes in numbers.items():
            if len(names[code]) != len(classes) or not 0 <= min(classes) <= max(classes) <= last:
                raise ValueError(f"{code}: needs one name per class, and classes from 0 to {last}")
    chosen = _chosen(BABEL, [code for code in names if code in prompts], languages)
    of_class = {code: {c: i for i, c in enumerate(numbers[code])} for code in chosen}
    return Translated(
        imagenet.count,
        imagenet.load,
        chosen,
        lambda language, label: of_class[language].get(label),
        names,
        prompts,
        key=imagenet.key,
    )


def open_translated(folder: AnyPath, languages: Sequence[str] = ()) -> Translated:
    """Open captions in many languages: a file per language with a line per image, beside a list of
    the images' names; or Crossmodal-3600's `captions.jsonl`, whose first caption counts.

    The images are in `images/`, `val2014/` or the folder itself.
    """
    images, file = images_beside(folder), folder / _CROSSMODAL
    names, captions = _crossmodal(file) if file.is_file() else _lines_of(folder)
    chosen = _chosen(folder.name, sorted({code for row in captions for code in row}), languages)

    def load(index: int) -> tuple[AnyPath, dict[str, list[str]]]:
        return images / names[index], captions[index]

    return Translated(
        len(names),
        load,
        chosen,
        lambda language, texts: texts.get(language),
        key=lambda i: str(images / names[i]),
    )


def _crossmodal(file: AnyPath) -> tuple[list[str], list[dict[str, list[str]]]]:
    layout = "Crossmodal-3600's format: lines of image/key and, by language, a caption"
    with checked(file, layout):
        rows = [json.loads(line) for line in _lines(file)]
        captions = [
            {code: [x["caption"][0]] for code, x in row.items() if "caption" in x} for row in rows
        ]
        return [f"{row['image/key']}.jpg" for row in rows], captions


def _lines_of(folder: AnyPath) -> tuple[list[str], list[dict[str, list[str]]]]:
    texts = (path for path in map(as_path, walk(folder)) if path.suffix == ".txt")
    files = [path for path in texts if not path.name.startswith(".")]
    index = next((path for path in files if path.name in _INDICES), None)
    if index is None:
        raise InputError(
            f"{folder} needs {_CROSSMODAL} or a list of images, {' or '.join(_INDICES)}."
        )
    marked = [path for path in files if path.name.startswith(_XTD10)]
    names = _lines(index)
    captions: list[dict[str, list[str]]] = [{} for _ in names]
    for path in marked or [path for path in files if path != index]:
        lines = _lines(path)
        if len(lines) != len(names):
            raise InputError(f"{path} has {len(lines)} lines, but {index} has {len(names)} images.")
        for row, line in zip(captions, lines, strict=True):
            if line:
                row[path.stem.removeprefix(_XTD10)] = [line]
    return names, captions


def _lines(path: AnyPath) -> list[str]:
    """Split lines at newlines alone: captions may contain Unicode's other separators."""
    return [line.strip() for line in read_text(path).removesuffix("\n").split("\n")]


def _chosen(name: str, available: Sequence[str], wanted: Sequence[str]) -> list[str]:
    chosen = [code for code in available if code in wanted or not wanted]
    if not chosen:
        raise InputError(
            f"{name} has captions in {', '.join(available) or 'no language'}; choose from these "
            "with --languages."
        )
    return chosen


def average(by_language: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the means over languages, `mean/METRIC`, then each language's metrics, `de/METRIC`."""
    each = {f"{code}/{m}": x for code, row in by_language.items() for m, x in row.items()}
    metrics = dict.fromkeys(metric for row in by_language.values() for metric in row)
    means = {
        f"mean/{m}": float(np.mean([row[m] for row in by_language.values() if m in row]))
        for m in metrics
    }
    return means | each
