"""A teacher whose embeddings are stored trains the same student as one that encodes each batch."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from clip_jax.config import Config
from clip_jax.data.augment import AugmentationsConfig
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.array_record import ArrayRecordConfig
from clip_jax.losses import DistillationConfig, LiveTeacher, SoftmaxConfig, StoredTeacher
from clip_jax.optim import OptimConfig
from clip_jax.prepare.layout import PrepareConfig
from clip_jax.prepare.writer import prepare
from tests.conftest import TINY, losses, rows, train_shared
from tests.data.conftest import FORMATS
from tests.prepare.conftest import tiny_pairs, write_reinforcers

STEPS = 40
LARGE = {"logit_scale": 10.0, "embed_dim": 24}  # twice the student's resolution
SMALL = {"logit_scale": 10.0, "embed_dim": TINY.embed_dim}


@pytest.fixture(scope="module")
def made(in_made):
    """The teachers, and pairs with their embeddings in both types."""
    folder = in_made
    models = write_reinforcers(folder)
    source = FORMATS["tar"](Path(), tiny_pairs(64)).path
    for kind in ("float16", "int8"):
        prepare(
            PrepareConfig(
                source=source,
                destination=folder / kind,
                embedding_type=kind,
                batch_size=16,
                reinforce=(models / "large", models / "small"),
                augmentations_per_image=4,
                augmentations=AugmentationsConfig(size=16, flip=0.5),
            )
        )
    return folder


def run(made, kind, teachers, workdir):
    """Train the student on the stored augmentations; return its losses."""
    config = Config(
        model=dataclasses.replace(TINY, init_logit_scale=10.0),
        data=DataConfig(
            source=ArrayRecordConfig(path=str(made / kind / "*.array_record")), crop="stored"
        ),
        objective=(SoftmaxConfig(weight=0.25), DistillationConfig(weight=0.75, teachers=teachers)),
        optim=OptimConfig(learning_rate=4e-3, warmup_steps=4),
        steps=STEPS,
        seed=2,
        batch_size=16,
        report_every=1,
    )
    train_shared(config, workdir)
    samples = [row["samples_seen"] for row in rows(workdir) if "loss" in row]
    assert samples == list(range(16, 16 * STEPS + 1, 16))
    return np.array(list(losses(workdir).values()))


def test_a_stored_teacher_gives_the_losses_of_a_live_one(made, tmp_path):
    """One of them at twice the resolution, whose images are resized from the same crop."""
    paths = [str(made / name) for name in ("large", "small")]
    live = tuple(LiveTeacher(weights=path, dtype="float32", logit_scale=10.0) for path in paths)
    stored = (StoredTeacher(**LARGE), StoredTeacher(**SMALL))
    expected = run(made, "float16", live, tmp_path / "live")
    got = run(made, "float16", stored, tmp_path / "stored")
    assert abs(got - expected).max() < 5e-4
    coarse = run(made, "int8", stored, tmp_path / "int8")
    assert abs(coarse - expected).max() < 5e-3
    assert expected[-10:].mean() < expected[:10].mean() - 0.05
