"""Run all code blocks of the documentation, as a reader would, and compare their outputs.

    python benchmarks/documentation.py [--folder FOLDER] [PAGE ...]
    python benchmarks/documentation.py --count

`tests/pages.py` describes the kinds of code blocks, and those that CI skips. Without PAGE, the
script runs README.md, the installation page, all tutorials and all how-to pages, which takes two
hours on two cores. It prints a table. The exit code is 1 if a command fails or an output differs
from the page.

FOLDER gets a folder and a result for each page. To resume after an interruption, run the same
command: a page that had no problem runs again only if its text has changed.

The README runs in a copy of the repository's tracked files, with a new virtual environment. A page
with a block "as in" another page uses the files that this one has written in FOLDER.

`--count` runs nothing. It prints how many commands run in CI, and how many run only here.
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
    """Runs pages in subfolders of a folder, and stores their results there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._done: dict[Path, dict[str, Any]] = {}  # results of this process

    def folder(self, page: Path) -> Path:
        return self._folder / page.relative_to(pages.ROOT).with_suffix("").as_posix()

    def run(self, page: Path) -> dict[str, Any]:
        """Return the result of a page, which runs unless it has one; "as in" pages run first."""
        if page not in self._done:
            self._done[page] = self._earlier(page) or self._run(page)
        return self._done[page]

    def _earlier(self, page: Path) -> dict[str, Any] | None:
        """Return an earlier result, if it had no problems and the page has not changed since."""
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
    """Copy the tracked files, with changes that are not committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=pages.ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(pages.ROOT / name, folder / name, follow_symlinks=False)


def count() -> None:
    """Print how many commands and Python blocks each page has."""
    print("| page | in CI | by hand |\n|---|---|---|")
    all_in_ci = all_by_hand = 0
    for page in pages.PAGES:
        in_ci = pages.programs(page, by_hand=False)
        by_hand = pages.programs(page, by_hand=True) - in_ci
        print(f"| {page.relative_to(pages.ROOT)} | {in_ci} | {by_hand} |")
        all_in_ci += in_ci
        all_by_hand += by_hand
    print(f"| all | {all_in_ci} | {all_by_hand} |")


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
