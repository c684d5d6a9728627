"""`estimate`: memory and work of traced programs, and of steps that were compiled."""

import dataclasses
import math
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from clip_jax import flops, sharding
from clip_jax.cli.commands import main
from clip_jax.config_files import load_config
from clip_jax.losses import SoftmaxConfig
from clip_jax.optim import OptimConfig
from clip_jax.pods import bounds
from clip_jax.pods import compile as pod
from clip_jax.pods.compile import Request
from clip_jax.pods.estimate import Reader, Shares
from clip_jax.pods.plan import V5E, announce
from clip_jax.pods.topology import Topology
from clip_jax.sharding import MeshConfig
from clip_jax.step import Recipe
from tests.conftest import TINY

ROWS, WIDTH, LAYERS = 48, 20, 3
MESH = sharding.abstract_mesh(MeshConfig(data=2, fsdp=2, tensor=2), 8)
KERNELS = jax.ShapeDtypeStruct(
    (LAYERS, WIDTH, WIDTH), jnp.float32, sharding=NamedSharding(MESH, PartitionSpec(None, "fsdp"))
)
INPUT = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
ARRAY = ROWS * WIDTH  # bytes of four shards of rows of float32


def reader() -> Reader:
    return Reader(Shares([KERNELS], ROWS, MESH), fast=0)


def work_of(reader: Reader) -> dict[str, tuple[int, float, int]]:
    return {x.part: (x.times, x.flops or 0, x.bytes) for x in reader.works}


def test_elementwise_operations_are_stored_once():
    read = reader()
    peak = read.read(jax.jit(lambda x: jnp.tanh(x * x + 1) * 2).trace(INPUT))
    assert peak == 2 * ARRAY  # input and result
    assert work_of(read) == {"elementwise": (1, 0, 2 * ARRAY)}


def test_a_product_takes_its_epilogue_and_is_split_over_all_devices():
    read, kernel = reader(), jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    read.read(jax.jit(lambda x, w: jnp.tanh(x @ w)).trace(INPUT, kernel))
    products = [x for x in read.works if x.part == "matmuls"]
    assert [x.flops for x in products] == [2 * ROWS * WIDTH * WIDTH / 8]
    assert sum(x.bytes for x in read.works) == 2 * ARRAY + WIDTH * WIDTH * 4 // 2


def test_a_loop_keeps_what_the_gradient_needs_of_every_layer():
    def value(kernels, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, kernels)[0].sum()

    read = reader()
    peak = read.read(jax.jit(jax.grad(value)).trace(KERNELS, INPUT), updates=True)
    kept = 3 * LAYERS * ARRAY  # of each layer its input, and two factors of the derivative of tanh
    gradients = LAYERS * WIDTH * WIDTH * 4 // 2
    assert kept + gradients < peak < kept + gradients + 4 * ARRAY + 3 * WIDTH * WIDTH * 4
    repeated = [x for x in read.works if x.part == "matmuls"]
    assert {x.times for x in repeated} == {LAYERS}
    total = sum(x.times * (x.flops or 0) for x in repeated)
    assert total == 3 * LAYERS * 2 * ROWS * WIDTH * WIDTH / 8


@pytest.mark.parametrize("form", ["dense", "blocked", "ring"])
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=2, tensor=2)])
def test_work_of_a_step_is_that_of_the_formulas(mesh, form):
    loss = SoftmaxConfig(form=form)
    recipe = Recipe(model=TINY, objective=(loss,), optim=OptimConfig(), steps=10, batch_size=64)
    estimate = pod.estimate(
        Request(recipe=recipe, mesh=mesh, topology=Topology.parse("v5e:2x4"), schedules=False)
    )
    total = 8 * sum(x.times * (x.flops or 0) for x in estimate.works)
    # Formulas count a gradient of the images; sums by products with ones are left out there.
    assert total == pytest.approx(flops.of_step(recipe).total, rel=0.06)


# Of compiled steps, as in BENCHMARKS.md: gigabytes, and milliseconds of the overlapped bound.
COMPILED = {
    "vit_b16": (6.33, 81.1),
    "vit_l14": (13.6, 372.3),
    "siglip_b16": (7.1, 91.7),
    "coca_l14": (14.6, 475.2),
}


@pytest.mark.parametrize("name", COMPILED)
def test_estimates_agree_with_compiled_steps(name):
    config, topology = load_config(name), Topology.parse("v5e:16x16")
    estimate = pod.estimate(Request(recipe=config.recipe, mesh=config.mesh, topology=topology))
    gigabytes, milliseconds = COMPILED[name]
    seconds = bounds.step_seconds(bounds.bounds(topology.chip.device, estimate.works, ()))
    assert estimate.peak_bytes / 1e9 == pytest.approx(gigabytes, rel=0.1)
    assert 1e3 * (seconds["bound"] or math.nan) == pytest.approx(milliseconds, rel=0.02)


@pytest.mark.parametrize(("devices", "rows", "gigabytes"), [(64, 256, 15.6), (8, 1_152, 62.5)])
def test_estimates_agree_with_steps_that_were_compiled_for_gpus(devices, rows, gigabytes):
    """Without cuDNN, beside which alone JAX traces its kernel."""
    config, topology = load_config("vit_b16"), Topology.parse(f"H100:{devices}")
    recipe = dataclasses.replace(config.recipe, batch_size=devices * rows)
    request = Request(recipe=recipe, mesh=MeshConfig(), topology=topology, schedules=False)
    estimate = pod.estimate(request)
    assert dict(estimate.attention) == {"image": "cudnn", "text": "cudnn"}
    assert estimate.peak_bytes / 1e9 == pytest.approx(gigabytes, rel=0.1)


def test_a_loss_that_cannot_be_traced_has_no_estimate(capsys):
    request = Request(recipe=load_config("vit_b32").recipe, mesh=MeshConfig(), topology=V5E)
    with mock.patch.object(pod, "estimate", autospec=True, side_effect=ValueError("no devices")):
        announce(request)
    assert capsys.readouterr().err == "clip-jax: no estimate: no devices\n"


def test_memory_of_accumulated_batches_is_that_of_one_chunk():
    config, topology = load_config("vit_b16"), Topology.parse("v5e:16x16")

    def peak(accumulation: int) -> int:
        recipe = dataclasses.replace(config.recipe, accumulation=accumulation)
        return pod.estimate(Request(recipe=recipe, mesh=config.mesh, topology=topology)).peak_bytes

    assert peak(4) < 0.4 * peak(1)


def test_the_command_ends_at_the_estimate(capsys):
    command = ["plan", "vit_b32", "--topology", "v5e:16x16", "--estimate"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pod, "compile_step", None)
        assert main(command) == 0
    text = capsys.readouterr().out
    assert "Estimated without the compiler" in text
    assert "estimated from the traced step" in text
    assert "MFU ≤" not in text
