"""Statistics of a loss of a user's module; tests/mesh compares every kind with its definition."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.errors import InputError
from clip_jax.losses import Contrastive, SoftmaxConfig, contrastive_loss
from clip_jax.losses.pairs import MASKED, Pairs
from clip_jax.losses.sums import ExpSum, Max, SumOf
from clip_jax.models.clip import l2_normalize
from tests.conftest import assert_close

EMBED = 16


def negatives(pairs: Pairs) -> jax.Array:
    return jnp.where(pairs.positive, MASKED, pairs.cosine)


@dataclass(frozen=True, kw_only=True)
class Hinge(Contrastive):
    """A margin to the hardest negative (VSE++), relative to which a share of all others counts."""

    margin: float = 0.2

    def sums(self, scale, bias):
        return {
            "hardest": Max(negatives, has_gradient=True),
            "others": ExpSum("hardest", 3.0, times=lambda pairs: pairs.cosine),
        }

    def losses(self, image, text, scale, bias):
        def hinge(x):
            return jax.nn.relu(self.margin + x["hardest"] - x["positive"]) + 0.1 * x["others"]

        return hinge(image), hinge(text)


def test_a_maximum_that_several_pairs_reach_shares_its_gradient() -> None:
    """Equal texts are equally hard negatives, in one block or in several."""
    image = l2_normalize(np.random.default_rng(0).normal(size=(4, EMBED)).astype(np.float32))
    text = image[[0, 1, 1, 1]]

    def gradients(form: Any) -> Any:
        def value(image: Any, text: Any) -> Any:
            config = Hinge(form=form, block_size=3, margin=1.0)
            return contrastive_loss(config, image, text, jnp.float32(1))[0]

        return jax.jit(jax.grad(value, (0, 1)))(image, text)

    assert_close(gradients("dense"), gradients("blocked"))


def test_a_statistic_that_every_loss_has_cannot_be_defined_again() -> None:
    class Taken(SoftmaxConfig):
        def sums(self, scale, bias):
            return {"count": SumOf(lambda pairs: pairs.cosine)}

    image = jnp.eye(2)
    with pytest.raises(InputError, match=r"Taken\.sums defines count, .* give yours another name"):
        contrastive_loss(Taken(), image, image, jnp.float32(1))
