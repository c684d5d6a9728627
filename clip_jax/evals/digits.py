"""Zero-shot accuracy on the bundled digits: seen and unseen numbers by held-out writers."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from clip_jax import processes
from clip_jax.data import digits
from clip_jax.data.digits import DigitsConfig
from clip_jax.errors import check_ranges
from clip_jax.evals.captioning import captions
from clip_jax.evals.evaluator import Encoder, EvaluatorConfig
from clip_jax.evals.pictures import contact_sheet, with_probabilities
from clip_jax.evals.ranks import cosines, top_k_accuracy
from clip_jax.evals.zero_shot import classifier
from clip_jax.models.generation import GenerationConfig
from clip_jax.models.images import Images
from clip_jax.storage.files import AnyPath

_SHORT = GenerationConfig(min_length=1)  # captions are as short as "4 2"


@dataclass(frozen=True, kw_only=True)
class DigitsEvalConfig(EvaluatorConfig):
    """Zero-shot classification of the bundled digits, each number a class."""

    source: DigitsConfig = field(default_factory=DigitsConfig)  # Digits data set and its split.
    per_number: int = 20  # Number of images per number (class).
    # Maximum number of seen numbers, and of unseen numbers, whose images are classified.
    max_numbers: int = 1_000
    max_prompts: int | None = None  # Maximum number of prompts per class. None: all its captions.
    every_steps: int = 500  # Steps between evaluations; the last step is always evaluated.

    def __post_init__(self) -> None:
        names = ("per_number", "max_numbers", "max_prompts", "every_steps")
        check_ranges(self, "evals.", **dict.fromkeys(names, "[1, inf)"))

    def measures(self) -> list[str]:
        """Return the bundled digits, whatever their number: the metrics have the same names."""
        return ["the bundled digits"]

    def make(self) -> "DigitsEvaluator":
        return DigitsEvaluator(self)


class DigitsEvaluator:
    """Yields `zero_shot/seen/top1`, `zero_shot/unseen/top1`, the top-5 accuracies, and `order`: how
    often an image of 42 is closer to the captions of 42 than to those of 24. Draws
    `predictions.png`: some of the images with their three best labels.

    With a decoder it also yields `caption/seen/exact` and `caption/unseen/exact`: how often the
    generated caption is, word for word, one of the number's captions."""

    def __init__(self, config: DigitsEvalConfig) -> None:
        self.config, self.every_steps = config, config.every_steps
        seen, unseen = digits.number_split(config.source.digits, config.source.split_seed)
        splits = {"seen": seen[: config.max_numbers], "unseen": unseen[: config.max_numbers]}
        self._splits = {name: numbers for name, numbers in splits.items() if numbers}
        # Every evaluation gets the same images.
        self._images = functools.cache(
            lambda name, size: digits.evaluation_set(
                config.source, self._splits[name], config.per_number, size
            )
        )

    def run(self, encoder: Encoder, output: AnyPath | None = None) -> Iterator[tuple[str, float]]:
        """Classify the held-out images of both splits among all numbers."""
        k, most = self.config.source.digits, self.config.max_prompts
        weights = classifier(encoder, [digits.prompts(n, k)[:most] for n in range(10**k)])
        tiles, right, lines = [], [], []
        for name in self._splits:
            spec = encoder.model.config.vision.image_spec
            images, labels = self._images(name, spec.side)
            logits = cosines(encoder.images(spec.pack(images)), weights)
            yield f"zero_shot/{name}/top1", top_k_accuracy(logits, labels, 1)
            yield f"zero_shot/{name}/top5", top_k_accuracy(logits, labels, 5)
            backwards = np.array([int(f"{n:0{k}d}"[::-1]) for n in labels])
            pairs = np.flatnonzero(backwards != labels)  # 42 and 24, not 77
            if len(pairs):
                forwards = logits[pairs, labels[pairs]] > logits[pairs, backwards[pairs]]
                yield f"zero_shot/{name}/order", float(forwards.mean())
            if encoder.model.config.decoder is not None:
                yield f"caption/{name}/exact", _exact(encoder, spec.pack(images), labels, k)
            firsts = np.unique(labels, return_index=True)[1]  # an image of each number
            for row in firsts[:: max(len(firsts) // 16, 1)][:16]:
                tiles.append(images[row])
                right.append(bool(logits[row].argmax() == labels[row]))
                names = [digits.number_words(number, k) for number in range(10**k)]
                best = with_probabilities(encoder.logit_scale * logits[row], names)
                lines.append([*best, f"({name} number)"])
        if output and processes.is_lead():
            title = f"Held-out writers: the three most probable of {10**k} labels"
            title += " (green: correct, red: wrong)"
            contact_sheet(output / "predictions.png", tiles, lines, right=right, title=title)


def _exact(encoder: Encoder, images: Images, labels: Int[np.ndarray, " B"], k: int) -> float:
    # Captions after a round trip through the tokenizer: "eighty - one" for "eighty-one".
    numbers = set(labels.tolist())
    accepted = {n: encoder.read(encoder.tokenize(digits.prompts(n, k))) for n in numbers}
    pairs = zip(captions(encoder, images, _SHORT), labels.tolist(), strict=True)
    return float(np.mean([caption in accepted[n] for caption, n in pairs]))
