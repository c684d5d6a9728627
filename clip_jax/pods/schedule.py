"""How many cycles a TPU kernel takes: the length of its final schedule, as the compiler writes it.

XLA estimates cycles of its own fusions; of a Pallas kernel the HLO says nothing, but the compiler
can be asked for the bundles that it issues, one a cycle, loops marked.
"""

import math
import re
from pathlib import Path

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(\w\w)?\s*: (>*)\s*\{(\})?")
_LIMIT = re.compile(r"scmp\.ge\.s32\.totalorder %(\w+), (\d+) /\* loop exit test \*/")
_STEP = re.compile(r"%(\w+) = sadd\.s32 (\d+), ")  # of a loop's counter: more than 1 if unrolled

FILL = 2  # turns of the outermost loop, over the grid, that only start and end its copies


def dump(folder: str) -> str:
    """Return the flags that make the TPU compiler write the schedules to a folder."""
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=final_bundles"
    )


def cycles(folder: Path, name: str) -> int | None:
    """Count the cycles of a kernel by its instruction's name; None where no schedule is there."""
    reports = [
        path
        for path in folder.glob("*-final_bundles.txt")
        if re.fullmatch(rf"\d+-{re.escape(name)}-\d+-final_bundles", path.stem)
    ]
    return count(reports[0].read_text()) if reports else None


def count(text: str) -> int | None:
    """Add up the bundles, those of a loop as often as it runs; None where that doesn't stand there.

    Branches count as if all were taken.
    """
    # Of each loop, the whole schedule first: its bundles, its turns, and the loop around it.
    bundles, turns, around = [0], [1.0], [0]
    inside, depth = [0], 0  # of each depth the last loop that began
    steps: dict[str, int] = {}
    for line in text.splitlines():
        if not (match := _BUNDLE.match(line)):
            continue
        label, empty = match[1], bool(match[3])
        depth = depth if empty else len(match[2])  # an empty one waits for a branch
        if label == "LB" and depth:
            del inside[depth:]
        while len(inside) <= depth:
            around.append(inside[-1])
            inside.append(len(bundles))
            bundles.append(0)
            turns.append(math.nan)
        loop = inside[depth]  # its end may stand between bundles of the one around it
        bundles[loop] += 1
        steps |= {name: int(step) for name, step in _STEP.findall(line)}
        if (limit := _LIMIT.search(line)) and limit[1] in steps:
            turns[loop] = math.ceil(int(limit[2]) / steps[limit[1]]) - (FILL if depth == 1 else 0)
    for loop in range(1, len(turns)):
        turns[loop] *= turns[around[loop]]
    total = sum(x * times for x, times in zip(bundles, turns, strict=True))
    return None if math.isnan(total) else int(total)
