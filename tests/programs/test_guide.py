"""The guide from a download to ImageNet's number: every command of it, on stand-ins."""

import dataclasses
import functools
import json
import re
import shlex

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.cli import main
from clip_jax.evals import suite, supervised
from tests.conftest import ROOT, rows
from tests.data.conftest import write_tar
from tests.prepare.conftest import jpeg, scene

GUIDE = ROOT / "docs/tutorials/imagenet.md"
SMALL = shlex.split(
    "--steps 4 --batch-size 8 --report-every 1 --optim.warmup-steps 1 --evals.0.every-steps 2 "
    "--model.embed-dim 16 --model.vision.layers 1 1 1 1 --model.vision.width 8 "
    "--model.vision.num-heads 4 --model.vision.image-size 32 --model.text.width 16 "
    "--model.text.depth 1 --model.text.num-heads 2 --data.threads 2"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What img2dataset leaves of two shards, and four of ImageNet's classes."""
    (tmp_path / "pairs").mkdir()
    for shard in range(2):
        members, keys = [], [f"{shard:05d}{number:04d}" for number in range(16)]
        for key in keys:
            image = jpeg(scene(int(key)))
            members += [(f"{key}.jpg", image), (f"{key}.txt", f"picture {key}".encode())]
        write_tar(tmp_path / f"pairs/{shard:05d}.tar", members)
        scores = pa.table({"key": keys, "similarity": [0.2 + 0.01 * i for i in range(16)]})
        pq.write_table(scores, tmp_path / f"pairs/{shard:05d}.parquet")
    for split in ("train", "val", "test"):
        for label in ("n01440764", "n01443537", "n01484850", "n01491361"):
            (tmp_path / "data/imagenet1k" / split / label).mkdir(parents=True)
            for number in range(2):
                file = tmp_path / "data/imagenet1k" / split / label / f"{number}.jpg"
                file.write_bytes(jpeg(scene(number)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    sets = [dataclasses.replace(x, classes=4) for x in suite.SUITE if x.name == "imagenet1k"]
    monkeypatch.setattr(suite, "SUITE", tuple(sets))
    return tmp_path


def test_every_command_of_the_guide_runs(folder, monkeypatch, capsys):
    few = functools.partial(supervised.search, lambdas=np.logspace(-2, 2, 3))
    monkeypatch.setattr(supervised, "search", few)
    blocks = re.findall(r"^```sh\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert len(lines) == 7
    for line in lines:
        tool, *arguments = shlex.split(line.replace("01242", "00001").replace("1/4", "1/1"))
        if tool == "img2dataset":  # which `folder` stands for
            continue
        assert tool == "clip-jax"
        assert main(arguments + SMALL * (arguments[0] == "train")) == 0, capsys.readouterr().err
    names = {"imagenet1k/acc1", "imagenet1k/mean_per_class_recall"}
    for file in ("runs/cc12m/result.json", "report/result.json"):
        assert names <= json.loads((folder / file).read_text()).keys()
    assert [row["step"] for row in rows(folder / "runs/cc12m", "evals/watch.jsonl")][-1] == 4
    assert list((folder / "prepared").glob("*.array_record"))
