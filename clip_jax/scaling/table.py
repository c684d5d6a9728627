"""One table of runs, one row a trained model, and the formats that fill it.

Columns are those of Cherti et al.'s results: `arch`, `samples_seen`, `gmacs_per_sample` (forward,
one pair, fvcore's count), `mparams`, and one column a metric. Whatever else a run knows (seed,
learning rate, where it came from) is a column too.
"""

import contextlib
import csv
import functools
import io
import json
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clip_jax import flops
from clip_jax.checkpoints.resume import branch_point
from clip_jax.checkpoints.retention import WATCHED
from clip_jax.checkpoints.run_config import upgrade
from clip_jax.data import growth
from clip_jax.errors import InputError
from clip_jax.models import zoo
from clip_jax.models.clip import CLIP, CLIPConfig, count
from clip_jax.models.vit import ViTConfig
from clip_jax.scaling.laws import Runs
from clip_jax.scaling.plots import Named
from clip_jax.serialize import from_dict
from clip_jax.storage.files import Place, place, walk, write_whole
from clip_jax.storage.files import read as read_file
from clip_jax.storage.json_files import read_rows

Row = dict[str, Any]

FIRST = ("arch", "samples_seen", "gmacs_per_sample", "mparams", "source")
# A whole schedule's samples in the names of published checkpoints: laion2b_s34b_b79k, Samples-3B.
SAMPLES_IN_NAME = re.compile(r"(?:_s|Samples-)(\d+(?:\.\d+)?)([bBmM])(?=_|$)")
OPENAI_SAMPLES = 12.8e9  # CLIP paper, 2.5: 32 epochs of 400M pairs
CLIP_BENCHMARK = {"dataset", "model", "pretrained", "task"}


# ------------------------------------------------------------------ numbers and names


def parse_count(text: str) -> float:
    """Read "12.8B", "400M", "64K" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMB]?)", text.strip(), re.IGNORECASE)
    if not match:
        raise InputError(f"{text!r} is not a number of samples; write 12.8B, 400M or 64000.")
    return float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[match[2].upper()]


def short(number: float) -> str:
    """Write a count in two digits: 13B, 2.6B, 400M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= 0.995 * unit:
            value = number / unit
            return f"{value:.0f}{name}" if value >= 9.95 else f"{value:.1f}{name}".replace(".0", "")
    return f"{number:g}"


@functools.cache
def gmacs(config: CLIPConfig) -> float:
    """Forward GMACs of one pair, as fvcore counts them."""
    return flops.forward(config, "fvcore").total / 1e9


@functools.cache
def mparams(config: CLIPConfig) -> float:
    """Millions of parameters."""
    shapes = dict(jax.eval_shape(CLIP(config).init, jax.random.key(0)))
    shapes.pop("batch_stats", None)  # BatchNorm's running statistics are not trained
    return count(shapes) / 1e6


def arch_of(config: CLIPConfig) -> str:
    """Name an architecture: the zoo's name for it, or its measures."""

    def shape(c: CLIPConfig) -> CLIPConfig:
        plain = {name: getattr(CLIPConfig, name) for name in ("remat", "unroll", "attention")}
        return replace(c, dtype="bfloat16", init_logit_scale=1.0, **plain)

    for name, known in zoo.ARCHITECTURES.items():
        if shape(known) == shape(config):
            return name
    v = config.vision
    kind = (
        f"ViT-w{v.width}d{v.depth}p{v.patch_size}" if isinstance(v, ViTConfig) else f"RN-w{v.width}"
    )
    return f"{kind}-text-w{config.text.width}d{config.text.depth}"


def _size_of(arch: str) -> Row:
    """Size of an architecture by the name that open_clip gives it."""
    try:
        config = zoo.get(arch)
    except InputError as error:
        raise Unfinished(str(error)) from None
    return {"gmacs_per_sample": round(gmacs(config), 4), "mparams": round(mparams(config), 3)}


# ------------------------------------------------------------------ gathering


def gather(paths: Sequence[Place], samples: dict[str, float]) -> tuple[list[Row], list[str]]:
    """Read every finished run below the paths, whatever wrote it.

    A directory is searched for our work directories and open_clip's; a `.csv` is CLIP_benchmark's
    or already such a table; a `results.jsonl` is open_clip's.

    Args:
      paths: files and directories.
      samples: samples seen, by the name of a checkpoint or of an open_clip run that does not say.

    Returns:
      The rows, and one line for each run that could not become one.
    """
    rows: list[Row] = []
    skipped: list[str] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist; give work directories or tables.")
        for file in sorted(_files(path)):
            for read_row in _readers(file, samples):
                try:
                    rows.append(read_row())
                except Unfinished as reason:
                    skipped.append(f"{file}: {reason}")
    return rows, skipped


class Unfinished(Exception):
    """A run that has no place in a table, and why."""


def _files(path: Place) -> Iterable[Place]:
    if not path.is_dir():
        return [path]
    named = (place(file) for file in walk(path))
    return [x for x in named if x.name in ("result.json", "results.jsonl") or x.suffix == ".csv"]


def _readers(file: Place, samples: dict[str, float]) -> list[Callable[[], Row]]:
    """What reads each row of a file; one that raises Unfinished leaves the others alone."""
    if file.name == "result.json":
        return [functools.partial(_ours, file)]
    if file.suffix == ".jsonl":
        return [functools.partial(_open_clip, file, samples)]
    lines = _csv_lines(file)
    columns = set(lines[0]) if lines else set()
    if columns >= CLIP_BENCHMARK:
        models: dict[tuple[str, str], list[dict[str, str]]] = {}
        for line in lines:
            models.setdefault((line["model"], line["pretrained"]), []).append(line)
        return [functools.partial(_clip_benchmark, mine, file, samples) for mine in models.values()]
    if {"arch", "samples_seen"} <= columns:
        return [functools.partial(dict, {"source": str(file), **line}) for line in lines]
    return [functools.partial(_unknown, "neither CLIP_benchmark's columns nor a table of runs")]


def _csv_lines(path: Place) -> list[dict[str, str]]:
    """Read a CSV with a header; cells beyond it are dropped. Raises InputError for what is no
    text."""
    try:
        text = io.StringIO(read_file(path).decode("utf-8"), newline="")
        lines = list(csv.DictReader(text, restkey="", restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}.") from error
    return [{name: cell for name, cell in line.items() if name} for line in lines]


@contextlib.contextmanager
def _expecting(what: str) -> Generator[None]:
    """Take what a file lacks, while it is parsed, for the reason to leave it out."""
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise Unfinished(f"not {what} ({error!r})") from error


def _unknown(reason: str) -> Row:
    raise Unfinished(reason)


def _ours(file: Place) -> Row:
    """A work directory of `clip-jax train`."""
    config = file.with_name("config.json")
    if not config.exists():
        raise Unfinished("no config.json beside it")
    with _expecting("the result.json and config.json of a work directory"):
        result, run = (json.loads(path.read_text()) for path in (file, config))
        run = upgrade(run)
        end = run["steps"]  # a run that --stop-after has stopped is in the middle of its schedule
        if result.get("step") != end:
            raise Unfinished(f"stopped at step {result.get('step')} of {end}")
        watched = {row["step"]: row for row in read_rows(file.parent / WATCHED)}
        if watched and end not in watched:
            raise Unfinished(f"its watcher has evaluated step {max(watched)} of {end}")
        if reason := watched.get(end, {}).get("skipped"):
            raise Unfinished(f"its watcher skipped step {end}: {reason}")
        row = of_run(run, end)
        row |= {"source": str(file.parent), "samples_seen": result.pop("samples_seen")}
    return row | {key: value for key, value in result.items() if isinstance(value, int | float)}


def of_run(run: dict[str, Any], step: int) -> Row:
    """Say what a work directory's config tells of a run that has come to a step.

    Raises LookupError, TypeError or ValueError for what is no such config.
    """
    model = from_dict(CLIPConfig, run["model"], "model")
    optim, batch_size = run["optim"], run["batch_size"]
    doubled, locked = run.get("double_batch_at", ()), tuple(optim.get("locked", ()))
    first = branch_point(run["branch_from"])[1] if run.get("branch_from") else 0

    def work(steps: int) -> int:
        phases = growth.phases(batch_size, doubled, steps)
        return sum(flops.training(model, n, locked=locked).total * count for n, count in phases)

    return {
        "arch": arch_of(model),
        "samples_seen": growth.samples_after(batch_size, doubled, step),
        "gmacs_per_sample": gmacs(model),
        "mparams": round(mparams(model), 6),
        "training_flops": work(step),
        "flops_spent": max(work(step) - work(first), 0),  # a trunk had done the first steps
        **_kinds(run),
        "seed": run["seed"],
        "global_batch": batch_size,
        "lr": optim["learning_rate"],
        "warmup": optim["warmup_steps"],
        "weight_decay": optim["weight_decay"],
        "width": model.vision.width,
    }


def _kinds(run: dict[str, Any]) -> Row:
    """Say by what families of runs are told apart: from a work directory's config."""
    source = run.get("data", {}).get("source", {})
    losses = [term["type"] for term in run.get("objective", [])]
    decoder = (run["model"].get("decoder") or {}).get("type", "").removesuffix("Config")
    schedule = run["optim"].get("schedule", {}).get("type", "Cosine")
    return {
        "family": decoder or ("SigLIP" if "SigmoidConfig" in losses else "CLIP"),
        "data": source.get("path") or source.get("type", "").removesuffix("Config").lower(),
        "schedule": re.sub(r"(?<=[a-z])(?=[A-Z])", "_", schedule).lower(),
    }


def _open_clip(file: Place, samples: dict[str, float]) -> Row:
    """An open_clip run: the last line of results.jsonl, its arguments in params.txt above it."""
    with _expecting("JSON lines"):
        lines = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    params = next((p / "params.txt" for p in file.parents[:2] if (p / "params.txt").exists()), None)
    if not lines or params is None:
        raise Unfinished("empty" if not lines else "no params.txt beside or above it")
    given = dict(line.split(": ", 1) for line in params.read_text().splitlines() if ": " in line)
    with _expecting("a results.jsonl and params.txt of open_clip"):
        arch, epochs = given["model"], int(given["epochs"])
        last, epoch = lines[-1], int(lines[-1].get("epoch", epochs))
    if epoch < epochs:
        raise Unfinished(f"stopped at epoch {epoch} of {epochs}")
    name, per_epoch = given.get("name", file.parent.name), given.get("train_num_samples", "None")
    if name not in samples and per_epoch == "None":
        raise Unfinished(f"train_num_samples is not in params.txt; give --samples {name}=12.8B")
    row = {
        "arch": arch,
        "samples_seen": samples[name] if name in samples else int(per_epoch) * epochs,
        **_size_of(arch),
        "source": str(file),
        "name": name,
        "seed": given.get("seed"),
        "lr": given.get("lr"),
        "warmup": given.get("warmup"),
    }
    for key, value in last.items():
        if key not in ("epoch", "num_samples") and isinstance(value, int | float):
            row[_open_clip_metric(key)] = value
    return row


def _open_clip_metric(key: str) -> str:
    match = re.fullmatch(r"(imagenet\w*)-zeroshot-val-top(\d)", key)
    if not match:
        return key
    return f"{'imagenet1k' if match[1] == 'imagenet' else match[1]}_acc{match[2]}"


def _clip_benchmark(lines: list[dict[str, str]], file: Place, samples: dict[str, float]) -> Row:
    """CLIP_benchmark's lines of one model, one a data set."""
    checkpoint = Path(lines[0]["pretrained"]).name
    row = {
        "arch": lines[0]["model"],
        "samples_seen": _samples_of(checkpoint, samples),
        **_size_of(lines[0]["model"]),
        "source": str(file),
        "name": checkpoint,
    }
    for line in lines:
        dataset = line["dataset"].removeprefix("wds/").replace("/", "_")
        for key, value in line.items():
            metric = _clip_benchmark_metric(key, value)
            if metric:
                row[f"{dataset}_{metric}"] = float(value)
    return row


def _clip_benchmark_metric(key: str, value: str) -> str | None:
    if key in CLIP_BENCHMARK | {"language"} or not re.fullmatch(r"[-+\d.eE]+", value or ""):
        return None
    return key.replace("image_retrieval_recall@", "img_r").replace(
        "text_retrieval_recall@", "txt_r"
    )


def _samples_of(checkpoint: str, samples: dict[str, float]) -> float:
    if checkpoint in samples:
        return samples[checkpoint]
    if checkpoint.startswith("openai"):
        return OPENAI_SAMPLES
    match = SAMPLES_IN_NAME.search(Path(checkpoint).stem)
    if not match:
        raise Unfinished(
            f"the name {checkpoint!r} does not say how many samples it has seen; give --samples "
            f"{checkpoint}=12.8B"
        )
    return parse_count(match[1] + match[2].upper())


# ------------------------------------------------------------------ the table itself


def write(rows: list[Row], path: Place) -> None:
    """Write rows as CSV; a column for everything that any of them has."""
    columns = list(dict.fromkeys([*FIRST, *(key for row in rows for key in row)]))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, file.getvalue())


def read(path: Place, metric: str, where: Sequence[str]) -> list[dict[str, str]]:
    """Read the rows that have the metric and match every COLUMN=PATTERN of `where`.

    Raises InputError for a file that is no such table, a column that is not there, and when
    nothing is left.
    """
    if not path.is_file():
        raise InputError(f"no table at {path}; `clip-jax scale collect` writes one.")
    rows = _csv_lines(path)
    columns = list(rows[0]) if rows else []
    for column in ("arch", "samples_seen", "gmacs_per_sample", metric):
        if column not in columns:
            raise InputError(
                f"{path} has no column {column!r}; it has {', '.join(columns) or 'no rows'}."
            )
    for condition in where:
        column, equals, pattern = condition.partition("=")
        if not equals or column not in columns:
            raise InputError(
                f"where={condition!r} must be COLUMN=PATTERN with one of {', '.join(columns)}."
            )
        rows = [row for row in rows if fnmatch(row[column] or "", pattern)]
    rows = [row for row in rows if row[metric]]
    if not rows:
        raise InputError(f"no row of {path} has {metric!r} and matches {list(where)}.")
    return rows


def number(row: dict[str, str], column: str) -> float:
    """Read a cell. Raises InputError if it is empty or no number."""
    try:
        return float(row[column] or "")
    except ValueError as error:
        what = f"{column} of {row['arch']} is {row[column]!r}, not a number"
        raise InputError(f"{what}: mend the table, or leave the row out by --where.") from error


def named(rows: list[dict[str, str]], metric: str, is_score: bool, third: str = "") -> Named:
    """Make runs of rows: errors from the metric, `third` from a column, labels for a plot."""
    columns = [metric, "samples_seen", "gmacs_per_sample", *([third] if third else [])]
    if missing := set(columns) - rows[0].keys():
        raise InputError(f"the table has no column {missing.pop()!r}; it has {', '.join(rows[0])}.")
    values, samples, sizes, *others = (
        np.array([number(row, column) for row in rows]) for column in columns
    )
    runs = Runs(
        size=sizes,
        samples=samples,
        error=1 - values if is_score else values,
        third=others[0] if others else None,
    )
    if not all(np.isfinite(x).all() for x in (values, samples, sizes, *others)):
        raise InputError(f"one of {', '.join(map(repr, columns))} is not finite in some row.")
    labels = tuple(
        row.get("samples_seen_scale") or short(count)
        for row, count in zip(rows, samples.tolist(), strict=True)
    )
    return Named(runs, tuple(row["arch"] for row in rows), labels)
