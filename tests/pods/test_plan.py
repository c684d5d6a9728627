"""`plan`: bytes as in a run, bounds, the search for a batch, the cache, the command."""

import dataclasses
import functools
import json
import re
import subprocess
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from clip_jax import flops, processes, sharding
from clip_jax.cli.commands import main
from clip_jax.data.batch_plan import SigLIP2Lengths
from clip_jax.errors import InputError
from clip_jax.losses import Frozen, SoftmaxConfig, Term
from clip_jax.models.images import NaFlex, fit_patches
from clip_jax.models.lora import LoRAConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.optim import Adafactor, AdamW, OptimConfig
from clip_jax.pods import compile as pod
from clip_jax.pods import plan as planning
from clip_jax.pods.collectives import Collective
from clip_jax.pods.compile import Facts, Request
from clip_jax.pods.plan import COMPILES, REMAT, PlanConfig, assess, fit, plan
from clip_jax.pods.summary import compare, describe
from clip_jax.pods.topology import Topology
from clip_jax.pods.work import Work
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Program, Recipe
from tests.conftest import DIGITS, TINY
from tests.pods.conftest import recipe

GIB = 2**30
CONFIG = PlanConfig(model=TINY, batch_size=2_048, steps=1_000, chip_hour_price=1.2)


def facts(request: Request, fixed: int = GIB, pair: int = 2**28) -> Facts:
    """What a compiler would say of a model whose memory grows by `pair` bytes a pair."""
    recipe, shares = (
        request.recipe,
        dict(zip(REMAT, (1.0, 0.5, 0.42, 0.4, 0.35, 0.3, 0.25), strict=True)),
    )
    share = shares[recipe.model.remat]
    data, fsdp, tensor = sharding.mesh_sizes(request.mesh, request.topology.devices)
    peak = fixed + int(pair * share) * recipe.batch_size // (data * fsdp)
    result = Facts(
        mesh=(data, fsdp, tensor),
        form="dense",
        versions="none",
        compile_seconds=1.0,
        fits=False,
        peak_bytes=peak,
        parameters=fixed // 3,
        optimizer=fixed - fixed // 3,
        batch=10,
        loss=20,
        token_embedding=7 << 20,
        token_embedding_optimizer=14 << 20,
    )
    if peak > 15.75 * GIB:
        return result
    moved = Collective(
        kind="all-gather",
        axes=("fsdp",),
        part="image tower, forward",
        times=3,
        bytes=9,
        source="",
        arrays=(),
        received=2 * 10**9,
        received_from_slices=0,
    )
    work = Work(
        name="x",
        opcode="fusion",
        part="MLP",
        times=2,
        flops=1e9,
        bytes=4_095_000_000,
        cycles=3_000_000,
    )
    return dataclasses.replace(result, fits=True, works=(work,), collectives=(moved,))


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        (AdamW(), 520 * 32 * (2 + 4) // 4),  # split over fsdp and tensor
        (Adafactor(), 520 * 32 * 2 // 4 + 32 * 4 // 4 + 520 * 4),  # a moment's column is whole
    ],
    ids=["AdamW", "Adafactor"],
)
def test_bytes_of_parameters_optimizer_and_batch_are_those_of_a_run(kind, table):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    optim = OptimConfig(first_moment="bfloat16", optimizer=kind)
    recipe = Recipe(
        model=TINY, objective=(SoftmaxConfig(),), optim=optim, steps=10_000, batch_size=16
    )
    program = Program(recipe, mesh)

    def on_one_device(tree):
        shapes = jax.tree.leaves(tree)
        arrays = [jax.device_put(np.zeros(x.shape, x.dtype), x.sharding) for x in shapes]
        return sum(x.addressable_shards[0].data.nbytes for x in arrays)

    state = program.state
    assert pod.held_bytes(state, program.batch) == {
        "parameters": on_one_device(state.params),
        "optimizer": on_one_device([getattr(state, x) for x in vars(state) if x != "params"]),
        "terms": 0,
        "frozen": 0,
        "batch": on_one_device(program.batch),
        "token_embedding": 520 * 32 * 4 // 4,
        "token_embedding_optimizer": table,
    }


@pytest.mark.parametrize(("factor", "unit"), [(1.0, "seconds"), (1e-4, "milliseconds")])
def test_short_steps_are_printed_in_milliseconds(factor, unit):
    compiled = facts(planning.request(CONFIG))
    (work,), (moved,) = compiled.works, compiled.collectives
    work = dataclasses.replace(
        work, bytes=round(factor * work.bytes), cycles=round(factor * work.cycles), flops=0
    )
    moved = dataclasses.replace(moved, received=round(factor * moved.received))
    plan: Any = assess(CONFIG, dataclasses.replace(compiled, works=(work,), collectives=(moved,)))
    text = describe(plan)
    assert f"{unit} at the peaks" in text
    assert re.search(r"the step .*" + ("0\\.0100" if unit == "seconds" else "0\\.0010"), text)
    (shown,) = re.findall(r"^overlapped bound: ([\d.]+) (m?s),", text, re.M)
    assert shown == (("0.0100", "s") if unit == "seconds" else ("0.0010", "ms"))
    (row,) = re.findall(r"256×1×1.*", compare([plan, plan]))[:1]
    assert ("0.0100" if unit == "seconds" else "1e-06") in row


def test_times_bound_the_step_and_price_the_run():
    planned: Any = assess(CONFIG, facts(planning.request(CONFIG)))
    seconds = planned.speed.seconds
    assert seconds["memory"] == pytest.approx(0.01)
    assert seconds["interconnect"] == pytest.approx(2e9 / 200e9)  # 400 GB/s, half inwards
    steps = planned.speed.step_seconds
    assert steps["bound"] == steps["sequential_bound"] == seconds["memory"]
    assert steps["cost_model"] == pytest.approx(2 * 3e6 / 1.5e9)
    assert steps["schedule_estimate"] == pytest.approx(0.01 + 0.01)  # nothing overlaps the gathers
    assert planned.speed.unscheduled == pytest.approx({"fusion": 0.01})
    total = flops.training(TINY, CONFIG.batch_size).total
    seconds = planned.to_json()["step_seconds_schedule_estimate"]
    mfu = planned.to_json()["mfu_schedule_estimate"]
    assert mfu == planned.cost.mfu == pytest.approx(total / (256 * 197e12 * seconds))
    assert planned.cost.mfu_source == "schedule estimate"
    quick: Any = assess(
        dataclasses.replace(CONFIG, schedules=False), facts(planning.request(CONFIG))
    )
    assert (quick.speed.step_seconds["schedule_estimate"], quick.speed.unscheduled) == (None, {})
    assert "schedule estimate: not known" in describe(quick)
    assert "remat none, dense loss, none\n" in describe(quick)
    # A caption loss has one form only.
    assert "remat none, none\n" in describe(dataclasses.replace(quick, form=""))
    assumed = assess(dataclasses.replace(CONFIG, mfu=1e-9), facts(planning.request(CONFIG)))
    assert (assumed.cost.mfu, assumed.cost.mfu_source) == (1e-9, "assumed")
    assert planned.cost.hours == pytest.approx(1_000 * seconds / 3600)
    assert planned.cost.price == pytest.approx(planned.cost.hours * 256 * 1.2)
    size = planned.memory.bytes_per_device
    assert sum(size.values()) == 2 * size["total"]
    assert "terms" not in size
    average = dataclasses.replace(facts(planning.request(CONFIG)), terms=3 << 20)
    assert re.findall(r"terms .* ([\d.]+)", describe(assess(CONFIG, average))) == ["3.0"]
    text = describe(planned)
    assert "MFU (schedule estimate): " in text
    assert "since they have no schedule: fusion 50.0%" in text
    assert re.findall(r"token embedding .* ([\d.]+)", text) == ["7.0", "14.0"]
    for words in ("fits", "optimizer, AdamW", "estimated from the loss alone", "minus the above"):
        assert words in text
    cost = dataclasses.replace(planned.cost, images_per_second_per_host=7_000)
    text = describe(dataclasses.replace(planned, cost=cost))
    assert "490 MB/s in 116.8 requests/s" in text


@pytest.mark.parametrize(("topology", "chips"), [("v3:4x4", 16), ("tpu7x:4x4x4", 64)])
def test_a_price_is_per_chip_where_a_chip_is_two_devices(topology: str, chips: int):
    """Else these runs are twice as expensive as they are."""
    pod = Topology.parse(topology)
    assert pod.devices == 2 * chips
    config = dataclasses.replace(CONFIG, topology=pod, mfu=1e-9)  # below every bound
    planned: Any = assess(config, facts(planning.request(config), pair=2**20))
    total = 1_000 * flops.training(TINY, CONFIG.batch_size).total
    hours = total / (chips * pod.chip.peak_flops * 1e-9) / 3600
    assert planned.cost.hours == pytest.approx(hours)
    assert planned.cost.price == pytest.approx(hours * chips * 1.2)
    per_host = 1_000 * CONFIG.batch_size / (hours * 3600) / (chips / 4)
    assert planned.cost.images_per_second_per_host == pytest.approx(per_host)


class Teacher(Term):
    def frozen(self):
        return {
            "model": Frozen(dataclasses.replace(TINY, dtype="bfloat16"), "runs/teacher", texts=2)
        }


@pytest.mark.usefixtures("unchecked_types")
def test_a_frozen_teachers_memory_flops_and_price():
    recipe = dataclasses.replace(CONFIG.recipe, objective=(SoftmaxConfig(), Teacher()))
    state = Program(recipe, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))).state
    held = pod.held_bytes(state, {})
    assert held["terms"] == held["frozen"] == pytest.approx(held["parameters"] / 2, rel=1e-3)
    compiled = dataclasses.replace(facts(planning.request(CONFIG)), terms=5 << 20, frozen=4 << 20)
    planned: Any = assess(CONFIG, compiled, recipe)
    alone = assess(CONFIG, compiled)
    forward = flops.forward(TINY)
    assert planned.speed.teacher_flops_per_step == 2_048 * (forward.image + 2 * forward.text)
    student = planned.speed.model_flops_per_step - planned.speed.teacher_flops_per_step
    assert student == alone.speed.model_flops_per_step
    printed: Any = planned.to_json()
    share = printed["teacher_share_of_flops"]
    assert share == planned.speed.teacher_flops_per_step / planned.speed.model_flops_per_step
    each = printed["per_billion_pairs"]
    assert each["price"] == pytest.approx(planned.cost.price / (1_000 * 2_048 / 1e9))
    assert each["hours_without_teacher"] == pytest.approx((1 - share) * each["hours"])
    assert each["price_without_teacher"] == pytest.approx((1 - share) * each["price"])
    text = describe(planned)
    assert re.findall(r"frozen weights .* ([\d.]+)", text) == ["4.0"]
    assert "of these, teacher:" in text
    assert re.search(r"1B pairs without teacher: [\d.]+ hours, price \d+", text)
    assert "teacher" not in describe(alone)


def test_with_adapters_the_weights_are_frozen_and_only_adapters_have_moments():
    mesh, lora = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), LoRAConfig(rank=1)
    model = dataclasses.replace(TINY, dtype="bfloat16")
    recipe = dataclasses.replace(CONFIG.recipe, model=model, lora=lora, batch_size=16)
    full = pod.held_bytes(Program(dataclasses.replace(recipe, lora=None), mesh).state, {})
    program = Program(recipe, mesh)
    held = pod.held_bytes(program.state, {})
    assert held["terms"] == held["frozen"]
    # Kernels are bfloat16 on the device; tables and gains stay float32.
    assert 0.6 * full["parameters"] < held["frozen"] < 0.9 * full["parameters"]
    assert held["parameters"] < 0.1 * full["parameters"]
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], abs=16)
    loss = pod.traced_loss(recipe, mesh, program.state, program.batch)  # with a frozen logit scale
    assert pod.peak(loss.lower().compile()) > 0


def test_a_locked_tower_costs_its_forward_pass_and_half_of_its_memory():
    """Kernels are bfloat16. The rest of TINY's parameters, which is float32, is large."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = dataclasses.replace(TINY, dtype="bfloat16")
    trained = dataclasses.replace(CONFIG.recipe, model=model, batch_size=16)
    optim = dataclasses.replace(trained.optim, locked=("image",))
    locked = dataclasses.replace(trained, optim=optim)
    before, after = (pod.held_bytes(Program(x, mesh).state, {}) for x in (trained, locked))
    assert (before["frozen"], after["terms"]) == (0, after["frozen"])
    tower = before["parameters"] - after["parameters"]
    assert 0.5 * tower < after["frozen"] < 0.8 * tower
    assert after["optimizer"] == pytest.approx(2 * after["parameters"], abs=16)
    step, full = flops.of_step(locked), flops.of_step(trained)
    assert (3 * step.image, step.text) == (full.image, full.text)


@pytest.mark.parametrize(
    ("batch", "pair", "remat", "largest"),
    [
        (8, 2**28, "none", 48),  # fits as it is; more does too
        (80, 2**28, "hidden", 104),  # 80 pairs need recomputation
        (1_000, 2**28, "full", 216),  # too much for any policy: down
        (8, 2**20, "none", 14_232),
        (8, 2**40, "full", None),  # nothing fits
    ],
)
def test_fit_finds_the_cheapest_remat_and_the_largest_batch(batch, pair, remat, largest):
    compile_ = mock.create_autospec(facts, side_effect=functools.partial(facts, pair=pair))
    plan = fit(dataclasses.replace(CONFIG, batch_size=batch * 256), compile_)
    requests = [call.args[0] for call in compile_.call_args_list]
    tried = [x for x in requests if not x.schedules]
    assert len(tried) <= COMPILES
    if largest is not None:
        assert plan.fit_compiles == len(tried)
        assert len(requests) == len(tried) + 1  # only the result is compiled with schedules
    assert plan.remat == remat
    assert plan.memory.fits == (largest is not None)
    assert largest is None or plan.batch_size // 256 == pytest.approx(largest, rel=0.07)


def test_a_batch_that_doubles_is_planned_at_its_largest_with_as_many_pairs():
    (largest,) = plan(dataclasses.replace(CONFIG, double_batch_at=(500,)), facts)
    assert (largest.batch_size, largest.cost.steps) == (4_096, 750)


def by_length(request: Request) -> Facts:
    """What a compiler would say of a model whose memory grows by 1 MiB per patch of a pair."""
    vision = request.recipe.model.vision
    return dataclasses.replace(
        facts(request, pair=vision.num_patches << 20),
        attention=pod.attention_of(request.recipe.model, V5E_CHIP, 1),
    )


V5E_CHIP = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
WIDE = ViTConfig(image_size=128, patch_size=8, width=768, depth=1, num_heads=12, max_patches=256)
NAFLEX = dataclasses.replace(
    CONFIG, model=dataclasses.replace(TINY, vision=WIDE), lengths=SigLIP2Lengths()
)


def test_a_run_of_several_lengths_is_planned_at_each():
    [planned] = plan(NAFLEX, by_length)
    rows = {(x.tokens, x.batch_size): x for x in planned.lengths}
    assert set(rows) == {(n, 2_048) for n in (128, 256, 576, 784)} | {(1_024, 1_024)}
    assert len(planned.lengths) == 6  # also with a fixed resolution of 256 patches
    assert sum(x.cost.steps for x in planned.lengths) == planned.cost.steps == 1_000
    assert planned.tokens == 784  # eight pairs per device; the longest come by four
    assert planned.cost.hours == pytest.approx(sum(x.cost.hours for x in planned.lengths))
    assert planned.cost.price == pytest.approx(planned.cost.hours * 256 * 1.2)
    shorter = {x.attention["image"] for x in planned.lengths if x.tokens != 1_024}
    assert shorter == {"short"}
    assert rows[1_024, 1_024].attention["image"] == "splash"  # with the class token 1,025 tokens
    for x in planned.lengths:
        is_fixed = x.speed.valid_share == 1
        tower = dataclasses.replace(WIDE, max_patches=None if is_fixed else x.tokens)
        model = dataclasses.replace(NAFLEX.model, vision=tower)
        assert x.speed.model_flops_per_step == flops.training(model, x.batch_size).total
    printed: Any = planned.to_json()
    assert [x["tokens"] for x in printed["lengths"]] == [x.tokens for x in planned.lengths]
    share = printed["valid_share"]
    assert printed["valid_mfu_bound"] == pytest.approx(share * printed["mfu_bound"])
    [padded] = plan(dataclasses.replace(NAFLEX, valid_share=0.5), by_length)
    shares = {x.speed.valid_share for x in padded.lengths}
    assert shares == {0.5, 1.0}  # no padding at a fixed resolution
    text = describe(planned)
    for words in ("padded", "784", "attention of the image tower, 784 patches: short"):
        assert words in text
    [larger] = plan(dataclasses.replace(NAFLEX, batch_size=8_192), by_length)
    assert not larger.memory.fits  # since one length does not
    assert {x.memory.fits for x in larger.lengths} == {True, False}


def test_fit_finds_the_batch_of_the_longest_sequences():
    [fitted] = plan(dataclasses.replace(NAFLEX, fit=True), by_length)
    assert (fitted.memory.fits, fitted.tokens, fitted.remat) == (True, 1_024, "none")
    # Memory of 15.75 GiB, 1 GiB of it in use, holds 14 pairs of 1 GiB; the run has 4 per device.
    assert 8 <= fitted.batch_size // 256 <= 14


@pytest.mark.parametrize(
    ("spec", "share"), [(NaFlex(1, 16), 1.0), (NaFlex(256, 16), 0.978), (NaFlex(1_024, 16), 0.985)]
)
def test_the_share_of_valid_patches(spec, share):
    """Against images of random sizes, which the published rule fits into the patches."""
    rng = np.random.default_rng(0)
    sides = [(1_000 * 2 ** (x / 2), 1_000 * 2 ** (-x / 2)) for x in rng.uniform(-1, 1, 2_000)]
    sizes = [fit_patches(round(w), round(h), 16, spec.max_patches) for w, h in sides]
    used = np.mean([w * h for w, h in sizes]) / (256 * spec.max_patches)
    assert planning.valid_share(spec) == pytest.approx(used, abs=2e-3)
    assert used == pytest.approx(share, abs=2e-3)


def test_topologies_and_meshes_are_compared():
    compared = ("v5p:4x4x8", "v5e:16x16/fsdp=8", "v5e:8x8/slices=2")
    config = dataclasses.replace(CONFIG, compare=compared)
    plans = plan(config, facts)
    assert [x.devices for x in plans] == [256, 128, 256, 128]
    assert plans[2].mesh == {"data": 32, "fsdp": 8, "tensor": 1}
    assert plans[3].name == "v5e:8x8/slices=2"
    assert compare(plans).count("v5e:16x16") == 2


@pytest.mark.parametrize(
    ("topology", "most"),
    [("v5e:16x16", 16.1e9), ("H100:8", 63.75e9)],  # JAX takes three quarters of a card's 84.9
)
def test_a_step_may_take_a_chips_memory_or_what_jax_takes_of_a_gpus(topology, most):
    config = dataclasses.replace(CONFIG, topology=Topology.parse(topology))
    compiled = dataclasses.replace(facts(planning.request(config)), fits=True)
    for size, fits in [(most - 0.1e9, True), (most + 0.1e9, False)]:
        plan = assess(config, dataclasses.replace(compiled, peak_bytes=int(size)))
        assert plan.memory.fits == fits
    assert plan.speed.mfus["bound"] is None
    text = describe(plan)
    assert "DOES NOT FIT" in text
    assert plan.speed.seconds == {}
    assert ("XLA_PYTHON_CLIENT_MEM_FRACTION" in text) == (topology == "H100:8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compare": ("v9:4x4",)}, "v5e:16x16"),
        ({"compare": ("v5e:16x16/fdsp=8",)}, "fdsp=8"),
        ({"batch_size": 100}, "batch_size=100 cannot be split over 256"),
        ({"mesh": MeshConfig(data=3)}, "all 256 devices"),
        ({"mfu": 1.5}, "mfu=1.5"),
    ],
)
def test_wrong_plans_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        plan(dataclasses.replace(CONFIG, **change), facts)


def test_a_step_is_compiled_once_for_the_same_code(tmp_path, monkeypatch):
    with mock.patch.object(pod, "compile_step", autospec=True, side_effect=facts) as compile_step:
        config = dataclasses.replace(CONFIG, cache=tmp_path)
        first, again = plan(config), plan(dataclasses.replace(config, chip_hour_price=2.0))
        assert first[0].memory == again[0].memory
        assert compile_step.call_count == 1
        plan(dataclasses.replace(config, batch_size=4_096))
        plan(dataclasses.replace(config, steps=5))  # which the schedule has as constants
        assert compile_step.call_count == 3
        with mock.patch.object(processes, "code_version", autospec=True, return_value="other"):
            plan(config)
            monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_enable_async_all_gather=false")
            plan(config)
        assert compile_step.call_count == 5


@pytest.mark.parametrize(
    ("topology", "distribution", "extra"),
    [
        ("v5e:2x4", "libtpu", "[tpu]"),
        ("H100:8", "jax-cuda13-plugin", "[plan-gpu]"),
        ("H100:8", "nvidia-cudnn-cu13", "[plan-gpu]"),
    ],
)
def test_without_the_compiler_the_command_says_how_to_get_it(
    topology, distribution, extra, tmp_path, capsys
):
    args = ["plan", str(DIGITS), "--topology", topology, "--cache", str(tmp_path)]
    with mock.patch.object(pod, "installed", autospec=True) as installed:
        installed.side_effect = lambda *names: [name for name in names if name != distribution]
        assert main(args) == 2
    assert f"pip install 'clip-jax-pods{extra}'" in capsys.readouterr().err


def test_a_long_compile_says_each_minute_that_it_goes_on(capsys):
    late, result = subprocess.TimeoutExpired("compile", 60), json.dumps({"error": "no such slice"})
    request = Request(recipe=recipe(), mesh=MeshConfig(), topology=Topology.parse("v5e:2x4"))
    with (
        mock.patch.object(subprocess, "Popen", autospec=True) as popen,
        mock.patch.object(pod, "installed", autospec=True),
    ):
        process = popen.return_value.__enter__.return_value
        process.communicate.side_effect = [late, late, (result, "")]
        process.returncode = 0
        with pytest.raises(InputError, match="no such slice"):
            pod.compile_step(request)
    assert capsys.readouterr().err.splitlines() == [
        f"clip-jax: still compiling after {minutes} min ..." for minutes in (1, 2)
    ]
    inputs = [bool(call.args[0]) for call in process.communicate.call_args_list]
    assert inputs == [True, False, False]  # a later call with input raises ValueError


RELEASED = """
attention batch_size bytes_per_device calls collectives compile_seconds devices fit_compiles
fits form frozen_bytes gigabytes hbm_bytes hours images_per_second_per_host is_estimate is_gpu
lengths mesh mfu mfu_bound mfu_cost_model mfu_schedule_estimate mfu_sequential_bound mfu_source
model_flops_per_step model_flops_per_step_per_device name optimizer per_billion_pairs price
remat seconds seconds_by_part stage step_seconds_bound step_seconds_cost_model
step_seconds_schedule_estimate step_seconds_sequential_bound steps teacher_flops_per_step
teacher_hours teacher_share_of_flops token_embedding_bytes tokens unscheduled
valid_mfu_bound valid_mfu_cost_model valid_mfu_schedule_estimate valid_mfu_sequential_bound
valid_share versions
"""


def test_the_command_describes_one_plan_and_compares_several(tmp_path, capsys):
    args = ["plan", str(DIGITS), "--topology", "v5e:2x4", "--cache", str(tmp_path)]
    texts = []
    for more in ([], ["--compare", "v6e:2x4"]):
        with mock.patch.object(pod, "compile_step", autospec=True, side_effect=facts):
            assert main([*args, *more]) == 0
        texts.append(capsys.readouterr().out)
    alone, both = texts
    assert both.startswith(alone)
    added = both.removeprefix(alone)
    assert all(topology in added for topology in ("v5e:2x4", "v6e:2x4"))


def test_the_command_prints_one_object(tmp_path, capsys):
    args = ["plan", str(DIGITS), "--topology", "v5e:2x4", "--cache", str(tmp_path), "--json"]
    with mock.patch.object(pod, "compile_step", autospec=True, side_effect=facts):
        assert main([*args, "--compare", "v6e:2x4"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == {*RELEASED.split(), "compared"}
    assert printed["bytes_per_device"]["total"] == sum(printed["bytes_per_device"].values()) / 2
    assert len(printed["compared"]) == 1
    assert not {"source", "arrays"} & printed["collectives"][0].keys()
    assert printed["seconds_by_part"]["MLP"].keys() == {
        "compute",
        "memory",
        "operations",
        "schedule",
        "cost model",
    }
