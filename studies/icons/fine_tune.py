"""Fine-tune a model on one unseen set, Iconoir, whose designers sort their icons by topic.

    python studies/icons/fine_tune.py icons runs/fine_tune

The task is the topic of an icon, such as "weather" or "home". Half of the names of each topic are
for training, a fifth for validation, the rest for testing; a seed draws other ones. `others` is
what the model could do before: the study's classes on the other test sets. If the script is
interrupted, run it again: what is complete is not done a second time.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import captions
import drawing
import icon_sets
import numpy as np
from icon_sets import Icon
from scipy import stats

SET = "iconoir"
FEWEST = 20  # icons of a topic
SHARES = {"train": 0.5, "val": 0.2, "test": 0.3}
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
RATES = {"FLYP, half the learning rate": 0.5, "FLYP": 1.0, "FLYP, twice the learning rate": 2.0}
RATE = 5e-4  # of the config fine_tune_flyp
TEMPLATES = Path(__file__).with_name("templates.txt")
COLUMNS = {"topics": "iconoir/acc1", "topics, validation": "val/acc1", "others": "others/acc1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("icons", type=Path, help="Folder that prepare.py has written.")
    parser.add_argument("output", type=Path, help="Folder for class folders, runs and results.")
    parser.add_argument("--archive", type=Path, help="Archive of the icons, if not in ICONS.")
    parser.add_argument("--model", default="icons", help="Model to fine-tune.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Random seeds.")
    parser.add_argument("--steps", type=int, default=200, help="Steps of fine-tuning.")
    options = parser.parse_args()
    archive = options.archive or next(options.icons.glob("iconify-json-*.tgz"))
    write_others(options.icons / "classes/test", options.output / "others/test")
    folders = [options.output / str(seed) for seed in options.seeds]
    for seed, folder in zip(options.seeds, folders, strict=True):
        if not (folder / "iconoir").exists():
            write_topics(topics(archive), folder, seed)
    results = []
    for seed, folder in zip(options.seeds, folders, strict=True):
        results.append(of_seed(options, folder, seed))
        print(seed, json.dumps(results[-1], indent=1), flush=True)
    write_table(options.output / "fine_tune.csv", results, options.seeds)
    summary = summarize(results)
    (options.output / "fine_tune.md").write_text(summary)
    print(summary, end="")


# ----------------------------------------------------------------------------------------- data


def topics(archive: Path) -> dict[str, list[Icon]]:
    """Return the icons of each topic of the set that has enough of them."""
    content = next(x for _, x in icon_sets.contents(archive) if x["prefix"] == SET)
    topic_of = {name: topic for topic, names in content["categories"].items() for name in names}
    of_topic = defaultdict(list)
    for icon in icon_sets.read(archive)[0]:
        if icon.set == SET and topic_of.get(icon.name, "Other") != "Other":
            of_topic[topic_of[icon.name].lower()].append(icon)
    return {topic: icons for topic, icons in of_topic.items() if len(icons) >= FEWEST}


def write_topics(of_topic: dict[str, list[Icon]], folder: Path, seed: int) -> None:
    """Draw the icons into class folders. Icons of one name in several styles are in one split."""
    rng, drawn = np.random.default_rng(seed), folder / "drawn"
    for topic in sorted(of_topic):
        names = sorted({icon.names[0] for icon in of_topic[topic]})
        order = rng.permutation(len(names))
        ends = np.cumsum([round(share * len(names)) for share in SHARES.values()][:-1])
        for split, part in zip(SHARES, np.split(order, ends), strict=True):
            chosen = {names[index] for index in part}
            path = drawn / split / topic.replace(" ", "_")
            path.mkdir(parents=True, exist_ok=True)
            for icon in of_topic[topic]:
                image = drawing.png(icon, 32) if icon.names[0] in chosen else None
                if image is not None:
                    (path / f"{icon.name}.png").write_bytes(image)
    drawn.rename(folder / "iconoir")


def write_others(source: Path, output: Path) -> None:
    """Copy class folders without the icons of the set."""
    if not output.exists():
        partial = output.with_name("partial")
        shutil.copytree(
            source, partial, ignore=shutil.ignore_patterns(f"{SET}.png"), dirs_exist_ok=True
        )
        partial.rename(output)


# ------------------------------------------------------------------------------------ fine-tune


def of_seed(options: argparse.Namespace, folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Fine-tune and evaluate in all ways; return the results of each row of the table."""
    data, base = folder / "iconoir", options.model
    sets = (f"folder:{data}/val", f"folder:{data}", f"folder:{options.output}/others")
    evaluation = ("--dataset", *sets, "--templates", TEMPLATES)
    texts = captions.TEMPLATES
    rows = {}

    def train(name: str, config: str, *flags: object) -> Path:
        run = folder / name.replace(", ", "-").replace(" ", "_")
        clip_jax(
            *("train", config, "--workdir", run, "--init-from", base, "--steps", options.steps),
            *("--model.dtype", "float32", "--seed", seed, "--data.seed", seed),
            *("--data.source.path", data / "train", "--data.source.templates", *texts),
            *("--evals.0.dataset", *sets, "--evals.0.templates", TEMPLATES),
            *("--evals.0.every-steps", options.steps, *flags),
            done=run / "done",
        )
        rows[name] = read(run / "result.json")
        return run

    probe = folder / "probe"
    clip_jax(
        *("evaluate", base, "--dataset", f"folder:{data}", "--tasks", "probe", "--output", probe),
        done=probe / "done",
    )
    runs = {
        name: train(name, "fine_tune_flyp", "--optim.learning-rate", RATE * factor)
        for name, factor in RATES.items()
    }
    train("LoRA", "fine_tune_lora")
    curve = folder / "curve"
    clip_jax(
        *("average", base, runs["FLYP"], curve, "--curve", *ALPHAS, "--overwrite", *evaluation),
        done=curve / "done",
    )
    soup = folder / "soup"
    clip_jax("average", *runs.values(), soup, "--overwrite", done=folder / "soup.done")
    clip_jax(
        *("evaluate", soup, *evaluation, "--output", folder / "of_soup"),
        done=folder / "of_soup/done",
    )
    of_alpha = {row["alpha"]: row for row in read(curve / "curve.json")}
    chosen = max(ALPHAS, key=lambda alpha: of_alpha[alpha]["val/acc1"])  # of equal ones the first
    rows = {
        "none (zero-shot)": of_alpha[0.0],
        "linear probe": {
            "iconoir/acc1": read(probe / "result.json")["iconoir/linear_probe/acc1"],
            "others/acc1": of_alpha[0.0]["others/acc1"],  # the towers are as they were
        },
        **rows,
        "FLYP, WiSE-FT α = 0.5": of_alpha[0.5],
        "FLYP, WiSE-FT α by validation": of_alpha[chosen],
        "soup of the three FLYP models": read(folder / "of_soup/result.json"),
    }
    return {
        name: {column: row[metric] for column, metric in COLUMNS.items() if metric in row}
        for name, row in rows.items()
    }


def clip_jax(*command: object, done: Path) -> None:
    """Run a command, unless it is done."""
    if not done.exists():
        subprocess.run([sys.executable, "-m", "clip_jax", *map(str, command)], check=True)
        done.touch()


def read(path: Path) -> dict[str, float] | list[dict[str, float]]:
    return json.loads(path.read_text())


# -------------------------------------------------------------------------------------- results


def write_table(path: Path, results: list[dict[str, dict[str, float]]], seeds: list[int]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("fine-tuning", "seed", *COLUMNS))
        for seed, rows in zip(seeds, results, strict=True):
            for name, row in rows.items():
                writer.writerow((name, seed, *(row.get(column, "") for column in COLUMNS)))


def summarize(results: list[dict[str, dict[str, float]]]) -> str:
    """Return Markdown: accuracy, and its change by fine-tuning, with 95% intervals over seeds."""
    names = ("topics", "others")
    lines = [
        "| fine-tuning | topics, % | others, % | change of topics | change of others |",
        "|---|---|---|---|---|",
    ]
    zero_shot = next(iter(results[0]))
    for row in results[0]:
        means = [f"{100 * np.mean([x[row][name] for x in results]):.1f}" for name in names]
        changes = [
            interval(np.array([100 * (x[row][name] - x[zero_shot][name]) for x in results]))
            for name in names
        ]
        cells = changes if row != zero_shot else ["", ""]
        lines.append(f"| {' | '.join((row, *means, *cells))} |")
    return "\n".join(lines) + "\n"


def interval(values: np.ndarray) -> str:
    """Return the mean and the 95% interval of Student's t distribution."""
    if len(values) < 2 or not values.std():
        return f"{values.mean():+.1f}"
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():+.1f} ({values.mean() - half:+.1f} to {values.mean() + half:+.1f})"


if __name__ == "__main__":
    main()
