"""`clip-jax plan CONFIG --topology v5e:16x16`: what a run takes on a pod that you don't have.

The training step of the config is compiled for the pod (`compile.py`); memory and collectives are
read from the result, times are bounds at the chips' peaks (`bounds.py`).
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from clip_jax import flops, processes, sharding
from clip_jax.config import Config
from clip_jax.data import growth
from clip_jax.display import warn
from clip_jax.errors import InputError, check_ranges
from clip_jax.models.layers import Remat
from clip_jax.pods import compile as pod
from clip_jax.pods.bounds import Seconds, bounds, by_part, step_seconds
from clip_jax.pods.collectives import Collective
from clip_jax.pods.compile import GPU_COMPILER, TPU_COMPILER, Facts, Request
from clip_jax.pods.topology import NODE, Topology
from clip_jax.serialize import from_dict, to_dict
from clip_jax.storage import files

COMPILES = 8  # of --fit, at most
REMAT: tuple[Remat, ...] = ("none", "hidden", "residual", "attention", "full")  # cheapest first
V5E = Topology.parse("v5e:16x16")
# Of a step's seconds: how `--json` names them, what they are, and how MFU compares to them.
BOUNDS = {
    "bound": ("overlapped bound", "≤"),
    "sequential_bound": ("sequential bound", "≤"),
    "compiler_estimate": ("compiler estimate", "≈"),
}
GPU_SHARE = 0.75  # of a card's memory that JAX takes, where XLA_PYTHON_CLIENT_MEM_FRACTION is unset
LIBRARIES = ("jax", "jaxlib", "flax", "optax", *TPU_COMPILER, *GPU_COMPILER)
Compile = Callable[[Request], Facts]
AsText = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1, metavar="NAME:SIZE[/slices=N]", instance_from_str=lambda x: Topology.parse(x[0]),
    is_instance=lambda x: isinstance(x, Topology), str_from_instance=lambda x: [str(x)],
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Config):
    """A run's config, and the pod that it is planned for."""

    # v5e:16x16/slices=2: two of them, joined by the network between slices along the data axis.
    topology: Annotated[Topology, AsText] = V5E  # TPUs (v5e:16x16) or GPUs (H100:64)
    chip_hour_price: float | None = None  # price of one chip-hour, in any currency
    mfu: float = 0.4  # MFU that the run is assumed to reach, unless its bound is lower
    fit: bool = False  # find the cheapest remat and the largest batch that fit
    compare: tuple[str, ...] = ()  # other pods or meshes: v5p:4x4x8, v5e:16x16/fsdp=8,slices=2
    cache: Path | None = None  # folder of compiled results (default: ~/.cache/clip_jax/plan)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, mfu="(0, 1]", chip_hour_price="[0, inf)")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One config on one pod."""

    name: str  # of the topology
    fits: bool
    devices: int
    mesh: dict[str, int]
    batch_size: int
    remat: str
    form: str  # of the loss
    optimizer: str  # its name
    hbm_bytes: float  # of one device, that a run may use
    is_gpu: bool
    bytes_per_device: dict[str, int]  # by part, and the total
    token_embedding_bytes: dict[str, int]  # of parameters and optimizer, the token embedding table
    model_flops_per_step: int  # of all devices, nothing recomputed
    collectives: tuple[Collective, ...]
    calls: dict[str, int]  # of kernels and libraries in a step, by name
    seconds: Seconds  # at the peaks; empty where it does not fit
    seconds_by_part: dict[str, Seconds]  # of the step
    gigabytes: float  # that a device reads from and writes to HBM, padding included
    step_seconds: Seconds  # by its name in `BOUNDS`; None: not known
    mfus: dict[str, float | None]  # of these
    steps: int
    mfu: float  # what hours and price assume
    hours: float
    images_per_second_per_host: float  # that it must read and decode
    price: float | None
    versions: str
    compile_seconds: float
    fit_compiles: int = 0  # how many were needed to find batch and remat

    def to_json(self) -> dict[str, Any]:
        """Return everything, each bound of the step by its own name, and FLOPs per device."""
        values = dataclasses.asdict(self)
        for prefix, field in (("step_seconds", "step_seconds"), ("mfu", "mfus")):
            values |= {f"{prefix}_{name}": value for name, value in values.pop(field).items()}
        for collective in values["collectives"]:
            del collective["source"], collective["arrays"]
        return values | {
            "model_flops_per_step_per_device": self.model_flops_per_step / self.devices
        }


def plan(config: PlanConfig, compile_: Compile | None = None) -> list[Plan]:
    """Plan a config on its topology, then on those it is compared with.

    `compile_` gives the facts of a request; by default the cache, then the compiler. Raises
    InputError for a topology or mesh that cannot be, and where the compiler is missing.
    """
    if config.double_batch_at:  # the largest batch, and as many pairs
        largest = growth.batch_after(config.batch_size, config.double_batch_at, config.steps)
        steps = -(-config.samples_after(config.steps) // largest)
        config = dataclasses.replace(config, batch_size=largest, steps=steps, double_batch_at=())
    compile_ = compile_ or compiling(config)
    first = fit(config, compile_) if config.fit else assess(config, compile_(request(config)))
    others = [_variant(config, text) for text in config.compare]
    return [first, *(assess(other, compile_(request(other))) for other in others)]


def request(config: PlanConfig) -> Request:
    """Return what the compiled step depends on. Raises InputError for what cannot be split."""
    devices = config.topology.devices
    data, fsdp, _ = sharding.mesh_sizes(config.mesh, devices)
    if config.batch_size % (data * fsdp):
        raise InputError(
            f"batch_size={config.batch_size} cannot be split over {data * fsdp} batch shards of "
            f"{config.topology} (mesh data={data} × fsdp={fsdp}); change --batch-size or --mesh."
        )
    return Request(recipe=config.recipe, mesh=config.mesh, topology=config.topology)


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
    """Return what a run may use of one device's memory."""
    if topology.is_tpu:
        # The compiler's own limit, 15.75 GiB on a v5e, is above the 16 GB that a chip is sold with.
        return topology.chip.hbm_bytes / topology.chip.devices
    return GPU_SHARE * pod.memory_of_card(topology)


def assess(config: PlanConfig, facts: Facts) -> Plan:
    """Turn what the compiler says into memory, times, the MFU's bounds, and the run's price."""
    topology, chip = config.topology, config.topology.chip
    model_flops = flops.of_step(config).total
    peak_flops = topology.devices * chip.peak_flops / chip.devices
    entries = ("parameters", "optimizer", *["terms"] * bool(facts.terms), "batch", "loss")
    known = {name: getattr(facts, name) for name in entries}
    rest = facts.peak_bytes - sum(known.values())
    seconds, parts, steps = {}, {}, dict.fromkeys(BOUNDS)
    if is_fitting := facts.fits and facts.peak_bytes <= usable_bytes(topology):
        received = sum(x.received for x in facts.collectives)
        from_slices = sum(x.received_from_slices for x in facts.collectives)
        seconds = bounds(chip, facts.works, received, from_slices)
        parts = by_part(chip, facts.works)
        steps = step_seconds(seconds)
    mfus = {name: x and model_flops / (peak_flops * x) for name, x in steps.items()}
    mfu = min(config.mfu, *(mfus[name] or 1.0 for name in ("bound", "sequential_bound")))
    hours = config.steps * model_flops / (peak_flops * mfu) / 3600
    devices_of_host = 4 * chip.devices if topology.is_tpu else NODE
    hosts = max(1, topology.devices / devices_of_host)
    return Plan(
        name=str(topology),
        fits=is_fitting,
        devices=topology.devices,
        mesh=dict(zip(("data", "fsdp", "tensor"), facts.mesh, strict=True)),
        batch_size=config.batch_size,
        remat=config.model.remat,
        form=facts.form,
        optimizer=type(config.optim.optimizer).__name__,
        hbm_bytes=usable_bytes(topology),
        is_gpu=not topology.is_tpu,
        bytes_per_device=known | {"activations and workspace": rest, "total": facts.peak_bytes},
        token_embedding_bytes={
            "parameters": facts.token_embedding, "optimizer": facts.token_embedding_optimizer
        },
        model_flops_per_step=model_flops,
        collectives=facts.collectives,
        calls=facts.calls(),
        seconds=seconds,
        seconds_by_part=parts,
        gigabytes=sum(x.times * x.bytes for x in facts.works) / 1e9,
        step_seconds=steps,
        mfus=mfus,
        steps=config.steps,
        mfu=mfu,
        hours=hours,
        images_per_second_per_host=config.steps * config.batch_size / (hours * 3600) / hosts,
        price=config.chip_hour_price
        and hours * config.chip_hour_price * topology.devices / chip.devices,
        versions=facts.versions,
        compile_seconds=facts.compile_seconds,
    )  # fmt: skip


def fit(config: PlanConfig, compile_: Compile) -> Plan:
    """Find the cheapest remat at which the batch fits, then the largest batch at that remat.

    Bisection in steps of 8 pairs a device, led by what memory the batches before took; at most
    COMPILES compiles. Where the config's own batch fits at no policy, the search goes down.
    """
    left = COMPILES
    devices = config.topology.devices
    data, fsdp, _ = sharding.mesh_sizes(config.mesh, devices)
    shards = data * fsdp

    def attempt(remat: Remat, per_device: int) -> Plan:
        nonlocal left
        left -= 1
        model = dataclasses.replace(config.model, remat=remat)
        tried = dataclasses.replace(config, model=model, batch_size=per_device * shards)
        warn(f"fit: remat {remat}, {per_device} pairs a device ({left} compiles left)")
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
        guess = max(guess, low + max(8, low // 64 * 8))  # memory is not quite a straight line
        if high and guess >= high:
            guess = (low + high) // 2 // 8 * 8 or (low + high) // 2
            if not low < guess < high:
                break
        assessed = attempt(remat, guess)
        if assessed.fits:
            low, best = guess, assessed
        else:
            high = guess
    return dataclasses.replace(best, fit_compiles=COMPILES - left) if best else assessed


def compiling(config: PlanConfig) -> Compile:
    """Return a compile that looks on disk first: for the same code, compilers and flags."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = config.cache or home / "clip_jax/plan"
    flags = [os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")]
    program = " ".join([processes.code_version(), *pod.installed(*LIBRARIES), *flags])

    def cached(request: Request) -> Facts:
        values = to_dict(request)
        key = hashlib.sha256(f"{json.dumps(values)} {program}".encode()).hexdigest()[:24]
        path = folder / f"{key}.json"
        if path.is_file():
            return from_dict(Facts, json.loads(path.read_text())["facts"])
        warn(f"compiling for {request.topology} (a minute or a few) ...")
        facts = pod.compile_step(request)
        folder.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, json.dumps({"request": values, "facts": to_dict(facts)}))
        return facts

    return cached
