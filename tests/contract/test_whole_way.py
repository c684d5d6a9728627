"""The whole way with everything in a bucket: data, the run, what is made of it."""

import json
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import clip_jax
from clip_jax.data.sources.array_record import ArrayRecordConfig, ArrayRecordSource
from clip_jax.storage import files
from tests.conftest import ROOT
from tests.contract.conftest import FEW, PAIRS, write_pictures
from tests.forks import Forks


def at_once(clip, *rows):
    """Run rows of commands that don't wait for other rows; return the last one's of each."""
    with ThreadPoolExecutor(len(rows)) as threads:
        return list(threads.map(lambda row: [clip.run(*command) for command in row][-1], rows))


@pytest.fixture
def clip(s3, tmp_path):
    """`clip-jax`, where the server is known."""
    environment = {"JAX_DEFAULT_PRNG_IMPL": "rbg", "XDG_CACHE_HOME": str(tmp_path)}
    with Forks(tmp_path, "s3fs", **s3.server.environment(), **environment) as forks:
        yield forks


def test_the_whole_way_in_a_bucket(clip, s3):
    url, run = s3.url, f"{s3.url}/runs/tiny"
    clip.run(
        "prepare", write_pictures(f"{url}/pairs", 40), f"{url}/prepared", "--samples-per-shard", 16
    )
    assert len(ArrayRecordSource(ArrayRecordConfig(path=f"{url}/prepared/*.array_record"))) == 40

    train = ("train", PAIRS, "--data.source.path", f"{url}/prepared", "--steps", 8, *FEW)
    fourth = re.compile(r"^(PUT|POST).*checkpoints(/|%2F)4(/|%2F)")
    s3.server.behave(faults={"hang": 1.0}, only=fourth.pattern)
    child = clip.start(*train, "--workdir", run)
    s3.server.until_fault()
    child.kill()
    assert child.wait() == -signal.SIGKILL
    s3.server.behave()
    for path in files.walk(f"{run}/lease"):  # as if it had been dead for a minute
        files.remove(path)
    assert "resuming from step 2" in clip.run(*train, "--workdir", run).stderr
    lines = files.read(f"{run}/metrics.jsonl").decode().splitlines()
    assert [row["step"] for row in map(json.loads, lines) if "loss" in row] == list(range(1, 9))
    assert json.loads(files.read(f"{run}/starts.json")) == {"step": 2, "starts": 1}
    result = json.loads(files.read(f"{run}/result.json"))
    assert result["step"] == 8
    assert min(result["seconds/compile"], result["seconds/restore"], result["goodput"]) > 0

    for folder in ("train/cat", "train/dog", "test/cat", "test/dog"):
        write_pictures(f"{url}/animals/{folder}", 3)
    exported, again = f"{url}/hugging_face", ("--workdir", f"{url}/runs/next", "--steps", 2)
    ladder = ("scale", "ladder", str(ROOT / "configs/ladder_digits.py"))
    labels = ("--labels", "cat", "dog")
    *_, found, predicted, _ = at_once(
        clip,
        [
            ("convert", run, exported, "--to", "hugging-face"),
            ("convert", exported, f"{url}/model", "--to", "clip-jax"),
            (*train, *again, "--init-from", f"{url}/model"),
        ],
        [("convert", run, f"{url}/open_clip", "--to", "open-clip")],
        [("evaluate", run, "--dataset", f"folder:{url}/animals", "--output", f"{url}/report")],
        [
            ("embed", run, f"{url}/animals", f"{url}/embeddings"),
            ("search", run, f"{url}/embeddings", "--text", "a cat", "--sheet", f"{url}/found.png"),
            ("search", run, f"{url}/embeddings", "--text", "a cat", "--top", 3, "--json"),
        ],
        [("predict", run, "--images", f"{url}/animals/test/cat", *labels, "--json")],
        [
            (*ladder, "--root", f"{url}/runs/ladder", "--dry-run"),
            ("scale", "collect", run, "--output", f"{url}/ladder.csv"),
            ("scale", "report", run, "--output", f"{url}/ladder.html"),
        ],
    )
    assert "animals/acc1" in files.read(f"{url}/report/result.json").decode()
    assert len(json.loads(found.stdout)) == 3
    assert len(json.loads(predicted.stdout)) == 3
    for name in ("found.png", "ladder.csv", "ladder.html"):
        assert files.stat(f"{url}/{name}")[0]

    images = np.zeros((1, 16, 16, 3), np.float32)
    first, *others = (
        np.asarray(clip_jax.load(f"{url}/{name}").encode_image(images))
        for name in ("runs/tiny", "model", "hugging_face", "open_clip")
    )
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-5, atol=1e-5)
