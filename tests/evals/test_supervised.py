"""Probes on splits of a data set, from images to numbers; and templates chosen on one of them."""

import dataclasses

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from clip_jax import sharding
from clip_jax.data.digits import DigitsConfig
from clip_jax.data.images import Preprocess
from clip_jax.evals import evaluator, linear_probe, measure
from clip_jax.evals.datasets import Captioned, Labelled, Missing, open_digits
from clip_jax.evals.evaluator import Encoder
from clip_jax.evals.supervised import hold_out, supervised
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.refused import Refused

SIZE = 12


@pytest.fixture(scope="module")
def encoder():
    """A small model of random weights, whose features still tell digits apart."""
    config = CLIPConfig(
        embed_dim=16,
        vision=ViTConfig(image_size=SIZE, patch_size=4, width=32, depth=1, num_heads=2),
        text=TextConfig(vocab_size=600, context_length=16, width=16, depth=1, num_heads=2),
        dtype="float32",
    )
    rng = np.random.default_rng(0)
    model = CLIP(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:2])

    def tokens(texts):
        codes = [[1 + sum(map(ord, word)) % 590 for word in text.split()] for text in texts]
        return np.array([(row + [599] + [0] * 16)[:16] for row in codes], np.int32)

    pixels = Preprocess(image_size=SIZE, mean=(0.5,) * 3, std=(1.0,) * 3)
    return Encoder(model, jax.device_put(params, sharding.replicated(mesh)), mesh, pixels, tokens)


def digits(split):
    return open_digits(DigitsConfig(digits=1), split, per_number=20, image_size=SIZE)


def without_validation(split):
    if split == "validation":
        raise Missing("there is none")
    return digits(split)


@pytest.mark.long
def test_every_number_is_what_scikit_learn_finds_on_the_same_features(encoder):
    splits = measure.Splits("digits", digits, encoder)
    values = supervised(splits, ["probe", "few-shot", "neighbours"], shots=(2, 40)).values
    assert set(values) == {
        "linear_probe/acc1",
        "linear_probe/acc5",
        "linear_probe/mean_per_class_recall",
        "linear_probe/lambda",
        "few_shot/2",
        "neighbours/acc1",
    }  # fmt: skip; no class has 40
    train, validation, test = (
        (x.features, x.labels) for x in (splits.embedded(split, before_projection=True)
                                         for split in ("train", "validation", "test"))
    )  # fmt: skip
    assert train[0].shape[1] == 32  # before the projection
    both = [np.concatenate(pair) for pair in zip(train, validation, strict=True)]
    theirs = LogisticRegression(  # λ is tiny here: its L-BFGS would not be there after 10,000 steps
        C=1 / values["linear_probe/lambda"], solver="newton-cholesky", tol=1e-8
    )
    theirs.fit(both[0].astype(np.float64), both[1])
    assert values["linear_probe/acc1"] == pytest.approx(theirs.score(*test), abs=0.001)
    votes = KNeighborsClassifier(20, metric="cosine").fit(*both)
    assert values["neighbours/acc1"] == pytest.approx(votes.score(*test), abs=0.011)
    assert 0.15 < values["few_shot/2"] < values["linear_probe/acc1"] - 0.1


def test_a_fifth_of_the_training_images_stands_in_for_validation(encoder, monkeypatch):
    seen = []
    search = linear_probe.search
    monkeypatch.setattr(
        "clip_jax.evals.supervised.search",
        lambda train, validation, *args, **more: (
            seen.append((len(train[1]), len(validation[1]))),
            search(train, validation, *args, lambdas=[0.1, 1.0], **more),
        )[1],
    )
    splits = measure.Splits("digits", without_validation, encoder)
    first = supervised(splits, ["probe"], seed=0).values
    assert seen == [(160, 40)]
    assert supervised(splits, ["probe"], seed=0).values == first


def test_each_split_is_opened_and_embedded_once(encoder):
    opened = []

    def open_split(split):
        opened.append(split)
        return digits(split)

    splits = measure.Splits("digits", open_split, encoder)
    for _ in range(2):
        supervised(splits, ["neighbours"])
        measure.select_templates(splits)
    assert sorted(opened) == ["test", "train", "validation"]


def test_templates_chosen_on_validation_images(encoder):
    splits = measure.Splits("digits", digits, encoder)
    found = measure.select_templates(splits)
    assert set(found.of_template) == set(digits("test").templates)
    assert found.values["templates/selected_of"] == len(found.templates) >= 1
    alone = list(found.of_template.values())
    assert found.values["templates/mean"] == pytest.approx(np.mean(alone))
    assert found.values["templates/spread"] == pytest.approx(max(alone) - min(alone))
    # Chosen on training images where there is no validation split: nothing is trained.
    assert measure.select_templates(measure.Splits("x", without_validation, encoder)).templates


def test_texts_are_embedded_once_for_all_data_sets(encoder, monkeypatch):
    calls = []
    encode = evaluator.encode_texts
    monkeypatch.setattr(
        evaluator,
        "encode_texts",
        lambda model, params, tokens, mesh: (
            calls.append(len(tokens)),
            encode(model, params, tokens, mesh),
        )[1],
    )
    fresh = Encoder(encoder.model, encoder.params, encoder.mesh, encoder.preprocess,
                            encoder.tokenize)  # fmt: skip
    first = fresh.classes(["a {c}", "the {c}"], ["cat", "dog"])
    again = fresh.classes(["the {c}", "one {c}"], ["dog", "cat"])
    assert calls == [4, 2]
    np.testing.assert_array_equal(again[0], first[1][::-1])
    # Another set of parameters is another encoder: it knows nothing of these.
    assert not Encoder(encoder.model, encoder.params, encoder.mesh, encoder.preprocess,
                               encoder.tokenize)._known  # fmt: skip


def test_what_cannot_be_probed_is_said(encoder):
    def captions(split):
        return Captioned(1, lambda i: (np.zeros((SIZE, SIZE, 3), np.uint8), ["x"]))

    with pytest.raises(Missing, match="one class each"):
        supervised(measure.Splits("flickr", captions, encoder), ["probe"])

    def other_classes(split):
        data = digits(split)
        names = data.names if split == "test" else data.names[::-1]
        return Labelled(names, data.templates[:1], data.count, data.load)

    with pytest.raises(ValueError, match="digits: train has 10 classes, test 10, and"):
        supervised(measure.Splits("digits", other_classes, encoder), ["probe"])
    with pytest.raises(Missing, match="has not two templates"):
        measure.select_templates(measure.Splits("digits", other_classes, encoder))


def test_what_is_held_out_leaves_every_class_something_to_learn_from():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(50), 20)
    held_out = hold_out(labels, np.random.default_rng(3))
    order = np.random.default_rng(3).permutation(1000)
    np.testing.assert_array_equal(held_out, order[:200])  # a plain fifth, where there are plenty
    for counts in ([1, 1, 2], [2, 2], [1, 5, 1], [3]):
        labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        held_out = hold_out(labels, rng)
        assert len(held_out) >= 1
        assert set(np.delete(labels, held_out)) == set(range(len(counts)))
    assert len(hold_out(np.arange(10), rng)) == 0


def test_a_strength_needs_images_to_be_chosen_by(encoder):
    def one_each(split):
        data = without_validation(split)
        if split == "test":
            return data
        return dataclasses.replace(data, count=10, load=lambda i: data.load(20 * i))

    splits = measure.Splits("few", one_each, encoder)
    with pytest.raises(Missing, match="few: one training image a class leaves none"):
        supervised(splits, ["probe"])
    assert set(supervised(splits, ["neighbours"], neighbours=3).values) == {"neighbours/acc1"}
    some, none = ((np.zeros((n, 3), np.float32), np.arange(n)) for n in (4, 0))
    with pytest.raises(Refused, match="there are none"):
        linear_probe.search(some, none, encoder.mesh)
