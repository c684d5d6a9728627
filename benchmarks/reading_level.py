"""Print the number of sentences and their mean length in words for each page of documentation.

    python benchmarks/reading_level.py [PAGE ...]

By default, the pages are README.md, BENCHMARKS.md and all pages below docs/. Code blocks, tables,
headings and link targets are left out; a list item without a full stop is one sentence. The exit
code is 1 if a sentence of README.md, of a page of docs/how-to/, or of a page that is named on the
command line has more than 18 words on average.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT, LIMIT = Path(__file__).parents[1], 18  # words
IGNORED = r"^(```|~~~).*?^\1\s*$|^---\n.*?^---\n|^ *(\||#|!!!|:::).*?$|<!--.*?-->|<[/a-z][^>\n]*>"
BREAK = r"\n\s*(?:\n|[-*+] |\d+\. |> )"  # before a paragraph or a list item
END = r"(?<!e\.g)(?<!i\.e)(?<!et al)(?<!etc)[.!?][)*_\"”]*\s+(?=[(*_\"“`]*[A-Z0-9`])"


def sentences(text: str) -> list[list[str]]:
    """Return the words of each sentence of a Markdown page."""
    text = re.sub(IGNORED, "\n\n", "\n" + text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", text)  # pictures
    text = re.sub(r"\[([^]]*)\](\([^)]*\)|\[[^]]*\])", r"\1", text)
    parts = [part for block in re.split(BREAK, text) for part in re.split(END, block)]
    words = [re.findall(r"\S*\w\S*", part) for part in parts]
    return [sentence for sentence in words if sentence]


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("pages", nargs="*", type=Path, help="Markdown files to check instead")
    pages = parser.parse_args().pages
    limited = pages or [ROOT / "README.md", *sorted((ROOT / "docs/how-to").glob("*.md"))]
    every = pages or [
        ROOT / "README.md",
        ROOT / "BENCHMARKS.md",
        *sorted(ROOT.glob("docs/**/*.md")),
    ]
    too_long = 0
    for page in every:
        lengths = [len(words) for words in sentences(page.read_text(encoding="utf-8"))]
        mean = sum(lengths) / max(len(lengths), 1)
        is_over = page in limited and mean > LIMIT
        too_long += is_over
        print(f"{len(lengths):5} sentences {mean:6.1f} words  {page}{' (too long)' * is_over}")
    return int(too_long > 0)


if __name__ == "__main__":
    sys.exit(main())
