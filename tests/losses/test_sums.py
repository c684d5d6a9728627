"""What a loss of a user may sum; tests/mesh compares such losses with their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.errors import InputError
from clip_jax.losses import SoftmaxConfig, contrastive_loss
from clip_jax.losses.sums import ExpSum, Max, SumOf
from clip_jax.sharding import MeshConfig, make_mesh


def test_a_statistic_that_every_loss_has_cannot_be_defined_again() -> None:
    class Taken(SoftmaxConfig):
        def sums(self, scale, bias):
            return {"count": SumOf(lambda pairs: pairs.cosine)}

    image = jnp.eye(2)
    with pytest.raises(InputError, match=r"Taken\.sums defines count, .* give yours another name"):
        contrastive_loss(Taken(), image, image, jnp.float32(1))


def test_a_statistic_that_the_loss_does_not_have_is_named_with_those_that_it_has() -> None:
    class Misspelt(SoftmaxConfig):
        def sums(self, scale, bias):
            return {"negatives": Max(lambda pairs: pairs.cosine, has_gradient=True)}

        def losses(self, image, text, scale, bias):
            return image["negativs"]

    features = np.eye(2, dtype=np.float32)
    message = r"Misspelt\.losses looks up 'negativs'; .* are top, negatives, .*, count\."
    with pytest.raises(InputError, match=message):
        jax.eval_shape(lambda x: contrastive_loss(Misspelt(), x, x, x[0, 0]), features)


def test_a_maximum_that_the_loss_does_not_have_is_named_with_those_that_it_has() -> None:
    class Misspelt(SoftmaxConfig):
        def sums(self, scale, bias):
            return {"others": ExpSum("topp")}

    features = np.eye(2, dtype=np.float32)
    message = r"Misspelt\.sums: others is relative to 'topp', which is no maximum; these are top\."
    with pytest.raises(InputError, match=message):
        jax.eval_shape(lambda x: contrastive_loss(Misspelt(), x, x, x[0, 0]), features)


def test_an_axis_that_the_mesh_lacks_is_named_with_those_that_it_has() -> None:
    mesh, features = make_mesh(MeshConfig(), jax.devices()[:1]), jnp.eye(2)
    with pytest.raises(InputError, match=r"no axis 'dta'; its axes are data, fsdp, tensor\."):
        contrastive_loss(
            SoftmaxConfig(), features, features, features[0, 0], mesh=mesh, axes=("dta",)
        )
