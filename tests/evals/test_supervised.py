"""Probes on splits of a data set, from images to numbers; and templates chosen on one of them."""

import dataclasses
import functools
from unittest import mock

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from clip_jax.data.digits import DigitsConfig
from clip_jax.errors import InputError
from clip_jax.evals import linear_probe, measure
from clip_jax.evals import supervised as supervised_evals
from clip_jax.evals.datasets import Captioned, Labelled, Missing, open_digits
from clip_jax.evals.supervised import hold_out, supervised
from tests.evals.conftest import encoder_on, mesh_of


@pytest.fixture(scope="module")
def encoder():
    """A small model of random weights, whose features still tell digits apart."""

    def tokens(texts):
        codes = [[1 + sum(map(ord, word)) % 590 for word in text.split()] for text in texts]
        return np.array([(row + [599] + [0] * 16)[:16] for row in codes], np.int32)

    return encoder_on(mesh_of(1), tokens, scale=0.3, mean=(0.5,) * 3, std=(1.0,) * 3)


@functools.cache
def digits(split):
    return open_digits(DigitsConfig(digits=1), split, per_number=20, image_size=16)


SPLITS = ("train", "validation", "test")


def without_validation(split):
    if split == "validation":
        raise Missing("there is none")
    return digits(split)


@pytest.fixture(autouse=True)
def search():
    """Probes try three λ, not 96."""
    few = functools.partial(linear_probe.search, lambdas=np.logspace(-2, 2, 3))
    with mock.patch.object(supervised_evals, "search", autospec=True, side_effect=few) as fake:
        yield fake


def test_a_probe_of_one_class_is_refused(encoder):
    one = dataclasses.replace(digits("train"), count=1)
    splits = measure.Splits("digits", {"train": one, "test": digits("test")}.__getitem__, encoder)
    with pytest.raises(InputError, match=r"are of one class, of 10; neighbours need two classes"):
        supervised(splits, ["neighbours"])


def test_every_number_is_what_scikit_learn_finds_on_the_same_features(encoder):
    splits = measure.Splits("digits", digits, encoder)
    values = supervised(splits, ["probe", "few-shot", "neighbours"], shots=(2, 40)).values
    names = {f"linear_probe/{x}" for x in ("acc1", "acc5", "mean_per_class_recall", "lambda")}
    assert set(values) == names | {"few_shot/2", "neighbours/acc1"}  # no class has 40
    train, validation, test = map(supervised_evals._part, 3 * [splits], SPLITS)
    assert train[0].shape[1] == 32  # before the projection
    both = [np.concatenate(pair) for pair in zip(train, validation, strict=True)]
    strength = values["linear_probe/lambda"]
    theirs = LogisticRegression(C=1 / strength, solver="newton-cholesky", tol=1e-8)
    theirs.fit(both[0].astype(np.float64), both[1])
    assert values["linear_probe/acc1"] == pytest.approx(theirs.score(*test), abs=0.001)
    votes = KNeighborsClassifier(20, metric="cosine").fit(*both)
    assert values["neighbours/acc1"] == pytest.approx(votes.score(*test), abs=0.011)
    assert 0.15 < values["few_shot/2"] < values["linear_probe/acc1"] - 0.1


def test_a_fifth_of_the_training_images_stands_in_for_validation(encoder, search):
    splits = measure.Splits("digits", without_validation, encoder)
    first = supervised(splits, ["probe"], seed=0).values
    train, validation, *_ = search.call_args.args
    assert (len(train[1]), len(validation[1])) == (160, 40)
    assert supervised(splits, ["probe"], seed=0).values == first
    # Templates are chosen on training images then: nothing is trained.
    assert measure.select_templates(splits).templates


def test_templates_are_chosen_and_each_split_opened_and_embedded_once(encoder):
    opened = []
    splits = measure.Splits("digits", lambda split: opened.append(split) or digits(split), encoder)
    with mock.patch.object(
        measure.Splits, "computed", autospec=True, side_effect=measure.Splits.computed
    ) as computed:
        for _ in range(2):
            supervised(splits, ["neighbours"])
            chosen = measure.select_templates(splits)
    assert sorted(opened) == sorted(SPLITS)
    assert computed.call_count == 3 + 2  # for probes and for templates
    assert set(chosen.of_template) == set(digits("test").templates)
    assert chosen.values["templates/selected_of"] == len(chosen.templates) >= 1
    assert chosen.values["templates/mean"] == pytest.approx(np.mean([*chosen.of_template.values()]))


def test_what_cannot_be_probed_is_said(encoder):
    def captions(split):
        return Captioned(1, lambda i: (np.zeros((16, 16, 3), np.uint8), ["x"]))

    with pytest.raises(Missing, match="one class each"):
        supervised(measure.Splits("flickr", captions, encoder), ["probe"])
    with pytest.raises(
        InputError, match="coco: no images with a class or caption in its test split"
    ):
        measure.Splits("coco", lambda split: Captioned(0, [].__getitem__), encoder).embedded("test")

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
