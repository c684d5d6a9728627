"""Read tables of other programs: rename columns, convert units, and widen long tables.

A column is mapped by OURS=THEIRS or OURS=THEIRS:UNIT. OURS with a {COLUMN} in braces names results
of a long table, which has a row per model and data set: {dataset}_acc1=acc1 gives the columns
cifar10_acc1 and so on, in one row per model.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from clip_jax.errors import InputError

Row = dict[str, Any]

UNITS = {  # factors by unit, for the columns that have a unit
    "gmacs_per_sample": {
        "MACs": 1e-9, "GMACs": 1.0, "TMACs": 1e3, "FLOPs": 0.5e-9, "GFLOPs": 0.5, "TFLOPs": 500.0,
    },
    "mparams": {"parameters": 1e-6, "K": 1e-3, "M": 1.0, "B": 1e3},
}  # fmt: skip
SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "%": 0.01}  # of numbers
PLAIN = {"percent": 0.01, "K": 1e3, "M": 1e6, "B": 1e9}  # for all other columns
TAG = "tag"  # unit of samples_seen=pretrained:tag, for the names of open_clip's weights
BRACES = re.compile(r"\{(.*?)\}")  # columns in the name of a result
IDENTITY = ("arch", "samples_seen", "seed", "name", "source")  # tell the runs of a long table apart

# Columns of published tables. An entry whose column a table lacks does not count; of several
# entries for one column the last counts.
PRESETS: dict[str, tuple[str, ...]] = {
    # docs/openclip_results.csv of open_clip
    "open_clip": (
        "arch=name", "samples_seen=pretrained:tag", "pretrained=pretrained",
        "mparams=params (M)", "gmacs_per_sample=FLOPs (B):GFLOPs", "imagenet1k_acc1=ImageNet 1k",
    ),
    # the table that CLIP_benchmark's `build` writes
    "clip_benchmark": (
        "arch=model", "samples_seen=pretrained:tag", "pretrained=pretrained",
        "{dataset}_acc1=acc1", "{dataset}_img_r5=image_retrieval_recall@5",
        "{dataset}_txt_r5=text_retrieval_recall@5",
    ),
    # zeroshot_results.csv of Cherti et al. 2023, arXiv:2212.07143
    "cherti": (
        "gmacs_per_sample=gmacs", "upstream_dataset=upstream_dataset",
        "samples_seen_scale=samples_seen_pretty", "{downstream_dataset}_acc1=acc1",
        "{downstream_dataset}_img_r5=image_retrieval_recall@5",
        "{downstream_dataset}_txt_r5=text_retrieval_recall@5",
    ),
    # all_results.csv.gz of Nezhurina et al. 2025, arXiv:2506.04598, as its code reads it
    "laion": (
        "arch=model", "samples_seen=samples_seen", "samples_seen=total_samples_seen",
        "gmacs_per_sample=gflops:GFLOPs", "gmacs_per_sample=model_gflops:GFLOPs",
        "mparams=model_mparams", "family=namespace", "data=pretrain_dataset", "lr=lr",
        "global_batch=global_batch_size", "warmup=warmup", "schedule=lr_scheduler", "epoch=epoch",
        "eval_type=eval_type", "{downstream_dataset}_acc1=acc1", "{downstream_dataset}_miou=miou",
        "{downstream_dataset}_img_r5=image_retrieval_recall@5",
        "{downstream_dataset}_loss=contrastive_loss",
    ),
}  # fmt: skip


class Entry(NamedTuple):
    """A column of ours, the column that it comes from, and its unit ("": none)."""

    ours: str
    theirs: str
    unit: str

    def cell(self, row: Row) -> Any:
        """Return a row's cell in our unit. Raises InputError for a cell that is not a number."""
        cell = row.get(self.theirs)
        if cell in ("", None) or not self.unit:
            return cell
        if self.unit == TAG:
            return samples_of_tag(str(cell))
        try:
            return numeric(str(cell)) * UNITS.get(self.ours, PLAIN)[self.unit]
        except ValueError as error:
            what = f"{self.theirs} is {cell!r} in a row"
            raise InputError(f"{what}, not a number of {self.unit}; correct the table.") from error


def mapped(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """Return rows with our columns; others keep their names.

    `columns` has entries and names of presets. A long table keeps the columns that are equal in all
    rows of a run. Raises InputError for a column that is missing, an unknown unit, or two values of
    one result of a run.
    """
    names = {name for row in rows for name in row}
    entries: dict[str, Entry] = {}
    used: set[str] = set()
    for column in columns:
        for text in PRESETS.get(column, (column,)):
            entry = _entry(text, names)
            needed = {entry.theirs, *BRACES.findall(entry.ours)}
            if needed <= names:
                entries[entry.ours] = entry
                used |= needed
            elif column not in PRESETS:
                lacks, has = (", ".join(sorted(x)) for x in (needed - names, names))
                raise InputError(f"columns={text!r}: the table has no {lacks}; it has {has}.")
    results = [entries.pop(name) for name in list(entries) if "{" in name]
    keys = {*IDENTITY, *entries}
    runs: dict[Any, Row] = {}
    for i, row in enumerate(rows):
        rest = {name: cell for name, cell in row.items() if name not in used}
        rest |= {name: entry.cell(row) for name, entry in entries.items()}
        key = tuple(_alike(cell) for name, cell in rest.items() if name in keys)
        run = runs.setdefault(key if results else i, dict(rest))
        for name, cell in rest.items():
            if name not in keys and run.get(name) != cell:
                run.pop(name, None)  # differs between the results of a run
        for entry in results:
            name = BRACES.sub(lambda x, row=row: str(row.get(x[1])), entry.ours)
            cell = entry.cell(row)
            if cell not in ("", None) and run.setdefault(name, cell) != cell:
                raise InputError(
                    f"{run.get('arch')} has two values of {name}, {run[name]} and {cell}; map the "
                    "column that tells these runs apart, such as lr=lr."
                )
    return list(runs.values())


def _entry(text: str, names: set[str]) -> Entry:
    """Read OURS=THEIRS or OURS=THEIRS:UNIT."""
    ours, _, theirs = text.partition("=")
    if not (ours and theirs):
        forms = ", ".join(("OURS=THEIRS", "OURS=THEIRS:UNIT", *PRESETS))
        raise InputError(f"columns={text!r} must be one of {forms}.")
    before, colon, unit = theirs.rpartition(":")
    if not colon or theirs in names:
        return Entry(ours, theirs, "")
    known = [*UNITS.get(ours, PLAIN), *([TAG] if ours == "samples_seen" else [])]
    if unit not in known:
        raise InputError(f"columns={text!r}: the unit of {ours} must be one of {', '.join(known)}.")
    return Entry(ours, before, unit)


def _alike(cell: Any) -> Any:
    """Return a key that is the same for numbers that differ by rounding only."""
    try:
        return f"{numeric(str(cell)):.8g}"
    except ValueError:
        return cell


def numeric(text: str) -> float:
    """Read a number, also one like 12.8B, 400M or 63.3%. Raises ValueError for other text."""
    text = text.strip()
    factor = SUFFIXES.get(text[-1:].upper())
    return float(text[:-1]) * factor if factor else float(text)


def samples_of_tag(tag: str) -> float | None:
    """Return the pairs seen by weights that open_clip names, such as laion2b_s34b_b79k.

    Names without a number of pairs have none, but for OpenAI's: 32 epochs over 400M pairs.
    """
    if tag == "openai":
        return 12.8e9
    if match := re.search(r"_s([\d.]+[MB])(?:_|$)", tag, re.IGNORECASE):
        return numeric(match[1])
    match = re.search(r"(\d+[MB])_e(\d+)$", tag, re.IGNORECASE)  # epochs over the data set's pairs
    return numeric(match[1]) * int(match[2]) if match else None
