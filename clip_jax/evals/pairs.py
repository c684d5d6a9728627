"""Pairs held out from training: the loss among them, retrieval, and how the modalities lie."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from clip_jax.data.digits import DigitsConfig
from clip_jax.data.pipeline import Batch, DataConfig, build, open_source
from clip_jax.errors import InputError, check_ranges
from clip_jax.evals.alignment import POOL, diagnostics
from clip_jax.evals.captions import loss_per_token
from clip_jax.evals.evaluator import Encoder, encode_texts
from clip_jax.evals.retrieval import retrieval


@dataclass(frozen=True, kw_only=True)
class PairsEvalConfig:
    """The first pairs of a source that training does not see, always the same."""

    data: DataConfig = field(
        default_factory=lambda: DataConfig(source=DigitsConfig(split="test"), crop="center")
    )  # where the pairs come from
    pairs: int = 1_024  # how many
    pool: int = POOL  # that compete in info_nce; runs to be compared must share it
    every_steps: int = 1_000  # steps between evaluations; the last step always counts

    def __post_init__(self) -> None:
        check_ranges(self, "evals.", pairs="[2, inf)", pool="[2, inf)", every_steps="[1, inf)")
        if self.pool > self.pairs:
            raise InputError(f"evals.pool={self.pool} must be at most pairs={self.pairs}.")
        if self.data.crop != "center":
            raise InputError("data.crop of held-out pairs must be 'center', not 'random'.")

    def make(self) -> "PairsEvaluator":
        return PairsEvaluator(self)


class PairsEvaluator:
    """Yields `info_nce`, `alignment`, `uniformity/*`, `modality_gap`, the recalls, and a
    decoder's `caption_loss`."""

    def __init__(self, config: PairsEvalConfig) -> None:
        self.config, self.every_steps = config, config.every_steps
        count = len(open_source(config.data.source, 32))
        if count < config.pairs:  # they would come twice, in one pool
            raise InputError(
                f"evals.pairs={config.pairs}, but their source has {count}; set evals.pairs, and "
                "evals.pool (of `evaluate` --pool), to no more than that."
            )
        self._read_once: Batch | None = None

    def run(self, encoder: Encoder) -> Iterator[tuple[str, float]]:
        """Embed all pairs and measure them."""
        batch = self._batch(encoder)
        images = encoder.images(batch.image)
        texts = encode_texts(encoder.model, encoder.params, batch.text, encoder.mesh)
        scale, mesh = encoder.logit_scale, encoder.mesh
        yield from diagnostics(images, texts, scale, mesh, pool=self.config.pool).items()
        yield from retrieval(images, texts, np.arange(len(images)), mesh).items()
        if encoder.model.config.decoder is not None:
            yield "caption_loss", loss_per_token(encoder, batch.image, batch.text)

    def _batch(self, encoder: Encoder) -> Batch:
        """The pairs, read at the first evaluation: a run has one way of reading them."""
        self._read_once = self._read_once or self._read(encoder)
        return self._read_once

    def _read(self, encoder: Encoder) -> Batch:
        config = encoder.model.config
        batches = build(
            self.config.data,
            tokenizer=lambda texts, length, truncate: encoder.tokenize(texts),
            image_spec=config.vision.image_spec,
            context_length=config.text.context_length,
            batch_size=self.config.pairs,
        ).batches()
        try:
            return next(batches)
        finally:
            batches.close()
