"""Embeddings of any number of rows on a mesh, which evaluator has its turn, and what it gives."""

import dataclasses
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from clip_jax import sharding
from clip_jax.errors import InputError
from clip_jax.evals.evaluator import Evaluations, embed_images, embed_texts
from clip_jax.evals.ranks import NotFinite
from clip_jax.models.clip import CLIP, l2_normalize
from tests.evals.conftest import SMALL, drawn, encoder_on, mesh_of


def test_embeddings_on_a_mesh_are_the_pure_functions():
    """Several batches, the last one part empty; bytes are normalised, floats are taken as such."""
    rng, model, params = np.random.default_rng(0), CLIP(SMALL), drawn()
    pixels = rng.integers(0, 256, (13, 16, 16, 3), np.uint8)
    tokens = rng.integers(1, 600, (13, 16), np.int32)
    mesh = mesh_of(8, data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, sharding.param_shardings(SMALL, params, mesh))
    encoder = dataclasses.replace(encoder_on(mesh), params=placed)

    @jax.jit
    def plain(params, pixels, tokens):
        normal = model.normalize(pixels)
        features = model.encode_image(params, normal), model.encode_text(params, tokens)
        return normal, *features, *map(l2_normalize, features)

    normal, raw, _, images, texts = map(np.asarray, plain(params, pixels, tokens))
    got = encoder.compute(embed_images, pixels, batch_size=6)  # eight, for four shards
    np.testing.assert_allclose(got, images, atol=1e-5)
    got = encoder.compute(embed_images, normal, normalize=False)
    np.testing.assert_allclose(got, raw, rtol=1e-4, atol=1e-4)
    got = encoder.compute(embed_texts, tokens, batch_size=6)
    np.testing.assert_allclose(got, texts, atol=1e-5)


def test_texts_are_embedded_once_for_all_data_sets():
    encoder = encoder_on(mesh_of(1))
    calls = []

    def encode(run, mesh, params, tokens, *, batch_size=0):
        calls.append(len(tokens))
        return tokens[:, :3].astype(np.float32)

    with mock.patch.object(sharding, "in_batches", autospec=True, side_effect=encode):
        first = encoder.classes(["a {c}", "the {c}"], ["cat", "dog"])
        again = encoder.classes(["the {c}", "one {c}"], ["dog", "cat"])
    assert calls == [4, 2]
    assert first.shape == (2, 2, 3)
    np.testing.assert_array_equal(again[0], first[1][::-1])
    np.testing.assert_array_equal(first[1], encoder.tokenize(["the cat", "the dog"])[:, :3])
    # Another set of parameters is another encoder: it knows nothing of these.
    assert not dataclasses.replace(encoder)._embedded


@dataclasses.dataclass
class Fixed:
    """An evaluator, and its own config, that finds the same every time."""

    every_steps: int
    values: dict[str, float]

    def make(self):
        return self

    outputs: list = dataclasses.field(default_factory=list, kw_only=True)

    def run(self, encoder, output=None):
        self.outputs.append(output)
        yield from self.values.items()


@dataclasses.dataclass
class Named(Fixed):
    names: tuple[str, ...]  # its data sets, which are known before its results


def test_each_has_its_turn_and_all_at_the_last_step():
    first, second = Fixed(2, {"a": 0.5}), Fixed(3, {"b": 4.0})
    evaluations, folder = Evaluations([first, second], 11), Path("evals")
    assert [step for step in range(1, 12) if evaluations.due(step)] == [2, 3, 4, 6, 8, 9, 10, 11]
    encoder = encoder_on(mesh_of(1))
    assert list(evaluations.run(3, encoder, folder)) == [{"b": 4.0}]
    assert list(evaluations.run(11, encoder, folder)) == [{"a": 0.5}, {"b": 4.0}]
    assert (first.outputs, second.outputs) == ([folder], [None, folder])  # written at the end
    assert Evaluations([Named(2, {}, ("x", "y")), Fixed(1, {})], 1).measured() == ["x", "y"]


@pytest.mark.parametrize("every", [0, -1])
def test_an_evaluator_runs_every_step_at_most(every):
    with pytest.raises(InputError, match=f"Fixed has every_steps={every}; it must be at least 1"):
        Evaluations([Fixed(every, {})], 1)


def test_the_tables_of_a_second_suite_have_a_folder_of_their_own():
    """Both write results.csv; the first suite's would be lost."""
    suites = [Named(1, {}, (name,)) for name in ("a", "b", "c")]
    others = [Fixed(1, {}), Fixed(1, {})]
    each = [others[0], suites[0], suites[1], others[1], suites[2]]
    list(Evaluations(each, 1).run(1, encoder_on(mesh_of(1)), Path("evals")))
    assert [x.outputs for x in others] == [[Path("evals")]] * 2
    assert [x.outputs for x in suites] == [
        [Path("evals")],
        [Path("evals/suite_2")],
        [Path("evals/suite_3")],
    ]


@dataclasses.dataclass
class Broken(Fixed):
    """An evaluator that raises this error."""

    error: InputError

    def run(self, encoder, output=None):
        raise self.error
        yield


def test_an_evaluator_of_embeddings_that_are_not_finite_fails_alone():
    """Otherwise NaN at one step would end a training run, or an evaluator's other errors not."""
    encoder, broken = encoder_on(mesh_of(1)), Broken(1, {}, NotFinite("3 of 4 rows"))
    evaluations = Evaluations([broken, Fixed(1, {"b": 4.0})], 2)
    assert list(evaluations.run(1, encoder, Path())) == [{"failed": "3 of 4 rows"}, {"b": 4.0}]
    evaluations.check_gives("a")  # whose metrics are still unknown
    with pytest.raises(InputError, match="no such file"):
        list(Evaluations([Broken(1, {}, InputError("no such file"))], 2).run(1, encoder, Path()))


@pytest.mark.parametrize("value", [1e25, 1e38, np.nan])
def test_embeddings_that_are_not_finite_are_counted(value):
    """Weights may be finite, and their products not."""
    encoder = encoder_on(mesh_of(8))
    params = encoder.params["visual"] | {"proj": encoder.params["visual"]["proj"] * value}
    encoder = dataclasses.replace(encoder, params=encoder.params | {"visual": params})
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    with pytest.raises(NotFinite, match=r"^5 of 5 rows of the model's outputs \(embed_images\) "):
        encoder.images(pixels)
    assert np.isfinite(encoder.texts(["a cat"])).all()


def test_a_result_that_no_evaluator_gives_is_refused_with_those_that_exist():
    evaluations = Evaluations([Fixed(2, {"a/acc1": 0.5}), Fixed(3, {"info_nce": 4.0})], 12)
    encoder = encoder_on(mesh_of(1))
    for step in (2, 3):  # each the turn of one
        evaluations.check_gives("b")  # nobody knows yet
        list(evaluations.run(step, encoder, Path()))
    evaluations.check_gives("info_nce")
    with pytest.raises(
        InputError, match=r"'b' is not a metric of .* which yield a/acc1, info_nce\."
    ):
        evaluations.check_gives("b")
    with pytest.raises(InputError, match="which yield none"):
        Evaluations([], 12).check_gives("b")
    evaluations = Evaluations([Named(2, {"a/acc1": 0.5}, ("a",))], 12)
    evaluations.check_gives("a/acc5")
    with pytest.raises(InputError, match=r"which yield a/\*"):
        evaluations.check_gives("imagenet1k/acc1")
