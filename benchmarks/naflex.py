"""Train on images of many aspect ratios: at their own ratio (NaFlex), or squashed to squares?

    python benchmarks/naflex.py [--steps 600] [--seeds 3] [--train 200] [--test 50]

The data are drawn shapes on canvases between 1:3 and 3:1, of 64 x 64 pixels in area, in 24 classes,
of which four combinations of known colours and shapes occur in the test images only. Both models
are that of `configs/shapes_naflex.py`. NaFlex has at most 64 patches of 8 pixels per image; the
other model gets the same canvases squashed to 64 x 64 pixels, which are 64 patches. Batches, steps,
data, seeds and captions are the same, and there are no random crops. The script prints zero-shot
top-1 on the test images as mean ± std over the seeds.
"""

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import clip_jax
from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.data.shapes import SampleDataConfig, write
from clip_jax.models.images import Patches
from clip_jax.train import train

ROOT = Path(__file__).parents[1]
SIDE = 64
HEADER = (
    "images",
    "top-1, seen combinations, %",
    "top-1, unseen combinations, %",
    "padding, %",
    "seconds of training per run",
)


def draw(folder: Path, train_images: int, test_images: int) -> None:
    """Write the canvases to folder/naflex, and the same ones squashed to folder/squash."""
    write(
        SampleDataConfig(
            output=str(folder / "naflex"),
            train=train_images,
            test=test_images,
            size=SIDE,
            aspect=3.0,
        )
    )
    for path in (folder / "naflex").glob("folders/*/*/*.png"):
        into = folder / "squash" / path.relative_to(folder / "naflex")
        into.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(into)


def config_of(folder: Path, steps: int, seed: int) -> Config:
    config = load_config(ROOT / "configs/shapes_naflex.py")
    model, data = config.model, config.data
    if folder.name == "squash":
        vision = dataclasses.replace(model.vision, max_patches=None)
        model = dataclasses.replace(model, vision=vision)
    source = dataclasses.replace(data.source, path=str(folder / "folders/train"))
    return dataclasses.replace(
        config,
        steps=steps,
        seed=seed,
        lengths=None,
        model=model,
        evals=(),
        report_every=steps,
        data=dataclasses.replace(data, source=source, seed=seed),
        optim=dataclasses.replace(config.optim, warmup_steps=min(100, steps // 6)),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=steps),
    )


def measure(folder: Path, workdir: Path) -> tuple[float, float, float]:
    """Return top-1 in % on seen and unseen combinations, and the share of padding in %."""
    model = clip_jax.load(workdir)
    names = sorted(path.name for path in (folder / "folders/test").iterdir())
    seen = {path.name for path in (folder / "folders/train").iterdir()}
    texts = np.asarray(
        model.encode_text(
            model.tokenize([f"a drawing of a {name.replace('_', ' ')}" for name in names])
        )
    )
    texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    right: dict[bool, list[float]] = {True: [], False: []}
    patches = valid = 0
    for label, name in enumerate(names):
        images = model.preprocess(sorted((folder / "folders/test" / name).glob("*.png")))
        if isinstance(images, Patches):
            patches += images.length.size * images.pixels.shape[1]
            valid += images.length.sum()
        scores = np.asarray(model.encode_image(images)) @ texts.T
        right[name in seen] += (scores.argmax(1) == label).tolist()
    top1 = {key: 100 * float(np.mean(values)) for key, values in right.items()}
    return top1[True], top1[False], float(100 * (1 - valid / patches)) if patches else 0.0


def spread(values: list[float]) -> str:
    std = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{std}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="training steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each kind")
    parser.add_argument("--train", type=int, default=200, help="training images per class")
    parser.add_argument("--test", type=int, default=50, help="test images per class")
    args = parser.parse_args()
    rows: dict[str, list[tuple[float, ...]]] = {"naflex": [], "squash": []}
    with tempfile.TemporaryDirectory() as name:
        draw(Path(name), args.train, args.test)
        for seed in range(args.seeds):
            for kind, row in rows.items():
                folder, workdir = Path(name, kind), Path(name, f"run_{kind}_{seed}")
                result = train(config_of(folder, args.steps, seed), workdir)
                row.append((*measure(folder, workdir), result["seconds/steps"]))
                print(kind, seed, [round(x, 1) for x in row[-1]], flush=True)
    print(f"\n| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for kind, title in (("naflex", "own aspect ratio (NaFlex)"), ("squash", "squashed")):
        cells = [spread(list(values)) for values in zip(*rows[kind], strict=True)]
        print(f"| {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
