"""Same features in, same numbers out as the clip-benchmark package."""

import warnings

import numpy as np
import pytest
import torch

from clip_jax import sharding
from clip_jax.evals import zero_shot
from clip_jax.evals.compositions import composition
from clip_jax.evals.datasets import Contrasted
from clip_jax.evals.retrieval import retrieval

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from clip_benchmark.metrics import (
        image_caption_selection,
        zeroshot_classification,
        zeroshot_retrieval,
    )

pytestmark = pytest.mark.filterwarnings("ignore")  # of the peer's, about its own calls


class Features:
    """A model whose inputs are its features already."""

    def encode_image(self, x):
        return x

    def encode_text(self, x):
        return x


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(sharding.MeshConfig())


def test_retrieval_with_several_captions_an_image(mesh):
    rng = np.random.default_rng(0)
    images = unit(rng.standard_normal((203, 32))).astype(np.float32)
    owner = np.repeat(np.arange(203), rng.integers(1, 6, 203))
    texts = unit(images[owner] + 0.3 * rng.standard_normal((len(owner), 32))).astype(np.float32)
    batches = [
        (torch.tensor(images[some]), [list(texts[owner == i]) for i in some])
        for some in np.array_split(np.arange(203), 7)
    ]
    theirs = zeroshot_retrieval.evaluate(
        Features(), batches, lambda rows: torch.tensor(np.stack(rows)), "cpu", amp=False,
        recall_k_list=[1, 5, 10],
    )  # fmt: skip
    ours = retrieval(images, texts, owner, mesh)
    assert 0.1 < theirs["image_retrieval_recall@1"] < 0.9
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name


def test_zero_shot_classification(monkeypatch):
    # It makes a float of an array of one element, which NumPy 2.4 refuses.
    monkeypatch.setattr(zeroshot_classification, "float", lambda array: array.item(), raising=False)
    rng = np.random.default_rng(1)
    labels = np.minimum(rng.geometric(0.15, 1_009) - 1, 29)  # classes of very different sizes
    weights = unit(rng.standard_normal((30, 24))).astype(np.float32)
    images = unit(weights[labels] + 0.4 * rng.standard_normal((1_009, 24))).astype(np.float32)

    class Loader(list):
        class dataset:
            classes = tuple(range(30))

    batches = Loader(
        (torch.tensor(images[part]), torch.tensor(labels[part]))
        for part in np.array_split(np.arange(1_009), 5)
    )
    logits, target = zeroshot_classification.run_classification(
        Features(), torch.tensor(weights.T), batches, "cpu", amp=False
    )
    acc1, acc5 = zeroshot_classification.accuracy(logits, target, topk=(1, 5))
    recall = zeroshot_classification.balanced_accuracy_score(target, logits.argmax(1))
    ours = zero_shot.classification(images @ weights.T, labels)
    assert 0.2 < acc1 < acc5 < 0.99
    assert ours["acc1"] == pytest.approx(acc1, abs=1e-6)
    assert ours["acc5"] == pytest.approx(acc5, abs=1e-6)
    assert ours["mean_per_class_recall"] == pytest.approx(recall, abs=1e-6)


def test_the_classifier_averages_as_theirs_does(mesh):
    rng = np.random.default_rng(2)
    features = rng.standard_normal((4, 7, 16)).astype(np.float32)  # classes, templates
    rows = {f"{t} {c}": features[c, t] for c in range(4) for t in range(7)}
    theirs = zeroshot_classification.zero_shot_classifier(
        Features(), lambda texts: torch.tensor(np.stack([rows[text] for text in texts])),
        [str(c) for c in range(4)], [f"{t} {{c}}" for t in range(7)], "cpu", amp=False,
    )  # fmt: skip
    ours = zero_shot.average(unit(features).reshape(28, 16), [7] * 4)
    np.testing.assert_allclose(ours, theirs.numpy().T, atol=1e-6)


def test_average_precision():
    rng = np.random.default_rng(3)
    truth = rng.random((400, 11)) < 0.2
    scores = truth + rng.standard_normal((400, 11)).astype(np.float32)
    theirs = zeroshot_classification.average_precision_per_class(
        torch.tensor(scores), torch.tensor(truth)
    ).numpy()
    ours = [zero_shot.average_precision(scores[:, c], truth[:, c]) for c in range(11)]
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_right_caption_against_the_wrong_one():
    rng = np.random.default_rng(4)
    images = unit(rng.standard_normal((307, 16))).astype(np.float32)
    right, wrong = (
        unit(images + noise * rng.standard_normal((307, 16))).astype(np.float32)
        for noise in (0.9, 1.0)
    )
    pairs = list(zip(right, wrong, strict=True))
    batches = [  # images are [B, C, H, W]: the features are one pixel's channels
        (torch.tensor(images[part])[:, :, None, None], [pairs[i] for i in part])
        for part in np.array_split(np.arange(307), 4)
    ]

    class Flat(Features):
        def encode_image(self, x):
            return x[:, :, 0, 0]

    theirs = image_caption_selection.evaluate(
        Flat(), batches, lambda rows: torch.tensor(np.stack(rows)), "cpu", amp=False
    )
    data = Contrasted(307, lambda i: ("", ("", "")), ["all"] * 307, lambda *_: True)
    won = (images * right).sum(axis=1) > (images * wrong).sum(axis=1)
    assert 0.4 < theirs["text_acc"] < 0.9
    assert composition(won, data.groups, data)["acc"] == pytest.approx(theirs["text_acc"], abs=1e-6)
