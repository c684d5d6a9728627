"""The softmax distillation of one teacher is open_clip's."""

import jax
import numpy as np
import pytest
import torch
from open_clip.loss import DistillClipLoss

from clip_jax.losses import DistillationConfig, SoftmaxConfig, StoredTeacher, contrastive_loss


def test_value_and_gradients_are_those_of_open_clip() -> None:
    draw = np.random.default_rng(0).normal
    latent = draw(size=(32, 24))
    sides = [
        (latent + 0.5 * draw(size=latent.shape)) @ draw(size=(24, width))
        for width in (16, 16, 40, 40)
    ]
    sides = [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in sides]
    scales = np.float32(25.0), np.float32(40.0)  # of student and teacher

    image, text, scale = (torch.tensor(x, requires_grad=True) for x in (*sides[:2], scales[0]))
    values = DistillClipLoss()(image, text, scale, *map(torch.tensor, (*sides[2:], scales[1])))
    distillation = DistillationConfig(teachers=(StoredTeacher(embed_dim=40),))
    for config, value in zip((SoftmaxConfig(), distillation), values, strict=True):
        value.backward(retain_graph=True)
        expected = [x.grad.numpy().copy() for x in (image, text, scale)]
        for x in (image, text, scale):
            x.grad = None

        def loss(image, text, scale, config=config):
            teachers = [(scales[1] * sides[2], sides[3])]
            teachers = teachers if isinstance(config, DistillationConfig) else []
            return contrastive_loss(config, image, text, scale, teachers=teachers)[0]

        got, gradients = jax.value_and_grad(loss, (0, 1, 2))(*sides[:2], scales[0])
        assert got == pytest.approx(value.item(), rel=1e-5)
        for a, b in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
