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


class _Loop:
    """A loop of a schedule, in another or (`outer` None) the schedule itself."""

    def __init__(self, outer: "_Loop | None") -> None:
        self.outer, self.bundles = outer, 0
        self.turns = 1.0 if outer is None else math.nan

    @property
    def cycles(self) -> float:
        around, times = self.outer, self.turns
        while around:
            times, around = times * around.turns, around.outer
        return self.bundles * times


def count(text: str) -> int | None:
    """Add up the bundles, those of a loop as often as it runs; None where that doesn't stand there.

    Branches count as if all were taken.
    """
    loops = [_Loop(None)]
    inside, depth = loops[:], 0  # of each depth the last loop that began
    steps: dict[str, int] = {}
    for line in text.splitlines():
        if not (match := _BUNDLE.match(line)):
            continue
        label, empty = match[1], bool(match[3])
        depth = depth if empty else len(match[2])  # an empty one waits for a branch
        if label == "LB" and depth:
            del inside[depth:]
        while len(inside) <= depth:
            inside.append(_Loop(inside[-1]))
            loops.append(inside[-1])
        loop = inside[depth]  # its end may stand between bundles of the one around it
        loop.bundles += 1
        steps |= {name: int(step) for name, step in _STEP.findall(line)}
        if (limit := _LIMIT.search(line)) and limit[1] in steps:
            turns = math.ceil(int(limit[2]) / steps[limit[1]])
            loop.turns = turns - (FILL if depth == 1 else 0)
    total = sum(loop.cycles for loop in loops)
    return None if math.isnan(total) else int(total)
