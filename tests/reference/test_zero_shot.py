"""ImageNet's zero-shot accuracy on made-up features, image by image, against open_clip's."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from open_clip import build_zero_shot_classifier
from open_clip_train import zero_shot as theirs

from clip_jax.evals import prompts
from clip_jax.evals.datasets import Labelled
from clip_jax.evals.ranks import standing
from clip_jax.evals.reader import Embedded
from clip_jax.evals.zero_shot import classify
from tests.evals.conftest import encoder_on, mesh_of, unit

NAMES = prompts.class_names("imagenet1k") or []
TEMPLATES = ["a photo of a {}.", "art of the {}.", "a blurry {}."]
TWICE = {"missile": [657, 744], "sunglasses": [836, 837]}
SIZE = 64  # of embeddings
NOISE = 0.24  # of a feature; a class vector has unit length


class Features(torch.nn.Module):
    """A model whose images are embeddings, and whose texts are their numbers in a table."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table = torch.tensor(table)

    def forward(self, image: Any) -> dict[str, Any]:
        return {"image_features": image}

    def encode_text(self, texts: Any, normalize: bool) -> Any:
        assert normalize
        return self.table[texts]


@pytest.fixture(scope="module")
def task():
    """One image for each class, its vector plus noise; each template has a vector near it."""
    rng = np.random.default_rng(0)
    vectors = {name: unit(rng.standard_normal(SIZE)) for name in NAMES}
    texts = {
        prompts.fill(template, name): unit(vectors[name] + 0.05 * rng.standard_normal(SIZE))
        for template in TEMPLATES
        for name in vectors
    }
    classes = np.stack([vectors[name] for name in NAMES])
    return unit(classes + NOISE * rng.standard_normal(classes.shape)), texts


def test_imagenets_accuracy_is_open_clips_but_for_equal_names(task, monkeypatch):
    """open_clip takes any of two equal classes, by rounding; here each counts one half."""
    # Its `accuracy` converts arrays of one number, which NumPy 2.4 no longer does.
    monkeypatch.setattr(theirs, "float", lambda x: x.item(), raising=False)
    images, texts = task
    labels = np.arange(len(NAMES))
    encoder = encoder_on(mesh_of(1))
    encoder._embedded.update(texts)
    data = Labelled(len(NAMES), [].__getitem__, NAMES, TEMPLATES)
    outcome = classify(data, Embedded(images, labels, labels.tolist(), []), encoder)
    assert outcome.logits is not None

    numbers = {text: number for number, text in enumerate(texts)}
    model = Features(np.stack([*texts.values()]))
    classifier = build_zero_shot_classifier(
        model, lambda rows: torch.tensor([numbers[row] for row in rows]), NAMES, TEMPLATES
    )
    rows = torch.tensor(images), torch.tensor(labels)
    args: Any = SimpleNamespace(device="cpu", precision="fp32", batch_size=len(NAMES))
    totals = theirs.run(model, classifier, [rows], args)
    logits = 100 * rows[0] @ classifier
    each = zip(logits.split(1), rows[1].split(1), strict=True)
    of_image = np.array([theirs.accuracy(*one, topk=(1, 5)) for one in each])
    np.testing.assert_allclose(of_image.mean(axis=0), totals, atol=1e-6)

    twice = np.concatenate([*TWICE.values()])
    assert [NAMES[i] for i in twice] == ["missile", "missile", "sunglasses", "sunglasses"]
    others = np.setdiff1d(labels, twice)
    for column, (name, k) in enumerate((("acc1", 1), ("acc5", 5))):
        own = standing(outcome.logits, labels).within(k)
        np.testing.assert_array_equal(own[others], of_image[others, column])
        assert outcome.values[name] == pytest.approx(own.mean())
        assert 0.5 < totals[column] < 0.95  # neither hopeless nor solved

    # Where a pair is nearest, each of its two classes counts one half.
    own = standing(outcome.logits, labels).within(1)
    for pair in TWICE.values():
        nearest = np.isin(logits[pair].argmax(dim=1).numpy(), pair)
        np.testing.assert_array_equal(own[pair], nearest / 2)
    assert own[twice].sum() == 2  # all four
