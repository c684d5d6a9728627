"""A student, its teachers, a batch and its embeddings for tests of distillation."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from clip_jax.losses import DistillationConfig, LiveTeacher, StoredTeacher
from clip_jax.models.clip import CLIP
from tests.conftest import TINY, batch, parameters

SMALL = replace(TINY, vision=replace(TINY.vision, depth=1), text=replace(TINY.text, depth=1))
# A teacher with images of another size, and the same tokens.
BIG = replace(
    SMALL, embed_dim=24, image_mean=(0.5, 0.5, 0.5), vision=replace(SMALL.vision, image_size=24)
)
LIVE = LiveTeacher(weights="runs/big", model=BIG, dtype="float32")
TERM = DistillationConfig(
    teachers=(StoredTeacher(embed_dim=8, logit_scale=60.0), LIVE, StoredTeacher(embed_dim=12)),
    captions="both",
    weight=2.0,
    similarity_weight=0.5,
    features_weight=0.25,
)


def unit(x: Any) -> Any:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def inputs() -> dict[str, Any]:
    rng, pairs = np.random.default_rng(3), batch(SMALL)
    vectors = {f"stored_{x}": rng.normal(size=(16, 20)) for x in ("image", "text", "synthetic")}
    stored = {name: x.astype(np.float32) for name, x in vectors.items()}
    more = {"synthetic": np.roll(pairs["text"], 1, axis=0), "teacher1_image": batch(BIG)["image"]}
    return pairs | more | stored


def embeddings(config: Any, image: Any, data: dict[str, Any]) -> dict[str, Any]:
    """Return normalised embeddings of a model, in float64."""
    model = CLIP(config)

    @jax.jit
    def encode(params: Any, image: Any, texts: dict[str, Any]) -> dict[str, Any]:
        outputs = {"image": model.encode_image(params, model.normalize(image))}
        return outputs | {name: model.encode_text(params, x) for name, x in texts.items()}

    outputs = encode(
        parameters(config), image, {name: data[name] for name in ("text", "synthetic")}
    )
    return {name: unit(np.asarray(y, np.float64)) for name, y in outputs.items()}
