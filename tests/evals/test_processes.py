"""The same numbers on one device, on eight, and on two processes of four."""

import json
import os
import socket
import subprocess
import sys

import jax
import pytest

from clip_jax import sharding
from tests.evals.processes import numbers
from tests.runs import ROOT


@pytest.fixture(scope="module")
def one():
    return numbers(sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))


def test_eight_devices(one):
    eight = numbers(sharding.make_mesh(sharding.MeshConfig(fsdp=2)))
    assert eight == pytest.approx(one, rel=1e-5)
    assert 0.1 < one["image_retrieval_recall@1"] < 0.99
    assert 0.3 < one["acc1"] < 0.99


def test_two_processes(one, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    files = [tmp_path / "0.json", tmp_path / "1.json"]
    command = [sys.executable, "-m", "tests.evals.processes", port]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [*command, str(index), str(file)], cwd=ROOT, env=environment,
            stderr=subprocess.PIPE, text=True,
        )
        for index, file in enumerate(files)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for file in files:
        assert json.loads(file.read_text()) == pytest.approx(one, rel=1e-5)
