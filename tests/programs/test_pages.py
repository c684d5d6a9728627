"""The README and the pages of `docs/` run as they stand (see tests/pages.py), in plain words."""

import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest import mock

import pytest
import yaml

from clip_jax.cli import arguments, commands
from tests import pages, words
from tests.conftest import ROOT

ALL = (
    *pages.PAGES,
    ROOT / "docs/index.md",
    ROOT / "docs/reference/glossary.md",
    *sorted((ROOT / "docs/explanation").glob("*.md")),
)


IN_CI = [page for page in pages.PAGES if pages.runnable(page, by_hand=False)]


@pytest.mark.parametrize("page", IN_CI, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs_from_an_empty_folder_and_prints_what_it_shows(page, tmp_path):
    assert not pages.run(page, tmp_path)


def is_run(page: Path, block: pages.Block) -> bool:
    """Whether CI runs a block."""
    return block.language == "bash" and not (pages.is_by_hand(page) or block.is_by_hand)


def typed():
    """The arguments of each `clip-jax` that CI does not run; of one, if several pages have it."""
    several = {}
    for page in ALL:
        for block in pages.blocks(page):
            if block.language in ("sh", "bash") and not is_run(page, block):
                for words in block.commands():
                    if any(word == "clip-jax" or "launch/" in word for word in words):
                        first = (i for i, word in enumerate(words) if word in commands.COMMANDS)
                        start = next(first, None)
                        if start is not None and "--import" not in words:
                            several[" ".join(words[start:])] = words[start:]
    return several.values()


def test_a_page_that_goes_on_from_another_has_the_same_commands():
    seen = 0
    for page in pages.PAGES:
        for block in pages.blocks(page):
            if block.as_in:
                same = [x.commands() for x in pages.blocks(block.as_in) if x.language == "bash"]
                for command in block.commands():
                    assert any(command in several for several in same), (page, command)
                    seen += 1
    assert seen >= 20


_FILES = re.compile(r"^cat > (\S+) <<'(\w+)'\n(.*?)^\2$", re.M | re.S)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with the checkout's configs, and the files that readers of pages write."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "configs").symlink_to(ROOT / "configs")
    for page in pages.PAGES:
        for name, _, text in _FILES.findall(page.read_text()):
            (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("command", [*typed()], ids=" ".join)
def test_the_flags_of_what_does_not_run_are_read(command, checkout, monkeypatch):
    def read(*args):
        parse(*args)
        raise EOFError  # so far and no further

    parse = arguments.parse
    monkeypatch.chdir(checkout)
    with (
        mock.patch.object(arguments, "parse", autospec=True, side_effect=read),
        pytest.raises(EOFError),
    ):
        commands._run(command)


def test_scripts_and_data_in_pages_are_well_formed(tmp_path):
    scripts = []
    for page, number in zip(ALL, itertools.count()):
        for block in pages.blocks(page):
            if block.language in ("sh", "bash"):
                script = tmp_path / f"{number}-{page.stem}-{block.line}.sh"
                script.write_text(block.text)
                scripts.append(str(script))
            elif block.language == "yaml":
                list(yaml.safe_load_all(block.text))
            elif block.language == "json":
                json.loads(block.text)
            elif block.language == "toml":
                tomllib.loads(block.text)
            else:
                assert block.language in ("text", "python", "console", "bibtex", "js"), (
                    page,
                    block.line,
                )
    # A page's blocks share one shell. Its readers have no variables to quote, and see what fails.
    excluded = "SC1091,SC2034,SC2154,SC2086,SC2164"
    done = subprocess.run(
        ["shellcheck", "--shell", "bash", "--exclude", excluded, *scripts],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_the_readme_is_short_and_its_two_commands_are_there_word_for_word():
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 130
    bash = [block.text for block in pages.blocks(readme) if block.language == "bash"]
    assert "pip install -e . && clip-jax train configs/digits.py\n" in bash
    assert "pip install -e '.[test]' && pytest -n 2\n" in bash


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a 1.5\nb", "a  1.505\nb\n", True),
        ("a 1.5", "a 1.6", True),  # by one in its last digit
        ("a 1.50", "a 1.52", False),
        ("a 150", "a 151", False),
        ("a 1,500", "a 1500", True),
        ("-1.5e-07", "1.5e-07", False),
        ("top1 1", "top1 0.996", True),
        ("ViT-B-32 of 0.1.0", "ViT-B-16 of 0.1.0", False),
        ("00000.tar", "00001.tar", False),
        ("a b", "b a", False),
        ("a\n...\nc", "a\nx\ny\nc", True),
        ("a\n...\nc", "a\nc", True),
        ("in ...: done 1.00%, ...", "in /x/y: done 1.001%, as told", True),
        ("in ...: done 1%", "in /x/y: done 2%", False),
        ("a ...", "a", True),
        ("a", "a\nb", False),
        ("a\n...", "b\na", False),
        ("...\nc", "a\nc\nd", False),
        ("loss 1", "error 1", False),
    ],
)
def test_texts_are_compared_word_by_word_and_numbers_as_numbers(shown, printed, same):
    assert pages.matches(shown, printed) == same


@pytest.mark.parametrize(
    ("comments", "printed", "same"),
    [
        ((), "step 5/20  loss 4.86  315 images/s in 3.0 s", True),
        ((), "step 5/20  loss 4.99  315 images/s in 3.0 s", False),
        (("numbers within 5%",), "step 5/20  loss 4.99  315 images/s in 3.0 s", True),
        (("numbers within 5%",), "step 6/20  loss 4.86  315 images/s in 3.0 s", False),
        (("numbers vary: images/s s",), "step 5/20  loss 4.86  99 images/s in 12 s", True),
        (("numbers vary: images/s s",), "step 5/20  loss 4.99  315 images/s in 3.0 s", False),
        (("numbers vary: images/s",), "step 5/20  loss 4.86  fast images/s in 3.0 s", True),
        (("numbers vary",), "step 6/30  loss 1.1  5 images/s in 3 s", True),
        (("numbers vary",), "step 5/20  lost 4.86  315 images/s in 3.0 s", False),
    ],
)
def test_a_comment_says_how_numbers_are_compared(comments, printed, same):
    shown = "step 5/20  loss 4.86  315 images/s in 3.0 s"
    assert pages.matches(shown, printed, comments) == same


def test_comments_choose_what_runs(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```bash\na b && c\n```\n\nText.\n\n<!-- numbers vary -->\n```text\n1\n```\n"
        "\n<!-- by hand, as in how-to/train.md -->\n\n```bash\nd <<'END'\ne\nEND\n```\n"
        "<!-- by hand -->\ntext\n```python\nf\n```\n\n```sh\ng\n```\n"
    )
    first, second, third = pages.runnable(page, by_hand=True)
    assert first.commands() == [["a", "b"], ["c"]]
    assert first.output
    assert first.output.comments == ("numbers vary",)
    assert second.commands() == [["d"]]
    assert second.as_in == ROOT / "docs/how-to/train.md"
    assert (second.output, third.output) == (None, None)
    assert [x.text for x in pages.runnable(page, by_hand=False)] == ["a b && c\n", "f\n"]
    page.write_text(page.read_text().replace("# A\n", "# A\n\n<!-- page by hand -->\n"))
    assert pages.runnable(page, by_hand=False) == []
    assert len(pages.runnable(page, by_hand=True)) == 3


def test_a_page_runs_block_by_block_and_what_differs_is_returned(tmp_path):
    (left := tmp_path / "left").mkdir()
    (left / "made.txt").write_text("1.00\n")
    (folder := tmp_path / "folder").mkdir()
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- by hand, as in how-to/train.md -->\n```bash\nexit 1\n```\n\n"
        "```bash\ncat made.txt; pwd\n```\n\n```text\n1.001\n/home/you\n```\n\n"
        "```python\nx = 3\n```\n\n```bash\necho on | cat\n```\n\nIt prints:\n\n```text\nof\n```\n\n"
        "```python\nprint(x)\n```\n\n```text\n3\n```\n\n```bash\nsleep 1000 &\n```\n\n"
        "```bash\nfalse | cat\n```\n\n```bash\necho more\n```\n"
    )
    with mock.patch.object(pages, "ROOT", tmp_path):
        differs, failed = pages.run(page, folder, by_hand=True, left=lambda page: left)
    assert differs == "page.md:20: shown\nof\n\nprinted\non\n"
    assert "failed:\nfalse | cat" in failed


def test_sentences_are_short():
    script = ROOT / "benchmarks/reading_level.py"
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(re.findall(r"words .*docs/how-to/", done.stdout)) >= 12


@pytest.mark.parametrize("page", [*ALL, ROOT / "BENCHMARKS.md", ROOT / "CONTRIBUTING.md"])
def test_pages_use_the_words_of_the_field(page):
    assert not list(words.misused(page))
