"""The collectives of the compiled step, as XLA's text of the program lists them.

A step may gather parameters and token ids over `fsdp`, and the embeddings [B, E] and vectors [B] of
the loss. It never gathers the token embedding table, only the embeddings of a batch's tokens. Each
device sums only its own shard of a sharded parameter's gradient.
"""

import functools
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import pytest
from jax.sharding import Mesh

from clip_jax import processes, sharding
from clip_jax import train as training
from clip_jax.pods import compile as pod
from clip_jax.pods.collectives import collectives
from clip_jax.pods.compile import Facts, Request
from clip_jax.pods.topology import Topology
from clip_jax.serialize import from_dict, to_dict
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Program
from tests.conftest import tiny_digits
from tests.pods.conftest import BATCH, MODEL, module, recipe

Sizes = tuple[int, int, int]  # of the axes data, fsdp, tensor
MESH, TOPOLOGY = MeshConfig(data=2, fsdp=4), Topology.parse("v5e:2x4")


@functools.cache
def program(sizes: Sizes, form: str = "dense") -> Program:
    mesh = MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    return Program(recipe(form=form), make_mesh(mesh))


@pytest.fixture(scope="module")
def planned() -> tuple[Facts, str]:
    """Return the facts that `plan` reads from a step compiled for CPU devices, and XLA's text."""
    request = Request(recipe=recipe(), mesh=MESH, topology=TOPOLOGY)
    with mock.patch.object(
        pod, "collectives", autospec=True, side_effect=pod.collectives
    ) as reader:
        facts = pod.facts(request, jax.devices())
    return facts, reader.call_args.args[0]


class Shapes(NamedTuple):
    """The dims of parameters, in the forms in which a program may have them (see `_dims`)."""

    split: set[tuple[int, ...]]  # parameters that are sharded over fsdp, gathered
    replicated: set[tuple[int, ...]]  # all others
    gradients: set[tuple[int, ...]]  # of the former, if they were not sharded over fsdp
    shards: set[tuple[int, ...]]  # and as they are


def shapes_of(params: Any, mesh: Mesh) -> Shapes:
    """Return the shapes of parameters on a mesh."""
    shapes, tensor = Shapes(set(), set(), set(), set()), mesh.shape["tensor"]
    for x in jax.tree.leaves(params):
        spec = [a if isinstance(a, tuple) else (a,) for a in x.sharding.spec]
        is_split = any("fsdp" in axes for axes in spec)
        if is_split:
            pairs = list(zip(x.shape, [*spec, *[()] * len(x.shape)], strict=False))
            shard = tuple(d // math.prod(mesh.shape[a] for a in axes if a) for d, axes in pairs)
            unsplit = tuple(d // tensor if "tensor" in axes else d for d, axes in pairs)
            shapes.shards.update(map(_dims, (shard, shard[1:])))
            shapes.gradients.update(map(_dims, (unsplit, unsplit[1:])))
        forms = shapes.split if is_split else shapes.replicated
        forms.update(map(_dims, _forms(x.shape, tensor)))
    return shapes


def _forms(shape: tuple[int, ...], tensor: int) -> Iterator[tuple[int, ...]]:
    """Yield the shapes that the compiler may give to a parameter.

    It may take a layer from the stack, merge the axes of an attention projection or of the patch
    embedding, and split an axis over tensor.
    """
    layer = shape[1:]
    merged = []
    if len(shape) == 4 and shape[0] == shape[1]:
        merged = [(math.prod(shape[:-1]), shape[-1])]
    if len(layer) > 2:
        merged += [(layer[0], math.prod(layer[1:])), (math.prod(layer[:-1]), layer[-1])]
    for dims in (shape, layer, *merged):
        yield dims
        for i, size in enumerate(dims):
            if size % tensor == 0:
                yield (*dims[:i], size // tensor, *dims[i + 1 :])


def faults(text: str, sizes: Sizes) -> list[str]:
    """Describe the collectives of a compiled step that the module's docstring does not allow."""
    mesh = program(sizes).mesh
    shapes = shapes_of(program(sizes).state.params, mesh)
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    rows = (BATCH, BATCH // fsdp, BATCH // data)
    features = {_dims((BATCH,)), *(_dims((n, MODEL.embed_dim)) for n in rows)}
    length, width = MODEL.text.context_length, MODEL.text.width
    ids = ("s32", (BATCH // data, length))
    words = (BATCH // sharding.batch_shards(mesh), length, width)
    result = []
    for x in collectives(text, mesh.shape):
        for dtype, shape in x.arrays:
            dims = _dims(shape)
            is_allowed = (
                (dims in shapes.split and x.axes == ("fsdp",))
                or (
                    _dims((math.prod(shape[:-1]), *shape[-1:])) in features
                    and set(x.axes) <= set(sharding.BATCH_AXES)
                )
                or ((dtype, shape) == ids and x.axes == ("fsdp",))
                or (shape == words and x.axes == ("tensor",))
            )
            if x.kind == "all-gather" and not is_allowed:
                result.append(f"gather of {shape} over {x.axes}: {x.source}")
            copied = shapes.split if "fsdp" in x.axes else shapes.gradients - shapes.shards
            if x.kind == "all-reduce" and "data" in x.axes and dims in copied - shapes.replicated:
                result.append(f"replicated gradient {shape} over {x.axes}: {x.source}")
    return result


def _dims(dims: tuple[int, ...]) -> tuple[int, ...]:
    """Return dims in any order, without those of length 1."""
    return tuple(sorted(d for d in dims if d > 1))


@pytest.mark.parametrize(("sizes", "form"), [((2, 4, 1), "dense"), ((2, 2, 2), "ring")])
def test_only_parameters_and_features_are_gathered_and_gradients_stay_split(sizes, form, planned):
    text = planned[1]
    if form == "ring":
        sharded = program(sizes, form)
        text = sharded.step.lower(sharded.state, sharded.batch).compile().as_text()
    assert faults(text, sizes) == []
    assert f"[{BATCH},{MODEL.text.context_length},{MODEL.text.width}]" not in text
    mesh = program(sizes).mesh
    blocks = [
        x
        for x in collectives(text, mesh.shape)
        if x.kind == "all-gather" and "transformer/while" in x.source
    ]
    assert blocks
    assert all(x.times == MODEL.text.depth for x in blocks)  # one layer at a time


def test_collectives_that_are_not_allowed_are_named():
    fsdp, data, both = "{{0,1,2,3},{4,5,6,7}}", "{{0,4},{1,5},{2,6},{3,7}}", "{{0,1,2,3,4,5,6,7}}"
    for kind, dims, groups, fault in (
        ("all-gather", (48, 12, 40), fsdp, "gather of"),  # activations
        ("all-gather", (48, 48), both, "gather of"),  # logits
        ("all-gather", (32, 96), both, "gather of"),  # parameters are split by fsdp alone
        ("all-gather", (32, 96), fsdp, None),
        ("all-gather", (48, 20), both, None),
        ("all-reduce", (32, 96), both, "replicated gradient"),
        ("all-reduce", (32, 24), data, None),
    ):
        shape = f"f32[{','.join(map(str, dims))}]{{1,0}}"
        line = f"  %x = {shape} {kind}(%a), channel_id=1, replica_groups={groups}"
        lines = [line.partition(" over ")[0] for line in faults(module(line), (2, 4, 1))]
        assert lines == ([f"{fault} {dims}"] if fault else [])


class Recorded(Program):
    """A program that raises EOFError, with its StableHLO, instead of compiling."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        lower = self.step.lower

        def stop(state: Any, batch: Any) -> None:
            raise EOFError(lower(state, batch).as_text())

        self.step = mock.Mock(side_effect=stop, lower=stop)

    def init(self, params: Any = None, frozen: Any = None) -> Any:
        shapes = jax.eval_shape(super().init)
        return jax.tree.map(
            lambda x, placed: x.update(sharding=placed.sharding), shapes, self.state
        )


def test_plan_compiles_what_train_runs(tmp_path):
    """The StableHLO and the compiler options are the same."""
    options = {"xla_cpu_enable_fast_math": False}
    config = tiny_digits(steps=3, evals=(), mesh=MESH)
    request = Request(recipe=config.recipe, mesh=MESH, topology=TOPOLOGY)
    with (
        mock.patch.object(training, "Program", Recorded),
        mock.patch.object(pod, "Program", Recorded),
        mock.patch.object(pod, "peak", autospec=True, return_value=0),
        mock.patch.object(processes, "compiler_options", autospec=True, return_value=options),
        mock.patch.object(jax, "jit", wraps=jax.jit) as jit,
    ):
        with pytest.raises(EOFError) as ran:
            training.train(config, tmp_path / "run")
        with pytest.raises(EOFError) as compiled:
            pod.facts(request, jax.devices())
    assert len(str(ran.value)) > 10_000
    assert str(ran.value) == str(compiled.value)
    passed = [call.kwargs.get("compiler_options") for call in jit.call_args_list]
    assert [x for x in passed if x] == [options, options]


def test_facts_are_read_from_what_is_compiled(planned):
    facts, _ = planned
    assert from_dict(Facts, json.loads(json.dumps(to_dict(facts)))) == facts
    assert (facts.fits, facts.mesh) == (True, (2, 4, 1))
    assert facts.peak_bytes > facts.parameters + facts.optimizer + facts.batch
    assert sum(x.times * x.bytes for x in facts.works) > facts.peak_bytes
    parts = {(x.kind, *x.axes, x.part) for x in facts.collectives}
    assert ("all-gather", "fsdp", "image tower, forward") in parts
    assert ("all-gather", "data", "fsdp", "loss, forward") in parts
