r"""A ladder of the fixed setting: 3 widths × 4 numbers of pairs × 3 seeds.

    clip-jax scale ladder studies/icons/ladder.py --jobs 2 --leave-out 'w96@410K-*' 'w128@410K-*'
    clip-jax scale collect runs/ladder --output studies/icons/results/ladder_small.csv
    python studies/icons/predictions.py predict studies/icons/results
    clip-jax scale ladder studies/icons/ladder.py --jobs 2
    clip-jax scale collect runs/ladder --output studies/icons/results/ladder.csv
    python studies/icons/predictions.py compare studies/icons/results

Hardware: two CPU cores, about two hours; the dearest run takes about 20 minutes on one core.
Recipe: base.py, whose model is the largest one. Towers of the others are narrower.
Notes: The dearest two points are predicted from the ten others before they are trained.
"""

from dataclasses import replace
from pathlib import Path

from clip_jax.config_files import load_config
from clip_jax.models.clip import CLIPConfig
from clip_jax.scaling.ladder import HardwareConfig, LadderConfig, RulesConfig

STUDY = Path(__file__).parent
WIDTHS = (64, 96, 128)  # of the image tower; that of the text tower is in proportion
SHARES = (1 / 3, 2 / 3, 4 / 3, 8 / 3)  # of the pairs of base.py
AT_THE_END = 1_000_000  # steps between evaluations; the last step is always evaluated


def with_width(model: CLIPConfig, width: int) -> CLIPConfig:
    """Return the model with towers of another width, with as many heads and layers."""
    vision = replace(model.vision, width=width)
    text = replace(model.text, width=model.text.width * width // model.vision.width)
    return replace(model, vision=vision, text=text)


def get_ladder() -> LadderConfig:
    base = load_config(STUDY / "base.py")
    return LadderConfig(
        base=replace(
            base,
            data=replace(base.data, threads=1),
            checkpoint=replace(base.checkpoint, every_steps=100, keep=1),
            evals=tuple(replace(evaluator, every_steps=AT_THE_END) for evaluator in base.evals),
        ),
        models={f"w{width}": with_width(base.model, width) for width in WIDTHS},
        samples=tuple(round(share * base.steps) * base.batch_size for share in SHARES),
        seeds=(0, 1, 2),
        rules=RulesConfig(
            reference_width=base.model.vision.width,
            width_exponent=-0.5,
            max_warmup_share=0.2,
            cool_down_share=0.25,
        ),
        hardware=(HardwareConfig(chip="CPU core", peak_flops=100e9, mfu=0.45, start_seconds=60),),
    )
