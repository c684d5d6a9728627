"""An objective of several terms: what each sees, what its metrics are named, what it draws, and
which objectives are refused. `tests/mesh/losses/test_objective.py` trains with terms of its own."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.errors import InputError
from clip_jax.losses import (
    CaptionConfig,
    Context,
    DistillationConfig,
    Parameter,
    SigmoidConfig,
    SoftmaxConfig,
    StoredTeacher,
    Term,
    objective,
)
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.lora import LoRAConfig, draw
from clip_jax.models.text_lengths import TextLengths
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Program, Recipe, State, context
from tests.conftest import CAPPA, COCA, MAMMUT, OPTIM, TINY, by_path


def test_each_term_sees_what_it_carries_itself() -> None:
    @dataclass(frozen=True, kw_only=True)
    class First(Term):
        name: ClassVar[str] = "first"

        def init(self, params):
            return {"count": 1}

        def update(self, x: Context):
            return {"count": 10 * x.carried["count"]}

    @dataclass(frozen=True, kw_only=True)
    class Second(First):
        name: ClassVar[str] = "second"

        def init(self, params):
            return {"count": 2}

    both = (First(), Second())
    begun = objective.init(both, {})
    state = State(jnp.zeros((), jnp.int32), {}, {}, begun)
    x = context(CLIP(TINY), make_mesh(MeshConfig(), jax.devices()[:1]), state, {}, {}, {})
    assert objective.update(both, x) == {"first": {"count": 10}, "second": {"count": 20}}


def test_a_term_without_weight_is_not_computed_and_keeps_what_it_carries() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Costly(CaptionConfig):
        def encode(self, x: Context):
            raise AssertionError("computed")

        loss = update = encode

    terms = (SoftmaxConfig(), Costly(weight=0.0))
    assert objective.needs(terms) == ()
    features = jnp.eye(4, TINY.embed_dim)
    state = State(jnp.zeros((), jnp.int32), {}, {}, {"caption": 3})
    scalars = {"logit_scale": jnp.zeros(())}
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    x = context(CLIP(COCA), mesh, state, scalars, {}, {"image": features, "text": features})
    x = replace(x, outputs=objective.encode(terms, x))
    value, metrics = objective.total(terms, x)
    alone, expected = objective.total(terms[:1], x)
    assert value == alone
    assert metrics == expected | {"contrastive_loss": alone}  # as in stages in which it has one
    assert objective.update(terms, x) == {"caption": 3}


def test_captions_alone_train_a_text_tower_that_a_decoder_or_a_term_needs() -> None:
    @dataclass(frozen=True, kw_only=True)
    class WithTexts(CaptionConfig):
        @property
        def needs(self):
            return (*super().needs, "text_tokens:-1")

    alone = (CaptionConfig(),)
    idle = [objective.idle(alone, model) for model in (COCA, MAMMUT, CAPPA)]
    assert idle == [(), (), ("text",)]
    assert objective.idle((WithTexts(),), CAPPA) == ()


@pytest.mark.usefixtures("unchecked_types")
def test_a_metric_of_several_terms_has_their_names_and_none_is_overwritten() -> None:
    """A later term's accuracy replaced an earlier term's, and the step's loss a term's own."""

    @dataclass(frozen=True, kw_only=True)
    class First(Term):
        name: ClassVar[str] = "first"

        def loss(self, x: Context):
            return 1.0, {"accuracy": 0.25, "norm": 2.0, "loss": 3.0, "second_loss": 4.0}

    @dataclass(frozen=True, kw_only=True)
    class Second(Term):
        name: ClassVar[str] = "second"

        def loss(self, x: Context):
            return 5.0, {"accuracy": 0.75}

    state = State(jnp.zeros((), jnp.int32), {}, {})
    x = context(CLIP(TINY), make_mesh(MeshConfig(), jax.devices()[:1]), state, {}, {}, {})
    alone = {"accuracy": 0.25, "norm": 2.0, "first/loss": 3.0, "second_loss": 4.0}
    assert objective.total((First(),), x) == (1.0, alone)
    value, metrics = objective.total((First(), Second(weight=2.0)), x)
    assert value == 11.0
    assert metrics == {
        "first_loss": 1.0,
        "first/accuracy": 0.25,
        "first/loss": 3.0,
        "first/second_loss": 4.0,
        "norm": 2.0,
        "second_loss": 5.0,
        "second/accuracy": 0.75,
    }


def test_the_names_of_the_steps_own_metrics_are_known_to_the_objective() -> None:
    """A term's metric of another name of the step would be overwritten."""
    optim = replace(OPTIM, skip_norm_ratio=10.0)
    lengths = TextLengths(tokens=(4, 8), shares=(0.5, 0.5))
    recipe = Recipe(model=TINY, optim=optim, steps=10, batch_size=16, text_lengths=lengths)
    run = Program(recipe, make_mesh(MeshConfig(), jax.devices()[:1]))
    _, metrics = jax.eval_shape(run.step, run.state, run.batch)
    of_term = {"image_to_text_accuracy", "text_to_image_accuracy"}
    assert metrics.keys() == objective.OF_STEP | of_term


def test_inputs_of_two_terms_by_one_name_are_refused_unless_they_are_equal() -> None:
    """The second teacher's embeddings replaced the first's in the batch."""

    @dataclass(frozen=True, kw_only=True)
    class Second(DistillationConfig):
        name: ClassVar[str] = "second"

    first = DistillationConfig(teachers=(StoredTeacher(embed_dim=8),))
    same, other = (Second(teachers=(StoredTeacher(embed_dim=x),)) for x in (8, 12))
    assert objective.reads((first, same), TINY) == first.reads(TINY)
    with pytest.raises(InputError, match=r"term 'second' and an earlier one .* 'stored_image'"):
        objective.check((first, other), TINY)


def test_each_term_draws_its_own_numbers_whatever_else_is_drawn() -> None:
    """Terms with equal shapes began equal, and adapters in the order of a term's numbers."""

    @dataclass(frozen=True, kw_only=True)
    class Other(Term):
        name: ClassVar[str] = "other"

        def parameters(self, model: CLIPConfig):
            return {"a": Parameter((96,), "-"), "b": Parameter((96,), "-")}

    @dataclass(frozen=True, kw_only=True)
    class More(Other):
        name: ClassVar[str] = "more"

    key = jax.random.key(0)
    lora = LoRAConfig(rank=3, targets=("visual/proj", "text/text_projection"))
    adapters = by_path(draw(TINY, lora, key))
    drawn, alone = (objective.draw(x, TINY, key) for x in ((More(), Other()), (Other(),)))
    jax.tree.map(np.testing.assert_array_equal, drawn["other"], alone["other"])
    arrays = [x.ravel() for x in (*adapters.values(), *by_path(drawn).values()) if x.any()]
    assert [x.size for x in arrays] == [96] * 6
    ranks = np.argsort(np.argsort(arrays))
    assert np.abs(np.corrcoef(ranks) - np.eye(6)).max() < 0.5


def test_what_terms_need_of_the_towers_has_one_order_in_every_process() -> None:
    views = tuple(f"image:view_{number}" for number in range(20))  # a set would shuffle them

    class First(Term):
        needs: ClassVar[tuple[str, ...]] = views[10:]

    class Second(Term):
        needs: ClassVar[tuple[str, ...]] = views[:15]

    assert objective.needs((First(), Second())) == views[10:] + views[:10]


def test_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"widths=\(8, 4\); list different widths, ascending"):
        SoftmaxConfig(widths=(8, 4))
    with pytest.raises(InputError, match="width_weights has 1 factors, but widths has 2"):
        SoftmaxConfig(widths=(4, 8), width_weights=(1.0,))
    with pytest.raises(InputError, match=r"widths=\(4, 16\), but embeddings have 16 channels"):
        objective.check((SoftmaxConfig(widths=(4, 16)),), TINY)


def test_an_objective_that_does_not_fit_is_refused() -> None:
    def recipe(model: CLIPConfig, *terms: Any) -> Recipe:
        return Recipe(model=model, objective=terms, optim=OPTIM, steps=10, batch_size=16)

    for terms, message in (
        ((), "terms none with the weights"),
        ((SoftmaxConfig(), SoftmaxConfig()), "contrastive, contrastive .* each term only once"),
        ((SoftmaxConfig(weight=0.0),), r"\[0\.0\]; it must have at least one weight above 0"),
        ((SoftmaxConfig(), CaptionConfig()), "needs model.decoder; use a CaptionConfig"),
        ((SigmoidConfig(),), "set model.init_logit_bias"),
    ):
        with pytest.raises(InputError, match=message):
            recipe(TINY, *terms)
    with pytest.raises(InputError, match=r"does not train model\.decoder"):
        recipe(COCA, SoftmaxConfig())
