r"""A ladder with and without a teacher: four-digit numbers, 2 widths × 3 sample counts.

    clip-jax scale ladder ladder_digits --only 'w64@98K-seed0'
    clip-jax scale ladder ladder_digits_teacher --jobs 2
    clip-jax scale collect runs/ladder_digits_teacher --output taught.csv
    clip-jax scale fit taught.csv --metric info_nce --metric-is error --compare teacher \
      --against training_flops

Hardware: two CPU cores, about ten minutes (`--dry-run` estimates 0.23 core hours).
Recipe: data, learning rates and error of `ladder_digits`; the teacher is its widest model after the
largest number of samples, which the first command trains.
Notes: `--against training_flops` counts the teacher's forward passes, `--against student_flops`
does not. Neither counts the teacher's own training.
"""

from dataclasses import replace
from pathlib import Path

from clip_jax.losses import DistillationConfig, LiveTeacher, SoftmaxConfig
from clip_jax.scaling.ladder import LadderConfig, load_ladder


def get_ladder() -> LadderConfig:
    own = load_ladder(Path(__file__).with_name("ladder_digits.py"))
    teacher = LiveTeacher(
        weights="runs/ladder_digits/w64@98K-seed0", model=own.models["w64"], dtype="float32"
    )
    taught = DistillationConfig(weight=0.75, teachers=(teacher,))
    return replace(
        own,
        models={name: own.models[name] for name in ("w24", "w40")},
        teachers={"": own.base.objective, "w64": (SoftmaxConfig(weight=0.25), taught)},
        samples=(12_288, 24_576, 49_152),
        seeds=(0,),
    )
