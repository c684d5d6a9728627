"""Zero-shot accuracy on the digits that ship inside: seen and never-seen numbers, unseen hands."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from clip_jax.data import digits
from clip_jax.data.digits import DigitsConfig
from clip_jax.evals.evaluator import encode_images
from clip_jax.evals.pictures import contact_sheet, with_probabilities
from clip_jax.evals.zero_shot import classifier, top_k_accuracy
from clip_jax.models.clip import CLIP, Params


@dataclass(frozen=True, kw_only=True)
class DigitsEvalConfig:
    """Every number is a class; its captions are its prompts; the scans are held out."""

    source: DigitsConfig = field(default_factory=DigitsConfig)  # whose numbers and split
    per_number: int = 20  # images of each number
    max_numbers: int = 1_000  # of the seen and of the unseen ones; all are classes all the same
    max_prompts: int | None = None  # of each class; None: every caption. 10,000 classes take long
    every_steps: int = 500  # steps between evaluations; the last step always counts

    def make(self) -> "DigitsEvaluator":
        return DigitsEvaluator(self)


class DigitsEvaluator:
    """Yields `zero_shot/seen/top1`, `zero_shot/unseen/top1`, top-5s, and `order`: how often 42
    is nearer to the captions of 42 than to those of 24."""

    def __init__(self, config: DigitsEvalConfig) -> None:
        self.config, self.every_steps = config, config.every_steps
        k = config.source.digits
        self._numbers = list(range(10**k))
        seen, unseen = digits.number_split(k, config.source.split_seed)
        self._splits = {
            "seen": seen[: config.max_numbers], "unseen": unseen[: config.max_numbers]
        }  # fmt: skip

    def run(self, model: CLIP, params: Params, mesh: Mesh) -> Iterator[tuple[str, float]]:
        """Classify the held-out images of both splits among all numbers."""
        weights, k = self._classifier(model, params, mesh), self.config.source.digits
        for name, numbers in self._splits.items():
            if not numbers:
                continue
            images, labels = self._images(numbers, model.config.vision.image_size)
            logits = encode_images(model, params, images, mesh) @ weights.T
            yield f"zero_shot/{name}/top1", top_k_accuracy(logits, labels, 1)
            yield f"zero_shot/{name}/top5", top_k_accuracy(logits, labels, 5)
            backwards = np.array([int(f"{n:0{k}d}"[::-1]) for n in labels])
            pairs = np.flatnonzero(backwards != labels)  # 42 and 24, not 77
            if len(pairs):
                own, other = logits[pairs, labels[pairs]], logits[pairs, backwards[pairs]]
                yield f"zero_shot/{name}/order", float((own > other).mean())

    def draw(self, model: CLIP, params: Params, mesh: Mesh, directory: Path) -> None:
        """Write `predictions.png`: held-out images with their three best labels."""
        weights = self._classifier(model, params, mesh)
        k, images, labels, unseen = self.config.source.digits, [], [], []
        for name, numbers in self._splits.items():
            some = numbers[:: max(len(numbers) // 16, 1)][:16]
            if some:
                drawn = digits.evaluation_set(
                    self.config.source, some, 1, model.config.vision.image_size
                )
                images += list(drawn[0])
                labels += list(drawn[1])
                unseen += [name == "unseen"] * len(some)
        logits = encode_images(model, params, np.stack(images), mesh) @ weights.T
        logits *= np.exp(np.asarray(params["logit_scale"]))
        names = [digits.number_words(number, k) for number in self._numbers]
        lines = [
            [*with_probabilities(row, names), "(never trained on)" if new else "(trained on)"]
            for row, new in zip(logits, unseen, strict=True)
        ]
        contact_sheet(
            directory / "predictions.png", images, lines,
            right=[bool(a == b) for a, b in zip(logits.argmax(1), labels, strict=True)],
            title="Handwriting of held-out writers: the three nearest of "
            f"{len(names)} numbers (red: wrong)",
        )  # fmt: skip

    def _classifier(
        self, model: CLIP, params: Params, mesh: Mesh
    ) -> Float[np.ndarray, "classes E"]:
        k, most = self.config.source.digits, self.config.max_prompts
        return classifier(model, params, [digits.prompts(n, k)[:most] for n in self._numbers], mesh)

    def _images(self, numbers: list[int], image_size: int) -> tuple[np.ndarray, np.ndarray]:
        return digits.evaluation_set(
            self.config.source, numbers, self.config.per_number, image_size
        )
