"""The whole way with everything in a bucket: data, the run, exports; with real servers."""

import io
import json
import re
import shlex
import signal
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clip_jax
from clip_jax import files
from clip_jax.data.sources.array_record import ArrayRecordConfig, ArrayRecordSource
from tests.conftest import FLAGS, ROOT
from tests.forks import Forks

TINY = [
    "--steps", "8", "--batch-size", "8", "--report-every", "1", "--checkpoint.every-steps", "2",
    "--data.threads", "2", "--optim.warmup-steps", "1", "--model.embed-dim", "16",
    "--model.dtype", "float32", "--model.vision.image-size", "16",
    "--model.vision.patch-size", "8", "--model.vision.width", "16",
    "--model.vision.num-heads", "2", "--model.vision.depth", "1", "--model.text.width", "16",
    "--model.text.num-heads", "2", "--model.text.depth", "1", "--model.text.vocab-size", "600",
]  # fmt: skip


def picture(number):
    """A PNG, another for each number."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (24, 20, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tars(url, shards=2, pairs=20):
    for shard in range(shards):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for i in range(pairs):
                text = f"picture {i} of {shard}".encode()
                for name, content in (("png", picture(100 * shard + i)), ("txt", text)):
                    member = tarfile.TarInfo(f"{i:03d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        files.write_whole(f"{url}/tars/{shard}.tar", file.getvalue())


def at_once(clip, *rows):
    """Run rows of commands that don't wait for other rows; return the last one's of each."""
    with ThreadPoolExecutor(len(rows)) as threads:
        return list(threads.map(lambda row: [clip.run(*command) for command in row][-1], rows))


@pytest.fixture(scope="module")
def clip(servers, tmp_path_factory):
    """`clip-jax`, where both servers are known."""
    folder = tmp_path_factory.mktemp("bucket")
    environment = servers("gs").environment() | servers("s3").environment()
    environment |= {"JAX_DEFAULT_PRNG_IMPL": "rbg", "XDG_CACHE_HOME": str(folder)}
    with Forks(folder, "gcsfs", "s3fs", **environment) as forks:
        yield forks


def wait_for(condition):
    for _ in range(9000):
        if condition():
            return
        time.sleep(0.02)
    raise TimeoutError


def test_the_whole_way_in_a_bucket(clip, bucket):
    url, run = bucket.url, f"{bucket.url}/runs/tiny"
    write_tars(url)
    clip.run("prepare", f"{url}/tars/*.tar", f"{url}/prepared", "--samples-per-shard", 16)
    assert len(ArrayRecordSource(ArrayRecordConfig(path=f"{url}/prepared/*.array_record"))) == 40

    train = ("train", str(ROOT / "configs/pairs.py"), "--data.source.path", f"{url}/prepared")
    begun = re.compile(r"checkpoints(/|%2F)4(/|%2F)")
    bucket.server.behave(faults={"hang": 1.0}, only=f"^(PUT|POST).*{begun.pattern}")
    child = clip.start(*train, "--workdir", run, *TINY)
    wait_for(lambda: any(begun.search(x["path"]) for x in bucket.server.requests()))
    child.kill()
    assert child.wait() == -signal.SIGKILL
    bucket.server.behave()
    for path in files.walk(f"{run}/lease"):  # as if it had been dead for a minute
        files.remove(path)
    assert "going on from step 2" in clip.run(*train, "--workdir", run, *TINY).stderr
    lines = files.read(f"{run}/metrics.jsonl").decode().splitlines()
    assert [row["step"] for row in map(json.loads, lines) if "loss" in row] == list(range(1, 9))

    for shard, animal in enumerate(("cat", "dog")):
        for part in ("train", "test"):
            for i in range(3):
                path = f"{url}/animals/{part}/{animal}/{i}.png"
                files.write_whole(path, picture(100 * shard + i))
    exported, again = f"{url}/hugging_face", ("--workdir", f"{url}/runs/next", "--steps", 2)
    *_, found = at_once(
        clip,
        [
            ("convert", run, exported, "--to", "hugging-face"),
            ("convert", exported, f"{url}/model", "--to", "clip-jax"),
            (*train, *TINY, *again, "--init-from", f"{url}/model"),
        ],
        [("convert", run, f"{url}/open_clip", "--to", "open-clip")],
        [("evaluate", run, "--dataset", f"folder:{url}/animals", "--output", f"{url}/report")],
        [
            ("embed", run, f"{url}/animals", f"{url}/embeddings"),
            ("search", run, f"{url}/embeddings", "--text", "a cat", "--top", 3, "--json"),
        ],
    )
    assert "animals/acc1" in files.read(f"{url}/report/result.json").decode()
    assert len(json.loads(found.stdout)) == 3

    images = np.zeros((1, 16, 16, 3), np.float32)
    first, *others = (
        np.asarray(clip_jax.load(f"{url}/{name}").encode_image(images))
        for name in ("runs/tiny", "model", "hugging_face", "open_clip")
    )
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-5, atol=1e-5)


PATHS = re.compile(
    r"(folder:)?(runs/\w+|report|pairs\.csv|animals|photos|embeddings|found\.png|exported|back|ladder"
    r"|ladder_digits\.csv|ladder\.html)"
)


def readme_commands(url):
    """Every `clip-jax` of the README's bash blocks, its paths in a bucket, as arguments."""
    text = (ROOT / "README.md").read_text()
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S):
        for line in block.splitlines():
            words = shlex.split(line.rpartition("&& ")[2])
            if words[0] != "clip-jax" or words[1] in ("demo", "serve", "export"):
                continue
            where = [None] * 2 + [PATHS.fullmatch(word) for word in words[2:]]
            if words[1] == "scale":
                where[2] = None
            words = [
                f"{found[1] or ''}{url}/{found[2]}" if found else word
                for found, word in zip(where, words, strict=True)
            ]
            if words[1] == "train":
                pairs = "configs/pairs.py" in words
                named = (
                    []
                    if "--workdir" in words
                    else ["--workdir", f"{url}/runs/{Path(words[2]).stem}"]
                )
                words += [*named, *(TINY if pairs else [*FLAGS, "--steps", "6"])]
            if words[1:3] == ["scale", "ladder"]:
                words += ["--root", f"{url}/runs/ladder_digits", "--dry-run"]
            if words[1] == "scale" and words[2] in ("collect", "report"):  # it was planned alone
                words[3] = f"{url}/runs/digits"
            yield words[1:]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_of_the_readme_with_its_paths_in_a_bucket(clip, bucket, monkeypatch):
    url = bucket.url
    monkeypatch.chdir(ROOT)
    lines = ["image,caption"]
    for i in range(8):
        lines.append(f"{i}.png,picture number {i}")
        files.write_whole(f"{url}/{i}.png", picture(i))
        files.write_whole(f"{url}/photos/{i}.png", picture(i))
        for part in ("train", "test"):
            for animal in ("cat", "dog"):
                files.write_whole(f"{url}/animals/{part}/{animal}/{i}.png", picture(i))
    files.write_whole(f"{url}/pairs.csv", "\n".join(lines) + "\n")
    done = 0
    for arguments in readme_commands(url):
        if arguments[:2] == ["scale", "fit"]:  # the repository's table: two runs give no law
            table = (ROOT / "notebooks/ladder_digits.csv").read_bytes()
            files.write_whole(f"{url}/ladder_digits.csv", table)
        clip.run(*arguments)
        done += 1
    assert done >= 13
    there = list(files.walk(url))
    for name in ("report/", "embeddings/", "found.png", "exported/", "back/", "ladder"):
        assert any(path.startswith(f"{url}/{name}") for path in there), name
