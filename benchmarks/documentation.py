"""Run pages of the documentation as a reader would and compare the outputs that they show.

    python benchmarks/documentation.py [--quick] [PAGE ...]

Without PAGE, README.md and all tutorials and how-to pages run, in full: the digits are trained for
minutes on each page that begins so, and the ladder for 20 minutes. `--quick` cuts training as the
tests do. See tests/pages.py for what the kinds of blocks mean. Exits with 1 if a page differs.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests import pages
from tests.forks import Forks


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE")
    parser.add_argument("--quick", action="store_true", help="Cut training to a few steps.")
    arguments = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as scratch, Forks(Path(scratch)) as forks:
        environment = {"SOCKET": forks.path, "CACHE": scratch}
        for number, page in enumerate(arguments.pages or pages.PAGES):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            began = time.monotonic()
            try:
                problems = pages.run(page.resolve(), folder, quick=arguments.quick, **environment)
            except AssertionError as error:
                problems = [str(error)]
            print(*problems, sep="\n")
            print(f"{page}: {len(problems)} problems, {time.monotonic() - began:.0f} s", flush=True)
            failed += bool(problems)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
