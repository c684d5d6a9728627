"""The README and the pages of `docs/` run as they stand (see tests/pages.py), in plain words."""

import dataclasses
import functools
import itertools
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from clip_jax.cli import arguments, commands
from clip_jax.evals import catalog, linear_probe
from tests import pages
from tests.conftest import ROOT, made_once, rows
from tests.data.conftest import write_tar
from tests.forks import Forks
from tests.prepare.conftest import jpeg, scene

SMALL = shlex.split(
    "--steps 4 --batch-size 8 --report-every 1 --optim.warmup-steps 1 --evals.0.every-steps 2 "
    "--model.embed-dim 16 --model.vision.layers 1 1 1 1 --model.vision.width 8 "
    "--model.vision.num-heads 4 --model.vision.image-size 32 --model.text.width 16 "
    "--model.text.depth 1 --model.text.num-heads 2 --data.threads 2"
)
ALL = (
    *pages.PAGES,
    ROOT / "docs/index.md",
    ROOT / "docs/reference/glossary.md",
    *sorted((ROOT / "docs/explanation").glob("*.md")),
)


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forks")
    cache = made_once(tmp_path_factory, "pages")
    with Forks(folder, JAX_DEFAULT_PRNG_IMPL="rbg", PYTHONUNBUFFERED="1") as server:
        yield {"SOCKET": server.path, "CACHE": str(cache)}


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs_from_an_empty_folder_and_prints_what_it_shows(page, forks, tmp_path):
    assert not pages.run(page, tmp_path, quick=True, **forks)


def typed():
    """What stands in `sh` blocks and is ours, as arguments of `clip-jax`."""
    for page in ALL:
        for block in pages.blocks(page):
            if block.language != "sh":
                continue
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line.split(" > ")[0], comments=True)
                if any(word == "clip-jax" or "launch/" in word for word in words):
                    first = (i for i, word in enumerate(words) if word in commands.COMMANDS)
                    if (start := next(first, None)) is not None:
                        yield words[start:]


@pytest.mark.parametrize("command", [*typed()], ids=" ".join)
def test_the_flags_of_what_does_not_run_are_read(command, monkeypatch):
    def read(*args):
        parse(*args)
        raise EOFError  # so far and no further

    parse = arguments.parse
    monkeypatch.chdir(ROOT)
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
    # A page's blocks share one shell, and its readers have no variables to quote.
    done = subprocess.run(
        ["shellcheck", "--shell", "bash", "--exclude", "SC2034,SC2154,SC2086", *scripts],
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
        ("a 1.5\nb", "a 2\nb\n", True),
        ("a b", "b  a", True),
        ("a\n...\nc", "a\nx\ny\nc", True),
        ("a\n...\nc", "a\nc", True),
        ("in ...: done 1%", "in /x/y: done 93.5%", True),
        ("a", "a\nb", False),
        ("a\n...", "b\na", False),
        ("...\nc", "a\nc\nd", False),
        ("loss 1", "error 1", False),
    ],
)
def test_outputs_are_compared_in_form(shown, printed, same):
    assert pages.matches(shown, printed) == same


def test_sentences_are_short():
    script = ROOT / "benchmarks/reading_level.py"
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(re.findall(r"words .*docs/how-to/", done.stdout)) >= 12


def lines_of_sh(page: Path) -> list[str]:
    """The commands of a page's `sh` blocks."""
    text = "".join(block.text for block in pages.blocks(page) if block.language == "sh")
    return text.replace("\\\n", " ").splitlines()


# The left column of the project's list of words: notes of its authors, for which the field has
# words of its own. `peers` is the name of an extra.
PRIVATE = (
    "table of words", "never-seen", "what is kept back", "what ships inside", "own cosine", "trunk",
    "one by one ≤", "hard ≤", "compiler ≈", "slices ms", "features of unit length", "lies whole",
    "encoding in chunks", "tides", "dealt",
)  # fmt: skip
_EXTRA = re.compile(r"`peers`|\[[\w,]*\bpeers\b[\w,]*\]|test,peers|peers,")


@pytest.mark.parametrize("page", [*ALL, ROOT / "BENCHMARKS.md", ROOT / "CONTRIBUTING.md"])
def test_pages_use_the_words_of_the_field(page):
    text = page.read_text()
    assert not [word for word in PRIVATE if word in text.lower()]
    assert not re.search(r"\bpeers\b", _EXTRA.sub("", text))


def test_every_command_of_the_guide_to_imagenet_runs(tmp_path, monkeypatch, capsys):
    """On what img2dataset leaves of two shards, and four of ImageNet's classes."""
    pictures = (jpeg(scene(number)) for number in itertools.count())
    (tmp_path / "pairs").mkdir()
    for shard in range(2):
        members, keys = [], [f"{shard:05d}{number:04d}" for number in range(16)]
        for key in keys:
            members += [(f"{key}.jpg", next(pictures)), (f"{key}.txt", b"picture %d" % int(key))]
        write_tar(tmp_path / f"pairs/{shard:05d}.tar", members)
        scores = pa.table({"key": keys, "similarity": [0.2 + 0.01 * i for i in range(16)]})
        pq.write_table(scores, tmp_path / f"pairs/{shard:05d}.parquet")
    for split in ("train", "val", "test"):
        for label in ("n01440764", "n01443537", "n01484850", "n01491361"):
            (tmp_path / "data/imagenet1k" / split / label).mkdir(parents=True)
            for name in ("0.jpg", "1.jpg"):
                file = tmp_path / "data/imagenet1k" / split / label / name
                file.write_bytes(next(pictures))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    row = dataclasses.replace(catalog.ROWS["imagenet1k"], classes=4)
    monkeypatch.setattr(catalog, "ROWS", {"imagenet1k": row})
    few = functools.partial(linear_probe.search, lambdas=[0.01, 1.0, 100.0])
    monkeypatch.setattr(linear_probe, "search", few)
    lines = lines_of_sh(ROOT / "docs/tutorials/imagenet.md")
    assert len(lines) == 8
    for line in lines:
        tool, *words = shlex.split(line.replace("01242", "00001").replace("1/4", "1/1"))
        assert tool in ("img2dataset", "hf", "clip-jax")
        if tool == "clip-jax":
            assert commands.main(words + SMALL * (words[0] == "train")) == 0, (
                capsys.readouterr().err
            )
    names = {"imagenet1k/acc1", "imagenet1k/mean_per_class_recall"}
    for file in ("runs/cc12m/result.json", "report/result.json"):
        assert names <= json.loads((tmp_path / file).read_text()).keys()
    assert [row["step"] for row in rows(tmp_path / "runs/cc12m", "evals/watch.jsonl")][-1] == 4
    assert list((tmp_path / "prepared").glob("*.array_record"))
