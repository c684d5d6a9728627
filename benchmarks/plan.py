"""The table "Pods" of BENCHMARKS.md: what `clip-jax plan` says of every config on its slice.

    python benchmarks/plan.py [config ...]

Compiled steps are cached, so that one can be compiled at a time.
"""

import dataclasses
import sys
from pathlib import Path

from clip_jax.config import load_config
from clip_jax.pods.bounds import LIMITS
from clip_jax.pods.plan import Plan, PlanConfig, plan
from clip_jax.pods.topology import Topology

ROOT = Path(__file__).parents[1]

V5E, V5P, V5P_512 = "v5e:16x16", "v5p:4x4x8", "v5p:8x8x8"
PODS = [  # config, topology, batch if not the config's
    ("vit_b32", V5E, None),
    ("vit_b16", V5E, None),
    ("vit_l14", V5E, None),
    ("vit_l14", f"{V5E}/slices=2", 65_536),
    ("vit_l14_336", V5E, None),
    ("rn50", V5E, None),
    ("rn50x64", V5P, None),
    ("vit_h14", V5P, None),
    ("vit_bigg14", V5P_512, None),
    ("siglip_b16", V5E, None),
    ("siglip2_b16", V5E, None),
    ("clipa_l14", V5E, None),
]


def make(name: str, topology: str, batch: int | None) -> Plan:
    config = load_config(ROOT / f"configs/{name}.py")
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if batch:  # as many samples
        values |= {"batch_size": batch, "steps": config.steps * config.batch_size // batch}
    return plan(PlanConfig(**values, topology=Topology.parse(topology)))[0]


def row(name: str, x: Plan) -> str:
    gigabytes = [x.bytes_per_device[part] / 1e9 for part in ("total", "parameters", "optimizer")]
    times = [x.seconds.get(part) for part in LIMITS]
    times += [x.step_seconds[name] for name in ("sequential_bound", "compiler_estimate")]
    cells = [
        f"`{name}`",
        f"{x.name}, {'×'.join(map(str, x.mesh.values()))}",
        f"{x.batch_size:,}",
        x.remat,
        f"{'yes' if x.fits else 'no'}: {gigabytes[0]:.1f} of {x.hbm_bytes / 1e9:.0f}",
        f"{gigabytes[1]:.2f} + {gigabytes[2]:.2f}",
        f"{x.model_flops_per_step / x.devices / 1e12:.1f}",
        f"{x.gigabytes:.0f}",
        *("" if not t else f"{1e3 * t:.0f}" for t in times),
        *("" if mfu is None else f"{mfu:.0%}" for mfu in x.mfus.values()),
        f"{x.compile_seconds:.0f}",
        f"{x.hours:,.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    print(
        "| config | slice, data × fsdp × tensor | batch | remat | fits: GB a chip | parameters + "
        "optimizer | TFLOP a step and chip | GB moved | compute ms | HBM ms | ICI ms | network "
        "between slices ms | sequential bound ms | compiler estimate ms | MFU, overlapped bound | "
        "MFU, sequential bound | MFU, compiler estimate | compile s | hours |\n|" + "---|" * 19
    )
    for name, *pod in PODS:
        if name in sys.argv[1:] or len(sys.argv) == 1:
            print(row(name, make(name, *pod)), flush=True)


if __name__ == "__main__":
    main()
