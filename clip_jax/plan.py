"""`clip-jax plan CONFIG --topology v5e:16x16`: what a run takes on a pod that you don't have.

The training step of the config is compiled for the pod (`pod.py`); memory and collectives are read
off the result, times are bounds at the chips' peaks (`scaling/bounds.py`).
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
from typing import Any

from clip_jax import pod, sharding
from clip_jax.config import Config
from clip_jax.models.layers import Remat
from clip_jax.models.serialize import to_dict
from clip_jax.pod import Facts, Request
from clip_jax.scaling import flops
from clip_jax.scaling.bounds import bounds, executed_flops
from clip_jax.scaling.pods import Plan

COMPILES = 8  # of --fit, at most
REMAT: tuple[Remat, ...] = ("none", "dots", "attention", "full")  # cheapest first
# What the compiled program is made of; the cache forgets when one of these files changes.
CODE = ("models", "losses", "optim.py", "sharding.py", "step.py", "pod.py", "scaling/hlo.py")
Compile = Callable[[Request], Facts]


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Config):
    """A run's config, and the pod that it is planned for."""

    topology: str = "v5e:16x16"  # a TPU slice (v4, v5e, v5p, v6e), or GPUs by formula: H100:64
    slices: int = 1  # of that topology, joined by the data-centre network along the data axis
    chip_hour_price: float | None = None  # of one chip, in any currency: prices the run
    mfu: float = 0.4  # what the run is taken to reach, where its bound is not lower
    fit: bool = False  # find the cheapest remat and the largest batch that fit
    compare: tuple[str, ...] = ()  # more of: v5p:4x4x8, v5e:16x16/fsdp=8, v5e:16x16/slices=2
    plot: Path | None = None  # draw time and memory by part: plan.png, .svg or .pdf
    cache: Path | None = None  # of compiled facts; None: clip_jax/plan in the user's cache folder

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slices < 1 or not 0 < self.mfu <= 1:
            raise ValueError(
                f"slices={self.slices} must be at least 1 and mfu={self.mfu} in (0, 1]."
            )
        if self.slices > 1 and not pod.is_tpu(self.topology):
            raise ValueError(f"slices={self.slices}: {self.topology} is not a TPU slice.")


def plan(config: PlanConfig, compile_: Compile | None = None) -> list[Plan]:
    """Plan a config on its topology, then on those it is compared with.

    `compile_` gives the facts of a request; by default the cache, then the compiler. Raises
    ValueError for a topology or mesh that cannot be, and where the TPU compiler is missing.
    """
    compile_ = compile_ or compiling(config)
    first = fit(config, compile_) if config.fit else assess(config, compile_(request(config)))
    others = [assess(c, compile_(request(c))) for c in map(_variant(config), config.compare)]
    plans = [first, *others]
    if config.plot:
        from clip_jax.scaling.pods import draw

        draw(plans, config.plot)
    return plans


def request(config: PlanConfig) -> Request:
    """Keep of a config what the compiled step depends on. ValueError for what cannot be split."""
    devices = pod.count_devices(config.topology, config.slices)
    data, fsdp, _ = sharding.mesh_sizes(config.mesh, devices)
    if config.batch_size % (data * fsdp):
        raise ValueError(
            f"batch_size={config.batch_size} cannot be split over {data * fsdp} batch shards of "
            f"{config.topology} (mesh data={data} × fsdp={fsdp}); change --batch-size or --mesh."
        )
    names = [field.name for field in dataclasses.fields(Request)]
    return Request(**{name: getattr(config, name) for name in names})


def _variant(config: PlanConfig) -> Callable[[str], PlanConfig]:
    """Read `v5e:16x16/fsdp=8,slices=2`: another topology, mesh or both."""

    def read(text: str) -> PlanConfig:
        topology, _, changes = text.partition("/")
        mesh, slices = config.mesh, 1
        for change in filter(None, changes.split(",")):
            name, _, value = change.partition("=")
            if name not in ("data", "fsdp", "tensor", "slices") or not value.lstrip("-").isdigit():
                raise ValueError(
                    f"--compare {text}: {change!r} is not data=, fsdp=, tensor= or slices= with a "
                    "number; write v5e:16x16 or v5e:16x16/fsdp=8,slices=2."
                )
            if name == "slices":
                slices = int(value)
            else:
                mesh = dataclasses.replace(mesh, **{name: int(value)})
        return dataclasses.replace(config, topology=topology, mesh=mesh, slices=slices)

    return read


def assess(config: PlanConfig, facts: Facts) -> Plan:
    """Turn what the compiler says into memory, times, the MFU's bound, and the price of the run."""
    chip = pod.chip_of(config.topology)
    devices = pod.count_devices(config.topology, config.slices)
    model_flops = flops.training(
        config.model,
        config.batch_size,
        patch_dropout=getattr(config.model.vision, "patch_dropout", 0.0),
        locked=config.optim.locked,
    ).total
    # The compiler's own limit, 15.75 GiB on a v5e, is above the 16 GB that the chip is sold with.
    hbm_bytes = chip.hbm_bytes / chip.devices
    is_fitting = facts["fits"] and facts["peak_bytes"] <= hbm_bytes
    known = {name: facts[name] for name in ("parameters", "optimizer", "batch", "loss")}
    rest = facts["peak_bytes"] - sum(known.values())
    seconds = None
    if is_fitting:
        executed = executed_flops(
            config.model, config.batch_size, precision=config.loss.precision, form=facts["form"],
            accumulation=config.accumulation, locked=config.optim.locked,
        )  # fmt: skip
        seconds = bounds(
            chip, devices, executed, facts["hbm_traffic"],
            sum(x["received"] for x in facts["collectives"])
            if pod.is_tpu(config.topology) or devices <= 8 else None,  # NVLink's reach
            sum(x["received_from_slices"] for x in facts["collectives"]),
        )  # fmt: skip
    peak = devices * chip.peak_flops / chip.devices
    mfu_bound = seconds and model_flops / (peak * seconds.step)
    hours = config.steps * model_flops / (peak * min(config.mfu, mfu_bound or 1)) / 3600
    return Plan(
        name=config.topology + (f" × {config.slices}" if config.slices > 1 else ""),
        fits=is_fitting,
        devices=devices,
        mesh=facts["mesh"],
        batch_size=config.batch_size,
        remat=config.model.remat,
        form=facts["form"],
        hbm_bytes=hbm_bytes,
        bytes_per_device=known | {"activations and workspace": rest, "total": facts["peak_bytes"]},
        model_flops_per_step=model_flops,
        collectives=facts.get("collectives", []),
        seconds=seconds._asdict() if seconds else {},
        step_seconds_bound=seconds and seconds.step,
        mfu_bound=mfu_bound,
        steps=config.steps,
        mfu=min(config.mfu, mfu_bound or 1),
        hours=hours,
        price=config.chip_hour_price and hours * config.chip_hour_price * devices / chip.devices,
        by_formula=not pod.is_tpu(config.topology),
        versions=facts["versions"],
        compile_seconds=facts["compile_seconds"],
    )


def fit(config: PlanConfig, compile_: Compile) -> Plan:
    """Find the cheapest remat at which the batch fits, then the largest batch at that remat.

    Bisection in steps of 8 pairs a device, led by what memory the batches before took; at most
    COMPILES compiles. Where the config's own batch fits at no policy, the search goes down.
    """
    left = COMPILES
    devices = pod.count_devices(config.topology, config.slices)
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
        found = attempt(remat, asked)
        if found.fits:
            break
    fitting = {asked: found} if found.fits else {}
    low, high = (asked, None) if found.fits else (0, asked)  # fits, does not fit
    while left and (high is None or high - low > max(8, low // 16)):
        fixed = found.bytes_per_device["parameters"] + found.bytes_per_device["optimizer"]
        each = max(found.bytes_per_device["total"] - fixed, 1) / (found.batch_size // shards)
        guess = int((found.hbm_bytes - fixed) / each) // 8 * 8
        guess = max(guess, low + max(8, low // 64 * 8))  # memory is not quite a straight line
        if high and guess >= high:
            guess = (low + high) // 2 // 8 * 8 or (low + high) // 2
            if not low < guess < high:
                break
        found = attempt(remat, guess)
        if found.fits:
            low, fitting[guess] = guess, found
        else:
            high = guess
    if not fitting:
        return found
    return dataclasses.replace(fitting[low], fit_compiles=COMPILES - left)


def compiling(config: PlanConfig) -> Compile:
    """Return a compile that looks on disk first, and shows that it works."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = config.cache or home / "clip_jax/plan"

    def cached(wanted: Request) -> Facts:
        if not pod.is_tpu(wanted.topology):
            return pod.estimate(wanted)
        key = hashlib.sha256(f"{json.dumps(to_dict(wanted))} {_code()}".encode()).hexdigest()[:24]
        path = folder / f"{key}.json"
        if path.is_file():
            return json.loads(path.read_text())["facts"]
        with _working(f"compiling for {wanted.slices} × {wanted.topology}"):
            facts = pod.compile_step(wanted)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"request": to_dict(wanted), "facts": facts}, indent=1))
        os.replace(temporary, path)
        return facts

    return cached


def _code() -> str:
    """Name the code and the compilers that make the program."""
    digest = hashlib.sha256()
    root = resources.files("clip_jax")
    for name in CODE:
        place = root / name
        files = sorted(place.iterdir(), key=lambda x: x.name) if place.is_dir() else [place]
        for file in files:
            if file.name.endswith(".py"):
                digest.update(file.read_bytes())
    versions = []
    for name in ("jax", "jaxlib", "libtpu", "flax", "optax"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return f"{digest.hexdigest()} {' '.join(versions)}"


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
