"""`plan`: bytes as in a run, bounds, the search for a batch, the cache, the command."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from clip_jax import plan as planning
from clip_jax import pod, sharding
from clip_jax.cli import main
from clip_jax.losses import SoftmaxConfig
from clip_jax.models.clip import CLIP
from clip_jax.optim import OptimConfig, make_optimizer
from clip_jax.plan import COMPILES, PlanConfig, assess, fit, plan
from clip_jax.pod import Request
from clip_jax.scaling import flops, hlo
from clip_jax.scaling.pods import compare, describe
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import init_state, state_shardings
from tests.models.test_clip import TINY
from tests.runs import DIGITS

GIB = 2**30
CONFIG = PlanConfig(model=TINY, batch_size=2_048, steps=1_000, chip_hour_price=1.2)


def facts(request: Request, fixed: int = GIB, pair: int = 2**28) -> pod.Facts:
    """What a compiler would say of a model whose memory grows by `pair` bytes a pair."""
    share = {"none": 1.0, "dots": 0.5, "attention": 0.35, "full": 0.25}[request.model.remat]
    devices = pod.count_devices(request.topology, request.slices)
    data, fsdp, tensor = sharding.mesh_sizes(request.mesh, devices)
    peak = fixed + int(pair * share) * request.batch_size // (data * fsdp)
    known = {"parameters": fixed // 3, "optimizer": fixed - fixed // 3, "batch": 10, "loss": 20}
    result = {
        "mesh": {"data": data, "fsdp": fsdp, "tensor": tensor},
        "form": "dense", "versions": "none", "compile_seconds": 1.0, "peak_bytes": peak, **known,
    }  # fmt: skip
    if peak > 15.75 * GIB:
        return result | {"fits": False}
    moved = {"kind": "all-gather", "axes": ["fsdp"], "part": "image tower, forward", "times": 3}
    return result | {
        "fits": True,
        "hbm_traffic": 8_190_000_000,
        "collectives": [moved | {"bytes": 9, "received": 2 * 10**9, "received_from_slices": 0}],
    }


def test_bytes_of_parameters_optimizer_and_batch_are_those_of_a_run():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    optim = OptimConfig(first_moment="bfloat16")
    request = Request(
        topology="", batch_size=16, model=TINY, loss=SoftmaxConfig(), optim=optim,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
    )  # fmt: skip
    planned = pod.parts(*pod.shapes(request, mesh))
    model, optimizer = CLIP(TINY), make_optimizer(optim, pod.STEPS)
    init = functools.partial(init_state, model=model, optimizer=optimizer)
    state = jax.jit(init, out_shardings=state_shardings(model, optimizer, mesh))(jax.random.key(0))
    batch = {
        "image": jnp.zeros((16, 16, 16, 3), jnp.uint8),
        "text": jnp.zeros((16, 10), jnp.int32),
    }
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))

    def on_one_device(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    rest = [getattr(state, name) for name in vars(state) if name != "params"]
    assert planned == {
        "parameters": on_one_device(state.params),
        "optimizer": on_one_device(rest),
        "batch": on_one_device(batch),
    }
    assert planned["parameters"] < sum(x.nbytes for x in jax.tree.leaves(state.params))


def test_facts_of_a_compiled_step():
    """On the CPU's own devices; a TPU's facts are read the same way."""
    mesh = MeshConfig(data=2, fsdp=4)
    request = Request(
        topology="", batch_size=16, model=TINY, loss=SoftmaxConfig(), optim=OptimConfig(), mesh=mesh
    )
    found = json.loads(json.dumps(pod.facts(request, jax.devices())))
    assert found["fits"]
    assert found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert found["peak_bytes"] > found["parameters"] + found["optimizer"] + found["batch"]
    assert found["hbm_traffic"] > found["peak_bytes"]
    parts = {(x["kind"], *x["axes"], x["part"]) for x in found["collectives"]}
    assert ("all-gather", "fsdp", "image tower, forward") in parts
    assert ("all-gather", "data", "fsdp", "loss, forward") in parts


def test_exchanges_between_slices_are_read():
    """The TPU compiler writes them as transfers of one chip with its likes on the other slices."""
    transfer = "u32[], token[]) recv(%a), channel_id={}, frontend_attributes={{{}}}"
    name = '_xla_megascale_target="{{1,2}}x{{0:3}}",_xla_megascale_transfer_type="{}"'
    lines = [
        f"  %r{i} = (f32[{dims}]{{1,0}}, " + transfer.format(i, name.format(kind))
        for i, (dims, kind) in enumerate([("8,128", "ALL_REDUCE"), ("16,16", "ALL_GATHER")])
    ]
    text = "\n".join(["HloModule step", "ENTRY %main (a: f32[]) -> f32[] {", *lines, "}"])
    gathered, reduced = hlo.collectives(text, {"data": 4, "fsdp": 2, "tensor": 1}, 2)
    assert (gathered.kind, reduced.kind) == ("all-gather", "all-reduce")
    assert reduced.axes == gathered.axes == ("data",)
    assert reduced.received_from_slices == 8 * 128 * 4  # half sent away, half got back, twice
    assert gathered.received_from_slices == 16 * 16 * 4 // 2
    assert reduced.received == gathered.received == 0


def test_a_fused_sum_of_which_a_slice_is_kept_is_a_reduce_scatter():
    """As the TPU compiler writes it; a sum that is used whole stays an all-reduce."""
    text = """HloModule step
%all-reduce-scatter.1 (input: bf16[64,128]) -> bf16[16,128] {
  %input = bf16[64,128]{1,0} parameter(0)
  %sum = bf16[64,128]{1,0} all-reduce(%input), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %kept = bf16[16,128]{1,0} dynamic-slice(%sum, %place), dynamic_slice_sizes={16,128}
}
ENTRY %main (a: bf16[64,128]) -> bf16[64,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  %shard = bf16[16,128]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1, \
metadata={op_name="jit(step)/transpose(jvp(visual))/c_fc"}
  ROOT %whole = bf16[64,128]{1,0} all-reduce(%a), channel_id=8, replica_groups={{0,1,2,3},{4,5,6,7}}
}"""
    whole, shard = hlo.collectives(text, {"data": 2, "fsdp": 4, "tensor": 1})
    assert (whole.kind, shard.kind) == ("all-reduce", "reduce-scatter")
    assert shard.source == "jit(step)/transpose(jvp(visual))/c_fc"
    assert whole.received == 2 * shard.received == 2 * (64 * 128 * 2) * 3 // 4


def test_times_bound_the_step_and_price_the_run():
    found = assess(CONFIG, facts(planning.request(CONFIG)))
    assert found.seconds["memory"] == pytest.approx(0.01)
    assert found.seconds["interconnect"] == pytest.approx(2e9 / 200e9)  # 400 GB/s, half inwards
    assert found.step_seconds_bound == max(x for x in found.seconds.values())
    total = flops.training(TINY, CONFIG.batch_size).total
    assert found.mfu_bound == pytest.approx(total / (256 * 197e12 * found.step_seconds_bound))
    assert found.hours == pytest.approx(1_000 * found.step_seconds_bound / 3600)
    assert found.price == pytest.approx(found.hours * 256 * 1.2)
    assert sum(found.bytes_per_device.values()) == 2 * found.bytes_per_device["total"]
    text = describe(found)
    assert "fits" in text
    assert "the loss compiled alone" in text
    assert "minus the above" in text


def test_compute_bounds_a_large_model_and_recomputation_costs():
    from clip_jax.models import zoo

    model = zoo.get("ViT-L-14")
    bounds = {}
    for remat in ("none", "dots", "attention", "full"):
        config = dataclasses.replace(
            CONFIG, model=dataclasses.replace(model, remat=remat), batch_size=256
        )
        bounds[remat] = assess(config, facts(planning.request(config))).seconds["compute"]
    assert bounds["none"] < bounds["dots"] < bounds["attention"] < bounds["full"]
    assert bounds["full"] / bounds["none"] == pytest.approx(4 / 3, rel=0.01)


@pytest.mark.parametrize(
    ("asked", "pair", "remat", "largest"),
    [
        (8, 2**28, "none", 48),  # fits as it is; more does too
        (80, 2**28, "dots", 104),  # 80 pairs need recomputation
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


def test_topologies_and_meshes_are_compared(tmp_path):
    config = dataclasses.replace(
        CONFIG, compare=("v5p:4x4x8", "v5e:16x16/fsdp=8", "v5e:8x8/slices=2"),
        plot=tmp_path / "plan.png",
    )  # fmt: skip
    plans = plan(config, facts)
    assert [x.devices for x in plans] == [256, 128, 256, 128]
    assert plans[2].mesh == {"data": 32, "fsdp": 8, "tensor": 1}
    assert plans[3].name == "v5e:8x8 × 2"
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
        found = assess(CONFIG, known | {"fits": True, "peak_bytes": int(size)})
        assert found.fits == fits


def test_what_a_step_needs_is_read_from_the_compilers_complaint():
    early = "the total memory required for HLO temporaries (22.99G) exceeds available HBM (15.75G)."
    late = "Ran out of memory in memory space hbm. Used 17.5G of 15.75G hbm. Exceeded"
    assert pod.needed_bytes(early, 5) == int(22.99 * GIB) + 5
    assert pod.needed_bytes(late, 5) == int(17.5 * GIB)
    assert pod.needed_bytes("something else", 5) is None


def test_gpus_are_reckoned_by_formula():
    config = dataclasses.replace(CONFIG, topology="H100:8")
    [found] = plan(config)
    assert found.by_formula
    assert "By formula, nothing compiled" in describe(found)
    assert found.seconds["memory"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topology": "v9:4x4"}, "v5e:16x16"),
        ({"topology": "v5litepod-8"}, "v5e:16x16"),
        ({"topology": "H100:8", "slices": 2}, "not a TPU slice"),
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
    first, again = plan(config), plan(dataclasses.replace(config, steps=5, chip_hour_price=2.0))
    assert first[0].bytes_per_device == again[0].bytes_per_device
    assert len(calls) == 1
    plan(dataclasses.replace(config, batch_size=4_096))
    assert len(calls) == 2
    monkeypatch.setattr(planning, "_code", lambda: "another")
    plan(config)
    assert len(calls) == 3


def test_without_the_compiler_the_command_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else find(name, *a)
    )
    args = ["plan", str(DIGITS), "--topology", "v5e:2x4", "--cache", str(tmp_path)]
    assert main(args) == 2
    assert "pip install" in capsys.readouterr().err


def test_the_command_prints_one_object(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pod, "compile_step", facts)
    args = ["plan", str(DIGITS), "--topology", "v5e:2x4", "--cache", str(tmp_path), "--json"]
    assert main([*args, "--compare", "v6e:2x4"]) == 0
    found = json.loads(capsys.readouterr().out)
    keys = {"fits", "bytes_per_device", "model_flops_per_step", "mfu_bound", "step_seconds_bound"}
    assert keys <= found.keys()
    assert found["bytes_per_device"]["total"] == sum(found["bytes_per_device"].values()) / 2
    assert len(found["compared"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "slices"), [("v5e:2x4", 1), ("v4:2x2x1", 2)])
def test_a_step_compiles_for_a_tpu_that_is_not_there(topology, slices):
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install jax[tpu]")
    mesh = MeshConfig(fsdp=2)
    request = Request(
        topology=topology, slices=slices, batch_size=64, model=TINY, loss=SoftmaxConfig(),
        optim=OptimConfig(), mesh=mesh,
    )  # fmt: skip
    found = pod.compile_step(request)
    assert found["fits"]
    assert found["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    between = sum(x["received_from_slices"] for x in found["collectives"])
    assert (between > 0) == (slices > 1)
    huge = dataclasses.replace(request, batch_size=2**24)
    assert not pod.compile_step(huge)["fits"]
