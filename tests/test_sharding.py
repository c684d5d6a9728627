"""The mesh and the strict table."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import sharding
from clip_jax.losses import SoftmaxConfig
from clip_jax.models import clip
from clip_jax.models.clip import CLIP
from clip_jax.optim import OptimConfig
from clip_jax.sharding import MeshConfig, make_mesh, param_shardings
from clip_jax.step import Recipe, shapes
from tests.conftest import MESHES, TINY

MESH_222 = make_mesh(MESHES["2x2x2"])


@pytest.fixture(scope="module")
def params():
    return jax.eval_shape(CLIP(TINY).init, jax.random.key(0))


def test_large_tensors_are_split_over_fsdp_and_tensor(params):
    shardings = param_shardings(TINY, params, MESH_222)
    block = shardings["visual"]["transformer"]["resblocks"]
    assert block["attn"]["in_proj"]["kernel"].spec == P(None, "fsdp", None, "tensor", None)
    assert block["mlp"]["c_proj"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert shardings["text"]["token_embedding"].spec == P(None, ("tensor", "fsdp"))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (1, 2, 4)])
def test_token_embeddings_are_looked_up_where_they_are(sizes):
    """A vocabulary of an odd size, which no mesh divides; the gradient is sharded alike."""
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    rng = np.random.default_rng(0)
    table = rng.standard_normal((901, 16)).astype(np.float32)
    ids = rng.integers(0, 901, (16, 5)).astype(np.int32)
    ids[::3] = ids[0]  # tokens that many texts have
    weights = rng.standard_normal((16, 5, 16)).astype(np.float32)
    split = NamedSharding(mesh, P(None, ("tensor", "fsdp")))
    rows = sharding.batch_sharding(mesh)
    lookup = sharding.layout(mesh).lookup

    def looked_up(table, ids, weights):
        x = lookup(table, ids)
        return (x * weights).sum(), x

    slope = jax.value_and_grad(looked_up, has_aux=True)
    args = jax.device_put((table, ids, weights), (split, rows, rows))
    (_, got), gradient = jax.jit(slope)(*args)
    np.testing.assert_array_equal(got, table[ids])
    expected = jnp.zeros((901, 16)).at[ids].add(weights)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_optimizer_state_is_sharded_as_its_parameters():
    recipe = Recipe(
        model=TINY, objective=(SoftmaxConfig(),), optim=OptimConfig(), steps=10_000, batch_size=16
    )
    shardings = jax.tree.map(lambda x: x.sharding, shapes(recipe, MESH_222)[0])
    adam = shardings.opt_state[0]
    assert adam.mu == adam.nu == shardings.params
    assert adam.count.spec == P()


def test_what_does_not_fit_the_table_is_named(params):
    mesh = make_mesh(MeshConfig())
    extra = params | {"adapter": jax.ShapeDtypeStruct((3,), "float32")}
    with pytest.raises(ValueError, match="adapter"):
        param_shardings(TINY, extra, mesh)
    missing = {name: tree for name, tree in params.items() if name != "logit_scale"}
    with pytest.raises(ValueError, match="logit_scale"):
        param_shardings(TINY, missing, mesh)
    with pytest.raises(ValueError, match=r"N=2 cannot be split over mesh axis tensor=8"):
        param_shardings(TINY, params, make_mesh(MeshConfig(data=1, fsdp=1, tensor=8)))
    stray = {"mu": {"stray": jax.ShapeDtypeStruct((2,), "float32")}}
    with pytest.raises(ValueError, match="mu/stray"):
        sharding.like_params(stray, param_shardings(TINY, params, mesh), mesh)


def test_a_parameter_without_names_of_its_dimensions_is_named(monkeypatch):
    monkeypatch.setattr(clip, "named", lambda _, init: init)
    config = replace(TINY, init_logit_scale=3.0)  # not seen before
    with pytest.raises(ValueError, match=r"\['logit_scale'\] have no names"):
        config.dimensions()


def test_meshes_that_do_not_fit_are_refused():
    assert dict(make_mesh(MeshConfig(fsdp=4)).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    with pytest.raises(ValueError, match="all 8 devices"):
        make_mesh(MeshConfig(data=3))
    with pytest.raises(ValueError, match="at most one of them -1"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(ValueError, match="batch_size=12 cannot be split over 8"):
        sharding.check_batch_size(12, make_mesh(MeshConfig()))
