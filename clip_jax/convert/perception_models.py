"""PE core's own files: a state dict of Meta's program under names like OpenAI's."""

import math
from dataclasses import replace
from typing import cast

import numpy as np

from clip_jax.convert import openai
from clip_jax.convert.state_dict import Row, Rules, table, to_params
from clip_jax.convert.tensor_files import Tensors
from clip_jax.convert.weights import Weights, count_blocks, default_preprocess, shape_of
from clip_jax.data.images import Preprocess
from clip_jax.errors import InputError
from clip_jax.models import zoo
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.rotary import RotaryConfig

PROBE = "visual.attn_pool.probe"  # a tensor by which the files are recognised
_NAMES: Rules = (
    (r"attn_pool/latent", "attn_pool/probe"),
    (r"attn_pool/(q|kv)/", r"attn_pool/attn/\1/"),
    (r"attn_pool/proj/", "attn_pool/attn/out_proj/"),
    (r"attn_pool/norm/", "attn_pool/layernorm/"),
)


def rows(config: CLIPConfig) -> list[Row]:
    """Return the table of parameters."""
    return table(config, [openai.FLAT_TEXT, *_NAMES, *openai.NAMES])


def read(tensors: Tensors, source: str) -> Weights:
    """Read a state dict, whose sizes are a published model's but for the image's.

    The projection gets a bias of zeros, as in timm. Raises InputError for other sizes.
    """
    width, *_ = shape_of(tensors, "visual.conv1.weight", 4, source)
    depth = count_blocks(tensors, "visual.transformer.resblocks.")
    known = [x for name, x in zoo.ARCHITECTURES.items() if name.startswith("PE-Core")]
    sizes = [(x.vision.width, cast(RotaryConfig, x.vision).depth) for x in known]
    if (width, depth) not in sizes:
        raise InputError(f"{source}: no published PE core has width {width} and depth {depth}.")
    config = known[sizes.index((width, depth))]
    vision = cast(RotaryConfig, config.vision)
    positions, _ = shape_of(tensors, "visual.positional_embedding", 2, source)
    side = math.isqrt(positions)
    vision = replace(vision, image_size=side * vision.patch_size, reference_grid=side)
    bare = replace(config, vision=replace(vision, projection_bias=False))
    params = to_params(rows(bare), openai.without_bookkeeping(tensors), bare, source)
    params["visual"]["proj_bias"] = np.zeros_like(params["visual"]["proj"][0])
    config = replace(config, vision=vision)
    like = Preprocess(interpolation="bilinear", resize_mode="squash")
    return Weights(config=config, params=params, preprocess=default_preprocess(config, like))
