"""Run the code blocks of a documentation page in an empty folder, as a reader would.

The language of a block decides what happens to it:

    bash     Runs as a script of `bash -euo pipefail`, exactly as the page shows it.
    python   Runs in one interpreter per page, after the page's earlier Python blocks.
    text     Shows the output of the bash or Python block directly before it.
    sh       Does not run: it needs a cloud, a cluster, a hub or large data, or installs packages.

Some blocks take too long for CI. Comments in the page's source mark them; readers of the site do
not see these comments. `benchmarks/documentation.py` runs all blocks. Otherwise both run a page in
the same way, except that `tests/conftest.py` sets environment variables that make XLA compile
faster.

    <!-- page by hand -->             CI skips the page.
    <!-- by hand -->                  CI skips the next block.
    <!-- by hand, as in PAGE -->      The same; and where all blocks run, this one does not. It has
                                      the commands of PAGE (a path in docs/), so the files that PAGE
                                      has written are copied instead.

A page's output is compared with the printed one word by word. In it, "..." stands for any number of
lines, or for any text within a line, and /home/you for the page's folder. Integers must be equal.
Other numbers may differ by a relative TOLERANCE, or by one unit in the last digit, unless a comment
before the output says otherwise:

    <!-- numbers within 5% -->        Sets the relative tolerance.
    <!-- numbers vary: WORD ... -->   Ignores numbers next to one of these words, such as speeds.
    <!-- numbers vary -->             Ignores all numbers.
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
PROGRAMS = ("clip-jax", "python", "pip", "pytest")  # the programs that `programs` counts

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
    comments: tuple[str, ...] = ()  # those directly before the block
    output: "Block | None" = None  # the block that shows its output

    @property
    def is_run(self) -> bool:
        """Whether the block runs, in CI or by hand."""
        return self.language in ("bash", "python")

    @property
    def is_by_hand(self) -> bool:
        """Whether CI skips the block."""
        return any(comment.startswith("by hand") for comment in self.comments)

    @property
    def as_in(self) -> Path | None:
        """The page that has the same commands, if a comment names one."""
        names = [comment.partition(", as in ")[2] for comment in self.comments]
        return next((ROOT / "docs" / name for name in names if name), None)

    def commands(self) -> list[list[str]]:
        """Return the words of each command of a shell block, without redirections."""
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
    """Return the code blocks of a page, in order."""
    text, end, result = page.read_text(), 0, []
    for match in _FENCE.finditer(text):
        between = text[end : match.start()]
        directly_before = re.search(r"(?:<!-- [^>]* -->\s*)*$", between)
        comments = tuple(_COMMENT.findall(directly_before[0] if directly_before else ""))
        line = text[: match.start(2)].count("\n") + 1
        result.append(Block(match[1], match[2], line, comments))
        end = match.end()
    return result


def runnable(page: Path, *, by_hand: bool) -> list[Block]:
    """Return the blocks that run in CI, or by hand, each with the output that the page shows."""
    if is_by_hand(page) and not by_hand:
        return []
    all_blocks = blocks(page)
    pairs = zip(all_blocks, [*all_blocks[1:], None], strict=True)
    return [
        replace(block, output=following if following and following.language == "text" else None)
        for block, following in pairs
        if block.is_run and (by_hand or not block.is_by_hand)
    ]


def is_by_hand(page: Path) -> bool:
    """Return whether CI skips the whole page."""
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
    """Return whether a printed output agrees with the one that a page shows."""
    tolerance, all_vary, varying = TOLERANCE, False, set()
    for comment in comments:
        kind, _, words = comment.partition(": ")
        if match := re.fullmatch(r"numbers within ([\d.]+)%", comment):
            tolerance = float(match[1]) / 100
        elif kind == "numbers vary":
            all_vary = all_vary or not words
            varying |= set(words.split())
    lines = _lines(printed)
    # How many printed lines the shown lines up to here can stand for: several numbers, since "..."
    # stands for any number of lines.
    reachable = {0}
    for pieces in [_pieces(line, all_vary, varying) for line in _lines(shown)]:
        if pieces == [("any text", "")]:
            reachable = {*range(min(reachable, default=len(lines) + 1), len(lines) + 1)}
        else:
            fitting = (i for i in reachable if i < len(lines))
            reachable = {i + 1 for i in fitting if _fits(pieces, lines[i], tolerance)}
    return len(lines) in reachable


def _lines(text: str) -> list[str]:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return [" ".join(line.split()) for line in plain.splitlines() if line.strip()]


def _pieces(line: str, all_vary: bool, varying: Collection[str]) -> list[tuple[str, str]]:
    """Split a line that a page shows into pieces: (kind, text).

    The kinds are "text" and "number", which the printed line must have, and "any text" (also none),
    "any word" and "any number".
    """
    words = line.split(" ")
    names = [word.strip(".,:;()") for word in words]
    pieces: list[tuple[str, str]] = []
    for i, word in enumerate(words):
        neighbours = {*names[max(i - 1, 0) : i], *names[i + 1 : i + 2]}
        if re.search(r"\d", word) and "..." not in word and not neighbours.isdisjoint(varying):
            pieces.append(("any word", ""))
        else:
            pieces += _pieces_of_word(word, all_vary)
        pieces.append(("text", " "))
    # "a ... b" also stands for "a b": spaces around "..." need not be there.
    around = [("", ""), *pieces[:-1], ("", "")]
    return [
        piece
        for before, piece, after in zip(around, around[1:], around[2:], strict=False)
        if piece != ("text", " ") or ("any text", "") not in (before, after)
    ]


def _pieces_of_word(word: str, all_vary: bool) -> list[tuple[str, str]]:
    pieces, position = [], 0
    for match in re.finditer(rf"\.\.\.|{_NUMBER.pattern}", word):
        pieces.append(("text", word[position : match.start()]))
        if match[0] == "...":
            pieces.append(("any text", ""))
        else:
            pieces.append(("any number" if all_vary else "number", match[0]))
        position = match.end()
    pieces.append(("text", word[position:]))
    return [piece for piece in pieces if piece != ("text", "")]


def _fits(pieces: Sequence[tuple[str, str]], line: str, tolerance: float) -> bool:
    """Return whether a printed line agrees with the pieces of a shown one."""

    @functools.cache
    def fits(index: int, start: int) -> bool:
        if index == len(pieces):
            return start == len(line)
        kind, text = pieces[index]
        if kind == "any text":
            return any(fits(index + 1, end) for end in range(start, len(line) + 1))
        if kind == "text":
            return line.startswith(text, start) and fits(index + 1, start + len(text))
        match = (_WORD if kind == "any word" else _NUMBER).match(line, start)
        return (
            match is not None
            and (kind != "number" or is_close(text, match[0], tolerance))
            and fits(index + 1, match.end())
        )

    return fits(0, 0)


def is_close(shown: str, printed: str, tolerance: float = TOLERANCE) -> bool:
    """Return whether two numbers agree: integers exactly, others within a relative tolerance."""
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
    """Return the environment variables of a reader who has installed this checkout.

    `python` names the interpreter of another environment to use instead. Output has the width of
    a usual terminal. It is not buffered, so that standard output and standard error appear in the
    order in which a terminal shows them.
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
    """Run a page in an empty folder; return a description of each failure and difference.

    With `by_hand`, the blocks that CI skips run, too. `left` then returns the folder in which
    another page has run, for blocks marked "as in". `python`: see `environment`.
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
    """Yield a function that runs a block of bash. Background processes end with the page."""
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
    """Yield a function that runs a block of Python, with the names that earlier ones defined."""
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
