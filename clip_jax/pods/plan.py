"""`clip-jax plan CONFIG --topology v5e:16x16`: memory, time and cost of a run on a pod.

The training step is compiled for the pod, which need not be at hand (`compile.py`). Memory and
collectives are read from the result; times are bounds at the chips' peaks, and sums of schedules
(`bounds.py`). Before that, both are estimated from the traced step (`estimate.py`).
"""

import bisect
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import tyro

from clip_jax import flops, sharding
from clip_jax.config import Config
from clip_jax.config_files import with_weights
from clip_jax.display import say
from clip_jax.errors import InputError, check_ranges
from clip_jax.models.images import NaFlex
from clip_jax.models.layers import Remat
from clip_jax.pods import bounds
from clip_jax.pods import compile as pod
from clip_jax.pods.bounds import Seconds
from clip_jax.pods.collectives import Collective
from clip_jax.pods.compile import Compile, Facts, Request
from clip_jax.pods.topology import Topology
from clip_jax.step import Recipe

COMPILES = 8  # maximum number of compilations of --fit
REMAT = get_args(Remat)  # cheapest first
V5E = Topology.parse("v5e:16x16")
# Bounds and estimates of the step time: name in `--json`, label, and relation of the MFU to it.
BOUNDS = {
    "bound": ("overlapped bound", "≤"),
    "sequential_bound": ("sequential bound", "≤"),
    "schedule_estimate": ("schedule estimate", "≈"),
    "cost_model": ("XLA's cost model", "≈"),
}
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

    # Pod to plan for: TPUs such as v5e:16x16 or, by Cloud TPU's name, v5litepod-256; GPUs such as
    # H100:64. v5e:16x16/slices=2 is two slices, joined along the data axis by the network between
    # slices.
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
    # Estimate memory and bounds in seconds, without a compiler, and end there.
    estimate: bool = False
    # Estimate the time by the compiler's schedules, too. For TPUs, compiling then takes 1.6 to 2.8
    # times as long.
    schedules: bool = True
    cache: Path | None = None  # Cache folder. None: clip_jax/plan in $XDG_CACHE_HOME or ~/.cache.

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, mfu="(0, 1]", chip_hour_price="[0, inf)", valid_share="(0, 1]")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of one device."""

    fits: bool
    hbm_bytes: float  # memory of one device that a run may use
    bytes_per_device: dict[str, int]  # by part, and the total
    token_embedding_bytes: dict[str, int]  # its part of parameters and optimizer
    frozen_bytes: int  # parameters of frozen models, a part of the terms


@dataclass(frozen=True, kw_only=True)
class Speed:
    """FLOPs, traffic and time of a step."""

    model_flops_per_step: int  # of all devices, without recomputation, with the teachers'
    teacher_flops_per_step: int  # forward passes of frozen models
    collectives: tuple[Collective, ...]
    calls: dict[str, int]  # calls of kernels and libraries per step, by name
    seconds: Seconds  # of a step at the chips' peaks; empty if it does not fit
    seconds_by_part: dict[str, Seconds]  # the same for each part of the step
    gigabytes: float  # HBM traffic of one device per step, padding included
    step_seconds: Seconds  # by name in `BOUNDS`; None: not known
    mfus: dict[str, float | None]  # MFU at each of these
    unscheduled: dict[str, float]  # see `bounds`
    valid_share: float  # share of patches that are not padding


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Time and price of a run."""

    steps: int
    mfu: float  # for hours and price
    mfu_source: str  # what this MFU is: assumed, or the label of the lowest bound or estimate
    hours: float
    teacher_hours: float  # the share of frozen models in the hours
    price: float | None
    images_per_second_per_host: float  # to read and decode


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A step of one config on one pod: what is compiled, its memory and speed, the run's cost."""

    name: str  # name of the topology
    is_gpu: bool
    devices: int
    mesh: dict[str, int]
    batch_size: int
    remat: str
    form: str  # form of the loss
    optimizer: str
    tokens: int | None  # patches of an image, padding included; None: no ViT
    attention: dict[str, str]  # backend by tower
    versions: str
    compile_seconds: float
    memory: Memory
    speed: Speed
    cost: Cost
    is_estimate: bool = False  # nothing is compiled
    stage: int | None = None  # of the run, from 1; None: it has no stages
    fit_compiles: int = 0  # compilations that --fit needed
    lengths: tuple["Plan", ...] = ()  # of each batch size and length, if the run has several

    @property
    def rows(self) -> int:
        """Number of pairs in one shard of a batch."""
        return self.batch_size // math.prod(self.mesh[axis] for axis in sharding.BATCH_AXES)

    def per_billion_pairs(self) -> dict[str, float | None]:
        """Return hours and price of 1B pairs, with and without the teachers' FLOPs at this MFU."""
        billions = sum(x.cost.steps * x.batch_size for x in self.lengths or (self,)) / 1e9
        hours, price = self.cost.hours / billions, self.cost.price and self.cost.price / billions
        without_teacher = 1 - self.cost.teacher_hours / self.cost.hours
        return {
            "hours": hours,
            "price": price,
            "hours_without_teacher": without_teacher * hours,
            "price_without_teacher": price and without_teacher * price,
        }

    def to_json(self) -> dict[str, Any]:
        """Return all fields in one object, whose names are released, and what follows from them."""
        values = dataclasses.asdict(dataclasses.replace(self, lengths=()))
        for part in ("memory", "speed", "cost"):
            values |= values.pop(part)
        mfus, speed = values.pop("mfus"), self.speed
        values |= {f"step_seconds_{name}": x for name, x in values.pop("step_seconds").items()}
        values |= {f"mfu_{name}": x for name, x in mfus.items()}
        values |= {f"valid_mfu_{name}": x and x * speed.valid_share for name, x in mfus.items()}
        for collective in values["collectives"]:
            del collective["source"], collective["arrays"]
        return values | {
            "lengths": [x.to_json() for x in self.lengths],
            "model_flops_per_step_per_device": speed.model_flops_per_step / self.devices,
            "teacher_share_of_flops": speed.teacher_flops_per_step / speed.model_flops_per_step,
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
    if config.fit and (config.lengths or config.stages):  # the batch at which the costliest fit
        recipes = [config.recipe_of(kind) for kind in config.batches.kinds]
        costliest = max(recipes, key=lambda x: flops.of_step(x).total / x.batch_size)
        config = dataclasses.replace(
            config,
            lengths=None,
            stages=(),
            model=costliest.model,
            objective=costliest.objective,
            batch_size=costliest.batch_size,
        )
    if config.estimate:
        config, compile_ = dataclasses.replace(config, schedules=False), pod.estimate
    compile_ = compile_ or pod.compiling(config.cache, announce)
    first = fit(config, compile_) if config.fit else run(config, compile_)
    return [first, *(run(_variant(config, text), compile_) for text in config.compare)]


def announce(request: Request) -> None:
    """Print the estimate of a step that is about to be compiled, in one line."""
    topology = request.topology
    try:
        facts = pod.estimate(request)
    except ValueError as error:  # of a loss that asks a mesh for its devices; the compiler has them
        say(f"no estimate: {error}")
        return
    seconds = bounds.step_seconds(bounds.bounds(topology.chip.device, facts.works, ()))["bound"]
    say(
        f"estimate: about {facts.peak_bytes / 1e9:.1f} of {topology.usable_bytes / 1e9:.1f} GB, "
        f"overlapped bound about {1e3 * (seconds or 0):.3g} ms"
    )


def run(config: PlanConfig, compile_: Compile) -> Plan:
    """Plan a run at each of its batch sizes and sequence lengths, in each of its stages.

    The result is the plan of the variant that takes the most memory, with the steps, hours and
    price of the whole run; `lengths` has all of them if there are several.
    """
    plans = [
        dataclasses.replace(
            assess(config, compile_(request(config, recipe)), recipe, steps), stage=kind.stage
        )
        for kind, steps, recipe in config.variants()
    ]
    if len(plans) == 1:
        return plans[0]
    worst = max(plans, key=lambda x: (not x.memory.fits, x.memory.bytes_per_device["total"]))
    hours = sum(x.cost.hours for x in plans)
    cost = dataclasses.replace(
        worst.cost,
        steps=sum(x.cost.steps for x in plans),
        hours=hours,
        teacher_hours=sum(x.cost.teacher_hours for x in plans),
        price=worst.cost.price and worst.cost.price * hours / worst.cost.hours,
        images_per_second_per_host=max(x.cost.images_per_second_per_host for x in plans),
    )
    seconds = sum(x.compile_seconds for x in plans)
    return dataclasses.replace(worst, cost=cost, compile_seconds=seconds, lengths=tuple(plans))


def request(config: PlanConfig, recipe: Recipe | None = None) -> Request:
    """Return what the compiled step depends on, by default of the config's own recipe. Raises
    InputError if the mesh cannot shard it."""
    devices, recipe = config.topology.devices, recipe or config.recipe
    mesh = sharding.abstract_mesh(config.mesh, devices)
    if recipe.batch_size % (shards := sharding.batch_shards(mesh)):
        sizes = " × ".join(f"{axis}={mesh.shape[axis]}" for axis in sharding.BATCH_AXES)
        raise InputError(
            f"batch_size={recipe.batch_size} cannot be split over {shards} batch shards of "
            f"{config.topology} (mesh {sizes}); change --batch-size or --mesh."
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
        elif axis in sharding.AXES and value.lstrip("-").isdigit():
            sizes[axis] = int(value)
        else:
            raise InputError(
                f"--compare {text}: {change!r} is not data=, fsdp=, tensor= or slices= with a "
                "number; write v5e:16x16 or v5e:16x16/fsdp=8,slices=2."
            )
    mesh = dataclasses.replace(config.mesh, **sizes)
    return dataclasses.replace(config, topology=Topology.parse(name), mesh=mesh)


def assess(
    config: PlanConfig, facts: Facts, recipe: Recipe | None = None, steps: int | None = None
) -> Plan:
    """Compute memory, step times, MFU bounds, hours and price from the compiler's facts, by default
    of all steps at the config's own recipe."""
    topology = config.topology
    recipe, steps = recipe or config.recipe, steps or config.steps
    memory = _memory(facts, topology)
    speed = _speed(config, facts, recipe, fits=memory.fits)
    return Plan(
        name=str(topology),
        is_gpu=not topology.is_tpu,
        devices=topology.devices,
        mesh=dict(zip(sharding.AXES, facts.mesh, strict=True)),
        batch_size=recipe.batch_size,
        remat=recipe.model.remat,
        form=facts.form,
        optimizer=type(config.optim.optimizer).__name__,
        tokens=recipe.model.vision.num_patches or None,
        attention=dict(facts.attention),
        versions=facts.versions,
        compile_seconds=facts.compile_seconds,
        is_estimate=facts.is_estimate,
        memory=memory,
        speed=speed,
        cost=_cost(config, speed, steps, steps * recipe.batch_size, facts),
    )


def _memory(facts: Facts, topology: Topology) -> Memory:
    entries = ("parameters", "optimizer", *["terms"] * bool(facts.terms), "batch", "loss")
    sizes = {name: getattr(facts, name) for name in entries}
    rest = facts.peak_bytes - sum(sizes.values())
    return Memory(
        fits=facts.fits and facts.peak_bytes <= topology.usable_bytes,
        hbm_bytes=topology.usable_bytes,
        bytes_per_device=sizes | {"activations and workspace": rest, "total": facts.peak_bytes},
        token_embedding_bytes={
            "parameters": facts.token_embedding,
            "optimizer": facts.token_embedding_optimizer,
        },
        frozen_bytes=facts.frozen,
    )


def _speed(config: PlanConfig, facts: Facts, recipe: Recipe, *, fits: bool) -> Speed:
    """Compute times and MFUs of a step; unknown ones if it does not fit."""
    topology, device = config.topology, config.topology.chip.device
    flops_of_step = flops.of_step(recipe)
    seconds, parts, times, unscheduled = {}, {}, dict.fromkeys(BOUNDS), {}
    if fits:
        seconds = bounds.bounds(device, facts.works, facts.collectives)
        if facts.is_estimate:
            seconds |= dict.fromkeys(("interconnect", "network"))
        parts = bounds.by_part(device, facts.works, facts.collectives)
        if config.schedules:
            unscheduled = bounds.unscheduled(device, facts.works)
        else:
            for values in (seconds, *parts.values()):
                values["schedule"] = None
        times = bounds.step_seconds(seconds)
    peak_flops = topology.devices * device.peak_flops
    vision, share = recipe.model.vision, 1.0
    if isinstance(vision.image_spec, NaFlex):
        share = config.valid_share or valid_share(vision.image_spec)
    return Speed(
        model_flops_per_step=flops_of_step.total,
        teacher_flops_per_step=flops_of_step.teacher,
        collectives=facts.collectives,
        calls=facts.calls(),
        seconds=seconds,
        seconds_by_part=parts,
        gigabytes=sum(x.times * x.bytes for x in facts.works) / 1e9,
        step_seconds=times,
        mfus={name: x and flops_of_step.total / (peak_flops * x) for name, x in times.items()},
        unscheduled=unscheduled,
        valid_share=share,
    )


def _cost(config: PlanConfig, speed: Speed, steps: int, pairs: int, facts: Facts) -> Cost:
    """Compute hours and price at the assumed MFU, or at the lowest bound or estimate if lower."""
    topology = config.topology
    mfus = {"assumed": config.mfu}
    # XLA's cost model is too high by far for operations of the vector unit, and without a compiler
    # the sequential bound is not accurate.
    left_out = ("cost_model", *["sequential_bound"] * facts.is_estimate)
    mfus |= {BOUNDS[name][0]: x for name, x in speed.mfus.items() if x and name not in left_out}
    mfu, mfu_source = min((x, name) for name, x in mfus.items())
    peak_flops = topology.devices * topology.chip.device.peak_flops
    hours = steps * speed.model_flops_per_step / (peak_flops * mfu) / 3600
    hosts = max(1, topology.devices / topology.devices_per_host)
    return Cost(
        steps=steps,
        mfu=mfu,
        mfu_source=mfu_source,
        hours=hours,
        teacher_hours=hours * speed.teacher_flops_per_step / speed.model_flops_per_step,
        price=config.chip_hour_price and hours * config.chip_hour_price * topology.chips,
        images_per_second_per_host=pairs / (hours * 3600) / hosts,
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

    Bisects the policies, since cheaper ones need more memory; then the batch, in steps of 8 pairs
    per device, guided by the memory of the batches before. There are at most COMPILES compilations.
    If the config's batch fits with no policy, the search goes down.
    Only the result is compiled with schedules, once more.
    """
    left = COMPILES
    devices = config.topology.devices
    shards = sharding.batch_shards(sharding.abstract_mesh(config.mesh, devices))

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
    assessed_by: dict[Remat, Plan] = {}

    def does_fit(remat: Remat) -> bool:
        assessed_by[remat] = attempt(remat, wanted)
        return assessed_by[remat].memory.fits

    remat = REMAT[bisect.bisect_left(REMAT, True, hi=len(REMAT) - 1, key=does_fit)]
    assessed = assessed_by.get(remat) or attempt(remat, wanted)
    best = assessed if assessed.memory.fits else None
    low, high = (wanted, None) if best else (0, wanted)  # fits, does not fit
    while left and (high is None or high - low > max(8, low // 16)):
        size = assessed.memory.bytes_per_device
        fixed = size["parameters"] + size["optimizer"] + size.get("terms", 0)
        each = max(size["total"] - fixed, 1) / (assessed.batch_size // shards)
        guess = int((assessed.memory.hbm_bytes - fixed) / each) // 8 * 8
        guess = max(guess, low + max(8, low // 64 * 8))  # memory is not quite linear in the batch
        if high and guess >= high:
            guess = (low + high) // 2 // 8 * 8 or (low + high) // 2
            if not low < guess < high:
                break
        assessed = attempt(remat, guess)
        if assessed.memory.fits:
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
