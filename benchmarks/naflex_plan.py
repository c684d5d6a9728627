"""Plan SigLIP 2's NaFlex models at each of their sequence lengths. No TPU is needed.

    python benchmarks/naflex_plan.py [--attention BACKEND] [MODEL:PATCHES:BATCH:REMAT:SLICE ...]

The TPU compiler (extra `tpu`) compiles the training step of `configs/siglip2_b16.py` with another
image tower; PATCHES `fixed` is the model of fixed resolution with the same parameters. Without
arguments the script compiles the rows in BENCHMARKS.md, which takes about an hour on two cores.
"""

import argparse
import dataclasses
from pathlib import Path

from clip_jax.config_files import load_config
from clip_jax.models import zoo
from clip_jax.pods.plan import Plan, PlanConfig, plan
from clip_jax.pods.topology import Topology

ROOT = Path(__file__).parents[1]
B16, SO400M = "ViT-B-16-SigLIP2-naflex", "ViT-SO400M-16-SigLIP2-naflex"
V5E = "v5e:16x16"
ROWS = [
    f"{B16}:fixed:32768:hidden:{V5E}",
    f"{B16}:128:32768:hidden:{V5E}",
    f"{B16}:256:32768:hidden:{V5E}",
    f"{B16}:576:24576:hidden:{V5E}",
    f"{B16}:784:16384:hidden:{V5E}",
    f"{B16}:1024:12288:hidden:{V5E}",
    f"{SO400M}:fixed:32768:attention:{V5E}",
    f"{SO400M}:128:32768:attention:{V5E}",
    f"{SO400M}:256:32768:attention:{V5E}",
    f"{SO400M}:576:12288:attention:{V5E}",
    f"{SO400M}:784:8192:attention:{V5E}",
    f"{SO400M}:1024:8192:attention:{V5E}",
]
HEADER = (
    "model, patches",
    "batch, pairs",
    "memory, GB per chip",
    "attention",
    "overlapped bound, ms (MFU, %)",
    "sequential bound, ms (MFU, %)",
    "MFU of valid patches, % (overlapped bound)",
    "compile time, s",
)


def make(row: str, attention: str) -> Plan:
    name, patches, batch, remat, slice_ = row.split(":", 4)
    config = load_config(ROOT / "configs/siglip2_b16.py")
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    model = zoo.get(name)
    vision = dataclasses.replace(
        model.vision, max_patches=None if patches == "fixed" else int(patches)
    )
    values["model"] = dataclasses.replace(model, vision=vision, remat=remat, attention=attention)
    values["batch_size"] = int(batch)
    return plan(PlanConfig(**values, topology=Topology.parse(slice_)))[0]


def bound(x: Plan, name: str) -> str:
    seconds, mfu = x.speed.step_seconds[name], x.speed.mfus[name]
    return f"{1e3 * seconds:.0f} ({100 * mfu:.1f})" if seconds and mfu else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help="see above", default=ROWS)
    parser.add_argument("--attention", default="auto", help="backend of attention")
    args = parser.parse_args()
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for row in args.rows:
        x, (name, patches) = make(row, args.attention), row.split(":")[:2]
        mfu = x.speed.mfus["bound"]
        cells = (
            f"{name}, {patches}",
            f"{x.batch_size:,}",
            f"{x.memory.bytes_per_device['total'] / 1e9:.1f} of {x.memory.hbm_bytes / 1e9:.0f}"
            + (" (too much)" * (not x.memory.fits)),
            x.attention.get("image", ""),
            bound(x, "bound"),
            bound(x, "sequential_bound"),
            f"{100 * mfu * x.speed.valid_share:.1f}" if mfu else "",
            f"{x.compile_seconds:.0f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
