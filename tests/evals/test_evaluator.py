"""The same numbers on one device, on eight, and on two processes of four."""

import dataclasses
import importlib.util
import json
import math
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from clip_jax import sharding
from clip_jax.data.images import Preprocess
from clip_jax.evals.evaluator import Encoder, Evaluations
from clip_jax.models import zoo
from clip_jax.models.clip import CLIP
from clip_jax.refused import Refused
from tests.conftest import ROOT, TINY
from tests.evals.processes import numbers


@pytest.fixture(scope="module")
def one():
    return numbers(sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))


@pytest.mark.long
def test_eight_devices(one):
    eight = numbers(sharding.make_mesh(sharding.MeshConfig(fsdp=2)))
    assert eight == pytest.approx(one, rel=1e-5)
    assert 0.1 < one["image_retrieval_recall@1"] < 0.99
    assert 0.3 < one["acc1"] < 0.99


@dataclasses.dataclass
class Fixed:
    """An evaluator, and its own config, that finds the same every time."""

    every_steps: int
    found: dict[str, float]

    def make(self):
        return self

    def run(self, encoder):
        yield from self.found.items()


def test_a_result_that_no_evaluator_gives_is_refused_with_those_that_exist():
    evaluations = Evaluations([Fixed(2, {"a/acc1": 0.5}), Fixed(3, {"info_nce": 4.0})], 12)
    model, mesh = CLIP(TINY), sharding.make_mesh(sharding.MeshConfig())
    encoder = Encoder(model, {}, mesh, Preprocess(image_size=16), np.asarray)
    evaluations.check_gives("b")  # nobody knows yet
    assert list(evaluations.run(2, encoder)) == [{"a/acc1": 0.5}]
    evaluations.check_gives("b")
    assert list(evaluations.run(3, encoder)) == [{"info_nce": 4.0}]
    evaluations.check_gives("info_nce")
    with pytest.raises(Refused, match=r"'b' is no result of .* which give a/acc1, info_nce\."):
        evaluations.check_gives("b")
    with pytest.raises(Refused, match="which give none"):
        Evaluations([], 12).check_gives("b")
    named = Fixed(2, {"a/acc1": 0.5})
    named.names = ("a",)  # its data sets are known before its results
    evaluations = Evaluations([named], 12)
    evaluations.check_gives("a/acc5")
    with pytest.raises(Refused, match=r"which give a/\*"):
        evaluations.check_gives("imagenet1k/acc1")


@pytest.mark.long
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


# ------------------------------------------------------------------ on a TPU slice

HAS_TPU_COMPILER = importlib.util.find_spec("libtpu") is not None


def compiled(*arguments: str) -> dict:
    quiet = {"TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3",
             "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
             "PYTHONPATH": str(ROOT)}  # fmt: skip
    command = [sys.executable, "-m", "tests.evals.compiled", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | quiet, capture_output=True, text=True, timeout=590
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def sizes(architecture: str) -> set[int]:
    """How many elements a parameter has, or one layer's part of it, whole or split by two."""
    shapes = jax.eval_shape(CLIP(zoo.get(architecture)).init, jax.random.key(0))
    found = set()
    for x in jax.tree.leaves(shapes):
        for dims in (x.shape, x.shape[1:]):
            found |= {math.prod(dims), math.prod(dims) // 2}
    return found


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TPU_COMPILER, reason="needs libtpu: pip install jax[tpu]")
def test_only_parameters_are_gathered_and_only_tensors_sums_reduced():
    """L/14 on data 2 x fsdp 4 x tensor 2, besides the features, of which all have all.

    Of the table of words, which is larger than what is asked of it, rows are sent.
    """
    found, parameters = compiled("v5e:4x4", "ViT-L/14", "2", "4", "2"), sizes("ViT-L/14")
    for tower in ("image", "text"):
        for kind, axes, shapes, source in found[tower]["exchanges"]:
            for dims in shapes:
                elements, what = math.prod(dims), f"{tower}: {kind} {dims} over {axes}: {source}"
                if "text.embed" in source:
                    assert kind in ("all-gather", "all-to-all"), what
                    assert elements <= 1_024 // 8 * 77 * 768, what
                    continue
                assert kind in ("all-gather", "all-reduce"), what
                is_result = elements == 1_024 * 768 and set(axes) <= set(sharding.BATCH_AXES)
                if kind == "all-gather":
                    assert is_result or (axes == ["fsdp"] and elements in parameters), what
                else:
                    assert axes == ["tensor"], what


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TPU_COMPILER, reason="needs libtpu: pip install jax[tpu]")
def test_a_chip_holds_a_sixteenth_of_bigg14():
    found = compiled("v5e:4x4", "ViT-bigG-14", "1", "16", "1")
    assert found["parameters"] <= 0.7e9
    assert max(found[tower]["peak"] for tower in ("image", "text")) < 4e9
