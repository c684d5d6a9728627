"""Zero-shot accuracy on the bundled digits: seen and unseen numbers, by writers held out."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from clip_jax.data import digits
from clip_jax.data.digits import DigitsConfig
from clip_jax.errors import check_ranges
from clip_jax.evals.captions import captions
from clip_jax.evals.evaluator import Encoder
from clip_jax.evals.pictures import contact_sheet, with_probabilities
from clip_jax.evals.zero_shot import classifier, top_k_accuracy
from clip_jax.models.generation import GenerationConfig

_SHORT = GenerationConfig(min_length=1)  # "4 2" is a caption


@dataclass(frozen=True, kw_only=True)
class DigitsEvalConfig:
    """Every number is a class; its captions are its prompts; the scans are held out."""

    source: DigitsConfig = field(default_factory=DigitsConfig)  # whose numbers and split
    per_number: int = 20  # images of each number
    max_numbers: int = 1_000  # of the seen and of the unseen ones; all are classes all the same
    max_prompts: int | None = None  # of each class; None: every caption. 10,000 classes take long
    every_steps: int = 500  # steps between evaluations; the last step always counts

    def __post_init__(self) -> None:
        names = ("per_number", "max_numbers", "max_prompts", "every_steps")
        check_ranges(self, "evals.", **dict.fromkeys(names, "[1, inf)"))

    def make(self) -> "DigitsEvaluator":
        return DigitsEvaluator(self)


class DigitsEvaluator:
    """Yields `zero_shot/seen/top1`, `zero_shot/unseen/top1`, top-5s, and `order`: how often 42
    is nearer to the captions of 42 than to those of 24.

    With a decoder also `caption/seen/exact`, `caption/unseen/exact`: how often what it writes is
    one of the number's captions, word by word."""

    def __init__(self, config: DigitsEvalConfig) -> None:
        self.config, self.every_steps = config, config.every_steps
        k = config.source.digits
        self._numbers = list(range(10**k))
        seen, unseen = digits.number_split(k, config.source.split_seed)
        self._splits = {
            "seen": seen[: config.max_numbers], "unseen": unseen[: config.max_numbers]
        }  # fmt: skip
        self._rendered: dict[tuple[str, int], Any] = {}

    def run(self, encoder: Encoder) -> Iterator[tuple[str, float]]:
        """Classify the held-out images of both splits among all numbers."""
        weights, k = self._classifier(encoder), self.config.source.digits
        for name, numbers in self._splits.items():
            if not numbers:
                continue
            images, labels = self._images(name, _size(encoder))
            logits = encoder.images(images) @ weights.T
            yield f"zero_shot/{name}/top1", top_k_accuracy(logits, labels, 1)
            yield f"zero_shot/{name}/top5", top_k_accuracy(logits, labels, 5)
            backwards = np.array([int(f"{n:0{k}d}"[::-1]) for n in labels])
            pairs = np.flatnonzero(backwards != labels)  # 42 and 24, not 77
            if len(pairs):
                own, other = logits[pairs, labels[pairs]], logits[pairs, backwards[pairs]]
                yield f"zero_shot/{name}/order", float((own > other).mean())
            if encoder.model.config.decoder is not None:
                written = captions(encoder, images, _SHORT)
                # As they come out of the tokenizer: "eighty - one" for "eighty-one".
                own = {
                    n: encoder.read(encoder.tokenize(digits.prompts(n, k)))
                    for n in set(labels.tolist())
                }
                right = [x in own[n] for x, n in zip(written, labels.tolist(), strict=True)]
                yield f"caption/{name}/exact", float(np.mean(right))

    def _images(
        self, split: str, size: int
    ) -> tuple[UInt8[np.ndarray, "B H W 3"], Int[np.ndarray, " B"]]:
        """Render a split's images when they are first evaluated: they are always the same."""
        if (split, size) not in self._rendered:
            self._rendered[split, size] = digits.evaluation_set(
                self.config.source, self._splits[split], self.config.per_number, size
            )
        return self._rendered[split, size]

    def draw(self, encoder: Encoder, folder: Path) -> None:
        """Write `predictions.png`: held-out images with their three best labels."""
        weights = self._classifier(encoder)
        k, images, labels, unseen = self.config.source.digits, [], [], []
        for name, numbers in self._splits.items():
            some = numbers[:: max(len(numbers) // 16, 1)][:16]
            if some:
                drawn = digits.evaluation_set(self.config.source, some, 1, _size(encoder))
                images += list(drawn[0])
                labels += list(drawn[1])
                unseen += [name == "unseen"] * len(some)
        logits = encoder.logit_scale * (encoder.images(np.stack(images)) @ weights.T)
        names = [digits.number_words(number, k) for number in self._numbers]
        lines = [
            [*with_probabilities(row, names), "(never trained on)" if new else "(trained on)"]
            for row, new in zip(logits, unseen, strict=True)
        ]
        contact_sheet(
            folder / "predictions.png", images, lines,
            right=[bool(a == b) for a, b in zip(logits.argmax(1), labels, strict=True)],
            title="Handwriting of held-out writers: the three nearest of "
            f"{len(names)} numbers (red: wrong)",
        )  # fmt: skip

    def _classifier(self, encoder: Encoder) -> Float[np.ndarray, "classes E"]:
        k, most = self.config.source.digits, self.config.max_prompts
        return classifier(encoder, [digits.prompts(n, k)[:most] for n in self._numbers])


def _size(encoder: Encoder) -> int:
    return encoder.model.config.vision.image_size
