"""The mesh, the sharding table, and the shares of processes."""

import functools
import math
from dataclasses import dataclass, replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import sharding
from clip_jax.errors import InputError
from clip_jax.losses import SoftmaxConfig
from clip_jax.models import clip
from clip_jax.models.clip import CLIP
from clip_jax.optim import OptimConfig
from clip_jax.sharding import MeshConfig, make_mesh, param_shardings
from clip_jax.step import Recipe, shapes
from tests.conftest import COCA, MESHES, RESNET, TINY

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


# ------------------------------------------------------------------ the table

SIZES = st.sampled_from([1, 2, 3, 4, 8])
MESH = st.builds(lambda *sizes: AbstractMesh(sizes, sharding.AXES), SIZES, SIZES, SIZES)
AXES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys("NFV", ("tensor",)),
    "D": ("fsdp",),
    "W": ("tensor", "fsdp"),
    "K": (),
    "L": (),
}
TABLES = ("", "K", "V D", "L W", "D N K", "N K D", "D F", "F D", "K L D")  # dimensions of kernels


def axes_of(spec):
    """Return the mesh axes of each dimension."""
    return [(x,) if isinstance(x, str) else tuple(x or ()) for x in spec]


@given(
    mesh=MESH,
    tables=st.lists(st.sampled_from(TABLES), min_size=1, max_size=4, unique=True),
    sizes=st.fixed_dictionaries({dim: st.sampled_from([1, 6, 8, 24, 64]) for dim in AXES}),
)
def test_each_dimension_is_split_over_its_axes_or_the_parameter_is_named(mesh, tables, sizes):
    """Optimizer state has the sharding of its parameter, except for dimensions of length 1."""
    rows = {f"{number}/kernel": dims for number, dims in enumerate(tables)}
    tree = {
        str(number): {"kernel": np.empty([sizes[dim] for dim in dims.split()], np.int8)}
        for number, dims in enumerate(tables)
    }
    splits = {dim: math.prod(mesh.shape[axis] for axis in axes) for dim, axes in AXES.items()}
    unfit = [name for name, dims in rows.items() if any(sizes[x] % splits[x] for x in dims.split())]
    if unfit:
        with pytest.raises(InputError, match=rf"^{unfit[0]} .* cannot be split over mesh axis"):
            param_shardings(TINY, tree, mesh, rows)
        return
    shardings = param_shardings(TINY, tree, mesh, rows)
    others = {"moments": tree, "means": jax.tree.map(lambda x: x[:1] if x.ndim else x, tree)}
    like = sharding.like_params(others | {"count": np.empty([])}, shardings, mesh)
    assert like["count"].spec == P()
    for name, dims in rows.items():
        number = name.partition("/")[0]
        axes = [AXES[dim] for dim in dims.split()]
        assert axes_of(shardings[number]["kernel"].spec) == axes
        for kind, array in others.items():
            shape = array[number]["kernel"].shape
            expected = [x if size > 1 else () for x, size in zip(axes, shape, strict=True)]
            assert axes_of(like[kind][number]["kernel"].spec) == expected


FAMILIES = {"CoCa": COCA, "ResNet": RESNET}


@given(family=st.sampled_from([*FAMILIES]), mesh=MESH)
def test_every_parameter_of_a_model_divides_or_the_mesh_is_refused(family, mesh):
    """No parameter has two dimensions that are sharded over the same axis."""
    config = FAMILIES[family]
    rows, shapes = table(config)
    try:
        shardings = param_shardings(config, shapes, mesh, rows)
    except InputError:
        assert max(mesh.shape.values()) > 2
        return
    for name, x in shapes.items():
        axes = axes_of(shardings[name].spec)
        used = [axis for of_dimension in axes for axis in of_dimension]
        assert len(used) == len({*used})
        for size, of_dimension in zip(x.shape, axes, strict=True):
            assert size % math.prod(mesh.shape[axis] for axis in of_dimension) == 0


@functools.cache
def table(config):
    """Return the dimensions' names and the shape of each parameter, traced once."""
    boxes = clip.parameters(config)
    names = {path: " ".join(box.names) for path, box in boxes.items()}
    return names, {path: box.value for path, box in boxes.items()}


# ------------------------------------------------------------------ meshes and batches


@given(sizes=st.tuples(SIZES, SIZES, SIZES), free=st.none() | st.integers(0, 2), extra=SIZES)
def test_a_mesh_uses_all_devices_or_is_refused(sizes, free, extra):
    names = dict(zip(sharding.AXES, sizes, strict=True))
    devices = math.prod(sizes)
    if free is not None:
        names |= {sharding.AXES[free]: -1}
    assert sharding.mesh_sizes(MeshConfig(**names), devices) == sizes
    others = devices if free is None else devices // sizes[free]
    if (devices + extra) % others or free is None:
        with pytest.raises(InputError, match=f"does not use all {devices + extra} devices"):
            sharding.mesh_sizes(MeshConfig(**names), devices + extra)


@given(shards=SIZES, each=st.integers(1, 64), rows=st.integers(1, 600))
def test_a_padded_batch_holds_its_rows_in_few_shapes(shards, each, rows):
    batch_size = shards * each
    rows = min(rows, batch_size)
    size = sharding.padded_size(rows, shards, batch_size)
    assert rows <= size <= batch_size
    assert size % shards == 0
    assert size == batch_size or (size // shards).bit_count() == 1
    assert size // 2 < rows or size == shards


@dataclass(frozen=True)
class Chip:
    """A device that this machine does not have."""

    id: int
    process_index: int
    platform: str = "tpu"
    device_kind: str = "fake"


@given(sizes=st.tuples(SIZES, SIZES, SIZES), each=SIZES)
def test_processes_read_all_shards_once_and_those_that_share_rows_the_same(sizes, each):
    """A mesh where a process would have parts of several shards is invalid."""
    devices, tensor = math.prod(sizes), sizes[2]
    each = math.gcd(each, devices)
    chips = np.array([Chip(i, i // each) for i in range(devices)], object)
    mesh = Mesh(chips.reshape(sizes), sharding.AXES)
    for process in range(devices // each):
        with mock.patch.object(jax, "process_index", autospec=True, return_value=process):
            if each < devices and each % tensor and tensor % each:
                with pytest.raises(InputError, match="unequal shards of a batch"):
                    sharding.data_part(mesh)
            else:
                width = min(max(each, tensor), devices)
                part = process * each // width, devices // width
                assert sharding.data_part(mesh) == part


def test_processes_with_unequal_numbers_of_shards_are_refused():
    chips = np.array([Chip(i, i // 4) for i in range(6)], object)
    with pytest.raises(InputError, match="unequal shards of a batch"):
        sharding.data_part(Mesh(chips.reshape(6, 1, 1), sharding.AXES))


# ------------------------------------------------------------------ lookup and errors


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (1, 2, 4)])
def test_token_embeddings_are_looked_up_where_they_are(sizes):
    """No mesh divides the vocabulary, whose size is odd. The gradient has the table's sharding."""
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
