"""The table "Pods" of BENCHMARKS.md: what `clip-jax plan` says of every config on its slice.

    python tests/bench_plan.py [config ...]

Compiled steps are cached, so that one can be compiled at a time.
"""

import dataclasses
import sys

from clip_jax.config import load_config
from clip_jax.plan import PlanConfig, plan
from clip_jax.scaling.pods import SECONDS, Plan
from tests.runs import ROOT

V5E, V5P, V5P_512 = "v5e:16x16", "v5p:4x4x8", "v5p:8x8x8"
PODS = [  # config, topology, slices, batch if not the config's
    ("vit_b32", V5E, 1, None),
    ("vit_b16", V5E, 1, None),
    ("vit_l14", V5E, 1, None),
    ("vit_l14", V5E, 2, 65_536),
    ("vit_l14_336", V5E, 1, None),
    ("rn50", V5E, 1, None),
    ("rn50x64", V5P, 1, None),
    ("vit_h14", V5P, 1, None),
    ("vit_bigg14", V5P_512, 1, None),
    ("siglip_b16", V5E, 1, None),
    ("clipa_l14", V5E, 1, None),
]


def make(name: str, topology: str, slices: int, batch: int | None) -> Plan:
    config = load_config(ROOT / f"configs/{name}.py")
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if batch:  # as many samples
        values |= {"batch_size": batch, "steps": config.steps * config.batch_size // batch}
    return plan(PlanConfig(**values, topology=topology, slices=slices))[0]


def row(name: str, x: Plan) -> str:
    gigabytes = [x.bytes_per_device[part] / 1e9 for part in ("total", "parameters", "optimizer")]
    times = [x.seconds.get(part) for part in SECONDS]
    cells = [
        f"`{name}`",
        f"{x.name}, {'×'.join(map(str, x.mesh.values()))}",
        f"{x.batch_size:,}",
        x.remat,
        f"{'yes' if x.fits else 'no'}: {gigabytes[0]:.1f} of {x.hbm_bytes / 1e9:.0f}",
        f"{gigabytes[1]:.2f} + {gigabytes[2]:.2f}",
        f"{x.model_flops_per_step / x.devices / 1e12:.1f}",
        *("" if not t else f"{1e3 * t:.0f}" for t in times),
        "" if x.mfu_bound is None else f"{x.mfu_bound:.0%}",
        f"{x.hours:,.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    print(
        "| config | slice, data × fsdp × tensor | batch | remat | fits: GB a chip | parameters + "
        "optimizer | TFLOP a step and chip | compute ms | HBM ms | ICI ms | slices ms | MFU ≤ | "
        "hours at 40% |\n|" + "---|" * 13
    )
    for name, *pod in PODS:
        if name in sys.argv[1:] or len(sys.argv) == 1:
            print(row(name, make(name, *pod)), flush=True)


if __name__ == "__main__":
    main()
