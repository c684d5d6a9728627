"""A sweep: every point of a ladder at several rates, batches, warm-ups and weight decays.

All trials of a grid are trained to their end, or, in successive halving (Jamieson and Talwalkar
2016, arXiv:1502.07943), each round trains the better ones of the round before further. A trial is
an ordinary run; stopped by a round, it goes on from its checkpoint where the next one wants it.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from clip_jax.config import Config
from clip_jax.errors import InputError, check_ranges
from clip_jax.storage.json_files import read_rows


@dataclass(frozen=True, kw_only=True)
class HalvingConfig:
    """Successive halving: rounds of which only the best trials of each point reach the next.

    The first round stops at steps / factor^rounds, the last at the end. Trials are compared in the
    middle of their schedules, so a rate that pays late may be lost; leave room (a factor of 2).
    """

    metric: str  # of the runs' evaluations, by which a round judges: info_nce
    best: Literal["min", "max"] = "min"
    factor: int = 2  # one in so many goes on
    rounds: int = 2  # before the last

    def __post_init__(self) -> None:
        check_ranges(self, "sweep.halving.", factor="[2, inf)", rounds="[1, inf)")

    def stops(self, steps: int) -> list[int | None]:
        """Return the steps at which a trial's rounds end; None: its own end."""
        shares = [self.factor**-n for n in range(self.rounds, 0, -1)]
        return [*(max(round(share * steps), 1) for share in shares), None]


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What the trials of a point differ in: every combination of these, one trial each."""

    rates: tuple[float, ...] = (1.0,)  # learning rates, as multiples of what the rules give
    batch_sizes: tuple[int, ...] = ()  # none: the point's own. Samples stay, steps follow
    warmups: tuple[float, ...] = (1.0,)  # steps of warm-up, as multiples of what the rules give
    weight_decays: tuple[float, ...] = ()  # none: the base's own
    halving: HalvingConfig | None = None  # None: a grid, all trials to their end

    def __post_init__(self) -> None:
        check_ranges(
            self, "sweep.",
            rates="(0, inf)", batch_sizes="[2, inf)", warmups="[0, inf)", weight_decays="[0, inf)",
        )  # fmt: skip
        for name in ("rates", "batch_sizes", "warmups", "weight_decays"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or (name in ("rates", "warmups") and not values):
                raise InputError(
                    f"sweep.{name}={values} must name each value once, and one at least."
                )

    def trials(self, config: Config) -> Iterator[tuple[str, Config]]:
        """Make a config for every combination at one batch size, named by what is swept."""
        decays = self.weight_decays or (config.optim.weight_decay,)
        for rate, warmup, decay in itertools.product(self.rates, self.warmups, decays):
            warmup_steps = round(warmup * config.optim.warmup_steps)
            if warmup_steps >= config.steps:
                raise InputError(
                    f"sweep.warmups={warmup:g} makes {warmup_steps} steps of warm-up, of "
                    f"{config.steps}: take a smaller multiple, or rules.max_warmup_share."
                )
            optim = replace(
                config.optim,
                learning_rate=_digits(rate * config.optim.learning_rate),
                final_learning_rate=_digits(rate * config.optim.final_learning_rate),
                warmup_steps=warmup_steps,
                weight_decay=decay,
            )
            parts = [
                (self.rates, f"rate{rate:g}"), (self.batch_sizes, f"batch{config.batch_size}"),
                (self.warmups, f"warmup{warmup:g}"), (self.weight_decays, f"decay{decay:g}"),
            ]  # fmt: skip
            name = "".join(f"-{text}" for values, text in parts if len(values) > 1)
            yield name, replace(config, optim=optim)


Point = Any  # of a ladder: name, model, samples, config, workdir
Train = Callable[[Sequence[Point]], dict[str, str]]


def halve(
    trials: Sequence[Point], halving: HalvingConfig, train: Train, say: Callable[[str], None]
) -> dict[str, str]:
    """Train in rounds; returns why trials failed, by name.

    `train` brings what it is given to where its config stops. A trial's seeds are judged by their
    mean and go on together; one that failed is behind all others. Whatever was trained before
    counts: the same call goes on after a stop, to the same choice.
    """
    failures: dict[str, str] = {}
    alive = list(trials)
    for number in range(halving.rounds + 1):
        stops = [halving.stops(trial.config.steps)[number] for trial in alive]
        stopped = [
            trial._replace(config=replace(trial.config, stop_after=stop))
            for trial, stop in zip(alive, stops, strict=True)
        ]
        failures |= train([trial for trial in stopped if trial.name not in failures])
        if number < halving.rounds:
            kept = {name for group in _groups(stopped) for name in _best(group, halving)}
            say(
                f"round {number + 1}: {len(kept)} of {len(alive)} runs go on, by {halving.metric}: "
                + ", ".join(sorted(kept))
            )
            alive = [trial for trial in alive if trial.name in kept]
    return failures


def measured(trial: Point, metric: str) -> float:
    """Return what a run measured where it stops; NaN if it did not come there."""
    found = [
        row[metric]
        for row in read_rows(trial.workdir / "metrics.jsonl")
        if row["step"] == trial.config.end and metric in row
    ]
    return float(found[-1]) if found else math.nan


def _groups(trials: Sequence[Point]) -> list[list[Point]]:
    """Put the trials of each point together."""
    groups: dict[tuple[str, int], list[Point]] = {}
    for trial in trials:
        groups.setdefault((trial.model, trial.samples), []).append(trial)
    return list(groups.values())


def _best(group: Sequence[Point], halving: HalvingConfig) -> list[str]:
    """Name the runs of the best trials of a point, all seeds of each."""
    seeds: dict[Config, list[Point]] = {}
    for trial in group:
        data = replace(trial.config.data, seed=0)
        seeds.setdefault(replace(trial.config, seed=0, data=data), []).append(trial)
    sign = 1 if halving.best == "min" else -1

    def score(runs: Sequence[Point]) -> float:
        mean = sign * float(np.mean([measured(run, halving.metric) for run in runs]))
        return math.inf if math.isnan(mean) else mean

    ranked = sorted(seeds.values(), key=score)
    return [run.name for runs in ranked[: math.ceil(len(ranked) / halving.factor)] for run in runs]


def _digits(number: float) -> float:
    return float(f"{number:.3g}")
