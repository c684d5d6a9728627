"""Handwritten numbers: what is held out, their words and captions, and how they are drawn."""

import dataclasses
from unittest import mock

import numpy as np
import pytest

from clip_jax.data import digits
from clip_jax.data.digits import (
    DigitsConfig,
    DigitsSource,
    Jitter,
    evaluation_set,
    number_split,
    number_words,
    prompts,
    render,
    scan_split,
)

STILL = Jitter(**{field.name: 0.0 for field in dataclasses.fields(Jitter)})


@pytest.mark.parametrize(("k", "seed"), [(2, 0), (3, 1), (4, 0)])
def test_a_fifth_of_the_numbers_is_held_out(k, seed):
    train, held_out = number_split(k, seed)
    assert sorted(train + held_out) == list(range(10**k))
    assert len(held_out) == 10**k // 5
    for i in range(k):
        assert {f"{number:0{k}d}"[i] for number in train} == set("0123456789")
    assert (train, held_out) == number_split(k, seed)
    assert held_out != number_split(k, seed + 1)[1]
    assert number_split(1) == (list(range(10)), [])


def test_scans_are_split_by_writers_pages():
    train, held_out = scan_split()
    assert sorted([*train, *held_out]) == list(range(1797))
    assert len(held_out) == 388
    labels = digits._scans()[1]
    assert set(labels[held_out]) == set(labels[train]) == set(range(10))
    # A page begins with the digits in order, three times.
    for start, _ in digits._HELD_OUT_PAGES:
        assert labels[start : start + 30].tolist() == [*range(10)] * 3


def test_number_words():
    words = {
        (42, 2): "forty-two",
        (7, 2): "zero seven",
        (0, 2): "zero zero",
        (13, 3): "zero thirteen",
        (300, 3): "three hundred",
        (4217, 4): "four thousand two hundred seventeen",
        (40, 4): "zero zero forty",
        (815_019, 6): "eight hundred fifteen thousand nineteen",
    }
    assert {key: number_words(*key) for key in words} == words


def test_captions_of_a_number():
    captions = [set(prompts(number, 3)) for number in range(1000)]
    assert len(set().union(*captions)) == sum(map(len, captions))  # of that number alone
    assert len(captions[42]) == len(digits.TEMPLATES)
    wanted = {"forty-two", "42", "a handwritten 42", "four two"}
    wanted |= {"a photo of the number forty-two", "the digits 4 2 in handwriting"}
    assert wanted <= set(prompts(42, 2))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_without_jitter_the_scans_stand_side_by_side(k):
    """Image pixels are scan pixels where a digit's share of the width is 8 pixels."""
    chosen = scan_split()[0][:k]
    image = render(chosen, np.random.default_rng(0), 8 * k, STILL)
    top = 4 * (k - 1)
    ink = (1 - image[top : top + 8, :, 0] / 255) / 0.9
    wanted = np.concatenate(list(digits._scans()[0][chosen]), axis=1)
    assert np.corrcoef(ink.ravel(), wanted.ravel())[0, 1] > 0.98
    blank = np.concatenate([image[: max(top - 1, 0)], image[top + 9 :]])
    assert (blank >= 250).all()  # the enlargement overshoots a little


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Jitter)])
def test_every_strength_does_something(name):
    chosen = scan_split()[0][[3, 5]]
    jitter = dataclasses.replace(STILL, **{name: getattr(Jitter(), name)})
    plain = render(chosen, np.random.default_rng(0), 24, STILL)
    changed = render(chosen, np.random.default_rng(0), 24, jitter)
    assert np.abs(changed.astype(int) - plain).mean() > 1


def test_thickness_adds_and_removes_ink():
    chosen = scan_split()[0][:1]
    thick = dataclasses.replace(STILL, thickness=1.0)
    generators = map(np.random.default_rng, range(20))
    darkness = [255 - render(chosen, rng, 24, thick).mean() for rng in generators]
    plain = 255 - render(chosen, np.random.default_rng(0), 24, STILL).mean()
    assert min(darkness) < 0.9 * plain
    assert max(darkness) > 1.1 * plain


def test_source_of_the_training_split():
    source = DigitsSource(DigitsConfig(samples=200), 33)
    seen, _ = number_split(2)
    keys = [source.key(i) for i in range(len(source))]
    assert len(keys) == len(set(keys)) == 200
    for i in (0, 79, 80, 199):
        image, caption = source.load(i, np.random.default_rng(i))
        assert image.shape == (33, 33, 3)
        assert caption in prompts(seen[i % 80], 2)
        assert keys[i].startswith(f"{seen[i % 80]:02d}/")


@pytest.fixture
def rendered():
    """Calls of `render`, which draws nothing."""
    with mock.patch.object(digits, "render", autospec=True) as function:
        function.return_value = np.zeros((24, 24, 3), np.uint8)
        yield function


def scans(rendered):
    """The scans of every call, and the numbers that they are of."""
    chosen = [call.args[0] for call in rendered.call_args_list]
    labels = digits._scans()[1]
    numbers = [int("".join(map(str, labels[own]))) for own in chosen]
    return set(np.concatenate(chosen).tolist()), numbers


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_uses_its_own_scans(split, rendered):
    source = DigitsSource(DigitsConfig(split=split), 24)
    for i in range(2000):
        source.load(i, np.random.default_rng(i))
    used, numbers = scans(rendered)
    own, foreign = map(set, scan_split() if split == "train" else reversed(scan_split()))
    assert not used & foreign
    assert len(used) > 0.9 * len(own)
    assert numbers == [int(source.key(i).split("/")[0]) for i in range(2000)]
    jitters = [call.args[3] == digits.HELD_OUT_JITTER for call in rendered.call_args_list]
    assert jitters == [split == "test"] * 2000


def test_evaluation_set_is_of_held_out_scans(rendered):
    _, labels = evaluation_set(DigitsConfig(), range(100), 5, 24)
    used, numbers = scans(rendered)
    assert used <= set(scan_split()[1])
    assert numbers == labels.tolist() == np.repeat(np.arange(100), 5).tolist()


def test_evaluation_set_is_fixed():
    images, _ = evaluation_set(DigitsConfig(jitter=STILL, split_seed=5), [42, 7], 3, 24)
    assert images.shape == (6, 24, 24, 3)
    alone, _ = evaluation_set(DigitsConfig(), [7], 3, 24)
    np.testing.assert_array_equal(images[3:], alone)
    assert len({image.tobytes() for image in images}) == 6
