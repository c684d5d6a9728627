"""The collectives of the compiled step, as XLA's text of the program lists them.

A step may gather parameters and token ids over `fsdp`, and the embeddings [B, E] and vectors [B] of
the loss. It never gathers the token embedding table, only the embeddings of a batch's tokens. Each
device sums only its own shard of a sharded parameter's gradient.
"""

import functools
import json
import math
from typing import Any
from unittest import mock

import jax
import pytest

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


def faults(text: str, sizes: Sizes) -> list[str]:
    """Describe the collectives of a compiled step that the module's docstring does not allow."""
    mesh, params = program(sizes).mesh, program(sizes).state.params
    tensor = mesh.shape["tensor"]
    split, replicated, unsplit, shards = set(), set(), set(), set()  # of sorted dims without depth
    for x in jax.tree.leaves(params):
        spec = [a if isinstance(a, tuple) else (a,) for a in x.sharding.spec]
        is_split = any("fsdp" in axes for axes in spec)
        if is_split:  # its shard, and the same without fsdp
            pairs = list(zip(x.shape, [*spec, *[()] * len(x.shape)], strict=False))
            shard = tuple(d // math.prod(mesh.shape[a] for a in axes if a) for d, axes in pairs)
            copy = tuple(d // tensor if "tensor" in axes else d for d, axes in pairs)
            shards |= {_dims(shard), _dims(shard[1:])}
            unsplit |= {_dims(copy), _dims(copy[1:])}
        flat = x.shape[1:]  # without depth
        merged = [(flat[0], math.prod(flat[1:])), (math.prod(flat[:-1]), flat[-1])] if flat else []
        # The compiler may merge the axes of attention projections, and split one over tensor.
        for dims in (x.shape, flat, *(merged if len(flat) > 2 else [])):
            (split if is_split else replicated).add(_dims(dims))
            parts = [d // tensor if d % tensor == 0 else d for d in dims]
            for i in range(len(dims)):
                mixed = (*dims[:i], parts[i], *dims[i + 1 :])
                (split if is_split else replicated).add(_dims(mixed))
    features = {_dims((BATCH,))}
    for gathered in (BATCH, BATCH // mesh.shape["fsdp"], BATCH // mesh.shape["data"]):
        features.add(_dims((gathered, MODEL.embed_dim)))
    length, width = MODEL.text.context_length, MODEL.text.width
    ids = ("s32", (BATCH // mesh.shape["data"], length))
    words = (BATCH // sharding.batch_shards(mesh), length, width)
    result = []
    for x in collectives(text, mesh.shape):
        for array in x.arrays:
            dims = _dims(array[1])
            batch_axes = set(x.axes) <= set(sharding.BATCH_AXES)
            if x.kind == "all-gather" and not (
                (dims in split and x.axes == ("fsdp",))
                or (_dims((math.prod(array[1][:-1]), *array[1][-1:])) in features and batch_axes)
                or (array == ids and x.axes == ("fsdp",))
                or (array[1] == words and x.axes == ("tensor",))
            ):
                result.append(f"gather of {array[1]} over {x.axes}: {x.source}")
            copied = split if "fsdp" in x.axes else unsplit - shards
            if x.kind == "all-reduce" and "data" in x.axes and dims in copied - replicated:
                result.append(f"replicated gradient {array[1]} over {x.axes}: {x.source}")
    return result


def _dims(dims: tuple[int, ...]) -> tuple[int, ...]:
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
        mock.patch.object(pod, "compile_loss", autospec=True),
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
