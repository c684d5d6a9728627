"""`clip-jax plan CONFIG --topology v5e:16x16`: memory, time and cost of a run on a pod.

The training step is compiled for the pod, which need not be at hand (`compile.py`). Memory and
collectives are read from the result; times are bounds at the chips' peaks, and sums of schedules
(`bounds.py`).
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from clip_jax import flops, processes, sharding
from clip_jax.config import Config
from clip_jax.config_files import with_weights
from clip_jax.display import say
from clip_jax.errors import InputError, check_ranges
from clip_jax.models.images import NaFlex
from clip_jax.models.layers import Remat
from clip_jax.pods import compile as pod
from clip_jax.pods.bounds import Seconds, bounds, by_part, step_seconds, unscheduled
from clip_jax.pods.collectives import Collective
from clip_jax.pods.compile import GPU_COMPILER, TPU_COMPILER, Facts, Request
from clip_jax.pods.topology import Topology
from clip_jax.serialize import from_dict, to_dict
from clip_jax.step import Recipe
from clip_jax.storage import files
from clip_jax.storage.json_files import read_json

COMPILES = 8  # maximum number of compilations of --fit
REMAT: tuple[Remat, ...] = ("none", "hidden", "residual", "attention", "full")  # cheapest first
V5E = Topology.parse("v5e:16x16")
# Bounds and estimates of the step time: name in `--json`, label, and relation of the MFU to it.
BOUNDS = {
    "bound": ("overlapped bound", "≤"),
    "sequential_bound": ("sequential bound", "≤"),
    "schedule_estimate": ("schedule estimate", "≈"),
    "cost_model": ("XLA's cost model", "≈"),
}
GPU_SHARE = 0.75  # XLA_PYTHON_CLIENT_MEM_FRACTION's default: share of a card that JAX takes
LIBRARIES = ("jax", "jaxlib", "flax", "optax", *TPU_COMPILER, *GPU_COMPILER)
Compile = Callable[[Request], Facts]
AsText = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="NAME:SIZE[/slices=N]",
    instance_from_str=lambda x: Topology.parse(x[0]),
    is_instance=lambda x: isinstance(x, Topology),
    str_from_instance=lambda x: [str(x)],
)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Config):
    """Config of a training run, and the pod that it is planned for."""

    # Pod to plan for: TPUs such as v5e:16x16, or GPUs such as H100:64. v5e:16x16/slices=2 is two
    # slices, joined along the data axis by the network between slices.
    topology: Annotated[Topology, AsText] = V5E
    chip_hour_price: float | None = None  # Price of one chip-hour, in any currency. None: no price.
    # Assumed MFU (0 to 1) for hours and price, unless a bound or the schedule estimate is lower.
    mfu: float = 0.4
    fit: bool = False  # Find the cheapest remat and the largest batch that fit into memory.
    # Share of a NaFlex model's patches that are not padding (0 to 1), for the MFU of valid tokens.
    # None: of images whose aspect ratios are log-uniform from 1:2 to 2:1.
    valid_share: float | None = None
    # Other pods or meshes to compare with, such as v5p:4x4x8 or v5e:16x16/fsdp=8,slices=2.
    compare: tuple[str, ...] = ()
    # Estimate the time by the compiler's schedules, too. For TPUs, compiling then takes 1.6 to 2.8
    # times as long.
    schedules: bool = True
    cache: Path | None = None  # Cache folder. None: clip_jax/plan in $XDG_CACHE_HOME or ~/.cache.

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, mfu="(0, 1]", chip_hour_price="[0, inf)", valid_share="(0, 1]")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory, time and cost of one config on one pod."""

    name: str  # name of the topology
    fits: bool
    devices: int
    mesh: dict[str, int]
    batch_size: int
    remat: str
    form: str  # form of the loss
    optimizer: str
    hbm_bytes: float  # memory of one device that a run may use
    is_gpu: bool
    bytes_per_device: dict[str, int]  # by part, and the total
    token_embedding_bytes: dict[str, int]  # its part of parameters and optimizer
    model_flops_per_step: int  # of all devices, without recomputation, with the teachers'
    collectives: tuple[Collective, ...]
    calls: dict[str, int]  # calls of kernels and libraries per step, by name
    seconds: Seconds  # of a step at the chips' peaks; empty if it does not fit
    seconds_by_part: dict[str, Seconds]  # the same for each part of the step
    gigabytes: float  # HBM traffic of one device per step, padding included
    step_seconds: Seconds  # by name in `BOUNDS`; None: not known
    mfus: dict[str, float | None]  # MFU at each of these
    steps: int
    mfu: float  # for hours and price
    mfu_source: str  # what this MFU is: assumed, or the label of the lowest bound or estimate
    hours: float
    images_per_second_per_host: float  # to read and decode
    price: float | None
    versions: str
    compile_seconds: float
    fit_compiles: int = 0  # compilations that --fit needed
    tokens: int | None = None  # patches of an image, padding included; None: no ViT
    attention: dict[str, str] = dataclasses.field(default_factory=dict)  # backend by tower
    unscheduled: dict[str, float] = dataclasses.field(default_factory=dict)  # see `bounds`
    valid_share: float = 1.0  # share of patches that are not padding
    lengths: tuple["Plan", ...] = ()  # of each batch size and length, if the run has several
    teacher_flops_per_step: int = 0  # forward passes of frozen models
    teacher_hours: float = 0.0  # their share of the hours
    frozen_bytes: int = 0  # parameters of frozen models on one device, a part of the terms

    def per_billion_pairs(self) -> dict[str, float | None]:
        """Return hours and price of 1B pairs, with and without the teachers' FLOPs at this MFU."""
        billions = sum(x.steps * x.batch_size for x in self.lengths or (self,)) / 1e9
        hours, price = self.hours / billions, self.price and self.price / billions
        own = 1 - self.teacher_hours / self.hours
        return {
            "hours": hours,
            "price": price,
            "hours_without_teacher": own * hours,
            "price_without_teacher": price and own * price,
        }

    def to_json(self) -> dict[str, Any]:
        """Return all fields, with bounds of the step flattened, and FLOPs per device."""
        values = dataclasses.asdict(dataclasses.replace(self, lengths=()))
        values["lengths"] = [x.to_json() for x in self.lengths]
        values |= {f"valid_mfu_{k}": x and x * self.valid_share for k, x in self.mfus.items()}
        for prefix, field in (("step_seconds", "step_seconds"), ("mfu", "mfus")):
            values |= {f"{prefix}_{name}": value for name, value in values.pop(field).items()}
        for collective in values["collectives"]:
            del collective["source"], collective["arrays"]
        return values | {
            "model_flops_per_step_per_device": self.model_flops_per_step / self.devices,
            "teacher_share_of_flops": self.teacher_flops_per_step / self.model_flops_per_step,
            "per_billion_pairs": self.per_billion_pairs(),
        }


def plan(config: PlanConfig, compile_: Compile | None = None) -> list[Plan]:
    """Plan a config on its topology, then on those to compare with.

    `compile_` returns the facts of a request; by default from the cache, else the compiler. Raises
    InputError for an impossible topology or mesh, and without the compiler.
    """
    config = with_weights(config)
    if config.double_batch_at:  # plan the largest batch, for the same number of pairs
        largest = config.batches.at(config.steps).pairs
        steps = -(-config.samples_after(config.steps) // largest)
        config = dataclasses.replace(config, batch_size=largest, steps=steps, double_batch_at=())
    if config.fit and config.lengths:  # find the batch at which the longest sequences fit
        longest = config.recipe_of(max(config.batches.kinds, key=lambda x: x.max_patches or 0))
        own = {"model": longest.model, "batch_size": longest.batch_size}
        config = dataclasses.replace(config, lengths=None, **own)
    compile_ = compile_ or compiling(config)
    first = fit(config, compile_) if config.fit else run(config, compile_)
    return [first, *(run(_variant(config, text), compile_) for text in config.compare)]


def run(config: PlanConfig, compile_: Compile) -> Plan:
    """Plan a run at each of its batch sizes and sequence lengths.

    The result is the plan of the variant that takes the most memory, with the steps, hours and
    price of the whole run; `lengths` has all of them if there are several.
    """
    plans = [
        assess(config, compile_(request(config, recipe)), recipe, steps)
        for steps, recipe in config.variants()
    ]
    if len(plans) == 1:
        return plans[0]
    worst = max(plans, key=lambda x: (not x.fits, x.bytes_per_device["total"]))
    hours = sum(x.hours for x in plans)
    return dataclasses.replace(
        worst,
        steps=sum(x.steps for x in plans),
        hours=hours,
        teacher_hours=sum(x.teacher_hours for x in plans),
        price=worst.price and worst.price * hours / worst.hours,
        images_per_second_per_host=max(x.images_per_second_per_host for x in plans),
        compile_seconds=sum(x.compile_seconds for x in plans),
        lengths=tuple(plans),
    )


def request(config: PlanConfig, recipe: Recipe | None = None) -> Request:
    """Return what the compiled step depends on, by default of the config's own recipe. Raises
    InputError if the mesh cannot shard it."""
    devices, recipe = config.topology.devices, recipe or config.recipe
    data, fsdp, _ = sharding.mesh_sizes(config.mesh, devices)
    if recipe.batch_size % (data * fsdp):
        raise InputError(
            f"batch_size={recipe.batch_size} cannot be split over {data * fsdp} batch shards of "
            f"{config.topology} (mesh data={data} × fsdp={fsdp}); change --batch-size or --mesh."
        )
    schedules = config.schedules and config.topology.is_tpu
    return Request(recipe=recipe, mesh=config.mesh, topology=config.topology, schedules=schedules)


def _variant(config: PlanConfig, text: str) -> PlanConfig:
    """Read `v5e:16x16/fsdp=8,slices=2`: another topology, mesh or both."""
    name, _, changes = text.partition("/")
    sizes = {}
    for change in filter(None, changes.split(",")):
        axis, _, value = change.partition("=")
        if axis == "slices" and value.isdigit():
            name += f"/{change}"
        elif axis in ("data", "fsdp", "tensor") and value.lstrip("-").isdigit():
            sizes[axis] = int(value)
        else:
            raise InputError(
                f"--compare {text}: {change!r} is not data=, fsdp=, tensor= or slices= with a "
                "number; write v5e:16x16 or v5e:16x16/fsdp=8,slices=2."
            )
    mesh = dataclasses.replace(config.mesh, **sizes)
    return dataclasses.replace(config, topology=Topology.parse(name), mesh=mesh)


def usable_bytes(topology: Topology) -> float:
    """Return how much memory of one device a run may use, in bytes."""
    if topology.is_tpu:
        # The compiler's own limit, 15.75 GiB on a v5e, exceeds the nominal 16 GB of the chip.
        return topology.chip.device.hbm_bytes
    return GPU_SHARE * pod.memory_of_card(topology)


def assess(
    config: PlanConfig, facts: Facts, recipe: Recipe | None = None, steps: int | None = None
) -> Plan:
    """Compute memory, step times, MFU bounds, hours and price from the compiler's facts, by default
    of all steps at the config's own recipe."""
    topology, device = config.topology, config.topology.chip.device
    recipe, steps = recipe or config.recipe, steps or config.steps
    vision, share = recipe.model.vision, 1.0
    if isinstance(vision.image_spec, NaFlex):
        share = config.valid_share or valid_share(vision.image_spec)
    counts = flops.of_step(recipe)
    model_flops = counts.total
    peak_flops = topology.devices * device.peak_flops
    entries = ("parameters", "optimizer", *["terms"] * bool(facts.terms), "batch", "loss")
    sizes = {name: getattr(facts, name) for name in entries}
    rest = facts.peak_bytes - sum(sizes.values())
    seconds, parts, times = {}, {}, dict.fromkeys(BOUNDS)
    if is_fitting := facts.fits and facts.peak_bytes <= usable_bytes(topology):
        seconds = bounds(device, facts.works, facts.collectives)
        parts = by_part(device, facts.works, facts.collectives)
        for values in (seconds, *parts.values()) if not config.schedules else ():
            values["schedule"] = None
        times = step_seconds(seconds)
    mfus = {name: x and model_flops / (peak_flops * x) for name, x in times.items()}
    # XLA's cost model is left out: it is too high by far for operations of the vector unit.
    known = {BOUNDS[name][0]: x for name, x in mfus.items() if x and name != "cost_model"}
    mfu, mfu_source = min((x, name) for name, x in ({"assumed": config.mfu} | known).items())
    hours = steps * model_flops / (peak_flops * mfu) / 3600
    hosts = max(1, topology.devices / topology.devices_per_host)
    return Plan(
        name=str(topology),
        fits=is_fitting,
        devices=topology.devices,
        mesh=dict(zip(("data", "fsdp", "tensor"), facts.mesh, strict=True)),
        batch_size=recipe.batch_size,
        remat=recipe.model.remat,
        form=facts.form,
        optimizer=type(config.optim.optimizer).__name__,
        hbm_bytes=usable_bytes(topology),
        is_gpu=not topology.is_tpu,
        bytes_per_device=sizes | {"activations and workspace": rest, "total": facts.peak_bytes},
        token_embedding_bytes={
            "parameters": facts.token_embedding,
            "optimizer": facts.token_embedding_optimizer,
        },
        model_flops_per_step=model_flops,
        collectives=facts.collectives,
        calls=facts.calls(),
        seconds=seconds,
        seconds_by_part=parts,
        gigabytes=sum(x.times * x.bytes for x in facts.works) / 1e9,
        step_seconds=times,
        mfus=mfus,
        steps=steps,
        mfu=mfu,
        mfu_source=mfu_source,
        hours=hours,
        images_per_second_per_host=steps * recipe.batch_size / (hours * 3600) / hosts,
        price=config.chip_hour_price and hours * config.chip_hour_price * topology.chips,
        versions=facts.versions,
        compile_seconds=facts.compile_seconds,
        tokens=vision.num_patches or None,
        attention=dict(facts.attention),
        unscheduled=unscheduled(device, facts.works) if is_fitting and config.schedules else {},
        valid_share=share,
        teacher_flops_per_step=counts.teacher,
        teacher_hours=hours * counts.teacher / model_flops,
        frozen_bytes=facts.frozen,
    )


def valid_share(spec: NaFlex) -> float:
    """Return the mean share of patches that are not padding, over images whose aspect ratios are
    log-uniform from 1:2 to 2:1."""
    ratios = 2 ** ((np.arange(200) + 0.5) / 100 - 1)
    sizes = (spec.fit(round(1_000 * x**0.5), round(1_000 / x**0.5)) for x in ratios)
    counts = [width * height // spec.patch_size**2 for width, height in sizes]
    return float(np.mean(counts)) / spec.max_patches


def fit(config: PlanConfig, compile_: Compile) -> Plan:
    """Find the cheapest remat at which the batch fits, then the largest batch at that remat.

    Bisects in steps of 8 pairs per device, guided by the memory of the batches before, with at
    most COMPILES compilations. If the config's batch fits with no policy, the search goes down.
    Only the result is compiled with schedules, once more.
    """
    left = COMPILES
    devices = config.topology.devices
    data, fsdp, _ = sharding.mesh_sizes(config.mesh, devices)
    shards = data * fsdp

    def attempt(remat: Remat, per_device: int) -> Plan:
        nonlocal left
        left -= 1
        model = dataclasses.replace(config.model, remat=remat)
        tried = dataclasses.replace(
            config, model=model, batch_size=per_device * shards, schedules=False
        )
        say(f"fit: remat {remat}, {per_device} pairs per device ({left} compiles left)")
        return assess(tried, compile_(request(tried)))

    wanted = max(config.batch_size // shards, 1)
    for remat in REMAT:
        assessed = attempt(remat, wanted)
        if assessed.fits:
            break
    best = assessed if assessed.fits else None
    low, high = (wanted, None) if best else (0, wanted)  # fits, does not fit
    while left and (high is None or high - low > max(8, low // 16)):
        size = assessed.bytes_per_device
        fixed = size["parameters"] + size["optimizer"] + size.get("terms", 0)
        each = max(size["total"] - fixed, 1) / (assessed.batch_size // shards)
        guess = int((assessed.hbm_bytes - fixed) / each) // 8 * 8
        guess = max(guess, low + max(8, low // 64 * 8))  # memory is not quite linear in the batch
        if high and guess >= high:
            guess = (low + high) // 2 // 8 * 8 or (low + high) // 2
            if not low < guess < high:
                break
        assessed = attempt(remat, guess)
        if assessed.fits:
            low, best = guess, assessed
        else:
            high = guess
    if best is None:
        return assessed
    if config.schedules:
        model = dataclasses.replace(config.model, remat=remat)
        chosen = dataclasses.replace(config, model=model, batch_size=best.batch_size)
        best = assess(chosen, compile_(request(chosen)))
    return dataclasses.replace(best, fit_compiles=COMPILES - left)


def compiling(config: PlanConfig) -> Compile:
    """Return a compile function with a cache on disk, per code, compilers and flags."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = config.cache or home / "clip_jax/plan"
    flags = [os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")]
    program = " ".join([processes.code_version(), *pod.installed(*LIBRARIES), *flags])

    def cached(request: Request) -> Facts:
        values = to_dict(request)
        key = hashlib.sha256(f"{json.dumps(values)} {program}".encode()).hexdigest()[:24]
        path = folder / f"{key}.json"
        if path.is_file():
            return from_dict(Facts, read_json(path, "facts", advice="Delete it.")["facts"])
        say(f"compiling for {request.topology} (takes a few minutes) ...")
        facts = pod.compile_step(request)
        folder.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, json.dumps({"request": values, "facts": to_dict(facts)}))
        return facts

    return cached
