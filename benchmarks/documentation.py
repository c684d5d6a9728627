"""Run the pages of the documentation in full, as a reader would, and compare the outputs they show.

    python benchmarks/documentation.py [--folder FOLDER] [PAGE ...]
    python benchmarks/documentation.py --count

Without PAGE, README.md, the page about installation, all tutorials and all how-to pages run: two
hours on two cores. Prints a table, and exits with 1 if a page fails or shows another output. FOLDER
gets a folder and a result for each page. The same command continues after an interruption: a page
whose text has not changed since it ran without a problem does not run again.

The README runs in a copy of the tracked files, and installs into a fresh environment. Pages that go
on from another page (see tests/pages.py) begin with what that one has left in FOLDER.

`--count` prints instead how many commands run in CI, and how many here.
"""

import argparse
import contextlib
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests import pages

README = pages.ROOT / "README.md"


class Runs:
    """The pages that have run, with their results, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._done: dict[Path, dict[str, Any]] = {}  # in this process

    def folder(self, page: Path) -> Path:
        return self._folder / page.relative_to(pages.ROOT).with_suffix("").as_posix()

    def run(self, page: Path) -> dict[str, Any]:
        """Run a page, and before it the pages from which it goes on; return its result."""
        if page not in self._done:
            self._done[page] = self._earlier(page) or self._run(page)
        return self._done[page]

    def _earlier(self, page: Path) -> dict[str, Any] | None:
        """Return the result of a page's present text, if it has one without problems."""
        with contextlib.suppress(FileNotFoundError):
            result = json.loads(self._file(page).read_text())
            if result["text"] == _hash(page) and not result["problems"]:
                return result
        return None

    def _run(self, page: Path) -> dict[str, Any]:
        for before in filter(None, (x.as_in for x in pages.runnable(page, by_hand=True))):
            self.run(before)
        folder, began, cpu = self.folder(page), time.monotonic(), _cpu()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        python = None
        if page == README:
            _check_out(folder)
            environment = folder.with_name("README-environment")
            venv.create(environment, clear=True, with_pip=True)
            python = environment / "bin/python"
        problems = pages.run(page, folder, by_hand=True, left=self.folder, python=python)
        result = {
            "text": _hash(page),
            "problems": problems,
            "seconds": time.monotonic() - began,
            "cpu": _cpu() - cpu,
        }
        self._file(page).write_text(json.dumps(result, indent=1))
        return result

    def _file(self, page: Path) -> Path:
        folder = self.folder(page)
        return folder.with_name(f"{folder.name}.json")


def _hash(page: Path) -> str:
    return hashlib.sha256(page.read_bytes()).hexdigest()


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _check_out(folder: Path) -> None:
    """Copy the tracked files, as they are."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=pages.ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(pages.ROOT / name, folder / name, follow_symlinks=False)


def count() -> None:
    """Print how many commands and blocks of Python run, by page."""
    print("| page | in CI | by hand |\n|---|---|---|")
    several = [(page, *_counts(page)) for page in pages.PAGES]
    for name, in_ci, total in [
        *((page.relative_to(pages.ROOT), *counts) for page, *counts in several),
        ("all", *(sum(column) for column in zip(*(x[1:] for x in several), strict=True))),
    ]:
        print(f"| {name} | {in_ci} | {total - in_ci} |")


def _counts(page: Path) -> tuple[int, int]:
    return pages.programs(page, by_hand=False), pages.programs(page, by_hand=True)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "clip_jax_documentation"
    )
    parser.add_argument("--count", action="store_true", help="Print the numbers of commands.")
    arguments = parser.parse_args(words)
    if arguments.count:
        count()
        return 0
    runs, results = Runs(arguments.folder.resolve()), {}
    for page in [page.resolve() for page in arguments.pages] or pages.PAGES:
        if pages.runnable(page, by_hand=True):
            result = results[page] = runs.run(page)
            for problem in result["problems"]:
                print(problem)
            name, seconds = page.relative_to(pages.ROOT), round(result["seconds"])
            print(f"{name}: {len(result['problems'])} problems, {seconds} s", flush=True)
    print("\n| page | commands | problems | seconds | CPU seconds |\n|---|---|---|---|---|")
    for page, result in results.items():
        commands, problems = pages.programs(page, by_hand=True), len(result["problems"])
        seconds, cpu = round(result["seconds"]), round(result["cpu"])
        print(f"| {page.relative_to(pages.ROOT)} | {commands} | {problems} | {seconds} | {cpu} |")
    return int(any(result["problems"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
