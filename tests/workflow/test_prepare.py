"""`clip-jax prepare`, killed in the middle of a shard: the same command goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.prepare.conftest import captions, encoded

# Stops at the ninth sample, in the second of three shards, and says so.
INTERRUPTED = """
import sys
from clip_jax.cli.commands import main
from clip_jax.prepare.filters import Filter

read = Filter.read

def wait(self, index, *pair):
    if index == 8:
        print("here", flush=True)
        sys.stdin.read()
    return read(self, index, *pair)

Filter.read = wait
main(sys.argv[1:])
"""


def test_a_killed_command_leaves_whole_shards_and_goes_on(tmp_path: Path):
    for i in range(15):
        (tmp_path / f"{i}.png").write_bytes(encoded(9 + i, 20))
    rows = [f"{i}.png,text {i}" for i in range(15)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *rows]))
    flags = ["prepare", "pairs.csv", "out", "--json", "--samples-per-shard", "5", "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, *flags],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "here\n"
        process.kill()
    out = tmp_path / "out"
    assert list(out.glob(".*.partial.*"))
    assert captions(out) == [[f"text {i}"] for i in range(5)]
    shard = out / "pairs-00000-of-00003.array_record"
    before = shard.stat().st_mtime_ns

    command = [sys.executable, "-m", "clip_jax", *flags]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, check=True
    )
    assert json.loads(done.stdout)["counts"] == {"kept": 15}
    assert captions(out) == [[f"text {i}"] for i in range(15)]
    assert not list(out.glob(".*.partial.*"))
    assert shard.stat().st_mtime_ns == before
