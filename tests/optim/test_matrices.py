"""What of a model is a linear map, and in which layer."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models import zoo
from clip_jax.models.dimensions import table
from clip_jax.optim.matrices import stack_of, with_names
from clip_jax.sharding import path_name
from tests.optim.conftest import names_only


@pytest.mark.parametrize(
    "name", ["ViT-B/32", "ViT-B-16-SigLIP", "RN50", "coca_ViT-L-14", "mammut_ViT-L-14"]
)
def test_linear_maps_are_all_kernels_but_patches_and_tables(name):
    config = zoo.get(name)
    stacks = with_names(table(config), lambda names, _: bool(stack_of(names)), names_only(config))
    for path, is_linear in jax.tree_util.tree_leaves_with_path(stacks):
        name = path_name(path)
        last = name.rpartition("/")[2]
        is_weight = last in ("kernel", "proj", "text_projection", "image_projection")
        assert is_linear == (is_weight and not re.search("conv|downsample", name)), name


def test_functions_of_matrices_are_applied_to_each():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 3, 2, 5)), jnp.float32)
    stack = stack_of(["depth", "D", "S", "N", "K"])
    assert stack.sizes(x.shape) == (6, 10)
    got = stack.apply(lambda m: m @ m.mT @ m, x)
    one = np.asarray(x[1, :, 2]).reshape(6, 10)
    np.testing.assert_allclose(got[1, :, 2].reshape(6, 10), one @ one.T @ one, rtol=1e-4)
    assert stack_of(["depth", "S", "N", "K"]) is None
