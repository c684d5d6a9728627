"""`clip-jax plan CONFIG --topology v5e:16x16`: what a run takes on a pod that you don't have.

The training step of the config is compiled for the pod (`compile.py`); memory and collectives are
read off the result, times are bounds at the chips' peaks (`bounds.py`).
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Annotated, Any

import tyro

from clip_jax import flops, sharding
from clip_jax.config import Config
from clip_jax.data import growth
from clip_jax.errors import InputError, check_picture, check_ranges
from clip_jax.models.layers import Remat
from clip_jax.pods import compile as pod
from clip_jax.pods.bounds import Bounds, bounds, by_part
from clip_jax.pods.compile import Facts, Request
from clip_jax.pods.report import Plan
from clip_jax.pods.topology import Topology
from clip_jax.serialize import from_dict, to_dict
from clip_jax.storage import files
from clip_jax.storage.files import Place, write_whole

COMPILES = 8  # of --fit, at most
REMAT: tuple[Remat, ...] = ("none", "hidden", "residual", "attention", "full")  # cheapest first
# What the compiled program is made of; the cache forgets when one of these files changes.
CODE = ("models", "losses", "optim", "sharding.py", "step.py", "processes.py", "pods")
V5E = Topology.parse("v5e:16x16")
GPU_SHARE = 0.75  # of a card's memory that JAX takes, where XLA_PYTHON_CLIENT_MEM_FRACTION is unset
COMPILERS = (
    *("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "flax", "optax"),
)
Compile = Callable[[Request], Facts]
AsText = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1, metavar="NAME:SIZE[/slices=N]", instance_from_str=lambda x: Topology.parse(x[0]),
    is_instance=lambda x: isinstance(x, Topology), str_from_instance=lambda x: [str(x)],
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Config):
    """A run's config, and the pod that it is planned for."""

    # v5e:16x16/slices=2: two of them, joined by the data-centre network along the data axis.
    topology: Annotated[Topology, AsText] = V5E  # TPUs (v5e:16x16) or GPUs (H100:64)
    chip_hour_price: float | None = None  # of one chip, in any currency: prices the run
    mfu: float = 0.4  # what the run is taken to reach, where its bound is not lower
    decoded: float | None = None  # images/s of a host's cores, `samples_per_second` of bench input
    fit: bool = False  # find the cheapest remat and the largest batch that fit
    compare: tuple[str, ...] = ()  # more of: v5p:4x4x8, v5e:16x16/fsdp=8, v5e:16x16/slices=2
    plot: Place | None = None  # draw time and memory by part: plan.png, .svg or .pdf
    cache: Path | None = None  # of compiled facts; None: clip_jax/plan in the user's cache folder

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, mfu="(0, 1]", chip_hour_price="[0, inf)", decoded="(0, inf)")
        check_picture(self.plot, "plot")


def plan(config: PlanConfig, compile_: Compile | None = None) -> list[Plan]:
    """Plan a config on its topology, then on those it is compared with.

    `compile_` gives the facts of a request; by default the cache, then the compiler. Raises
    InputError for a topology or mesh that cannot be, and where the compiler is missing.
    """
    files.check_destination(config.plot, "--plot", folder=False)
    if config.double_batch_at:  # the largest batch, and as many pairs
        largest = growth.batch_after(config.batch_size, config.double_batch_at, config.steps)
        steps = -(-config.samples_after(config.steps) // largest)
        config = dataclasses.replace(config, batch_size=largest, steps=steps, double_batch_at=())
    compile_ = compile_ or compiling(config)
    first = fit(config, compile_) if config.fit else assess(config, compile_(request(config)))
    others = [assess(c, compile_(request(c))) for c in map(_variant(config), config.compare)]
    plans = [first, *others]
    if config.plot:
        from clip_jax.pods.report import draw

        with files.written_whole(config.plot) as path:
            draw(plans, path)
    return plans


def request(config: PlanConfig) -> Request:
    """Keep of a config what the compiled step depends on. Raises InputError for what cannot be
    split."""
    devices = config.topology.devices
    data, fsdp, _ = sharding.mesh_sizes(config.mesh, devices)
    if config.batch_size % (data * fsdp):
        raise InputError(
            f"batch_size={config.batch_size} cannot be split over {data * fsdp} batch shards of "
            f"{config.topology} (mesh data={data} × fsdp={fsdp}); change --batch-size or --mesh."
        )
    return Request(recipe=config.recipe, mesh=config.mesh, topology=config.topology)


def _variant(config: PlanConfig) -> Callable[[str], PlanConfig]:
    """Read `v5e:16x16/fsdp=8,slices=2`: another topology, mesh or both."""

    def read(text: str) -> PlanConfig:
        name, _, changes = text.partition("/")
        mesh = config.mesh
        for change in filter(None, changes.split(",")):
            axis, _, value = change.partition("=")
            if axis == "slices" and value.isdigit():
                name += f"/{change}"
            elif axis in ("data", "fsdp", "tensor") and value.lstrip("-").isdigit():
                mesh = dataclasses.replace(mesh, **{axis: int(value)})
            else:
                raise InputError(
                    f"--compare {text}: {change!r} is not data=, fsdp=, tensor= or slices= with a "
                    "number; write v5e:16x16 or v5e:16x16/fsdp=8,slices=2."
                )
        return dataclasses.replace(config, topology=Topology.parse(name), mesh=mesh)

    return read


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
    is_fitting = facts.fits and facts.peak_bytes <= usable_bytes(topology)
    known = {name: getattr(facts, name) for name in ("parameters", "optimizer", "batch", "loss")}
    rest = facts.peak_bytes - sum(known.values())
    seconds: Bounds | None = None
    if is_fitting:
        seconds = bounds(
            chip, facts.works, sum(x.received for x in facts.exchanges),
            sum(x.received_from_slices for x in facts.exchanges),
        )  # fmt: skip
    peak = topology.devices * chip.peak_flops / chip.devices

    def mfu(step: float | None) -> float | None:
        return step and model_flops / (peak * step)

    caps = [mfu(seconds.step), mfu(seconds.one_by_one)] if seconds else []
    reached = min([config.mfu, *(cap for cap in caps if cap)])
    hours = config.steps * model_flops / (peak * reached) / 3600
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
        words={"parameters": facts.words, "optimizer": facts.words_optimizer},
        bytes_per_device=known | {"activations and workspace": rest, "total": facts.peak_bytes},
        model_flops_per_step=model_flops,
        collectives=facts.exchanges,
        calls=facts.calls(),
        seconds=seconds._asdict() if seconds else {},
        seconds_by_part={k: v._asdict() for k, v in by_part(chip, facts.works).items()}
        if is_fitting else {},
        gigabytes=sum(x.times * x.bytes for x in facts.works) / 1e9,
        step_seconds_bound=seconds and seconds.step,
        step_seconds_one_by_one=seconds and seconds.one_by_one,
        step_seconds_compiler=seconds and seconds.compiler,
        mfu_bound=mfu(seconds and seconds.step),
        mfu_one_by_one=mfu(seconds and seconds.one_by_one),
        mfu_compiler=mfu(seconds and seconds.compiler),
        steps=config.steps,
        mfu=reached,
        hours=hours,
        images_per_second_per_host=images_per_host(config, hours, topology),
        decoded_per_second_per_host=config.decoded,
        price=config.chip_hour_price
        and hours * config.chip_hour_price * topology.devices / chip.devices,
        versions=facts.versions,
        compile_seconds=facts.compile_seconds,
    )  # fmt: skip


def images_per_host(config: PlanConfig, hours: float, topology: Topology) -> float:
    """Images that a host must read and decode a second: hosts have 4 TPU chips, or 8 GPUs."""
    each = 4 * topology.chip.devices if topology.is_tpu else 8
    hosts = max(1, topology.devices / each)
    return config.steps * config.batch_size / (hours * 3600) / hosts


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
        _say(f"fit: remat {remat}, {per_device} pairs a device ({left} compiles left)")
        return assess(tried, compile_(request(tried)))

    asked = max(config.batch_size // shards, 1)
    for remat in REMAT:
        assessed = attempt(remat, asked)
        if assessed.fits:
            break
    fitting = {asked: assessed} if assessed.fits else {}
    low, high = (asked, None) if assessed.fits else (0, asked)  # fits, does not fit
    while left and (high is None or high - low > max(8, low // 16)):
        fixed = assessed.bytes_per_device["parameters"] + assessed.bytes_per_device["optimizer"]
        each = max(assessed.bytes_per_device["total"] - fixed, 1) / (assessed.batch_size // shards)
        guess = int((assessed.hbm_bytes - fixed) / each) // 8 * 8
        guess = max(guess, low + max(8, low // 64 * 8))  # memory is not quite a straight line
        if high and guess >= high:
            guess = (low + high) // 2 // 8 * 8 or (low + high) // 2
            if not low < guess < high:
                break
        assessed = attempt(remat, guess)
        if assessed.fits:
            low, fitting[guess] = guess, assessed
        else:
            high = guess
    if not fitting:
        return assessed
    return dataclasses.replace(fitting[low], fit_compiles=COMPILES - left)


def compiling(config: PlanConfig) -> Compile:
    """Return a compile that looks on disk first, and shows that it works."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = config.cache or home / "clip_jax/plan"

    def cached(wanted: Request) -> Facts:
        asked = json.dumps(to_dict(wanted))
        key = hashlib.sha256(f"{asked} {_code()}".encode()).hexdigest()[:24]
        path = folder / f"{key}.json"
        if path.is_file():
            return from_dict(Facts, json.loads(path.read_text())["facts"])
        with _working(f"compiling for {wanted.topology}"):
            facts = pod.compile_step(wanted)
        folder.mkdir(parents=True, exist_ok=True)
        kept = json.dumps({"request": json.loads(asked), "facts": to_dict(facts)})
        write_whole(str(path), lambda file: file.write(kept.encode()))
        return facts

    return cached


def _code() -> str:
    """Name the code, the compilers and their flags, which make the program."""
    digest = hashlib.sha256()
    root = resources.files("clip_jax")
    for name in CODE:
        place = root / name
        files = sorted(place.iterdir(), key=lambda x: x.name) if place.is_dir() else [place]
        for file in files:
            if file.name.endswith(".py"):
                digest.update(file.read_bytes())
    versions = []
    for name in COMPILERS:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    flags = [os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")]
    return " ".join([digest.hexdigest(), *versions, *flags])


def _working(text: str) -> Any:
    """Show on standard error what goes on and for how long."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        _say(f"{text} (a minute or a few) ...")
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
        console=console, transient=True,
    )  # fmt: skip
    progress.add_task(text, total=None)
    return progress


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
