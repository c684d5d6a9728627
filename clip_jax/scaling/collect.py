"""Collect finished runs, and tables of others, in one table."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax import flops, parts
from clip_jax.checkpoints.resume import branch_point
from clip_jax.checkpoints.retention import WATCHED
from clip_jax.checkpoints.run_config import read_run_config
from clip_jax.config import Config
from clip_jax.errors import InputError
from clip_jax.models import zoo
from clip_jax.models.clip import CLIPConfig, count, parameters
from clip_jax.scaling.columns import Row
from clip_jax.scaling.run_table import RunTable, gmacs, read, write
from clip_jax.serialize import from_dict
from clip_jax.storage.files import AnyPath, as_path, check_destination, walk
from clip_jax.storage.json_files import read_json, read_rows


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Collect finished runs in one table."""

    paths: tuple[AnyPath, ...] = (Path("runs"),)  # Run directories, folders of these, or tables.
    output: AnyPath = Path("scaling.csv")  # Table to write (CSV).
    columns: tuple[str, ...] = ()  # Columns of other programs' tables, as for `scale fit`.


def collect(config: CollectConfig) -> dict[str, Any]:
    """Write the table; return its path, the number of rows, and the reasons of skipped runs."""
    check_destination(config.output, "--output", folder=False)
    table, skipped = gather(config.paths, config.columns)
    if not table.rows:
        raise InputError(
            f"no finished run under {', '.join(map(str, config.paths))}"
            + "".join(f"\n  {line}" for line in skipped)
        )
    write(table, config.output)
    return {"table": str(config.output), "rows": len(table.rows), "skipped": skipped}


def gather(paths: Sequence[AnyPath], columns: Sequence[str] = ()) -> tuple[RunTable, list[str]]:
    """Read every finished run directory and every CSV of runs below the paths.

    CSVs in a run directory are the run's own results, and not read. `columns` maps those of the
    tables. Returns the table, and one line for each run or file that was skipped, with the reason.
    """
    rows: list[Row] = []
    skipped: list[str] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist; name run directories or tables.")
        files = [path]
        if path.is_dir():
            named = [as_path(file) for file in walk(path)]
            runs = {x.parent for x in named if x.name == "config.json"}
            tables = [x for x in named if x.suffix == ".csv" and runs.isdisjoint(x.parents)]
            files = [x for x in named if x.name == "result.json"] + tables
        for file in sorted(files):
            try:
                rows += [_ours(file)] if file.name == "result.json" else _table(file, columns)
            except parts.NotImported:
                raise
            except InputError as reason:
                if file == path:
                    raise  # a table by name; those in folders may be of other kinds
                skipped.append(f"{file}: {reason}")
    return RunTable(rows), skipped


def _table(file: AnyPath, columns: Sequence[str]) -> list[Row]:
    """Read the rows of a CSV of runs from any program."""
    table = read(file, columns)
    table.check("arch", "samples_seen")
    return [{**row, "source": row.get("source", str(file))} for row in table.rows]


def _ours(file: AnyPath) -> Row:
    """Read the row of a run of `clip-jax train`. Raises InputError if it is unfinished."""
    result = read_json(file)
    run = read_run_config(file.parent)
    try:
        row = of_run(run, end := run["steps"])
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"no config.json of a run beside it ({error!r})") from error
    if not {"step", "samples_seen"} <= result.keys():
        raise InputError("it has no result yet: it stopped before its first report or evaluation")
    if result["step"] != end:  # --stop-after has stopped it
        raise InputError(f"stopped at step {result['step']} of {end}")
    watched = {line["step"]: line for line in read_rows(file.parent / WATCHED)}
    if watched and end not in watched:
        raise InputError(f"its watcher has evaluated up to step {max(watched)} of {end}")
    if reason := watched.get(end, {}).get("skipped"):
        raise InputError(f"its watcher skipped step {end}: {reason}")
    if reason := result.get("failed") or watched.get(end, {}).get("failed"):
        raise InputError(f"its evaluation of step {end} failed: {reason}")
    row |= {"source": str(file.parent), "samples_seen": result.pop("samples_seen")}
    return row | {key: value for key, value in result.items() if isinstance(value, int | float)}


def of_run(run: dict[str, Any], step: int) -> Row:
    """Return the columns that follow from a run's config and its last step.

    Raises LookupError, TypeError or ValueError for an invalid config.
    """
    config = from_dict(Config, run)
    model = config.model
    optim = config.optim
    spent = config.flops_after(step)
    parents = config.flops_after(branch_point(config.branch_from)[1]) if config.branch_from else 0
    source = run.get("data", {}).get("source", {})
    losses = [term["type"] for term in run.get("objective", [])]
    teachers = [x for term in config.objective for x in getattr(term, "teachers", ())]
    kinds = config.batches.counts(0, step).items()
    taught = sum(flops.of_step(config.recipe_of(kind)).teacher * n for kind, n in kinds)
    decoder = (run["model"].get("decoder") or {}).get("type", "").removesuffix("Config")
    schedule = run["optim"].get("schedule", {}).get("type", "Cosine")
    return {
        "arch": zoo.name_of(model),
        "samples_seen": config.samples_after(step),
        "gmacs_per_sample": gmacs(model),
        "mparams": round(mparams(model), 6),
        "training_flops": spent,
        "student_flops": spent - taught,
        "flops_spent": max(spent - parents, 0),  # without the parent run's
        "family": decoder or ("SigLIP" if "SigmoidConfig" in losses else "CLIP"),
        "data": source.get("path") or source.get("type", "").removesuffix("Config").lower(),
        "teacher": "+".join(getattr(x, "weights", "stored") for x in teachers) or "none",
        "schedule": re.sub(r"(?<=[a-z])(?=[A-Z])", "_", schedule).lower(),
        "seed": config.seed,
        "global_batch": config.batch_size,
        "lr": optim.learning_rate,
        "warmup": optim.warmup_steps,
        "weight_decay": optim.weight_decay,
        "width": model.vision.width,
    }


@functools.cache
def mparams(config: CLIPConfig) -> float:
    """Return the number of parameters in millions."""
    boxes = parameters(config)
    trained = [x.value for path, x in boxes.items() if not path.startswith("batch_stats/")]
    return count({"parameters": trained}) / 1e6
