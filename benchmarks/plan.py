"""Plan every config on the slice that it is meant for. No TPU is needed.

    python benchmarks/plan.py [CONFIG ...]

The TPU compiler (extra `tpu`) compiles each config's training step. The script prints five tables:
cost and step time (in BENCHMARKS.md), what bounds the step, what the estimate leaves out, memory
(in docs/explanation/performance.md), and the errors of estimates without a compiler. Compiled steps
are cached, so that configs can be compiled one at a time; all of them take about two hours on one
or two cores.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from clip_jax.config_files import load_config
from clip_jax.models import zoo
from clip_jax.pods.plan import Plan, PlanConfig, plan
from clip_jax.pods.topology import Topology

ROOT = Path(__file__).parents[1]
PRICES = {"v5e": 1.2, "v5p": 4.2}  # $ per chip-hour

V5E, V5P, V5P_512, V5E_8 = "v5e:16x16", "v5p:4x4x8", "v5p:8x8x8", "v5e:2x4"
PODS: list[tuple[str, str, dict[str, Any]]] = [  # config, topology, and what differs
    ("vit_b32", V5E, {}),
    ("vit_b16", V5E, {}),
    ("vit_b16", V5E, {"fsdp": 1}),
    ("vit_l14", V5E, {}),
    ("vit_l14", f"{V5E}/slices=2", {"batch_size": 65_536}),
    ("vit_l14_336", V5E, {}),
    ("rn50", V5E, {}),
    ("rn50x64", V5P, {}),
    ("vit_h14", V5P, {}),
    ("vit_h14", V5P, {"architecture": "ViT-H-14-quickgelu-worldwide"}),  # MetaCLIP 2
    ("vit_bigg14", V5P_512, {}),
    ("siglip_b16", V5E, {}),
    ("siglip2_b16", V5E, {}),
    ("clipa_l14", V5E, {}),
    ("coca_b32", V5E, {}),
    ("coca_l14", V5E, {}),
    ("cappa_b16", V5E, {}),
    ("mammut_l14", V5E, {}),
    ("pe_core_l14", V5E, {}),
    ("eva02_l14", V5E, {}),
    ("convnext_large", V5E, {}),
    ("lit_b16", V5E_8, {}),
    ("datacomp_small", V5E_8, {}),
    ("datacomp_medium", V5E_8, {}),
]
COST = (
    "config",
    "slice",
    "batch, pairs",
    "memory, GB per chip",
    "sequential bound, ms (MFU, %)",
    "schedule estimate, ms (MFU, %)",
    "XLA's cost model, ms (MFU, %)",
    "training time, h",
    "cost, $",
)
BOUNDS = (
    "config",
    "HBM traffic, GB",
    "compute, ms",
    "HBM, ms",
    "ICI, ms",
    "MFU, % (overlapped bound)",
)
ESTIMATE = (
    "config",
    "collectives without overlap, % of the schedule estimate",
    "operations without a schedule, %",
    "model TFLOP per chip and step",
    "compile time, s",
)
MEMORY = (
    "config",
    "mesh, data × fsdp × tensor",
    "remat",
    "peak, GB per chip",
    "parameters, GB",
    "optimizer, GB",
)


ESTIMATES = (
    "config",
    "memory, GB per chip",
    "error, %",
    "overlapped bound, ms",
    "error, %",
    "error of the sequential time, %",
    "time of the estimate, s",
)


def make(name: str, topology: str, changes: dict[str, Any]) -> tuple[str, Plan, Plan]:
    """Return the label of a config, its plan, and its estimate."""
    config, label = load_config(ROOT / f"configs/{name}.py"), f"`{name}`"
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if batch := changes.get("batch_size"):  # for as many samples
        values |= {"batch_size": batch, "steps": config.steps * config.batch_size // batch}
    if fsdp := changes.get("fsdp"):
        values["mesh"] = dataclasses.replace(config.mesh, fsdp=fsdp)
        label += f", fsdp {fsdp}"
    if architecture := changes.get("architecture"):
        model = dataclasses.replace(zoo.get(architecture), remat=config.model.remat)
        values["model"] = dataclasses.replace(model, attention="xla")
        label += f", {architecture}, attention `xla`"
    price = PRICES[topology.partition(":")[0]]
    where = Topology.parse(topology)
    config = PlanConfig(**values, topology=where, chip_hour_price=price)
    estimate = plan(dataclasses.replace(config, estimate=True))[0]
    return label, plan(config)[0], estimate


def milliseconds(x: float | None) -> str:
    return f"{1e3 * x:,.0f}" if x else ""


def rows(label: str, x: Plan, estimate: Plan) -> tuple[tuple[str, ...], ...]:
    """Return a row of each table."""
    peak, parameters, optimizer = (
        x.memory.bytes_per_device[part] / 1e9 for part in ("total", "parameters", "optimizer")
    )
    memory = f"{peak:.1f} of {x.memory.hbm_bytes / 1e9:.0f}" + " (too much)" * (not x.memory.fits)
    times = {
        name: f"{milliseconds(value)} ({100 * (x.speed.mfus[name] or 0):.0f})" if value else ""
        for name, value in x.speed.step_seconds.items()
    }
    limits = [
        milliseconds(x.speed.seconds.get(part)) for part in ("compute", "memory", "interconnect")
    ]
    parts = [
        x.speed.seconds_by_part.get("collectives", {}).get("schedule"),
        sum(x.speed.unscheduled.values()),
    ]
    shares = [
        f"{100 * (y or 0) / (x.speed.seconds.get('schedule') or math.inf):.1f}" for y in parts
    ]
    return (
        (
            label,
            x.name,
            f"{x.batch_size:,}",
            memory,
            times["sequential_bound"],
            times["schedule_estimate"],
            times["cost_model"],
            f"{x.cost.hours:,.{0 if x.cost.hours >= 5 else 2}f}",
            f"{x.cost.price or 0:,.0f}",
        ),
        (label, f"{x.speed.gigabytes:,.0f}", *limits, f"{100 * (x.speed.mfus['bound'] or 0):.0f}"),
        (
            label,
            *shares,
            f"{x.speed.model_flops_per_step / x.devices / 1e12:.1f}",
            f"{x.compile_seconds:.0f}",
        ),
        (
            label,
            "×".join(map(str, x.mesh.values())),
            x.remat,
            memory,
            f"{parameters:.2f}",
            f"{optimizer:.2f}",
        ),
        errors(label, x, estimate),
    )


def errors(label: str, x: Plan, estimate: Plan) -> tuple[str, ...]:
    """Return a row with the estimate, and how far it is from the plan."""

    def error(of: float | None, true: float | None) -> str:
        return f"{100 * (of / true - 1):+.0f}" if of and true else ""

    sizes = [y.memory.bytes_per_device["total"] for y in (estimate, x)]
    times = [y.speed.step_seconds for y in (estimate, x)]
    return (
        label,
        f"{sizes[0] / 1e9:.1f}",
        error(*sizes),
        milliseconds(times[0]["bound"]),
        error(*(y["bound"] for y in times)),
        error(*(y["sequential_bound"] for y in times)),
        f"{estimate.compile_seconds:.1f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", help="names of configs; by default all")
    names = parser.parse_args().configs
    every = []
    for name, topology, changes in PODS:
        if not names or name in names:
            print(f"{name} on {topology} {changes or ''}", file=sys.stderr, flush=True)
            every.append(rows(*make(name, topology, changes)))
    headers = (COST, BOUNDS, ESTIMATE, MEMORY, ESTIMATES)
    for header, table in zip(headers, zip(*every, strict=True), strict=True):
        print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
        print(*(f"| {' | '.join(row)} |" for row in table), sep="\n")


if __name__ == "__main__":
    main()
