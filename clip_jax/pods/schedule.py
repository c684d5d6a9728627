"""Read the final schedules that the TPU compiler writes: the cycles of each operation.

A schedule lists the bundles of instructions that a core issues, one bundle per cycle, with loops
marked. It is what runs. XLA's own `estimated_cycles` come from a cost model that the compiler uses
to choose between programs; for operations of the vector unit they are often ten times as long.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

_FILE = re.compile(r"\d+-(.+)-\d+-final_bundles")
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(\w\w)?\s*: (>*)\s*\{(\})?")
_LIMIT = re.compile(r"scmp\.ge\.s32\.totalorder %(\w+), (\d+) /\* loop exit test \*/")
# Increment of a loop counter: its next value, the step (> 1 if unrolled) and its value.
_STEP = re.compile(r"%(\w+) = sadd\.s32 (\d+), %(\w+)")
_MATMUL = re.compile(r" vmatmul\.(\S+)")  # multiplies 8 rows of a register, or 16 packed ones


class Schedule(NamedTuple):
    """Cycles of one operation on one core."""

    cycles: int
    matrix: int = 0  # of these, cycles in which the matrix units are busy, if all share them


def dump(folder: str) -> str:
    """Return the flags that make the TPU compiler write the schedules to a folder."""
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=final_bundles"
    )


def read(folder: Path, matrix_units: int) -> dict[str, Schedule]:
    """Return the schedules in a folder by the names of their HLO instructions.

    A schedule with a loop whose length it does not state is left out.
    """
    counted = {
        match[1]: count(path.read_text(), matrix_units)
        for path in sorted(folder.glob("*-final_bundles.txt"))
        if (match := _FILE.fullmatch(path.stem)) and path.stat().st_size
    }
    return {name: schedule for name, schedule in counted.items() if schedule}


def count(text: str, matrix_units: int) -> Schedule | None:
    """Add up the bundles, times the iterations of their loops; None if these are not known.

    All branches count as taken. Iterations of the outermost loop that only start or end copies do
    not count: the first one if the body is left out in it, and the last one likewise.
    """
    # For each loop (0: the schedule itself): its bundles, the operands' rows, its iterations, and
    # the enclosing loop.
    bundles, rows, turns, around = [0], [0], [1.0], [0]
    inside, depth = [0], 0  # the last loop that began at each depth
    steps: dict[str, tuple[int, str]] = {}
    for line in text.splitlines():
        if not (match := _BUNDLE.match(line)):
            continue
        label, empty = match[1], bool(match[3])
        depth = depth if empty else len(match[2])  # empty bundles wait for a branch
        if label == "LB" and depth:
            del inside[depth:]
        while len(inside) <= depth:
            around.append(inside[-1])
            inside.append(len(bundles))
            bundles.append(0)
            rows.append(0)
            turns.append(math.nan)
        loop = inside[depth]  # its end may be among bundles of the enclosing loop
        bundles[loop] += 1
        if "vmatmul" in line:
            kinds = _MATMUL.findall(line)
            rows[loop] += sum(16 if "bf16" in x and ".16." not in x else 8 for x in kinds)
        if "sadd" in line:
            steps |= {name: (int(step), before) for name, step, before in _STEP.findall(line)}
        if "loop exit" in line and (limit := _LIMIT.search(line)) and limit[1] in steps:
            step, index = steps[limit[1]]
            end = math.ceil(int(limit[2]) / step)
            turns[loop] = end - (_without_body(text, index, end) if depth == 1 else 0)
    for loop in range(1, len(turns)):
        turns[loop] *= turns[around[loop]]
    total = sum(x * times for x, times in zip(bundles, turns, strict=True))
    matrix = sum(x * times for x, times in zip(rows, turns, strict=True)) / matrix_units
    return None if math.isnan(total) else Schedule(int(total), int(matrix))


def _without_body(text: str, index: str, end: int) -> int:
    """Count the first and the last iteration of a loop where its body tests for them."""
    first = re.search(rf"scmp\.(ge|lt)\.s32\.totalorder %{index}, 1\b", text)
    last = re.search(rf"scmp\.lt\.s32\.totalorder %{index}, {end - 1}\b", text)
    return bool(first) + bool(last)
