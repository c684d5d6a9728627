"""What `clip-jax prepare` kept and dropped: counts, histograms, and pairs to look at."""

import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clip_jax.data.images import ImageError, decode
from clip_jax.data.sources import SampleError, Source

_KEPT = "kept"
_EDGES = {  # of the histograms; what lies outside counts in the first or the last bin
    "shorter side, pixels": np.geomspace(8, 8192, 61),
    "longer side / shorter side": np.linspace(1, 4, 61),
    "image, KiB": np.geomspace(0.5, 8192, 57),
    "caption, characters": np.geomspace(1, 1024, 61),
}
_QUANTILES = (0.05, 0.5, 0.95)
_SHEET = (6, 4)  # pairs on a contact sheet, across and down
_TILE = 160  # pixels
_LINES, _LETTERS = 3, 26  # of a caption that the sheet shows
_PAIRS = 12  # images shown beside what they look like


class Statistics:
    """Counts the pairs of a shard."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._values: dict[str, list[float]] = {name: [] for name in _EDGES}
        self._found: dict[str, dict[str, Any]] = {}

    @property
    def kept(self) -> int:
        """How many pairs are kept so far."""
        return self._counts[_KEPT]

    def keep(self, size: tuple[int, int], num_bytes: int, captions: list[str]) -> None:
        """Count a pair that is kept: width and height, length of the file, captions."""
        self._counts[_KEPT] += 1
        short, long = sorted(size)
        for name, value in zip(_EDGES, (short, long / short, num_bytes / 1024), strict=False):
            self._values[name].append(value)
        self._values["caption, characters"] += [len(caption) for caption in captions]

    def drop(self, key: str, error: SampleError) -> None:
        """Count a pair that is not."""
        reason = str(error).partition(":")[0]
        self._counts[reason] += 1
        self._examples.setdefault(reason, f"{key}: {error}")

    def match(self, index: int, matches: Iterable[tuple[str, int, int]]) -> None:
        """Count a pair that is not kept since it looks like images of evaluation sets."""
        seen = set()
        for name, image, _ in matches:
            found = self._found.setdefault(name, {"pairs": 0, "images": [], "examples": []})
            found["images"].append(image)
            if name not in seen:
                found["pairs"] += 1
                found["examples"] = [*found["examples"], (index, image)][:_PAIRS]
            seen.add(name)

    def to_dict(self) -> dict[str, Any]:
        """Counts and an example by reason, histograms, least and largest values; what was found of
        evaluation sets."""
        return {
            "counts": dict(self._counts),
            "examples": self._examples,
            "found": self._found,
            "histograms": {
                name: np.histogram(np.clip(self._values[name], edges[0], edges[-1]), edges)[0]
                .astype(int)
                .tolist()
                for name, edges in _EDGES.items()
            },
            "extremes": {
                name: [float(min(values)), float(max(values))]
                for name, values in self._values.items()
                if values
            },
        }


def merged(shards: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Sum what `Statistics.to_dict` made; `quantiles` are exact to a bin of the histograms."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    histograms = {name: np.zeros(len(edges) - 1, np.int64) for name, edges in _EDGES.items()}
    extremes: dict[str, list[float]] = {}
    found: dict[str, dict[str, Any]] = {}
    for shard in shards:
        counts.update(shard["counts"])
        for name, some in shard.get("found", {}).items():
            total = found.setdefault(name, {"pairs": 0, "images": set(), "examples": []})
            total["pairs"] += some["pairs"]
            total["images"].update(some["images"])
            total["examples"] = [*total["examples"], *map(tuple, some["examples"])][:_PAIRS]
        examples = shard["examples"] | examples
        for name, histogram in shard["histograms"].items():
            histograms[name] += np.array(histogram)
        for name, (low, high) in shard["extremes"].items():
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
            name: one | {"images": len(one["images"])} for name, one in sorted(found.items())
        },
    }


def _quantile(
    histogram: np.ndarray, edges: np.ndarray, share: float, low: float, high: float
) -> float:
    below = np.concatenate([[0], np.cumsum(histogram)])
    return float(np.clip(np.interp(share * below[-1], below, edges), low, high))


def describe(report: dict[str, Any]) -> str:
    """Lines for people."""
    lines = [f"{count:>12,}  {reason}" for reason, count in report["counts"].items()]
    lines += [f"{'':>14}such as {example}" for example in report["examples"].values()]
    for name, one in report["found"].items():
        share = f" ({one['images'] / one['of']:.2%})" if one.get("of") else ""
        lines.append(
            f"{one['images']:,} of {one.get('of', '?'):,} images of {name}{share} are there, in "
            f"{one['pairs']:,} pairs, which are dropped"
        )
    for name, quantiles in report["quantiles"].items():
        shares = ", ".join(f"{share} {value:.3g}" for share, value in quantiles.items())
        lines.append(f"{name}: about {shares}")
    return "\n".join(lines)


def draw(path: Path, report: dict[str, Any]) -> None:
    """Bars of the counts by reason, and the histograms."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplot_mosaic("012;034")
    bars, axes = grid["0"], [grid[place] for place in "1234"]
    counts = list(report["counts"].items())[::-1]
    shown = bars.barh([reason for reason, _ in counts], [count for _, count in counts])
    bars.bar_label(shown, fmt="{:,.0f}")
    bars.set(title="pairs", xscale="symlog", xmargin=0.2)
    for axis, (name, edges) in zip(axes, _EDGES.items(), strict=True):
        axis.stairs(report["histograms"][name], edges, fill=True)
        axis.set(title=name, xscale="log" if edges[-1] > 10 else "linear", yticks=[])
    figure.savefig(path)


def side_by_side(path: Path, rows: Iterable[tuple[bytes, str, bytes, str]]) -> None:
    """Draw images that were dropped, each beside the one that it looks like, with their keys."""
    rows, font = list(rows), _font()
    height = _TILE + 16 * _LINES
    sheet = Image.new("RGB", (4 * _TILE, -(-len(rows) // 2) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (first, said, second, also) in enumerate(rows):
        top = place // 2 * height
        for number, (image, text) in enumerate(((first, said), (second, also))):
            left = (place % 2 * 2 + number) * _TILE
            _draw(sheet, pen, font, (left, top), image, text)
    sheet.save(path)


def contact_sheet(path: Path, source: Source) -> None:
    """Draw random pairs, always the same ones of a source, with their captions below."""
    across, down = _SHEET
    font = _font()
    height = _TILE + 16 * _LINES
    count = min(across * down, len(source))
    sheet = Image.new("RGB", (across * _TILE, -(-count // across) * height), "white")
    pen = ImageDraw.Draw(sheet)
    rng = np.random.default_rng(0)
    for place, index in enumerate(rng.choice(len(source), count, replace=False)):
        corner = place % across * _TILE, place // across * height
        try:
            image, caption = source.load(int(index), np.random.default_rng(place))
        except SampleError as error:
            image, caption = b"", f"! {error}"
        _draw(sheet, pen, font, corner, image, caption)
    sheet.save(path)


def _draw(
    sheet: Image.Image, pen: Any, font: Any, corner: tuple[int, int],
    image: bytes | np.ndarray, text: str,
) -> None:  # fmt: skip
    """Draw an image, and below it the first lines of a text."""
    left, top = corner
    try:
        picture = decode(image) if isinstance(image, bytes) else Image.fromarray(image)
    except ImageError as error:
        text = text if text.startswith("!") else f"! {error}"
    else:
        picture.thumbnail((_TILE - 4, _TILE - 4))
        sheet.paste(picture, (left + 2, top + _TILE - 2 - picture.height))
    words = "\n".join(textwrap.wrap(text, _LETTERS)[:_LINES])
    pen.multiline_text((left + 2, top + _TILE), words, "black", font, spacing=2)


def _font() -> Any:
    """Matplotlib's DejaVu, which has Latin, Greek and Cyrillic letters."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 11)
