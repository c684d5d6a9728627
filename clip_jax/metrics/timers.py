"""Seconds of a run by activity, and the share of them that trains."""

import contextlib
from collections import defaultdict
from collections.abc import Generator, Mapping
from typing import Any

from clip_jax.clock import CLOCK, Clock


class Timers:
    """Seconds spent by activity since the start and since the last `lap`."""

    def __init__(self, clock: Clock = CLOCK) -> None:
        self._clock = clock
        self.total: dict[str, float] = defaultdict(float)
        self._lap: dict[str, float] = defaultdict(float)
        self._start = self._lap_start = self._clock.now()

    @contextlib.contextmanager
    def measure(self, name: str) -> Generator[None]:
        start = self._clock.now()
        try:
            yield
        finally:
            seconds = self._clock.now() - start
            self.total[name] += seconds
            self._lap[name] += seconds

    def elapsed(self) -> float:
        """Return seconds since the start."""
        return self._clock.now() - self._start

    def lap(self) -> tuple[float, dict[str, float]]:
        """Return the seconds since the last lap, in all and by activity, and start a new one."""
        now = self._clock.now()
        wall, parts = now - self._lap_start, dict(self._lap)
        self._lap_start = now
        self._lap.clear()
        return wall, parts


class Goodput:
    """Seconds of a run by activity, over all its starts; goodput is the share spent on steps.

    `lost` is the time of steps that were repeated, since a run that died resumes from its last
    checkpoint. Time between two starts is not counted.
    """

    PARTS = ("init", "restore", "compile", "input", "save", "evaluation")
    NAMES = (*PARTS, "steps", "lost")

    def __init__(self, timers: Timers, earlier: Mapping[str, Any], steps_kept: float) -> None:
        """`earlier` is the result.json of earlier starts, `steps_kept` their `seconds/steps` at the
        checkpoint from which this start resumes."""
        self._timers = timers
        self._earlier = {name: float(earlier.get(f"seconds/{name}", 0.0)) for name in self.NAMES}
        lost = max(self._earlier["steps"] - steps_kept, 0.0)
        self._earlier["steps"] -= lost
        self._earlier["lost"] += lost

    def values(self) -> dict[str, float]:
        """Return seconds by activity, their sum, and the share of steps in it."""
        in_this_start = {name: self._timers.total[name] for name in self.PARTS}
        in_this_start["steps"] = max(self._timers.elapsed() - sum(in_this_start.values()), 0.0)
        seconds = {
            name: in_this_start.get(name, 0.0) + value for name, value in self._earlier.items()
        }
        total = sum(seconds.values())
        return {f"seconds/{name}": value for name, value in seconds.items()} | {
            "seconds/total": total,
            "goodput": seconds["steps"] / total,
        }

    def describe(self) -> str:
        """Return a summary in one line."""
        values = self.values()
        seconds = ((name, values[f"seconds/{name}"]) for name in self.NAMES)
        parts = [f"{name} {spent:.1f}" for name, spent in seconds if spent > 0.05]
        return f"goodput {values['goodput']:.1%}; seconds: {', '.join(parts)}"
