"""Plan a step with a live teacher beside the same step with stored embeddings. No TPU is needed.

    python benchmarks/distillation_plan.py [live] [stored]

The TPU compiler (extra `tpu`) compiles the training step of `configs/vit_b16_distilled.py` for a
v5e:16x16, in 5 to 15 minutes each on two cores: as it is, and with the teacher's embeddings from
the data set. Prices are at $1.20 per chip-hour; the work of storing the embeddings is not included.
"""

import argparse
import dataclasses
from pathlib import Path

from clip_jax.config_files import load_config
from clip_jax.losses import StoredTeacher
from clip_jax.pods.plan import Plan, PlanConfig, plan

ROOT = Path(__file__).parents[1]
HEADER = (
    "teacher",
    "memory, GB per chip",
    "frozen parameters, MB per chip",
    "FLOPs per step (teacher's share, %)",
    "overlapped bound, ms (MFU, %)",
    "sequential bound, ms (MFU, %)",
    "hours per 1B pairs",
    "cost per 1B pairs, $",
)


def make(teacher: str) -> Plan:
    config = load_config(ROOT / "configs/vit_b16_distilled.py")
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if teacher == "stored":
        [term] = config.objective
        stored = StoredTeacher(embed_dim=768, logit_scale=70.0)
        values["objective"] = (dataclasses.replace(term, teachers=(stored,)),)
    return plan(PlanConfig(**values, chip_hour_price=1.2))[0]


def bound(x: Plan, name: str) -> str:
    seconds, mfu = x.speed.step_seconds[name], x.speed.mfus[name]
    return f"{1e3 * seconds:.0f} ({100 * mfu:.1f})" if seconds and mfu else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ["live", "stored"]
    parser.add_argument("teachers", nargs="*", default=kinds, help="live, stored, or both")
    args = parser.parse_args()
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for teacher in args.teachers:
        x = make(teacher)
        each = x.per_billion_pairs()
        share = x.speed.teacher_flops_per_step / x.speed.model_flops_per_step
        cells = (
            teacher,
            f"{x.memory.bytes_per_device['total'] / 1e9:.1f} of {x.memory.hbm_bytes / 1e9:.0f}"
            + (" (too much)" * (not x.memory.fits)),
            f"{x.memory.frozen_bytes / 1e6:.0f}",
            f"{x.speed.model_flops_per_step:.3g} ({100 * share:.0f})",
            bound(x, "bound"),
            bound(x, "sequential_bound"),
            f"{each['hours']:.2f}",
            f"{each['price']:,.0f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
