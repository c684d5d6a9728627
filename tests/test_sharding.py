"""The mesh and the strict table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import sharding
from clip_jax.losses import SoftmaxConfig
from clip_jax.models import zoo
from clip_jax.models.clip import CLIP
from clip_jax.optim import OptimConfig
from clip_jax.sharding import MeshConfig, make_mesh, param_shardings
from clip_jax.step import Recipe, shapes
from tests.conftest import TINY


# One for each kind of tower and option.
@pytest.mark.parametrize(
    "name",
    [
        "ViT-B/32",
        "ViT-M-16-alt",
        "ViT-L-14-CLIPA",
        "ViT-B-16-SigLIP",
        "ViT-bigG-14",
        "RN50",
        "coca_ViT-L-14",
        "coca_base",
        "mammut_ViT-L-14",
        "mammut_ViT-S-16",
    ],
)
def test_the_table_knows_every_parameter_of_the_zoo_and_nothing_else(name):
    config = zoo.get(name)
    params = jax.eval_shape(CLIP(config).init, jax.random.key(0))
    param_shardings(config, params, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))


def test_large_tensors_are_split_over_fsdp_and_tensor():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = jax.eval_shape(CLIP(TINY).init, jax.random.key(0))
    shardings = param_shardings(TINY, params, mesh)
    block = shardings["visual"]["transformer"]["resblocks"]
    assert block["attn"]["in_proj"]["kernel"].spec == P(None, "fsdp", None, "tensor", None)
    assert block["mlp"]["c_proj"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert shardings["text"]["token_embedding"].spec == P(None, ("tensor", "fsdp"))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_words_are_looked_up_where_they_lie(sizes):
    """A table of an odd number of words, which no mesh divides; its gradient lies as it does."""
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    rng = np.random.default_rng(0)
    table = rng.standard_normal((901, 16)).astype(np.float32)
    ids = rng.integers(0, 901, (16, 5)).astype(np.int32)
    ids[::3] = ids[0]  # words that many texts have
    weights = rng.standard_normal((16, 5, 16)).astype(np.float32)
    lies = NamedSharding(mesh, P(None, ("tensor", "fsdp")))
    rows = sharding.batch_sharding(mesh)
    lookup = sharding.layout(mesh).lookup

    def looked_up(table, ids, weights):
        x = lookup(table, ids)
        return (x * weights).sum(), x

    slope = jax.value_and_grad(looked_up, has_aux=True)
    args = jax.device_put((table, ids, weights), (lies, rows, rows))
    (_, found), gradient = jax.jit(slope)(*args)
    np.testing.assert_array_equal(found, table[ids])
    expected = jnp.zeros((901, 16)).at[ids].add(weights)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_optimizer_state_lies_where_its_parameters_lie():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    recipe = Recipe(
        model=TINY, loss=SoftmaxConfig(), optim=OptimConfig(), steps=10_000, batch_size=16
    )
    shardings = jax.tree.map(lambda x: x.sharding, shapes(recipe, mesh)[0])
    adam = shardings.opt_state[0]
    assert adam.mu == adam.nu == shardings.params
    assert adam.count.spec == P()


def test_a_parameter_without_a_row_and_a_row_without_a_parameter_are_named():
    mesh = make_mesh(MeshConfig())
    params = jax.eval_shape(CLIP(TINY).init, jax.random.key(0))
    extra = params | {"adapter": jax.ShapeDtypeStruct((3,), "float32")}
    with pytest.raises(ValueError, match="adapter"):
        param_shardings(TINY, extra, mesh)
    missing = {name: tree for name, tree in params.items() if name != "logit_scale"}
    with pytest.raises(ValueError, match="logit_scale"):
        param_shardings(TINY, missing, mesh)


def test_a_dimension_that_does_not_divide_is_named():
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=8))
    params = jax.eval_shape(CLIP(TINY).init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"N=2 cannot be split over mesh axis tensor=8"):
        param_shardings(TINY, params, mesh)


def test_something_that_mirrors_no_parameter_is_named():
    mesh = make_mesh(MeshConfig())
    shardings = param_shardings(TINY, jax.eval_shape(CLIP(TINY).init, jax.random.key(0)), mesh)
    stray = {"mu": {"stray": jax.ShapeDtypeStruct((2,), "float32")}}
    with pytest.raises(ValueError, match="mu/stray"):
        sharding.like_params(stray, shardings, mesh)


def test_meshes_that_do_not_fit_are_refused():
    assert dict(make_mesh(MeshConfig(fsdp=4)).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    with pytest.raises(ValueError, match="all 8 devices"):
        make_mesh(MeshConfig(data=3))
    with pytest.raises(ValueError, match="at most one of them -1"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(ValueError, match="batch_size=12 cannot be split over 8"):
        sharding.check_batch_size(12, make_mesh(MeshConfig()))


@pytest.mark.long
def test_parameters_are_born_sharded():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    model = CLIP(TINY)
    shardings = param_shardings(TINY, jax.eval_shape(model.init, jax.random.key(0)), mesh)
    params = jax.jit(functools.partial(model.init), out_shardings=shardings)(jax.random.key(0))
    embedding = params["text"]["token_embedding"]
    assert embedding.addressable_shards[0].data.shape == (520, 32 // 4)
