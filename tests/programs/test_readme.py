"""Every bash and Python block of the README and of `docs/` runs, in order, in one directory.

Installing is left out, training is cut to a few steps, ladders are planned only (their table is in
the repository), pytest is not run inside itself, and the page and the server have tests of their
own: the shims below say so. What has run once is not run again. Everything else runs as it stands.
Blocks of `sh` are for pods and large data sets: their flags are read, and nothing runs but those of
the guide to ImageNet's number, on small stand-ins.
"""

import dataclasses
import functools
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.cli import arguments, commands
from clip_jax.evals import catalog, linear_probe
from tests.conftest import FLAGS, ROOT, rows
from tests.data.conftest import make_pairs, table, write_tar
from tests.forks import Forks
from tests.prepare.conftest import jpeg, scene

SHIMS = r"""
set -euo pipefail
pip() { :; }
pytest() { :; }
clip-jax() {
  case "$1 ${2-}" in
    "train configs/digits.py") "$PYTHON" -IS "$FORKS" "$SOCKET" "$@" $TINY ;;
    "train configs/pairs.py") "$PYTHON" -IS "$FORKS" "$SOCKET" "$@" $TINY_PAIRS ;;
    "scale ladder") "$PYTHON" -IS "$FORKS" "$SOCKET" "${@:1:3}" --dry-run ;;
    "scale collect") cp notebooks/ladder_digits.csv "${@: -1}" ;;
    "scale report") "$PYTHON" -IS "$FORKS" "$SOCKET" "${@:1:2}" notebooks/*.csv "${@:4}" ;;
    "demo "* | "serve "*) ;;
    *) "$PYTHON" -IS "$FORKS" "$SOCKET" "$@" ;;
  esac
}
"""
PAIRS_FLAGS = (
    "--steps 3 --batch-size 4 --optim.warmup-steps 1 --model.vision.image-size 16 "
    "--model.vision.patch-size 8 --model.vision.width 16 --model.vision.num-heads 2 "
    "--model.vision.depth 1 --model.text.width 16 --model.text.num-heads 2 --model.text.depth 1"
)
SMALL = shlex.split(
    "--steps 4 --batch-size 8 --report-every 1 --optim.warmup-steps 1 --evals.0.every-steps 2 "
    "--model.embed-dim 16 --model.vision.layers 1 1 1 1 --model.vision.width 8 "
    "--model.vision.num-heads 4 --model.vision.image-size 32 --model.text.width 16 "
    "--model.text.depth 1 --model.text.num-heads 2 --data.threads 2"
)
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def blocks(language, pages=PAGES):
    """The blocks of a language in some pages, one after another."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.M | re.S)
    return [block for page in pages for block in pattern.findall(page.read_text())]


def in_sh(pages=PAGES):
    """The lines of `sh` blocks; one that goes on in the next is one."""
    return "".join(blocks("sh", pages)).replace("\\\n", " ").splitlines()


def typed():
    """What stands in `sh` blocks and is ours, as arguments of `clip-jax`."""
    for line in in_sh():
        words = shlex.split(line, comments=True)
        if "clip-jax" in words or any("launch/" in word for word in words):
            start = next(i for i, word in enumerate(words) if word in ("clip-jax", "up", "4"))
            yield words[start + 1 :]


@pytest.fixture
def directory(tmp_path):
    """A place with the repository's files and somebody's pairs."""
    for name in ("configs", "clip_jax", "tests", "notebooks"):
        (tmp_path / name).symlink_to(ROOT / name)
    table(tmp_path, make_pairs(8))
    for folder in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / "animals" / folder).mkdir(parents=True)
        for name, image, _ in make_pairs(8):
            (tmp_path / "animals" / folder / name).write_bytes(image)
    (tmp_path / "photos").mkdir()
    shutil.copy(tmp_path / "00001.png", tmp_path / "photos/0.png")
    return tmp_path


def test_every_block_of_the_readme_and_the_pages_runs(directory, tmp_path_factory):
    """The README's first, of whose runs the pages speak."""
    tiny = [*FLAGS, "--steps", "6", "--evals.0.every-steps", "6", "--model.vision.depth", "2"]
    environment = os.environ | {
        "PYTHON": sys.executable, "FORKS": str(ROOT / "tests/forks.py"), "TINY": " ".join(tiny),
        "TINY_PAIRS": PAIRS_FLAGS, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",  # compiles quickly, as in conftest.py
    }  # fmt: skip

    def run(*arguments: str) -> str:
        done = subprocess.run(
            arguments, cwd=directory, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{arguments[-1]}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    ran, outputs = set(), []
    with Forks(tmp_path_factory.mktemp("forks"), **environment) as forks:
        environment["SOCKET"] = forks.path
        for block in blocks("bash"):
            fresh = [line for line in block.splitlines() if line not in ran]
            ran.update(fresh)
            outputs.append(run("bash", "-c", SHIMS + "\n".join(fresh)))
    printed = "\n".join(outputs)
    assert "zero_shot/unseen/top1" in printed
    assert "alpha         -0.1114" in printed
    assert "held out: 9 runs predicted from the 27 others" in printed
    first, *others = dict.fromkeys(blocks("python"))
    assert blocks("python").count(first) == 2  # of the README, and in the library's page
    similarities, *rest = (run(sys.executable, "-c", block) for block in (first, *others))
    assert re.fullmatch(r"\[\[\S+\s+\S+\]\]\n", similarities)  # one image, two texts
    assert "(1, 17, 16) (1, 16, 16, 3)\n" in rest


@pytest.mark.parametrize("command", [*typed()], ids=" ".join)
def test_the_flags_of_what_needs_a_pod_are_read(command, monkeypatch):
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


def test_the_readme_is_short_and_its_two_commands_are_there_word_for_word():
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 150
    first, second = blocks("bash", [readme])[:2]
    assert first == "pip install -e . && clip-jax train configs/digits.py\n"
    assert second == "pip install -e '.[test]' && pytest -n 2\n"


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
    lines = in_sh([ROOT / "docs/tutorials/imagenet.md"])
    assert len(lines) == 7
    for line in lines:
        tool, *words = shlex.split(line.replace("01242", "00001").replace("1/4", "1/1"))
        assert tool in ("img2dataset", "clip-jax")
        if tool == "clip-jax":
            assert commands.main(words + SMALL * (words[0] == "train")) == 0, (
                capsys.readouterr().err
            )
    names = {"imagenet1k/acc1", "imagenet1k/mean_per_class_recall"}
    for file in ("runs/cc12m/result.json", "report/result.json"):
        assert names <= json.loads((tmp_path / file).read_text()).keys()
    assert [row["step"] for row in rows(tmp_path / "runs/cc12m", "evals/watch.jsonl")][-1] == 4
    assert list((tmp_path / "prepared").glob("*.array_record"))
