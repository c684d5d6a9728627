"""Rematerialisation policies: each needs a program of its own."""

import dataclasses
import functools
from typing import get_args

import jax
import numpy as np

from clip_jax.models.clip import CLIP, CLIPConfig, Params
from clip_jax.models.layers import Remat
from tests.conftest import TINY, assert_close, parameters


@functools.cache
def lowered(config: CLIPConfig) -> jax.stages.Lowered:
    """Lower the gradient of a function of the image features for all parameters."""
    model, shape = CLIP(config), (2, config.vision.image_size, config.vision.image_size, 3)
    params = jax.eval_shape(model.init, jax.random.key(0))
    gradients = jax.grad(lambda p, images: (model.encode_image(p, images) ** 2).sum())
    return jax.jit(gradients).lower(params, jax.ShapeDtypeStruct(shape, np.float32))


@functools.cache
def compiled(config: CLIPConfig) -> jax.stages.Compiled:
    return lowered(config).compile()


def image_grads(config: CLIPConfig) -> Params:
    size = config.vision.image_size
    images = np.random.default_rng(0).standard_normal((2, size, size, 3), np.float32)
    return jax.device_get(compiled(config)(parameters(config), images))["visual"]


def test_every_remat_computes_more_again_and_changes_nothing():
    """Also in unrolled layers, where XLA could merge a recomputation with the original."""
    programs = [lowered(dataclasses.replace(TINY, remat=remat)) for remat in get_args(Remat)]
    flops = [program.cost_analysis()["flops"] for program in programs]
    assert flops == sorted(set(flops))  # cheapest first
    unrolled, again = (dataclasses.replace(TINY, unroll=2, remat=x) for x in ("none", "full"))
    assert "stablehlo.while" in programs[0].as_text()
    assert "stablehlo.while" not in lowered(again).as_text()
    matmuls = [compiled(config).as_text().count(" dot(") for config in (unrolled, again)]
    assert matmuls[0] < matmuls[1]
    for config in (again, dataclasses.replace(TINY, remat="hidden")):
        assert_close(image_grads(TINY), image_grads(config))
