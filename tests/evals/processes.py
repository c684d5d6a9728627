"""One of two processes that evaluate together: PORT, INDEX, FILE. The test starts it."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from clip_jax import sharding
from clip_jax.data.images import Preprocess
from clip_jax.evals import alignment, linear_probe, measure, prompts, zero_shot
from clip_jax.evals.datasets import Labelled
from clip_jax.evals.evaluator import Encoder, encode_images, encode_texts
from clip_jax.evals.retrieval import retrieval
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig


def numbers(mesh) -> dict[str, float]:
    """Every evaluator on sizes that no device count divides."""
    rng = np.random.default_rng(0)
    config = CLIPConfig(
        embed_dim=16,
        vision=ViTConfig(image_size=8, patch_size=4, width=16, depth=1, num_heads=2),
        text=TextConfig(vocab_size=600, context_length=8, width=16, depth=1, num_heads=2),
        dtype="float32",
    )
    model = CLIP(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    params = jax.device_put(params, sharding.replicated(mesh))
    pixels = rng.integers(0, 256, (53, 8, 8, 3), np.uint8)
    images = encode_images(model, params, pixels, mesh, batch_size=20)
    owner = np.concatenate([np.arange(53), rng.integers(0, 53, 18)])
    texts = images[owner] + 0.15 * rng.standard_normal((71, 16)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    labels = rng.integers(0, 3, 53)
    votes = linear_probe.nearest_neighbours((images[:40], labels[:40]), images[40:], mesh, k=5)
    tokens = rng.integers(1, 600, (7 * 3, 8), np.int32)
    weights = prompts.ensemble(
        encode_texts(model, params, tokens, mesh, batch_size=10).reshape(7, 3, -1).swapaxes(0, 1)
    )
    nearest = (images @ weights.T).argmax(axis=1)
    classes = np.where(rng.random(53) < 0.5, nearest, rng.integers(0, 7, 53))
    drawn = rng.integers(0, 256, (17, 8, 8, 3), np.uint8)
    data = Labelled(["a", "b"], ["{c}"], 17, lambda i: (drawn[i], i % 2))
    encoder = Encoder(model, params, mesh, Preprocess(image_size=8), lambda texts: tokens[:2])
    own = measure.Splits("own", lambda _: data, encoder).embedded("test")
    assert own.answers == [i % 2 for i in range(17)]  # all, and in order, on every process
    np.testing.assert_allclose(own.features, encoder.images(drawn), atol=1e-6)
    return {
        **zero_shot.classification(images @ weights.T, classes),
        **retrieval(images, texts, owner, mesh),
        **alignment.diagnostics(images, texts[:53], 10.0, mesh, pool=13),
        "probe": linear_probe.Problem(images, labels, mesh).fit(1.0).objective,
        "neighbours": float(votes.sum()),
    }


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
    found = numbers(sharding.make_mesh(sharding.MeshConfig(fsdp=2)))
    Path(sys.argv[3]).write_text(json.dumps(found))
