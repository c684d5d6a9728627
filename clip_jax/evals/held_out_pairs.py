"""Contrastive loss, caption loss and retrieval on pairs held out from training."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from clip_jax.data.batch_plan import constant
from clip_jax.data.digits import DigitsConfig
from clip_jax.data.pipeline import Batch, DataConfig, build, open_source
from clip_jax.errors import InputError, check_ranges
from clip_jax.evals.captioning import loss_per_token
from clip_jax.evals.evaluator import Encoder, EvaluatorConfig
from clip_jax.evals.retrieval import retrieval
from clip_jax.models.images import ImageSpec
from clip_jax.storage.files import AnyPath


@dataclass(frozen=True, kw_only=True)
class PairsEvalConfig(EvaluatorConfig):
    """Contrastive loss and retrieval on the first pairs of a source held out from training."""

    data: DataConfig = field(
        default_factory=lambda: DataConfig(source=DigitsConfig(split="test"), crop="center")
    )  # Source of the pairs.
    pairs: int = 1_024  # Number of pairs; the source must have at least as many.
    # Number of pairs that compete in the info_nce loss, at most `pairs`. The loss grows with its
    # logarithm: use the same value in all runs that are compared.
    pool: int = 1_024
    every_steps: int = 1_000  # Steps between evaluations; the last step is always evaluated.
    # Prefix of the metrics' names: with web, info_nce is web/info_nce. Empty: no prefix. Evaluators
    # of held-out pairs in one run need different names.
    name: str = ""

    def __post_init__(self) -> None:
        check_ranges(self, "evals.", pairs="[2, inf)", pool="[2, inf)", every_steps="[1, inf)")
        if self.pool > self.pairs:
            raise InputError(f"evals.pool={self.pool} must be at most evals.pairs={self.pairs}.")
        if self.data.crop != "center":
            raise InputError("evals.data.crop must be 'center', not 'random', for held-out pairs.")

        if not re.fullmatch(r"[\w.-]*", self.name):
            raise InputError(
                f"evals.name={self.name!r} must consist of letters, digits, '_', '-' and '.'."
            )

    def measures(self) -> list[str]:
        """Return the name, under which a suite would report retrieval."""
        return [f"{self.name} (zero-shot)" if self.name else "held-out pairs"]

    def make(self) -> "PairsEvaluator":
        return PairsEvaluator(self)


class PairsEvaluator:
    """Yields `info_nce`, retrieval recalls and median ranks, and with a decoder `caption_loss`."""

    def __init__(self, config: PairsEvalConfig) -> None:
        self.config, self.every_steps = config, config.every_steps
        count = len(open_source(config.data.source, 32))
        if count < config.pairs:  # a pool would contain a pair twice
            raise InputError(
                f"evals.pairs={config.pairs}, but their source has {count}; set evals.pairs and "
                f"evals.pool to at most {count}."
            )
        self._read: tuple[ImageSpec, Batch] | None = None

    def run(self, encoder: Encoder, output: AnyPath | None = None) -> Iterator[tuple[str, float]]:
        """Embed all pairs and measure them."""
        prefix = f"{self.config.name}/" if self.config.name else ""
        for metric, value in self._measure(encoder):
            yield prefix + metric, value

    def _measure(self, encoder: Encoder) -> Iterator[tuple[str, float]]:
        batch = self._batch(encoder)
        images, texts = encoder.images(batch.image), encoder.token_ids(batch.text)
        yield "info_nce", info_nce(images, texts, encoder.logit_scale, self.config.pool)
        yield from retrieval(images, texts, np.arange(len(images)), encoder.mesh).items()
        if encoder.model.config.decoder is not None:
            yield "caption_loss", loss_per_token(encoder, batch.image, batch.text)

    def _batch(self, encoder: Encoder) -> Batch:
        """Return the pairs, read at the first evaluation and then kept, at its sequence length."""
        config = encoder.model.config
        if self._read is None or self._read[0] != config.vision.image_spec:
            pipeline = build(
                self.config.data,
                constant(self.config.pairs, config.vision.image_spec),
                tokenizer=lambda texts, length, truncate: encoder.tokenize(texts),
                context_length=config.text.context_length,
            )
            with contextlib.closing(pipeline.batches()) as batches:
                self._read = config.vision.image_spec, next(batches)
        return self._read[1]


def info_nce(
    image_features: Float[np.ndarray, "B E"],
    text_features: Float[np.ndarray, "B E"],
    logit_scale: float,
    pool: int,
) -> float:
    """Return the symmetric contrastive loss among `pool` pairs, averaged over pools of that size.

    Features are unit vectors; `logit_scale` is the factor itself, not its logarithm. Pools are
    consecutive pairs; an incomplete last pool is left out, since fewer negatives are easier.
    """
    from scipy.special import logsumexp  # its import takes 0.1 s

    losses = []
    for start in range(0, len(image_features) - pool + 1, pool):
        rows = slice(start, start + pool)
        logits = logit_scale * image_features[rows] @ text_features[rows].T
        both = logsumexp(logits, axis=0) + logsumexp(logits, axis=1)
        losses.append((both / 2 - np.diagonal(logits)).mean())
    return float(np.mean(losses))
