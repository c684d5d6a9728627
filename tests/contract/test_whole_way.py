"""The whole way with everything in a bucket: data, the run, what is made of it."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

import clip_jax
from clip_jax.cli.commands import main
from clip_jax.data.sources.array_record import ArrayRecordConfig, ArrayRecordSource
from clip_jax.storage import files
from tests.conftest import ROOT
from tests.contract.conftest import FEW, PAIRS, write_pictures


@pytest.fixture
def clip(capsys, monkeypatch, tmp_path):
    """Run a command that ends well; return what it prints, and what it reports."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def run(*words):
        code = main([str(word) for word in words])
        printed, reported = capsys.readouterr()
        assert code == 0, reported
        return printed, reported

    return run


def test_the_whole_way_in_a_bucket(clip, s3):
    url, run = s3.url, f"{s3.url}/runs/tiny"
    clip(
        "prepare", write_pictures(f"{url}/pairs", 40), f"{url}/prepared", "--samples-per-shard", 16
    )
    assert len(ArrayRecordSource(ArrayRecordConfig(path=f"{url}/prepared/*.array_record"))) == 40

    train = ("train", PAIRS, "--data.source.path", f"{url}/prepared", "--steps", 8, *FEW)
    fourth = re.compile(r"^(PUT|POST).*checkpoints(/|%2F)4(/|%2F)")
    s3.server.behave(faults={"hang": 1.0}, only=fourth.pattern)
    command = [sys.executable, "-m", "clip_jax", *map(str, train), "--workdir", run]
    environment = {"PYTHONPATH": str(ROOT), "JAX_DEFAULT_PRNG_IMPL": "rbg"}  # as here
    with subprocess.Popen(command, env=os.environ | environment) as process:
        s3.server.until_fault()
        process.kill()
    assert process.returncode == -signal.SIGKILL
    s3.server.behave()
    for path in files.walk(f"{run}/lease"):  # as if it had been dead for a minute
        files.remove(path)
    _, reported = clip(*train, "--workdir", run)
    assert "resuming from step 2" in reported
    lines = files.read(f"{run}/metrics.jsonl").decode().splitlines()
    assert [row["step"] for row in map(json.loads, lines) if "loss" in row] == list(range(1, 9))
    assert json.loads(files.read(f"{run}/starts.json")) == {"step": 2, "starts": 1}
    result = json.loads(files.read(f"{run}/result.json"))
    assert result["step"] == 8
    assert min(result["seconds/compile"], result["seconds/restore"], result["goodput"]) > 0

    for folder in ("train/cat", "train/dog", "test/cat", "test/dog"):
        write_pictures(f"{url}/animals/{folder}", 3)
    exported, again = f"{url}/hugging_face", ("--workdir", f"{url}/runs/next", "--steps", 2)
    clip("convert", run, exported, "--to", "hugging-face")
    clip("convert", exported, f"{url}/model", "--to", "clip-jax")
    clip(*train, *again, "--init-from", f"{url}/model")
    clip("convert", run, f"{url}/open_clip", "--to", "open-clip")
    clip("evaluate", run, "--dataset", f"folder:{url}/animals", "--output", f"{url}/report")
    clip("embed", run, f"{url}/animals", f"{url}/embeddings")
    search = ("search", run, f"{url}/embeddings", "--text", "a cat")
    clip(*search, "--sheet", f"{url}/found.png")
    nearest, _ = clip(*search, "--top", 3, "--json")
    predicted, _ = clip(
        "predict", run, "--images", f"{url}/animals/test/cat", "--labels", "cat", "dog", "--json"
    )
    clip("scale", "ladder", ROOT / "configs/ladder_digits.py", "--root", f"{url}/l", "--dry-run")
    clip("scale", "collect", run, "--output", f"{url}/ladder.csv")
    clip("scale", "report", run, "--output", f"{url}/ladder.html")
    assert "animals/acc1" in files.read(f"{url}/report/result.json").decode()
    assert len(json.loads(nearest)) == 3
    assert len(json.loads(predicted)) == 3
    for name in ("found.png", "ladder.csv", "ladder.html"):
        assert files.stat(f"{url}/{name}")[0]

    images = np.zeros((1, 16, 16, 3), np.float32)
    first, *others = (
        np.asarray(clip_jax.load(f"{url}/{name}").encode_image(images))
        for name in ("runs/tiny", "model", "hugging_face", "open_clip")
    )
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-5, atol=1e-5)
