"""PE core's own files: a state dict of Meta's program under names like OpenAI's."""

from dataclasses import replace
from typing import cast

import numpy as np

from clip_jax.convert import openai
from clip_jax.convert.state_dict import Convention, table, to_params
from clip_jax.convert.tensor_files import Tensors
from clip_jax.convert.weights import Weights, count_blocks, default_preprocess, shape_of
from clip_jax.data.images import Preprocess
from clip_jax.errors import InputError
from clip_jax.models import zoo
from clip_jax.models.rotary import RotaryConfig

PROBE = "visual.attn_pool.probe"  # a tensor by which the files are recognised
_POOL = Convention(
    names=(
        (r"attn_pool/latent", "attn_pool/probe"),
        (r"attn_pool/(q|kv)/", r"attn_pool/attn/\1/"),
        (r"attn_pool/proj/", "attn_pool/attn/out_proj/"),
        (r"attn_pool/norm/", "attn_pool/layernorm/"),
    ),
)
CONVENTION = _POOL + openai.CONVENTION


def read(tensors: Tensors, source: str) -> Weights:
    """Read a state dict of a published model; the projection gets a bias of zeros, as in timm.
    Raises InputError for other sizes."""
    width, *_ = shape_of(tensors, "visual.conv1.weight", 4, source)
    depth = count_blocks(tensors, "visual.transformer.resblocks.")
    published = [x for name, x in zoo.ARCHITECTURES.items() if name.startswith("PE-Core")]
    sizes = {(x.vision.width, cast(RotaryConfig, x.vision).depth): x for x in published}
    if (width, depth) not in sizes:
        raise InputError(f"{source}: no published PE core has width {width} and depth {depth}.")
    config = sizes[width, depth]
    bare = replace(config, vision=replace(cast(RotaryConfig, config.vision), projection_bias=False))
    params = to_params(table(bare, CONVENTION), openai.without_bookkeeping(tensors), bare, source)
    params["visual"]["proj_bias"] = np.zeros_like(params["visual"]["proj"][0])
    like = Preprocess(interpolation="bilinear", resize_mode="squash")
    return Weights(config=config, params=params, preprocess=default_preprocess(config, like))
