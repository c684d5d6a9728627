"""Zero-shot classification (CLIP paper, 3.1): the nearest averaged prompt embedding wins."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from clip_jax.data.tokenizer import Tokenizer
from clip_jax.evals.evaluator import encode_texts
from clip_jax.models.clip import CLIP, Params


def classifier(
    model: CLIP, params: Params, prompts: Sequence[Sequence[str]], mesh: Mesh
) -> Float[np.ndarray, "classes E"]:
    """Embed every class as the mean of its prompts' unit embeddings, scaled to unit length."""
    if not prompts or not all(prompts):
        raise ValueError("zero-shot classification needs at least one class, each with a prompt.")
    text = model.config.text
    tokens = Tokenizer(text.vocab_size)(
        [prompt for group in prompts for prompt in group], text.context_length, truncate=True
    )
    features = encode_texts(model, params, tokens, mesh)
    ends = np.cumsum([len(group) for group in prompts])
    means = np.stack([group.mean(axis=0) for group in np.split(features, ends[:-1])])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def top_k_accuracy(
    logits: Float[np.ndarray, "B classes"], labels: Int[np.ndarray, "B"], k: int = 1
) -> float:
    """Return the share of rows whose label is among their k largest logits; ties count against."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    better_or_tied = (logits >= own).sum(axis=1)
    return float((better_or_tied <= k).mean())
