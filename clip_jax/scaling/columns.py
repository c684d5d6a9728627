"""Read tables of other programs: rename columns, convert units, and widen long tables.

A column is mapped by OURS=THEIRS or OURS=THEIRS:UNIT. OURS with a {COLUMN} in braces names results
of a long table, which has a row per model and data set: {dataset}_acc1=acc1 gives the columns
cifar10_acc1 and so on, in one row per run. Rows that are equal in all other columns are one run, so
=THEIRS leaves columns out that describe a result, such as =acc5 or =lp_*.
"""

import re
from collections.abc import Sequence
from fnmatch import filter as matching
from typing import Any, NamedTuple

from clip_jax.display import say
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
        "=task", "=acc*", "=*_acc", "=lp_*", "=mean_*", "=*recall*",
    ),
    # zeroshot_results.csv of Cherti et al. 2023, arXiv:2212.07143
    "cherti": (
        "gmacs_per_sample=gmacs", "upstream_dataset=upstream_dataset",
        "samples_seen_scale=samples_seen_pretty", "{downstream_dataset}_acc1=acc1",
        "{downstream_dataset}_img_r5=image_retrieval_recall@5",
        "{downstream_dataset}_txt_r5=text_retrieval_recall@5",
        "=task", "=acc*", "=mean_*", "=*recall*",
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
        "=task", "=path", "=acc*", "=*_acc", "=main_metric*", "=mean_*", "=*recall*",
        "=cosine_distance", "=caption_loss",
    ),
}  # fmt: skip


class Entry(NamedTuple):
    """A column of ours, the column that it comes from, and its unit ("": none)."""

    ours: str  # "" for a pattern of columns that are left out
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

    `columns` has entries and names of presets. Rows of a long table are of one run if all columns
    but those of results are equal. Raises InputError for a column that is missing, an unknown unit,
    or two values of one result of a run.
    """
    names = {name for row in rows for name in row}
    entries: dict[str, Entry] = {}
    used: set[str] = set()
    for column in columns:
        for text in PRESETS.get(column, (column,)):
            entry = _entry(text, names)
            needed = {entry.theirs, *BRACES.findall(entry.ours)}
            if not entry.ours:
                needed = {*matching(names, entry.theirs)} or needed
            if needed <= names:
                used |= needed
                if entry.ours:
                    entries[entry.ours] = entry
            elif column not in PRESETS:
                lacks, has = (", ".join(sorted(x)) for x in (needed - names, names))
                raise InputError(f"columns={text!r}: the table has no {lacks}; it has {has}.")
    results = [entries.pop(name) for name in list(entries) if "{" in name]
    runs: dict[Any, Row] = {}
    for i, row in enumerate(rows):
        rest = {name: cell for name, cell in row.items() if name not in used}
        rest |= {name: entry.cell(row) for name, entry in entries.items()}
        key = tuple((name, _alike(rest[name])) for name in sorted(rest))
        run = runs.setdefault(key if results else i, rest)
        for entry in results:
            name = BRACES.sub(lambda x, row=row: str(row.get(x[1])), entry.ours)
            cell = entry.cell(row)
            if cell not in ("", None) and run.setdefault(name, cell) != cell:
                raise InputError(
                    f"{run.get('arch')} has two values of {name}, {run[name]} and {cell}, in rows "
                    "whose other columns are equal; correct the table, or name the result by one "
                    "more column in braces."
                )
    if results and len(runs) == len(rows) > 1:
        others = ", ".join(sorted(names - used | entries.keys()))
        say(
            f"no two rows are equal in {others}, so each is a run of its own. To join rows, leave "
            "out columns that describe a result, such as --columns =acc5."
        )
    return list(runs.values())


def _entry(text: str, names: set[str]) -> Entry:
    """Read OURS=THEIRS, OURS=THEIRS:UNIT or =THEIRS."""
    ours, _, theirs = text.partition("=")
    if not theirs:
        forms = ", ".join(("OURS=THEIRS", "OURS=THEIRS:UNIT", *PRESETS))
        raise InputError(f"columns={text!r} must be one of {forms}, or =THEIRS.")
    if not ours:
        return Entry("", theirs, "")
    before, colon, unit = theirs.rpartition(":")
    if not colon or theirs in names:
        return Entry(ours, theirs, "")
    units = [*UNITS.get(ours, PLAIN)]
    if ours == "samples_seen":
        units.append(TAG)
    if unit not in units:
        raise InputError(f"columns={text!r}: the unit of {ours} must be one of {', '.join(units)}.")
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
