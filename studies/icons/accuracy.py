"""Measure zero-shot accuracy on class folders, with 95% intervals over icon sets.

    python studies/icons/accuracy.py runs/icons --output results/accuracy.csv

An interval is that of a bootstrap over sets, not over icons: icons of one set are alike. With two
models, the interval of their difference is printed, too, on the same sets.
"""

import argparse
import csv
from pathlib import Path

import captions
import numpy as np

import clip_jax

DRAWS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="Runs, or folders of weights.")
    parser.add_argument("--images", type=Path, default=Path("icons/classes/test"))
    parser.add_argument("--output", type=Path, help="CSV file for the counts of each set.")
    options = parser.parse_args()
    files = sorted(options.images.glob("*/*.png"))
    sets, set_of = np.unique([file.stem for file in files], return_inverse=True)
    right = {}
    table = []
    for path in options.models:
        right[path] = classify(clip_jax.load(path), files, options.images)
        for name, hits in right[path].items():
            print(f"{path} {name}: {interval(hits, set_of)}")
            for number, of_set in enumerate(sets):
                inside = hits[set_of == number]
                row = {"model": path, "set": of_set, "metric": name}
                table.append(row | {"right": int(inside.sum()), "icons": len(inside)})
    first, *others = options.models
    for other in others:
        for name in right[first]:
            difference = right[other][name].astype(float) - right[first][name]
            print(f"{other} minus {first} {name}: {interval(difference, set_of)}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with options.output.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, table[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


def classify(model: clip_jax.Model, files: list[Path], folder: Path) -> dict[str, np.ndarray]:
    """Return for each image whether its class is the nearest, and among the nearest five."""
    classes = sorted(path.name for path in folder.iterdir())
    names = [name.replace("_", " ") for name in classes]
    texts = np.mean([embed(model, template, names) for template in captions.TEMPLATES], axis=0)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    images = model.encode_image(model.preprocess(files), normalize=True)
    similarity = images @ texts.T
    label = np.array([classes.index(file.parent.name) for file in files])
    of_label = similarity[np.arange(len(files)), label]
    rank = (similarity > of_label[:, None]).sum(axis=1)
    return {"top-1": rank < 1, "top-5": rank < 5}


def embed(model: clip_jax.Model, template: str, names: list[str]) -> np.ndarray:
    prompts = [template.replace("{}", name) for name in names]
    return model.encode_text(model.tokenize(prompts, truncate=True), normalize=True)


def interval(values: np.ndarray, set_of: np.ndarray) -> str:
    """Return the mean over all icons and its 95% interval, from sets drawn with replacement."""
    total = np.bincount(set_of, values)
    count = np.bincount(set_of)
    drawn = np.random.default_rng(0).integers(0, len(count), (DRAWS, len(count)))
    means = total[drawn].sum(axis=1) / count[drawn].sum(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return f"{values.mean():.1%} ({low:.1%} to {high:.1%})"


if __name__ == "__main__":
    main()
