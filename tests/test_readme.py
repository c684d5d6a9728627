"""Every bash and Python block of the README runs, in order, in one directory.

Installing is left out, training is cut to a few steps, ladders are planned only (their table is in
the repository), pytest is not run inside itself, and `tests/browser` opens the page: the shims
below say so. Everything else runs as it stands.
"""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.runs import FLAGS, ROOT

SHIMS = r"""
set -euo pipefail
pip() { :; }
pytest() { :; }
clip-jax() {
  case "$1 ${2-}" in
    "train configs/digits.py") "$PYTHON" -m clip_jax "$@" $TINY ;;
    "train configs/pairs.py") "$PYTHON" -m clip_jax "$@" $TINY_PAIRS ;;
    "scale ladder") "$PYTHON" -m clip_jax "${@:1:3}" --dry-run ;;
    "scale collect") cp notebooks/ladder_digits.csv "${@: -1}" ;;
    "demo "*) ;;
    *) "$PYTHON" -m clip_jax "$@" ;;
  esac
}
"""
PAIRS_FLAGS = (
    "--steps 3 --batch-size 4 --optim.warmup-steps 1 --model.vision.image-size 16 "
    "--model.vision.patch-size 8 --model.vision.width 16 --model.vision.num-heads 2 "
    "--model.vision.depth 1 --model.text.width 16 --model.text.num-heads 2 --model.text.depth 1"
)


def blocks(language):
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A place with the repository's files and somebody's pairs."""
    path = tmp_path_factory.mktemp("readme")
    for name in ("configs", "clip_jax", "tests", "notebooks"):
        (path / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    lines = ["image,caption"]
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path / f"{i}.png")
        lines.append(f"{i}.png,picture number {i}")
    (path / "photos").mkdir()
    shutil.copy(path / "0.png", path / "photos")
    for place in ("train", "test"):
        for animal in ("cat", "dog"):
            (path / "animals" / place / animal).mkdir(parents=True)
            for i in range(4):
                shutil.copy(path / f"{i}.png", path / "animals" / place / animal)
    (path / "pairs.csv").write_text("\n".join(lines) + "\n")
    return path


def run(directory, arguments):
    tiny = [*FLAGS, "--steps", "6", "--evals.0.every-steps", "6", "--model.vision.depth", "2"]
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",  # compiles quickly, as in conftest.py
        "JAX_COMPILATION_CACHE_DIR": str(directory / "compilation_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TINY": " ".join(tiny),
        "TINY_PAIRS": PAIRS_FLAGS,
    }
    done = subprocess.run(
        arguments, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{arguments[-1]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_block_runs(directory):
    bash = shutil.which("bash")
    outputs = [run(directory, [bash, "-c", SHIMS + block]) for block in blocks("bash")]
    assert len(outputs) == 11
    assert any("zero_shot/unseen/top1" in output for output in outputs)
    assert any("held out: 9 runs predicted from the 27 others" in output for output in outputs)
    assert any("alpha         -0.1114" in output for output in outputs)
    similarities, shapes = (
        run(directory, [sys.executable, "-c", block]) for block in blocks("python")
    )
    assert re.fullmatch(r"\[\[\S+\s+\S+\]\]\n", similarities)  # one image, two texts
    assert shapes == "(1, 17, 16) (1, 16, 16, 3)\n"


def test_the_two_commands_are_there_word_for_word():
    first, second = blocks("bash")[:2]
    assert first == "pip install -e . && clip-jax train configs/digits.py\n"
    assert second == "pip install -e '.[test]' && pytest -n 2\n"
