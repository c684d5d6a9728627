"""Count the cycles of a TPU kernel: the length of the final schedule that the compiler writes.

XLA estimates cycles of its own fusions, but not of Pallas kernels. For these, the compiler can
write the instruction bundles that it issues, one per cycle, with loops marked.
"""

import math
import re
from pathlib import Path

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(\w\w)?\s*: (>*)\s*\{(\})?")
_LIMIT = re.compile(r"scmp\.ge\.s32\.totalorder %(\w+), (\d+) /\* loop exit test \*/")
_STEP = re.compile(r"%(\w+) = sadd\.s32 (\d+), ")  # increment of a loop counter; > 1 if unrolled

FILL = 2  # iterations of the outermost loop, over the grid, that only start and end copies


def dump(folder: str) -> str:
    """Return the flags that make the TPU compiler write the schedules to a folder."""
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=final_bundles"
    )


def cycles(folder: Path, name: str) -> int | None:
    """Count the cycles of a kernel by its instruction's name; None without a schedule."""
    reports = [
        path
        for path in folder.glob("*-final_bundles.txt")
        if re.fullmatch(rf"\d+-{re.escape(name)}-\d+-final_bundles", path.stem)
    ]
    return count(reports[0].read_text()) if reports else None


def count(text: str) -> int | None:
    """Add up the bundles, times the iterations of their loops; None if these are not known.

    All branches count as taken.
    """
    # For each loop (0: the schedule itself): its bundles, its iterations, and the enclosing loop.
    bundles, turns, around = [0], [1.0], [0]
    inside, depth = [0], 0  # the last loop that began at each depth
    steps: dict[str, int] = {}
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
            turns.append(math.nan)
        loop = inside[depth]  # its end may be among bundles of the enclosing loop
        bundles[loop] += 1
        steps |= {name: int(step) for name, step in _STEP.findall(line)}
        if (limit := _LIMIT.search(line)) and limit[1] in steps:
            turns[loop] = math.ceil(int(limit[2]) / steps[limit[1]]) - (FILL if depth == 1 else 0)
    for loop in range(1, len(turns)):
        turns[loop] *= turns[around[loop]]
    total = sum(x * times for x, times in zip(bundles, turns, strict=True))
    return None if math.isnan(total) else int(total)
