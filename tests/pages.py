"""Run a page of the documentation block by block, in an empty folder, as a reader would.

A block of `bash` is a script of its own for `bash -euo pipefail`, with the reader's commands as
they stand. Blocks of `python` run one after another in one interpreter. A block of `text` that is
the next one after such a block shows its output. Blocks of `sh` do not run: they need a cloud, a
cluster, a hub or large data, or they install packages.

Comments in the page's source, which the site does not show, choose what takes too long for CI.
`benchmarks/documentation.py` runs everything. Nothing else differs, but that `tests/conftest.py`
asks XLA, by the environment, for quick compilations.

    <!-- page by hand -->             CI runs nothing of this page.
    <!-- by hand -->                  CI leaves out the block that follows.
    <!-- by hand, as in PAGE -->      So it does here; and since PAGE (of docs/) has the same
                                      commands, this page goes on in a copy of PAGE's folder.

Outputs are compared word by word. "..." stands for any lines, or in a line for any text, and
/home/you for the page's folder. Whole numbers must be equal. Others may differ by TOLERANCE, or by
one in the last digit that is shown, unless a comment before the output says otherwise:

    <!-- numbers within 5% -->        The relative tolerance of numbers that are not whole.
    <!-- numbers vary: WORD ... -->   Numbers before or after these words are free, such as speeds.
    <!-- numbers vary -->             All of them are.
"""

import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "docs/install.md",
    *sorted((ROOT / "docs/tutorials").glob("*.md")),
    *sorted((ROOT / "docs/how-to").glob("*.md")),
)
TOLERANCE = 0.01
PROGRAMS = ("clip-jax", "python", "pip", "pytest")  # whose commands are counted

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
_WORD = re.compile(r"\S+")
_COMMENT = re.compile(r"<!-- (.*?) -->")
_NUMBER = re.compile(
    r"(?<![\w.@-])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?(?=[KMBTx%]?(?:\W|$))(?!\.\w)"
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int  # number of its first line in the page
    comments: tuple[str, ...] = ()  # directly before it
    output: "Block | None" = None  # what the page shows of its output

    @property
    def is_run(self) -> bool:
        """Whether it is run at all."""
        return self.language in ("bash", "python")

    @property
    def is_by_hand(self) -> bool:
        """Whether CI leaves it out."""
        return any(comment.startswith("by hand") for comment in self.comments)

    @property
    def as_in(self) -> Path | None:
        """The page that has the same commands."""
        names = [comment.partition(", as in ")[2] for comment in self.comments]
        return next((ROOT / "docs" / name for name in names if name), None)

    def commands(self) -> list[list[str]]:
        """Return the words of each command of a shell block, without what goes to or from files."""
        text = re.sub(r"<<'(\w+)'.*?^\1$", "", self.text, flags=re.M | re.S)
        text = re.sub(r" 2?> \S+", "", text)
        commands: list[list[str]] = []
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.shlex(line, posix=True, punctuation_chars=True)
            words.whitespace_split = True
            command: list[str] = []
            for word in [*words, ";"]:
                if word and set(word) <= set("&|;()"):
                    commands += [command] if command else []
                    command = []
                else:
                    command.append(word)
        return commands


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page, in order."""
    text, end, read = page.read_text(), 0, []
    for match in _FENCE.finditer(text):
        between = text[end : match.start()]
        near = re.search(r"(?:<!-- [^>]* -->\s*)*$", between)
        comments = tuple(_COMMENT.findall(near[0] if near else ""))
        line = text[: match.start(2)].count("\n") + 1
        read.append(Block(match[1], match[2], line, comments))
        end = match.end()
    return read


def runnable(page: Path, *, by_hand: bool) -> list[Block]:
    """Return the blocks that run, each with the output that the page shows for it."""
    if is_by_hand(page) and not by_hand:
        return []
    several = blocks(page)
    pairs = zip(several, [*several[1:], None], strict=True)
    return [
        replace(block, output=after if after and after.language == "text" else None)
        for block, after in pairs
        if block.is_run and (by_hand or not block.is_by_hand)
    ]


def is_by_hand(page: Path) -> bool:
    """Say whether CI leaves out the whole page."""
    return "<!-- page by hand -->" in page.read_text()


def programs(page: Path, *, by_hand: bool) -> int:
    """Count the commands of PROGRAMS and the blocks of Python that run."""
    count = 0
    for block in runnable(page, by_hand=by_hand):
        if block.language == "python":
            count += 1
        elif not block.as_in:
            count += sum(command[0] in PROGRAMS for command in block.commands())
    return count


# ------------------------------------------------------------------ compare outputs


def matches(shown: str, printed: str, comments: Collection[str] = ()) -> bool:
    """Say whether an output is what a page shows, as far as its comments ask for that."""
    tolerance, is_free, free = TOLERANCE, False, set()
    for comment in comments:
        kind, _, words = comment.partition(": ")
        if match := re.fullmatch(r"numbers within ([\d.]+)%", comment):
            tolerance = float(match[1]) / 100
        elif kind == "numbers vary":
            is_free = is_free or not words
            free |= set(words.split())
    wanted = [_pieces(line, is_free, free) for line in _lines(shown)]
    lines = _lines(printed)
    reachable = {0}  # numbers of lines that the patterns so far may have consumed
    for pieces in wanted:
        if pieces == [("any", "")]:
            reachable = {*range(min(reachable, default=len(lines) + 1), len(lines) + 1)}
        else:
            fitting = (i for i in reachable if i < len(lines))
            reachable = {i + 1 for i in fitting if _fits(pieces, lines[i], tolerance)}
    return len(lines) in reachable


def _lines(text: str) -> list[str]:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return [" ".join(line.split()) for line in plain.splitlines() if line.strip()]


def _pieces(line: str, is_free: bool, free: set[str]) -> list[tuple[str, str]]:
    """Split a line of a page into pieces: ("any" | "free" | "number" | "text", text)."""
    words = line.split(" ")
    names = [word.strip(".,:;()") for word in words]
    pieces: list[tuple[str, str]] = []
    for i, word in enumerate(words):
        near = {names[j] for j in (i - 1, i + 1) if 0 <= j < len(words)}
        has_digit = re.search(r"\d", word) is not None
        if has_digit and (near & free) and "..." not in word:
            pieces.append(("free", word))
        else:
            position = 0
            for match in re.finditer(rf"\.\.\.|{_NUMBER.pattern}", word):
                pieces.append(("text", word[position : match.start()]))
                kind = "any" if match[0] == "..." else "free number" if is_free else "number"
                pieces.append((kind, "" if kind == "any" else match[0]))
                position = match.end()
            pieces.append(("text", word[position:]))
        pieces.append(("text", " "))
    marks = [("", ""), *(piece for piece in pieces[:-1] if piece != ("text", "")), ("", "")]
    return [
        piece
        for before, piece, after in zip(marks, marks[1:], marks[2:], strict=False)
        if piece != ("text", " ") or ("any", "") not in (before, after)
    ]


def _fits(pieces: Sequence[tuple[str, str]], line: str, tolerance: float) -> bool:
    """Say whether pieces stand for a line."""

    @functools.cache
    def fits(index: int, start: int) -> bool:
        if index == len(pieces):
            return start == len(line)
        kind, text = pieces[index]
        if kind == "any":
            return any(fits(index + 1, end) for end in range(start, len(line) + 1))
        if kind == "text":
            return line.startswith(text, start) and fits(index + 1, start + len(text))
        match = (_WORD if kind == "free" else _NUMBER).match(line, start)
        return (
            match is not None
            and (kind != "number" or is_close(text, match[0], tolerance))
            and fits(index + 1, match.end())
        )

    return fits(0, 0)


def is_close(shown: str, printed: str, tolerance: float = TOLERANCE) -> bool:
    """Compare two numbers: whole ones exactly, others within a relative tolerance."""
    a, b = (Decimal(text.replace(",", "").replace("−", "-")) for text in (shown, printed))
    digits = [int(x.as_tuple().exponent) for x in (a, b)]
    if min(digits) >= 0 and "e" not in shown + printed:
        return a == b
    return abs(a - b) <= max(Decimal(tolerance) * abs(a), Decimal(10) ** min(digits))


# ------------------------------------------------------------------ run a page

_INTERPRETER = """
import contextlib, io, json, sys, traceback
names = {"__name__": "__main__"}
for line in sys.stdin:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            exec(compile(json.loads(line), "block", "exec"), names)
            done = True
        except BaseException:
            traceback.print_exc()
            done = False
    print(json.dumps([done, printed.getvalue()]), flush=True)
"""


def environment(python: Path | None = None) -> dict[str, str]:
    """Return the environment of a reader, by default of one who has installed this checkout.

    `python` is that of another environment. The width is that of a usual terminal, and standard
    output and standard error come in the order in which a terminal shows them.
    """
    values = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if python is None:
        python, values["PYTHONPATH"] = Path(sys.executable), str(ROOT)
    return values | {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
        "COLUMNS": "100",
    }


def run(
    page: Path,
    folder: Path,
    *,
    by_hand: bool = False,
    left: Callable[[Path], Path] | None = None,
    python: Path | None = None,
) -> list[str]:
    """Run a page in an empty folder; return what fails or differs from what the page shows.

    With `by_hand`, all its blocks run; `left` then returns the folder that another page has left.
    `python` is that of another environment.
    """
    values, problems = environment(python), []
    with _shell(folder, values) as shell, _interpreter(folder, values) as interpreter:
        for block in runnable(page, by_hand=by_hand):
            name = f"{page.relative_to(ROOT)}:{block.line}"
            if block.as_in and left:
                shutil.copytree(left(block.as_in), folder, symlinks=True, dirs_exist_ok=True)
                continue
            done, printed = (shell if block.language == "bash" else interpreter)(block.text)
            if not done:
                return [*problems, f"{name} failed:\n{block.text}\n{printed}"]
            printed = printed.replace(f"{folder}/", "/home/you/").replace(str(folder), "/home/you")
            shown = block.output
            if shown and not matches(shown.text, printed, shown.comments):
                problems.append(f"{name}: shown\n{shown.text}\nprinted\n{printed}")
    return problems


@contextlib.contextmanager
def _shell(folder: Path, values: dict[str, str]) -> Generator[Any]:
    """Run blocks of bash; what they leave in the background ends with the page."""
    groups = []

    def run(text: str) -> tuple[bool, str]:
        with (folder.parent / f"{folder.name}.out").open("w+") as file:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", text],
                cwd=folder,
                env=values,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            groups.append(process.pid)
            code = process.wait()
            file.seek(0)
            return code == 0, file.read()

    try:
        yield run
    finally:
        for group in groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


@contextlib.contextmanager
def _interpreter(folder: Path, values: dict[str, str]) -> Generator[Any]:
    """Run blocks of Python in one interpreter, which starts with the first."""
    process: list[subprocess.Popen[str]] = []

    def run(text: str) -> tuple[bool, str]:
        if not process:
            process.append(
                subprocess.Popen(
                    ["python", "-c", _INTERPRETER],
                    cwd=folder,
                    env=values,
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            )
        stdin, stdout = process[0].stdin, process[0].stdout
        assert stdin
        assert stdout
        stdin.write(json.dumps(text) + "\n")
        stdin.flush()
        done, printed = json.loads(stdout.readline())
        return done, printed

    try:
        yield run
    finally:
        for started in process:
            started.kill()
            started.communicate()
