"""`plan`: bytes as in a run, bounds, the search for a batch, the cache, the command."""

import dataclasses
import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import pytest

from clip_jax import flops, sharding
from clip_jax.cli import main
from clip_jax.losses import SoftmaxConfig
from clip_jax.optim import Adafactor, AdamW, OptimConfig
from clip_jax.pods import compile as pod
from clip_jax.pods import plan as planning
from clip_jax.pods.compile import Facts, Request
from clip_jax.pods.exchanges import Exchange
from clip_jax.pods.plan import COMPILES, PlanConfig, assess, fit, plan
from clip_jax.pods.report import compare, describe
from clip_jax.pods.topology import Topology
from clip_jax.pods.work import Work
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Program, Recipe
from tests.conftest import DIGITS, TINY

GIB = 2**30
CONFIG = PlanConfig(model=TINY, batch_size=2_048, steps=1_000, chip_hour_price=1.2)


def facts(request: Request, fixed: int = GIB, pair: int = 2**28) -> Facts:
    """What a compiler would say of a model whose memory grows by `pair` bytes a pair."""
    recipe = request.recipe
    share = {"none": 1.0, "hidden": 0.5, "residual": 0.4, "attention": 0.35, "full": 0.25}
    share = share[recipe.model.remat]
    data, fsdp, tensor = sharding.mesh_sizes(request.mesh, request.topology.devices)
    peak = fixed + int(pair * share) * recipe.batch_size // (data * fsdp)
    result = Facts(
        mesh=(data, fsdp, tensor), form="dense", versions="none", compile_seconds=1.0, fits=False,
        peak_bytes=peak, parameters=fixed // 3, optimizer=fixed - fixed // 3, batch=10, loss=20,
        words=7 << 20, words_optimizer=14 << 20,
    )  # fmt: skip
    if peak > 15.75 * GIB:
        return result
    moved = Exchange(
        kind="all-gather", axes=("fsdp",), part="image tower, forward", times=3, bytes=9,
        received=2 * 10**9, received_from_slices=0,
    )  # fmt: skip
    work = Work(name="x", part="MLP", times=2, flops=1e9, bytes=4_095_000_000, cycles=3_000_000)
    return dataclasses.replace(result, fits=True, works=(work,), exchanges=(moved,))


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (AdamW(), 520 * 32 * (2 + 4) // 4),  # split over fsdp and tensor
        (Adafactor(), 520 * 32 * 2 // 4 + 32 * 4 // 4 + 520 * 4),  # a moment's column is whole
    ],
    ids=["AdamW", "Adafactor"],
)
def test_bytes_of_parameters_optimizer_and_batch_are_those_of_a_run(kind, words):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    optim = OptimConfig(first_moment="bfloat16", optimizer=kind)
    recipe = Recipe(model=TINY, loss=SoftmaxConfig(), optim=optim, steps=10_000, batch_size=16)
    program = Program(recipe, mesh)
    planned = pod.parts(program.state, program.batch)
    state = program.init()
    batch = {
        "image": jnp.zeros((16, 16, 16, 3), jnp.uint8),
        "text": jnp.zeros((16, 10), jnp.int32),
    }
    batch = program.place(batch)

    def on_one_device(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    rest = [getattr(state, name) for name in vars(state) if name != "params"]
    assert planned == {
        "parameters": on_one_device(state.params),
        "optimizer": on_one_device(rest),
        "batch": on_one_device(batch),
        "words": 520 * 32 * 4 // 4,
        "words_optimizer": words,
    }
    assert planned["parameters"] < sum(x.nbytes for x in jax.tree.leaves(state.params))


def test_times_bound_the_step_and_price_the_run():
    found = assess(CONFIG, facts(planning.request(CONFIG)))
    assert found.seconds["memory"] == pytest.approx(0.01)
    assert found.seconds["interconnect"] == pytest.approx(2e9 / 200e9)  # 400 GB/s, half inwards
    assert found.step_seconds_bound == found.step_seconds_one_by_one == found.seconds["memory"]
    assert found.step_seconds_compiler == pytest.approx(2 * 3e6 / 1.5e9)
    total = flops.training(TINY, CONFIG.batch_size).total
    assert found.mfu_bound == pytest.approx(total / (256 * 197e12 * found.step_seconds_bound))
    assert found.hours == pytest.approx(1_000 * found.step_seconds_bound / 3600)
    assert found.price == pytest.approx(found.hours * 256 * 1.2)
    assert sum(found.bytes_per_device.values()) == 2 * found.bytes_per_device["total"]
    text = describe(found)
    assert re.findall(r"of it, words +([\d.]+)", text) == ["7.0", "14.0"]
    assert "fits" in text
    assert "optimizer, AdamW" in text
    assert "the loss compiled alone" in text
    assert "minus the above" in text


@pytest.mark.parametrize(
    ("asked", "pair", "remat", "largest"),
    [
        (8, 2**28, "none", 48),  # fits as it is; more does too
        (80, 2**28, "hidden", 104),  # 80 pairs need recomputation
        (1_000, 2**28, "full", 216),  # too much for any policy: down
        (8, 2**20, "none", 14_232),
        (8, 2**40, "full", None),  # nothing fits
    ],
)
def test_fit_finds_the_cheapest_remat_and_the_largest_batch(asked, pair, remat, largest):
    calls = []

    def compile_(request):
        calls.append(request)
        return facts(request, pair=pair)

    config = dataclasses.replace(CONFIG, batch_size=asked * 256)
    found = fit(config, compile_)
    assert len(calls) <= COMPILES
    assert found.remat == remat
    if largest is None:
        assert not found.fits
    else:
        assert found.fits
        assert found.batch_size // 256 == pytest.approx(largest, rel=0.07)


def test_a_batch_that_doubles_is_planned_at_its_largest_with_as_many_pairs():
    (found,) = plan(dataclasses.replace(CONFIG, double_batch_at=(500,)), facts)
    assert (found.batch_size, found.steps) == (4_096, 750)


def test_topologies_and_meshes_are_compared(tmp_path):
    config = dataclasses.replace(
        CONFIG, compare=("v5p:4x4x8", "v5e:16x16/fsdp=8", "v5e:8x8/slices=2"),
        plot=tmp_path / "plan.png",
    )  # fmt: skip
    plans = plan(config, facts)
    assert [x.devices for x in plans] == [256, 128, 256, 128]
    assert plans[2].mesh == {"data": 32, "fsdp": 8, "tensor": 1}
    assert plans[3].name == "v5e:8x8/slices=2"
    assert compare(plans).count("v5e:16x16") == 2
    assert config.plot.stat().st_size > 10_000
    with pytest.raises(ValueError, match="fdsp=8"):
        plan(dataclasses.replace(CONFIG, compare=("v5e:16x16/fdsp=8",)), facts)


def test_a_plan_that_does_not_fit_says_so():
    config = dataclasses.replace(CONFIG, batch_size=256 * 1_000)
    found = assess(config, facts(planning.request(config)))
    assert "DOES NOT FIT" in describe(found)
    assert found.mfu_bound is None


def test_what_the_compiler_takes_beyond_the_chips_own_size_does_not_fit():
    known = facts(planning.request(CONFIG))
    for size, fits in [(16.0e9, True), (16.3e9, False)]:
        found = assess(CONFIG, dataclasses.replace(known, fits=True, peak_bytes=int(size)))
        assert found.fits == fits


def test_a_gpu_holds_what_jax_takes_of_it():
    config = dataclasses.replace(CONFIG, topology=Topology.parse("H100:8"))
    known = dataclasses.replace(facts(planning.request(config)), fits=True)
    for size, fits in [(63.7e9, True), (63.8e9, False)]:  # of 84.9
        found = assess(config, dataclasses.replace(known, peak_bytes=int(size)))
        assert found.fits == fits
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in describe(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compare": ("v9:4x4",)}, "v5e:16x16"),
        ({"batch_size": 100}, "batch_size=100 cannot be split over 256"),
        ({"mesh": MeshConfig(data=3)}, "all 256 devices"),
        ({"mfu": 1.5}, "mfu=1.5"),
    ],
)
def test_wrong_plans_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        plan(dataclasses.replace(CONFIG, **change), facts)


def test_a_step_is_compiled_once_for_the_same_code(tmp_path, monkeypatch):
    calls = []

    def compile_(request):
        calls.append(request)
        return facts(request)

    monkeypatch.setattr(pod, "compile_step", compile_)
    config = dataclasses.replace(CONFIG, cache=tmp_path)
    first, again = plan(config), plan(dataclasses.replace(config, chip_hour_price=2.0))
    assert first[0].bytes_per_device == again[0].bytes_per_device
    assert len(calls) == 1
    plan(dataclasses.replace(config, batch_size=4_096))
    plan(dataclasses.replace(config, steps=5))  # which the schedule has as constants
    assert len(calls) == 3
    monkeypatch.setattr(planning, "CODE", ("models",))
    plan(config)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_enable_async_all_gather=false")
    plan(config)
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("topology", "module", "extra"),
    [("v5e:2x4", "libtpu", "[tpu]"), ("H100:8", "jax_plugins.xla_cuda13", "[plan-gpu]")],
)
def test_without_the_compiler_the_command_says_how_to_get_it(
    topology, module, extra, tmp_path, monkeypatch, capsys
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == module else find(name, *a)
    )
    args = ["plan", str(DIGITS), "--topology", topology, "--cache", str(tmp_path)]
    assert main(args) == 2
    assert f"pip install 'clip-jax-pods{extra}'" in capsys.readouterr().err


def test_the_command_prints_one_object(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pod, "compile_step", facts)
    args = ["plan", str(DIGITS), "--topology", "v5e:2x4", "--cache", str(tmp_path), "--json"]
    assert main([*args, "--compare", "v6e:2x4"]) == 0
    found = json.loads(capsys.readouterr().out)
    keys = {"fits", "bytes_per_device", "model_flops_per_step", "mfu_bound", "step_seconds_bound"}
    assert keys <= found.keys()
    assert found["bytes_per_device"]["total"] == sum(found["bytes_per_device"].values()) / 2
    assert len(found["compared"]) == 1
