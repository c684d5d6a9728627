"""Statistics of what `clip-jax prepare` kept and dropped: counts, examples and histograms."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from clip_jax.data.sources import SampleError

COUNTED = ("counts", "examples")  # keys of all statistics
_KEPT = "kept"
_EDGES = {  # of histogram bins; values outside count in the first or the last bin
    "shorter side, pixels": np.geomspace(8, 8192, 61),
    "longer side / shorter side": np.linspace(1, 4, 61),
    "image, KiB": np.geomspace(0.5, 8192, 57),
    "caption, characters": np.geomspace(1, 1024, 61),
}
_QUANTILES = (0.05, 0.5, 0.95)


class Statistics:
    """Counts the kept and the dropped pairs of a shard."""

    def __init__(self, list_dropped: bool = False) -> None:
        self._dropped: list[tuple[str, str]] | None = [] if list_dropped else None
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._values: dict[str, list[float]] = {name: [] for name in _EDGES}
        self._matches: dict[str, dict[str, Any]] = {}

    @property
    def num_kept(self) -> int:
        """Number of pairs kept so far."""
        return self._counts[_KEPT]

    def keep(self, size: tuple[int, int], num_bytes: int, captions: list[str]) -> None:
        """Count a kept pair: width and height, bytes of the encoded image, captions."""
        self._counts[_KEPT] += 1
        short, long = sorted(size)
        for name, value in zip(_EDGES, (short, long / short, num_bytes / 1024), strict=False):
            self._values[name].append(value)
        self._values["caption, characters"] += [len(caption) for caption in captions]

    def drop(self, key: str, error: SampleError) -> None:
        """Count a dropped pair by its reason, the part of the message before the colon."""
        reason = str(error).partition(":")[0]
        self._counts[reason] += 1
        self._examples.setdefault(reason, f"{key}: {error}")
        if self._dropped is not None:
            self._dropped.append((key, str(error)))

    def match(self, matches: Sequence[tuple[str, int, int]]) -> None:
        """Count a pair that is dropped as a near-duplicate of images of evaluation sets."""
        for name in dict.fromkeys(name for name, _, _ in matches):
            of_set = self._matches.setdefault(name, {"pairs": 0, "images": []})
            of_set["pairs"] += 1
            of_set["images"] += [image for other, image, _ in matches if other == name]

    def to_dict(self) -> dict[str, Any]:
        """Return counts and an example by reason, histograms, extremes, as `found` the matched
        images of evaluation sets, and if they are listed, all dropped pairs."""
        histograms = {}
        extremes = {}
        for name, edges in _EDGES.items():
            values = self._values[name]
            counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
            histograms[name] = counts.astype(int).tolist()
            if values:
                extremes[name] = [float(min(values)), float(max(values))]
        return {
            "counts": dict(self._counts),
            "examples": self._examples,
            "found": self._matches,
            "histograms": histograms,
            "extremes": extremes,
            **({} if self._dropped is None else {"dropped": self._dropped}),
        }


def merged(shards: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Merge the results of `Statistics.to_dict`; `quantiles` are exact to a histogram bin."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    histograms = {name: np.zeros(len(edges) - 1, np.int64) for name, edges in _EDGES.items()}
    extremes: dict[str, list[float]] = {}
    sets: dict[str, dict[str, Any]] = {}
    for shard in shards:
        counts.update(shard["counts"])
        for name, some in shard.get("found", {}).items():
            total = sets.setdefault(name, {"pairs": 0, "images": set()})
            total["pairs"] += some["pairs"]
            total["images"].update(some["images"])
        examples = shard["examples"] | examples
        for name, histogram in shard.get("histograms", {}).items():
            histograms[name] += np.array(histogram)
        for name, (low, high) in shard.get("extremes", {}).items():
            before = extremes.get(name, [low, high])
            extremes[name] = [min(low, before[0]), max(high, before[1])]
    return {
        "counts": dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))),
        "examples": examples,
        "quantiles": {
            name: {
                f"{share:.0%}": _quantile(histograms[name], _EDGES[name], share, *extremes[name])
                for share in _QUANTILES
            }
            for name in extremes
        },
        "histograms": {name: histogram.tolist() for name, histogram in histograms.items()},
        "found": {
            name: of_set | {"images": len(of_set["images"])}
            for name, of_set in sorted(sets.items())
        },
    }


def _quantile(
    histogram: np.ndarray, edges: np.ndarray, share: float, low: float, high: float
) -> float:
    below = np.concatenate([[0], np.cumsum(histogram)])
    return float(np.clip(np.interp(share * below[-1], below, edges), low, high))


def describe(report: dict[str, Any]) -> str:
    """Format a report for people."""
    lines = [f"{count:>12,}  {reason}" for reason, count in report["counts"].items()]
    lines += [f"{'':>14}such as {example}" for example in report["examples"].values()]
    for name, matches in report["found"].items():
        images = matches["images"]
        total = matches["of"]
        share = f" ({images / total:.2%})" if total else ""
        lines.append(
            f"{images:,} of {total:,} images of {name}{share} have near-duplicates: "
            f"{matches['pairs']:,} pairs, which are dropped"
        )
    for name, at in report["quantiles"].items():
        low, median, high = (f"{value:.3g}" for value in at.values())
        lines.append(f"{name}: median {median}, 5th to 95th percentile {low} to {high}")
    return "\n".join(lines)
