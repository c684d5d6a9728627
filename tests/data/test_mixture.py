"""Mixtures: shares, each member's own position, and weights that change on the way."""

import collections
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clip_jax.data.digits import DigitsConfig
from clip_jax.data.mixture import MemberConfig, MixtureConfig, MixtureSource, PhaseConfig
from tests.conftest import ROOT
from tests.data.conftest import FORMATS, make_pairs


class Numbers:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def key(self, index):
        return str(index)

    def load(self, index, rng):
        return b"", str(index)


def mixture(weights, phases=()):
    weights = map(float, weights)
    members = tuple(MemberConfig(source=DigitsConfig(), weight=weight) for weight in weights)
    return MixtureConfig(members=members, phases=phases)


def keys(config, sizes, positions):
    source = MixtureSource(config, [Numbers(size) for size in sizes])
    order = source.order(seed=3)
    found = [source.key(order[position]).split("/") for position in positions]
    return [(int(member), int(key)) for member, key in found]


@pytest.mark.long
def test_shares_are_the_weights():
    counts = collections.Counter(member for member, _ in keys(mixture((3, 1)), (9, 9), range(4096)))
    assert counts == {0: 3072, 1: 1024}
    start = [member for member, _ in keys(mixture((3, 1)), (9, 9), range(40))]
    assert abs(start.count(1) - 10) <= 1  # evenly spread, not in runs


@pytest.mark.parametrize(
    "config",
    [
        mixture((1.0, 2.5, 0.2)),
        mixture(
            (1.0, 2.5, 0.0),
            (
                PhaseConfig(from_sample=777, weights=(1.0, 0.0, 1.0)),
                PhaseConfig(from_sample=1601, weights=(1.0, 1.0, 1.0)),
            ),
        ),
    ],
)
def test_every_member_has_its_own_epochs(config):
    """Whatever the weights, and however they change, a member goes on where it stood."""
    sizes = (20, 30, 10)
    found = keys(config, sizes, range(2500))
    for member, size in enumerate(sizes):
        own = [key for which, key in found if which == member]
        epochs = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert len(epochs) > 3
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_a_change_leaves_the_past_alone():
    before = keys(mixture((1, 1)), (50, 70), range(700))
    phases = (PhaseConfig(from_sample=600, weights=(0.0, 1.0, 1.0)),)
    after = keys(mixture((1, 1, 0), phases), (50, 70, 30), range(700))
    assert before[:600] == after[:600]
    assert {member for member, _ in after[600:]} == {1, 2}


def test_samples_are_the_members():
    source = MixtureSource(mixture((1, 1)), [Numbers(3), Numbers(5)])
    assert [source.load(i, np.random.default_rng(0))[1] for i in range(8)] == list("01201234")
    assert source.key(3) == "1/0"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: MixtureConfig(), "members is empty"),
        (lambda: mixture((1, -1)), "weight=-1.* at least 0"),
        (lambda: mixture((0, 0)), "not all 0"),
        (lambda: mixture((1,), (PhaseConfig(from_sample=1, weights=(1.0, 1.0)),)), "needs 1"),
        (lambda: mixture((1,), (PhaseConfig(from_sample=-1, weights=(1.0,)),)), "from_sample=-1"),
    ],
)
def test_wrong_config(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


# ------------------------------------------------------------------ memory


def grown(samples, photographs, folder):
    """By which part memory grew, from the second tenth of the samples to the last one.

    Six formats at once, with a worker process and threads, and with images that cannot be read.
    """
    pairs = [*make_pairs(photographs, 500), ("broken.jpg", b"no image", "a caption")]
    folders = []
    for name in ("tar", "table", "parquet", "array_record", "saved_dataset", "tfds"):
        (folder / name).mkdir()
        config = FORMATS[name](folder / name, pairs)
        folders.append(config.path)
    command = [sys.executable, str(Path(__file__).with_name("leak.py")), str(samples), *folders]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    held = json.loads(done.stdout)
    assert len(held) > 40
    tenth = len(held) // 10
    before, after = (statistics.median(part) for part in (held[tenth : 2 * tenth], held[-tenth:]))
    growth = after / before - 1
    print(f"{samples:,} samples, {before / 2**20:.1f} MiB, grown by {growth:.2%}")
    return growth


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("samples", [15_000, 300_000])
def test_memory_stays_flat(samples, photographs, tmp_path):
    """What leaks does so by sample, however fast they come."""
    assert grown(samples, photographs, tmp_path) < 0.02
