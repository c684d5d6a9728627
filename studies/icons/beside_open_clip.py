"""Train the setting of adamw.py in open_clip, too: the same pairs, initial weights and schedule.

    pip install 'open_clip_torch[training]==3.3.0'
    python studies/icons/beside_open_clip.py icons runs/beside_open_clip

The programs run one after the other, each on all cores. open_clip has no counterpart to masking of
equal captions, so the comparison is with a run without it; `clip_jax, masked` has it. If the script
is interrupted, run it again: what is complete is not done a second time.
"""

import argparse
import csv
import gzip
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from datetime import datetime
from pathlib import Path

import accuracy
import numpy as np
import tables
from scipy import stats

import clip_jax
from clip_jax.config import Config

CONFIG = Path(__file__).with_name("adamw.py")
PER_TAR = 5_000
OURS, MASKED, THEIRS = "clip_jax", "clip_jax, masked", "open_clip"
MEASURED = (
    *("classes/acc1", "classes/acc5", "val/acc1", "val/acc5", "validation/info_nce"),
    *("test/image_retrieval_recall@1", "test/text_retrieval_recall@1"),
)
SPEED = "pairs_per_second"


def main() -> None:
    config = clip_jax.load_config(CONFIG)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("icons", type=Path, help="Folder that prepare.py has written.")
    parser.add_argument("output", type=Path, help="Folder for tars, runs and results.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Random seeds.")
    parser.add_argument("--steps", type=int, default=config.steps, help="Steps of each run.")
    parser.add_argument("--batch-size", type=int, default=config.batch_size, help="Batch size.")
    parser.add_argument("--warmup", type=int, default=config.optim.warmup_steps, help="Steps.")
    parser.add_argument("--report-every", type=int, default=config.report_every, help="Steps.")
    parser.add_argument("--workers", type=int, default=1, help="open_clip's processes for data.")
    parser.add_argument(
        "--masked", action=argparse.BooleanOptionalAction, default=True, help="Mask equal captions."
    )
    parser.add_argument("--ours", nargs=argparse.REMAINDER, default=[], help="Flags of clip-jax.")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    tars = options.output / "tars"
    count = write_tars(options.icons, tars, options.steps * options.batch_size)
    print(
        f"{count:,} pairs in tars; {options.steps} steps of {options.batch_size} pairs", flush=True
    )
    programs = (OURS, THEIRS, MASKED) if options.masked else (OURS, THEIRS)
    for number, seed in enumerate(options.seeds):
        start = initial_weights(config, seed, options.output)
        for program in programs[:: -1 if number % 2 else 1]:  # none is always the first
            folder = folder_of(options.output, program, seed)
            if not (folder / "speed.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                train = train_open_clip if program == THEIRS else train_clip_jax
                speed = train(program, seed, config, options, tars, start, folder)
                (folder / "speed.json").write_text(json.dumps(speed, indent=1))
                print(program, seed, speed, flush=True)
        evaluate_open_clip(start, options.output, seed)
    table = [
        {"program": program, "seed": seed, **row_of(options.output, program, seed)}
        for program in programs
        for seed in options.seeds
    ]
    tables.write(options.output / "open_clip.csv", table)
    summary = summarize(table, options.output, options.seeds)
    (options.output / "open_clip.md").write_text(summary)
    print(summary, end="")


def folder_of(output: Path, program: str, seed: int) -> Path:
    return output / f"{program.replace(', ', '-')}-{seed}"


# ----------------------------------------------------------------------------------------- data


def write_tars(icons: Path, folder: Path, count: int) -> int:
    """Write up to `count` training icons as tars, in random order, with one caption each."""
    done = folder / "count.txt"
    if done.exists():
        return int(done.read_text())
    with (icons / "train/dropped.csv").open(encoding="utf-8", newline="") as file:
        dropped = {row["key"].partition(".tar:")[2] for row in csv.DictReader(file)}
    samples: dict[str, tuple[bytes, list[str]]] = {}
    for path in sorted((icons / "drawn/train").glob("*.tar")):
        with tarfile.open(path) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}
        for name, image in content.items():
            key, _, kind = name.rpartition(".")
            if kind == "png" and key not in dropped:
                samples[key] = image, json.loads(content[f"{key}.json"])["caption"]
    rng = np.random.default_rng(0)
    keys = [list(samples)[index] for index in rng.permutation(len(samples))[:count]]
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(keys), PER_TAR):
        with tarfile.open(folder / f"{start // PER_TAR:05d}.tar", "w") as tar:
            for number, key in enumerate(keys[start : start + PER_TAR], start):
                image, captions = samples[key]
                add(tar, f"{number:06d}.png", image)
                add(tar, f"{number:06d}.txt", str(rng.choice(captions)).encode())
    done.write_text(str(len(keys)))
    return len(keys)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def initial_weights(config: Config, seed: int, output: Path) -> Path:
    """Write random weights, from which both programs start, in open_clip's format.

    open_clip's own tokenizer reads a shorter list of merges; the one that the conversion writes is
    a tokenizer of transformers, which takes twice as long.
    """
    folder = output / f"start-{seed}"
    if not (folder / "training/open_clip_config.json").exists():
        clip_jax.create_model(config.model, seed=seed).save(folder, "open-clip")
        content = json.loads((folder / "open_clip_config.json").read_text())
        text = content["model_cfg"]["text_cfg"]
        merges = write_merges(output / "merges.txt.gz", text["vocab_size"])
        del text["hf_tokenizer_name"]
        text["tokenizer_kwargs"] = {"bpe_path": str(merges.resolve())}
        training = folder / "training"
        training.mkdir()
        weights = folder / "open_clip_model.safetensors"
        (training / weights.name).symlink_to(weights.resolve())
        (training / "open_clip_config.json").write_text(json.dumps(content, indent=1))
    return folder


def write_merges(path: Path, vocab_size: int) -> Path:
    """Write the merges of CLIP's first `vocab_size` tokens: 512 are bytes, and two special."""
    import open_clip.tokenizer

    with gzip.open(open_clip.tokenizer.default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[: 1 + vocab_size - 512 - 2]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    return path


# ---------------------------------------------------------------------------------------- train


def train_clip_jax(
    program: str,
    seed: int,
    config: Config,
    options: argparse.Namespace,
    tars: Path,
    start: Path,
    folder: Path,
) -> dict[str, float]:
    """Train with nothing but steps between the first and the last report; return the speed."""
    steps, workdir = options.steps, folder / "run"
    masked = "" if program == MASKED else "no-"
    run(
        *("clip_jax", "train", CONFIG, "--workdir", workdir, "--seed", seed),
        *("--steps", steps, "--batch-size", options.batch_size, "--init-from", start),
        *("--data.source.path", f"{tars}/*.tar", f"--objective.0.{masked}mask-same-caption"),
        *("--optim.warmup-steps", options.warmup, "--report-every", options.report_every),
        *("--checkpoint.every-steps", steps, "--evals.1.every-steps", steps, *options.ours),
        log=folder / "log.txt",
    )
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    reports = [row for row in map(json.loads, lines) if "samples_seen" in row]
    first, last = reports[0], reports[-1]
    pairs, seconds = (last[name] - first[name] for name in ("samples_seen", "seconds"))
    return {SPEED: pairs / seconds}


def train_open_clip(
    program: str,
    seed: int,
    config: Config,
    options: argparse.Namespace,
    tars: Path,
    start: Path,
    folder: Path,
) -> dict[str, float]:
    """Train by open_clip's command; return the speed between the same reports as ours."""
    optim, last_tar = config.optim, max(path.stem for path in tars.glob("*.tar"))
    run(
        *("open_clip_train.main", "--model", f"local-dir:{start / 'training'}"),
        *("--train-data", f"{tars}/{{00000..{last_tar}}}.tar", "--dataset-type", "webdataset"),
        *("--train-num-samples", options.steps * options.batch_size, "--epochs", 1),
        *("--batch-size", options.batch_size, "--workers", options.workers, "--seed", seed),
        *("--lr", optim.learning_rate, "--warmup", options.warmup, "--wd", optim.weight_decay),
        *("--beta1", optim.b1, "--beta2", optim.b2, "--eps", optim.eps),
        *(("--grad-clip-norm", optim.clip_norm) if optim.clip_norm else ()),
        *("--aug-cfg", "scale=({},{})".format(*config.data.crop_scale)),
        *("--precision", "fp32", "--device", "cpu", "--zeroshot-frequency", 0),
        *("--log-every-n-steps", options.report_every, "--logs", folder, "--name", "run"),
        log=folder / "log.txt",
    )
    # 2026-12-01,12:00:00 | INFO | Train Epoch: 0 [ 12800/128000 (10%)] Data (t): ...
    line = re.compile(r"^(\S+) \| INFO \| Train Epoch: 0 \[ *(\d+)/", re.MULTILINE)
    reports = line.findall((folder / "run/out.log").read_text())
    begin, end = (reports[1], reports[-1])  # before them is a report of the first step
    times = [datetime.strptime(time, "%Y-%m-%d,%H:%M:%S") for time, _ in (begin, end)]
    seconds = (times[1] - times[0]).total_seconds() or 1.0
    return {SPEED: (int(end[1]) - int(begin[1])) / seconds}


def run(*command: object, log: Path) -> None:
    """Run a Python module."""
    with log.open("w") as file:
        process = subprocess.run(
            [sys.executable, "-m", *map(str, command)], stdout=file, stderr=subprocess.STDOUT
        )
    if process.returncode:
        raise SystemExit(f"{log} says why this failed: {' '.join(map(str, command))}")


# ------------------------------------------------------------------------------------- evaluate


def evaluate_open_clip(start: Path, output: Path, seed: int) -> None:
    """Evaluate open_clip's checkpoint by the evaluators of adamw.py, those of our run beside it."""
    folder = folder_of(output, THEIRS, seed)
    if (folder / "evaluated").exists():
        return
    checkpoint = folder / "run/checkpoints/epoch_1.pt"
    for name in ("open_clip_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(start / name, checkpoint.with_name(name))
    ours = folder_of(output, OURS, seed) / "run"
    options = ("--beside", checkpoint, "--output", folder / "evaluation")
    run("clip_jax", "evaluate", ours, *options, log=folder / "evaluation.txt")
    (folder / "evaluated").touch()


def row_of(output: Path, program: str, seed: int) -> dict[str, float]:
    """Return the results of a run."""
    folder = folder_of(output, program, seed)
    result, prefix = folder / "run/result.json", ""
    if program == THEIRS:
        result, prefix = folder / "evaluation/result.json", "original/"
    values = json.loads(result.read_text())
    speed = json.loads((folder / "speed.json").read_text())
    return {name: values[prefix + name] for name in MEASURED} | speed


def images_of(output: Path, program: str, seed: int) -> Path:
    folder = folder_of(output, program, seed)
    name = "classes/images.csv"
    return folder / ("evaluation/original" if program == THEIRS else "run/evals") / name


def summarize(table: list[dict], output: Path, seeds: list[int]) -> str:
    """Return Markdown: means over seeds, and differences from open_clip with 95% intervals."""
    programs = list(dict.fromkeys(row["program"] for row in table))
    others = [program for program in programs if program not in (OURS, THEIRS)]
    header = ("metric", THEIRS, OURS, "difference", *others)
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for name in (*MEASURED, SPEED):
        values = {
            program: np.array([row[name] for row in table if row["program"] == program])
            for program in programs
        }
        if name == SPEED:
            difference = over_seeds(values[OURS] / values[THEIRS], "{:.2f} times")
        else:
            difference = over_seeds(values[OURS] - values[THEIRS], "{:+.4f}")
        theirs, ours, *masked = (f"{values[x].mean():.4g}" for x in (THEIRS, OURS, *others))
        lines.append(f"| {' | '.join((f'`{name}`', theirs, ours, difference, *masked))} |")
    lines += ["", "Differences of the mean over seeds, with intervals over sets:", ""]
    for metric in accuracy.METRICS:
        set_of, theirs = mean_over_seeds(output, THEIRS, seeds, metric)
        for program in (OURS, *others):
            _, ours = mean_over_seeds(output, program, seeds, metric)
            interval = accuracy.interval(set_of, ours - theirs)
            lines.append(f"- {program} minus open_clip, classes/{metric}: {interval}")
    return "\n".join(lines) + "\n"


def over_seeds(values: np.ndarray, form: str) -> str:
    """Return the mean and the 95% interval of Student's t distribution."""
    mean = form.format(values.mean())
    if len(values) < 2:
        return mean
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    low, high = (form.format(x) for x in (values.mean() - half, values.mean() + half))
    return f"{mean} ({low} to {high})"


def mean_over_seeds(
    output: Path, program: str, seeds: list[int], metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of the set and the mean over seeds of each image."""
    tables = [accuracy.read(images_of(output, program, seed)) for seed in seeds]
    columns = [accuracy.by_set(table, metric) for table in tables]
    return columns[0][0], np.mean([values for _, values in columns], axis=0)


if __name__ == "__main__":
    main()
