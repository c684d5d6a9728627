"""What of a model is a linear map, in which layer, and what decays."""

import re

import jax
import pytest

from clip_jax.models import zoo
from clip_jax.optim.matrices import matrix_of, with_names
from clip_jax.optim.optimizer import decay_mask
from clip_jax.sharding import path_name
from tests.optim.conftest import names_only


@pytest.mark.parametrize(
    "name",
    [
        "ViT-B/32",
        "ViT-M-16-alt",
        "ViT-B-16-SigLIP",
        "PE-Core-B-16",
        "RN50",
        "coca_ViT-L-14",
        "mammut_ViT-L-14",
    ],
)
def test_linear_maps_and_what_decays_are_known_by_name(name):
    """All kernels but those of patches are linear; gains, biases and scalars do not decay."""
    config = zoo.get(name)
    tree = names_only(config)
    stacks = with_names(config.dimensions(), lambda names, _: bool(matrix_of(names)), tree)
    kernels = {"kernel", "proj", "text_projection", "image_projection"}
    tables = {"token_embedding", "positional_embedding", "latent", "query", "vocab_projection"}
    decays = jax.tree.leaves(decay_mask(tree))
    leaves = jax.tree_util.tree_leaves_with_path(stacks)
    for (path, is_linear), decayed in zip(leaves, decays, strict=True):
        name = path_name(path)
        last = name.rpartition("/")[2]
        assert is_linear == (last in kernels and not re.search("conv|downsample", name)), name
        assert decayed == (last in kernels | tables), name


def test_the_axes_of_a_matrix():
    assert matrix_of(["depth", "D", "S", "N", "K"]) == ((1,), (3, 4))
    assert matrix_of(["depth", "N", "K", "D"]) == ((1, 2), (3,))
    assert matrix_of(["depth", "S", "N", "K"]) is None
