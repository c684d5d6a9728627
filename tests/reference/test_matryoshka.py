"""The losses of several widths add up to sentence-transformers' MatryoshkaLoss."""

import jax
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses

from clip_jax.losses import SoftmaxConfig, contrastive_loss
from clip_jax.models.clip import l2_normalize

WIDTH, SCALE = 32, 20.0


class Embeddings(torch.nn.Module):
    """A module whose embeddings are its inputs."""

    def forward(self, features):
        return {"sentence_embedding": features["embedding"]}

    def get_embedding_dimension(self):
        return WIDTH


def test_value_and_gradients_are_those_of_sentence_transformers() -> None:
    draw = np.random.default_rng(0).normal
    image = draw(size=(24, WIDTH)).astype(np.float32)
    text = image + draw(size=image.shape).astype(np.float32)
    model = SentenceTransformer(modules=[Embeddings()], device="cpu")
    directions = ("query_to_doc", "doc_to_query")
    ranking = losses.MultipleNegativesRankingLoss(
        model, scale=SCALE, directions=directions, partition_mode="per_direction"
    )
    matryoshka = losses.MatryoshkaLoss(model, ranking, [WIDTH, 16, 8], [1.0, 0.5, 2.0])
    sides = [torch.tensor(x, requires_grad=True) for x in (image, text)]
    expected = matryoshka([{"embedding": x} for x in sides], None)
    expected.backward()

    def loss(image, text):
        config = SoftmaxConfig(widths=(8, 16), width_weights=(2.0, 0.5))
        return contrastive_loss(config, l2_normalize(image), l2_normalize(text), SCALE)[0]

    got, gradients = jax.value_and_grad(loss, (0, 1))(*map(jax.numpy.asarray, (image, text)))
    assert got == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(gradients, sides, strict=True):
        np.testing.assert_allclose(a, b.grad, rtol=0, atol=1e-5 * np.abs(b.grad.numpy()).max())
