"""Captions and embeddings on Ray: the same bytes as by threads that were stopped and went on, on
another number of devices."""

import itertools
import os
import subprocess
import sys
from unittest import mock

from clip_jax.cli.commands import main
from clip_jax.data.augment import replay
from clip_jax.prepare import reinforce
from tests.conftest import ROOT
from tests.data.conftest import FORMATS
from tests.prepare.conftest import digests, tiny_pairs, write_reinforcers

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}


def test_ray_writes_the_bytes_that_threads_write(tmp_path):
    models = write_reinforcers(tmp_path)
    (tmp_path / "in").mkdir()
    source = FORMATS["tar"](tmp_path / "in", tiny_pairs(120)).path
    flags = [
        "--reinforce",
        f"{models}/small",
        f"{models}/large",
        "--captions",
        f"{models}/captioner",
        "--generation.max-length",
        "6",
        "--augmentations.size",
        "16",
        "--samples-per-shard",
        "42",
        "--batch-size",
        "32",
    ]
    command = [sys.executable, "-m", "clip_jax", "prepare", source, "there", "--on", "ray", *flags]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here, calls = ["prepare", source, f"{tmp_path}/here", *flags], itertools.count()

    def stopping(*args):
        if next(calls) == 120:  # in the second of three shards
            raise KeyboardInterrupt
        return replay(*args)

    with mock.patch.object(reinforce, "replay", stopping):
        assert main(here) == 130
    assert len(digests(tmp_path / "here")) == 1
    assert main(here) == 0
    assert digests(tmp_path / "there") == digests(tmp_path / "here") != {}
