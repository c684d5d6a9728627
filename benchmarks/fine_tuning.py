"""What do the ways to fine-tune gain on a shifted domain, and what do they forget?

    python benchmarks/fine_tuning.py WORKDIR [--seeds 3] [--train 8] [--plot PICTURE]

A seed draws its own data, and pre-trains `class_folders` on bright drawings of 20 of 24 classes
for 600 steps. The model is then fine-tuned on eight dark drawings of each of all 24 classes, by
the configs `linear_probe`, `fine_tune_classifier`, `fine_tune_flyp` and `fine_tune_lora`, each
for 100 steps. Results are top-1 on 480 dark test images, and on 480 bright ones, of which 80 are of
the four classes that pre-training has not seen.

A model with a classifier is measured by it, others by the prompts of fine-tuning. WiSE-FT joins the
pre-trained and the fine-tuned model. The soup is the equal average of three FLYP models, whose
learning rates are half, once and twice the config's. Learning rates were not tuned on these
results; α = 0.7 was added to the table because of the curve.

WORKDIR keeps the runs; a second start of the script continues. It takes about six minutes a seed.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
from pathlib import Path

import numpy as np

from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.convert.formats import read_weights
from clip_jax.convert.weights import Weights
from clip_jax.data.shapes import SampleDataConfig, write
from clip_jax.evals.datasets import open_folder
from clip_jax.inference.average import combine, fitting
from clip_jax.inference.loading import model_of, prompt_head, unit
from clip_jax.train import train

ROOT = Path(__file__).parents[1]
TEMPLATES = ("a photo of a {}", "a drawing of a {}", "a {}")
RUNS = {  # config, initial weights, factor on the learning rate
    "linear probe": ("linear_probe", "base", 1.0),
    "full, with a classifier": ("fine_tune_classifier", "base", 1.0),
    "linear probe, then full": ("fine_tune_classifier", "linear probe", 1.0),
    "FLYP": ("fine_tune_flyp", "base", 1.0),
    "FLYP, half the learning rate": ("fine_tune_flyp", "base", 0.5),
    "FLYP, twice the learning rate": ("fine_tune_flyp", "base", 2.0),
    "FLYP with LoRA": ("fine_tune_lora", "base", 1.0),
}
ALPHAS = tuple(i / 10 for i in range(11))
CURVES = ("full, with a classifier", "FLYP")
COLUMNS = ("dark, %", "bright, seen classes, %", "bright, unseen classes, %")


def folder(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


def run(config: Config, seed: int, workdir: Path) -> None:
    """Train, unless the run has ended already."""
    path = workdir / "result.json"
    if not path.exists() or json.loads(path.read_text()).get("step") != config.steps:
        data = dataclasses.replace(config.data, seed=seed)
        checkpoint = dataclasses.replace(config.checkpoint, every_steps=config.steps)
        config = dataclasses.replace(
            config, seed=seed, data=data, checkpoint=checkpoint, evals=(), report_every=50
        )
        train(config, workdir)


def with_source(config: Config, path: Path) -> Config:
    source = dataclasses.replace(config.data.source, path=str(path))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))


class Measure:
    """Top-1 of weights on the test images of a seed, by the columns."""

    def __init__(self, root: Path) -> None:
        bright, dark = (open_folder(root / name / "folders/test") for name in ("shapes", "dark"))
        self.names = tuple(bright.names)
        seen = {f.name.replace("_", " ") for f in (root / "shapes/folders/train").iterdir()}
        self.files = [image for image, _ in (*dark, *bright)]
        self.labels = np.array([*(dark.labels or ()), *(bright.labels or ())])
        known = np.isin(np.array(self.names)[self.labels], list(seen))
        is_dark = np.arange(len(self.files)) < dark.count
        self.parts = [is_dark, ~is_dark & known, ~is_dark & ~known]
        self.pixels = None

    def __call__(self, weights: Weights) -> list[float]:
        model = model_of(weights)
        if self.pixels is None:
            self.pixels = model.preprocess(self.files)
        head = weights.head or prompt_head(model, self.names, TEMPLATES)
        logits = unit(model.encode_image(self.pixels)) @ head.kernel.T
        right = logits.argmax(1) == self.labels
        return [100 * float(right[part].mean()) for part in self.parts]


def of_seed(root: Path, seed: int, images: int) -> dict[str, list[float]]:
    """Return the results of a seed by row of the table, and by `NAME@α` of the curves."""
    for name, dark in (("shapes", False), ("dark", True)):
        if not (root / name).exists():
            count = images if dark else SampleDataConfig.train
            write(
                SampleDataConfig(
                    output=str(root / name), train=count, test=20, seed=seed + 100 * dark, dark=dark
                )
            )
    config = with_source(
        load_config(ROOT / "configs/class_folders.py"), root / "shapes/folders/train"
    )
    run(config, seed, root / "base")
    for name, (recipe, start, factor) in RUNS.items():
        config = with_source(
            load_config(ROOT / f"configs/{recipe}.py"), root / "dark/folders/train"
        )
        rate = config.optim.learning_rate * factor
        optim = dataclasses.replace(config.optim, learning_rate=rate)
        config = dataclasses.replace(config, optim=optim, init_from=str(root / folder(start)))
        run(config, seed, root / folder(name))
    weights = {name: read_weights(root / folder(name)) for name in ("base", *RUNS)}
    measure = Measure(root)
    rows = {"none (zero-shot)": measure(weights["base"])}
    rows |= {name: measure(weights[name]) for name in RUNS}
    flyp = [weights[name] for name in RUNS if RUNS[name][0] == "fine_tune_flyp"]
    rows["soup of the three FLYP models"] = measure(combine(flyp, [1.0] * 3))
    for name, alpha in itertools.product(CURVES, ALPHAS):
        ends = fitting([weights["base"], weights[name]], [root / "base", root / folder(name)])
        rows[f"{name}@{alpha}"] = measure(combine(ends, (1 - alpha, alpha)))
        if alpha in (0.5, 0.7):
            rows[f"{name}, WiSE-FT α = {alpha}"] = rows[f"{name}@{alpha}"]
    return rows


def spread(values: list[float]) -> str:
    std = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{std}"


def plot(results: list[dict[str, list[float]]], path: Path) -> None:
    """Draw the curves of both ways, mean and standard deviation over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), CURVES, strict=True):
        for i, column in enumerate(COLUMNS):
            values = np.array([[row[f"{name}@{a}"][i] for a in ALPHAS] for row in results])
            axes.errorbar(
                ALPHAS,
                values.mean(0),
                values.std(0),
                marker="o",
                markersize=3,
                capsize=2,
                label=column.removesuffix(", %"),
            )
        axes.set(title=name, xlabel="α (0: pre-trained, 1: fine-tuned)")
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="top-1, %")
    figure.axes[0].legend()
    figure.savefig(path, dpi=144)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=Path, help="folder of the data and runs")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--train", type=int, default=8, help="dark training images per class")
    parser.add_argument("--plot", type=Path, help="picture of the WiSE-FT curves to write")
    args = parser.parse_args()
    results = []
    for seed in range(args.seeds):
        results.append(of_seed(args.workdir / str(seed), seed, args.train))
        for name, row in results[-1].items():
            print(seed, name, [round(x, 1) for x in row], flush=True)
    (args.workdir / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\n| fine-tuning | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name in results[0]:
        if "@" not in name:
            cells = zip(*(row[name] for row in results), strict=True)
            print(f"| {name} | {' | '.join(spread(list(x)) for x in cells)} |")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
