"""What a loss of a user may sum; tests/mesh compares such losses with their definitions."""

import jax.numpy as jnp
import pytest

from clip_jax.errors import InputError
from clip_jax.losses import SoftmaxConfig, contrastive_loss
from clip_jax.losses.sums import SumOf


def test_a_statistic_that_every_loss_has_cannot_be_defined_again() -> None:
    class Taken(SoftmaxConfig):
        def sums(self, scale, bias):
            return {"count": SumOf(lambda pairs: pairs.cosine)}

    image = jnp.eye(2)
    with pytest.raises(InputError, match=r"Taken\.sums defines count, .* give yours another name"):
        contrastive_loss(Taken(), image, image, jnp.float32(1))
