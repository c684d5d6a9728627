"""Zero-shot accuracy on digits, of an encoder that reads the numbers, right or backwards."""

import dataclasses
from unittest import mock

import numpy as np
import pytest

from clip_jax.data import digits
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.evals import digits as digits_eval
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.evals.evaluator import Encoder
from clip_jax.models.clip import CLIP
from tests.conftest import COCA
from tests.evals.conftest import encoder_on, mesh_of


def reading(evaluator, first, second):
    """An encoder with an embedding for each number; an image is half as close to `second`."""
    of_text = {p: n for n in range(100) for p in digits.prompts(n, 2)}
    of_image = {
        image.tobytes(): label
        for split in ("seen", "unseen")
        for image, label in zip(*evaluator._images(split, 16), strict=True)
    }
    one = np.eye(100, dtype=np.float32)

    class Reads(Encoder):
        def numbers(self, pixels):
            return np.array([of_image[image.tobytes()] for image in pixels])

        def texts(self, texts):
            return one[[of_text[text] for text in texts]]

        def images(self, images):
            numbers = self.numbers(images)
            return one[first(numbers)] + one[second(numbers)] / 2

    small = encoder_on(mesh_of(1))
    return Reads(small.model, small.params, small.mesh, small.preprocess, small.tokenize)


def same(numbers):
    return numbers


def backwards(numbers):
    return 10 * (numbers % 10) + numbers // 10


@pytest.mark.parametrize(
    ("first", "second", "top1", "order"), [(same, backwards, 1, 1), (backwards, same, 0, 0)]
)
def test_numbers_read_backwards_are_wrong(first, second, top1, order):
    evaluator = DigitsEvalConfig(per_number=2, max_numbers=9).make()
    values = dict(evaluator.run(reading(evaluator, first, second)))
    for split in ("seen", "unseen"):
        palindromes = np.mean([n == backwards(n) for n in evaluator._splits[split]])
        assert values[f"zero_shot/{split}/top1"] == max(top1, palindromes)
        assert values[f"zero_shot/{split}/top5"] == 1
        assert values[f"zero_shot/{split}/order"] == order


def test_the_picture_has_each_image_above_the_names_of_what_it_is_taken_for(tmp_path):
    evaluator = DigitsEvalConfig(per_number=1, max_numbers=5).make()
    encoder = reading(evaluator, same, backwards)
    with mock.patch.object(digits_eval, "contact_sheet", autospec=True) as sheet:
        dict(evaluator.run(encoder, tmp_path))
    (path, images, lines), options = sheet.call_args
    assert path == tmp_path / "predictions.png"
    assert options["right"] == [True] * 10
    of = {name: evaluator._splits[name] for name in ("seen", "unseen")}
    numbers = encoder.numbers(images).tolist()
    assert numbers == [n for split in of.values() for n in sorted(split)]
    for number, (first, second, _, last) in zip(numbers, lines, strict=True):
        assert first.rpartition("  ")[0] == digits.number_words(number, 2)
        if number != backwards(number):
            assert second.rpartition("  ")[0] == digits.number_words(backwards(number), 2)
        assert last == f"({'seen' if number in of['seen'] else 'unseen'} number)"


@pytest.mark.parametrize(("shift", "expected"), [(0, 1.0), (1, 0.0)])
def test_a_caption_is_right_in_any_words_of_its_number(shift, expected):
    """As the tokenizer gives them back: "eighty - one" is 81; another number's are wrong."""
    evaluator = DigitsEvalConfig(per_number=1, max_prompts=1).make()
    encoder = reading(evaluator, same, backwards)
    text = dataclasses.replace(COCA.text, vocab_size=600, context_length=48)
    encoder = dataclasses.replace(
        encoder,
        model=CLIP(dataclasses.replace(COCA, text=text)),
        tokenize=lambda texts: make_tokenizer(text)(list(texts), 48),
    )

    def written(encoder, images, generation):
        assert generation.min_length == 1
        numbers = encoder.numbers(images).tolist()
        texts = [digits.prompts((n + shift) % 100, 2)[n % 13] for n in numbers]
        return encoder.read(encoder.tokenize(texts))

    with mock.patch.object(digits_eval, "captions", autospec=True, side_effect=written):
        values = dict(evaluator.run(encoder))
    assert values["caption/seen/exact"] == values["caption/unseen/exact"] == expected
