"""Run a page of the documentation block by block, in an empty folder, as a reader would.

Blocks of `bash` run in order, and those of `python` in one interpreter. A block of `text` directly
after one of them shows its output, which must match in form: numbers are free, words of a line may
come in any order, and "..." stands for any lines, or in a line for any words. Blocks of `sh` need a
cloud, a cluster, a hub or large data, and do not run.

`quick` cuts training: a bundled config without `--steps`, and cc12m, takes a few steps, the model
of class folders is tiny, the digits' runs are evaluated on one image of each number, the digits'
ladder is a dry run whose table is the stored one, fits of laws take 100 draws, and `pip`, `pytest`
and the web demo do nothing.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "docs/install.md",
    *sorted((ROOT / "docs/tutorials").glob("*.md")),
    *sorted((ROOT / "docs/how-to").glob("*.md")),
)
_SHIMS = r"""
set -euo pipefail
pip() { :; }
pytest() { :; }
python() { "$PYTHON" "$@"; }
clip-jax() {
  local short=""
  if [ "$1" = train ] && [[ " $* " != *" --steps "* ]]; then short=1; fi
  if [ -z "$QUICK" ]; then "$PYTHON" -m clip_jax "$@"; return; fi
  case "$short $1 ${2-} ${3-}:$#" in
    "1 train digits :2" | "1 train digits_coca :2" | "1 train class_folders :2") cached "$@" ;;
    *" train cc12m "*) run "$@" $SHORT --evals.0.every-steps 3 ;;
    *" serve "*) "$PYTHON" -m clip_jax "$@" ;;
    *" demo "*) ;;
    "1 train "*) run "$@" $SHORT $(tiny "$2") ;;
    *" train digits"*)
      if [[ "$*" == *per-number* ]]; then run "$@"; else run "$@" --evals.0.per-number 1; fi ;;
    *" scale ladder "*ladder_digits*) run "${@:1:3}" --dry-run ;;
    *" scale fit "*) run "$@" --draws 100 ;;
    *" scale collect "*) if [ -e "$3" ]; then run "$@"; else cp "$TABLE" "${@: -1}"; fi ;;
    *" scale report "*) if [ -e "$3" ]; then run "$@"; else run "${@:1:2}" "$TABLE" "${@:4}"; fi ;;
    *) run "$@" ;;
  esac
}
run() { "$PYTHON" -IS "$FORKS" "$SOCKET" "$@"; }
tiny() { case "$1" in *digits*) echo "$TINY_DIGITS" ;; *pairs*) echo "$TINY_PAIRS" ;;
  class_folders) echo "$TINY_FOLDERS" ;; esac; }
cached() {  # a run that several pages begin with
  (
    flock 9
    if [ ! -e "$CACHE/$2" ]; then
      run "$@" $SHORT $(tiny "$2") --workdir "$CACHE/$2" >"$CACHE/$2.out" 2>&1
    fi
  ) 9>"$CACHE/$2.lock"
  mkdir -p runs && cp -r "$CACHE/$2" "runs/$2" && sed "s:$CACHE:$PWD/runs:g" "$CACHE/$2.out"
}
"""
_SHORT = (
    "--steps 6 --optim.warmup-steps 1 --report-every 3 --checkpoint.every-steps 3 --batch-size 16"
)
_TINY = {
    "digits": "--evals.0.every-steps 6 --evals.0.per-number 1",
    "pairs": "--model.vision.image-size 32 --model.vision.patch-size 8 --model.vision.width 32 "
    "--model.vision.num-heads 2 --model.vision.depth 1 --model.text.width 32 "
    "--model.text.num-heads 2 --model.text.depth 1",
    "folders": "--model.vision.width 32 --model.vision.num-heads 2 --model.vision.depth 2 "
    "--model.text.width 32 --model.text.num-heads 2 --model.text.depth 1",
}
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


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int  # number of its first line in the page


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, in order."""
    text = page.read_text()
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.M | re.S):
        yield Block(match[1], match[2], text[: match.start(2)].count("\n") + 1)


def shown_outputs(page: Path) -> Iterator[tuple[Block, str | None]]:
    """Each block that runs, with the output that the page shows for it, if any."""
    several = [*blocks(page), Block("", "", 0)]
    for block, after in itertools.pairwise(several):
        if block.language in ("bash", "python"):
            last = block.line + block.text.count("\n") + 1  # of its closing fence
            is_near = (
                after.language == "text"
                and "".join(page.read_text().splitlines()[last : after.line - 2]).strip() == ""
            )  # nothing but empty lines between them
            yield block, after.text if is_near else None


def matches(shown: str, printed: str) -> bool:
    """Say whether an output has the form that a page shows."""
    wanted = [_form(line) for line in shown.splitlines() if line.strip()]
    lines = [_form(line) for line in printed.splitlines() if line.strip()]
    reachable = {0}  # numbers of lines that the pattern so far may have consumed
    for pattern in wanted:
        if pattern == "...":
            reachable = {*range(min(reachable, default=len(lines) + 1), len(lines) + 1)}
        else:
            reachable = {i + 1 for i in reachable if i < len(lines) and _fits(pattern, lines[i])}
    return len(lines) in reachable


def _form(line: str) -> str:
    line = re.sub(r"\x1b\[[0-9;]*m", "", line).strip()
    return re.sub(r"[-+−]?\d[\d.,]*(?:e[-+]?\d+)?", "#", line)


def _fits(pattern: str, line: str) -> bool:
    if "..." in pattern:
        parts = (re.escape(" ".join(part.split())) for part in pattern.split("..."))
        return bool(re.fullmatch(".*".join(parts), " ".join(line.split())))
    return sorted(pattern.split()) == sorted(line.split())


def run(page: Path, folder: Path, *, quick: bool, **environment: str) -> list[str]:
    """Run a page in an empty folder; return what differs from what it shows.

    Raises AssertionError for a block that fails. `environment` needs, if `quick`, SOCKET of
    `tests.forks.Forks` and CACHE, a folder for runs that several pages begin with.
    """
    values = os.environ | {
        "PYTHON": sys.executable,
        "FORKS": str(ROOT / "tests/forks.py"),
        "TABLE": str(ROOT / "notebooks/ladder_digits.csv"),
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "QUICK": "1" if quick else "",
        "SHORT": _SHORT,
        "TINY_DIGITS": _TINY["digits"],
        "TINY_PAIRS": _TINY["pairs"],
        "TINY_FOLDERS": _TINY["folders"],
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "100",
        **environment,
    }
    if page.name == "README.md":  # whose reader is in a checkout
        (folder / "configs").symlink_to(ROOT / "configs")
    differs = []
    with _shell(folder, values) as shell, _interpreter(folder, values) as interpreter:
        for block, shown in shown_outputs(page):
            name = f"{page.relative_to(ROOT)}:{block.line}"
            done, printed = (shell if block.language == "bash" else interpreter)(block.text)
            assert done, f"{name}\n{block.text}\n{printed}"
            if shown is not None:
                printed = printed.replace(f"{folder}/", "/home/you/").replace(
                    str(folder), "/home/you"
                )
                if not matches(shown, printed):
                    differs.append(f"{name}: shown\n{shown}\nprinted\n{printed}")
    return differs


@contextlib.contextmanager
def _shell(folder: Path, values: dict[str, str]) -> Generator[Any]:
    """Run blocks of bash; what they leave in the background ends with the page."""
    groups = []

    def run(text: str) -> tuple[bool, str]:
        with (folder.parent / f"{folder.name}.out").open("w+") as file:
            process = subprocess.Popen(
                ["bash", "-c", _SHIMS + text],
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
                    [sys.executable, "-c", _INTERPRETER],
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
        for one in process:
            one.kill()
            one.communicate()
