"""Pairs held out from training: the loss among them, retrieval, and how the modalities lie."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax.data.digits import DigitsConfig
from clip_jax.data.pipeline import Batch, DataConfig, build
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.evals.alignment import POOL, diagnostics
from clip_jax.evals.evaluator import encode_images, encode_texts
from clip_jax.evals.retrieval import retrieval
from clip_jax.models.clip import CLIP, Params


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
        if not 2 <= self.pool <= self.pairs:
            raise ValueError(f"pool={self.pool} must be from 2 to pairs={self.pairs}.")
        if self.data.crop != "center":
            raise ValueError("data.crop of held-out pairs must be 'center', not 'random'.")

    def make(self) -> "PairsEvaluator":
        return PairsEvaluator(self)


class PairsEvaluator:
    """Yields `info_nce`, `alignment`, `uniformity/*`, `modality_gap` and the recalls."""

    def __init__(self, config: PairsEvalConfig) -> None:
        self.config, self.every_steps = config, config.every_steps
        self._batch = functools.lru_cache(maxsize=1)(self._read)

    def run(self, model: CLIP, params: Params, mesh: Mesh) -> Iterator[tuple[str, float]]:
        """Embed all pairs and measure them."""
        batch = self._batch(model)
        images = encode_images(model, params, batch.image, mesh)
        texts = encode_texts(model, params, batch.text, mesh)
        scale = float(np.exp(jax.device_get(params["logit_scale"])))
        yield from diagnostics(images, texts, scale, mesh, pool=self.config.pool).items()
        yield from retrieval(images, texts, np.arange(len(images)), mesh).items()

    def _read(self, model: CLIP) -> Batch:
        config = model.config
        batches = build(
            self.config.data,
            tokenizer=Tokenizer(config.text.vocab_size),
            image_size=config.vision.image_size,
            context_length=config.text.context_length,
            batch_size=self.config.pairs,
        ).batches()
        try:
            return next(batches)
        finally:
            batches.close()
