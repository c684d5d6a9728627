"""big_vision's format: an `.npz` of SigLIP's parameters under their paths in its own model.

The file has no configuration: sizes are inferred from the arrays, the rest is that of big_vision's
`two_towers` for SigLIP. Blocks are stacked (`encoderblock/`), as ours are, or separate
(`encoderblock_0/`); they are written stacked. NaFlex has a linear patch layer and a grid of
positions.
"""

import functools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.convert import open_clip, siglip, tokenizer_files, verify
from clip_jax.convert.open_clip_config import model_cfg
from clip_jax.convert.state_dict import (
    Convention,
    Row,
    check_floating,
    from_params,
    table,
    to_params,
)
from clip_jax.convert.target import Target, check_assumptions, fixed
from clip_jax.convert.tensor_files import Tensors
from clip_jax.convert.weights import (
    DType,
    Weights,
    cast,
    default_preprocess,
    mlp_ratio,
    shape_of,
    square_side,
)
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.images import INCEPTION_MEAN, INCEPTION_STD
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.storage.archives import write_npz

_ROOT = "params/"
_BLOCK = re.compile(r"(.*/encoderblock)_(\d+)/(.*)")
_ACTIVATIONS = {"vision.activation": "gelu_tanh", "text.activation": "gelu_tanh"}
_SIGLIP2_WORDS = 256_000  # vocabulary size; transformers resizes such models' images bilinearly


_ATTENTION = "MultiHeadDotProductAttention_0"
# Names are below `params/`, for stacked blocks.
_CONVENTION = Convention(
    names=(
        (r"^visual/conv1/", "img/embedding/"),
        (r"^visual/positional_embedding", "img/pos_embedding"),
        (r"^visual/transformer/resblocks/", "img/Transformer/encoderblock/"),
        (r"^visual/ln_post/", "img/Transformer/encoder_norm/"),
        (r"^visual/attn_pool/", "img/MAPHead_0/"),
        (r"/latent$", "/probe"),
        (r"/q/", f"/{_ATTENTION}/query/"),
        (r"/kv/", f"/{_ATTENTION}/[key,value]/"),
        (r"/proj/", f"/{_ATTENTION}/out/"),
        (r"/norm/", "/LayerNorm_0/"),
        (r"^text/token_embedding", "txt/Embed_0/embedding"),
        (r"^text/positional_embedding", "txt/pos_embedding"),
        (r"^text/transformer/resblocks/", "txt/Encoder_0/encoderblock/"),
        (r"^text/ln_final/", "txt/Encoder_0/encoder_norm/"),
        (r"^text/text_projection$", "txt/head/kernel"),
        (r"^text/text_projection_bias", "txt/head/bias"),
        (r"/ln_1/", "/LayerNorm_0/"),
        (r"/ln_2/", "/LayerNorm_1/"),
        (r"/attn/in_proj/", f"/{_ATTENTION}/[query,key,value]/"),
        (r"/attn/out_proj/", f"/{_ATTENTION}/out/"),
        (r"/mlp/c_fc/", "/MlpBlock_0/Dense_0/"),
        (r"/mlp/c_proj/", "/MlpBlock_0/Dense_1/"),
        (r"^logit_scale", "t"),
        (r"^logit_bias", "b"),
    ),
    axes=(
        (r"positional_embedding$", "1 L D -> L D"),
        (r"/in_proj/kernel$", "S Z D N K -> Z D S N K"),
        (r"/in_proj/bias$", "S Z N K -> Z S N K"),
        (r"/kv/kernel$", "S D N K -> D S N K"),
        (r"/kv/bias$", "S N K -> S N K"),
        (r"^logit_", "1 -> "),
    ),
)
_NAFLEX = Convention(
    axes=(
        (r"^visual/conv1/kernel$", "(P Q C) D -> P Q C D"),
        (r"^visual/positional_embedding$", "H W D -> (H W) D"),
    ),
)


def rows(config: CLIPConfig) -> list[Row]:
    """Return the table of parameters."""
    is_naflex = config.vision.is_naflex
    return table(config, _NAFLEX + _CONVENTION if is_naflex else _CONVENTION)


def read(tensors: Tensors, source: str) -> Weights:
    """Read SigLIP's parameters; other arrays, such as optimizer state, are ignored."""
    prefix = _ROOT if any(name.startswith(_ROOT) for name in tensors) else ""
    arrays = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    check_floating(arrays, source)
    arrays = _stacked(arrays, source)
    config = infer(arrays, source)
    siglip2 = config.text.vocab_size == _SIGLIP2_WORDS
    tokenizer = tokenizer_files.missing(config.text, "lower" if siglip2 else "canonicalize")
    config = replace(config, text=replace(config.text, tokenizer=tokenizer))
    preprocess = default_preprocess(config)
    if preprocess.max_patches is None:
        filter_ = "bilinear" if siglip2 else "bicubic"
        preprocess = replace(preprocess, resize_mode="squash", interpolation=filter_)
    else:
        preprocess = replace(preprocess, rules="tensorflow", interpolation="bilinear")
    params = to_params(rows(config), arrays, config, source)
    return Weights(config=config, params=params, preprocess=preprocess)


def _stacked(arrays: Tensors, source: str) -> Tensors:
    """Stack separate blocks."""
    tensors: Tensors = {}
    blocks: dict[str, dict[int, np.ndarray]] = {}
    for name, array in arrays.items():
        if match := _BLOCK.fullmatch(name):
            blocks.setdefault(f"{match[1]}/{match[3]}", {})[int(match[2])] = array
        else:
            tensors[name] = array
    for name, stack in blocks.items():
        shapes = {x.shape for x in stack.values()}
        if sorted(stack) != list(range(len(stack))) or len(shapes) > 1 or name in tensors:
            raise InputError(f"{source}: blocks of {name} are missing; it has {sorted(stack)}.")
        tensors[name] = np.stack([stack[i] for i in range(len(stack))])
    return tensors


def infer(arrays: Tensors, source: str) -> CLIPConfig:
    """Infer the architecture from the arrays. Raises InputError, which names a missing one."""
    kernel, positions = "img/embedding/kernel", "img/pos_embedding"
    naflex = kernel in arrays and arrays[kernel].ndim == 2
    if naflex:
        values, width = shape_of(arrays, kernel, 2, source)
        patch = math.isqrt(values // 3)
        rows, side, _ = shape_of(arrays, positions, 3, source)
        if rows != side or 3 * patch**2 != values:
            raise InputError(
                f"{source}: {kernel} for {values} values and {positions} of {rows} x {side} are "
                "not supported: patches of RGB and the grid of positions must be square."
            )
    else:
        patch, _, _, width = shape_of(arrays, kernel, 4, source)
        count = shape_of(arrays, positions, 3, source)[1]
        side = square_side(count, positions, source)
    vocab, text_width = shape_of(arrays, "txt/Embed_0/embedding", 2, source)
    projection = "txt/head/kernel" in arrays
    vision = ViTConfig(
        # The released So400m/14 for 384 pixels uses 378 of them.
        image_size=384 if (side, patch, naflex) == (27, 14, False) else side * patch,
        patch_size=patch,
        max_patches=side**2 if naflex else None,
        **_tower(arrays, "img/Transformer/encoderblock", width, source),
        **fixed(siglip.ASSUMPTIONS | _ACTIVATIONS, "vision"),
    )
    text = TextConfig(
        context_length=shape_of(arrays, "txt/pos_embedding", 3, source)[1],
        vocab_size=vocab,
        **_tower(arrays, "txt/Encoder_0/encoderblock", text_width, source),
        **fixed(siglip.ASSUMPTIONS | _ACTIVATIONS, "text"),
        projection=projection,
        projection_bias=projection,
    )
    return CLIPConfig(
        embed_dim=width,
        vision=vision,
        text=text,
        init_logit_scale=10.0,
        init_logit_bias=-10.0,
        image_mean=INCEPTION_MEAN,
        image_std=INCEPTION_STD,
    )


def _tower(arrays: Tensors, blocks: str, width: int, source: str) -> dict[str, Any]:
    query = f"{blocks}/{_ATTENTION}/query/kernel"
    depth, _, heads, _ = shape_of(arrays, query, 4, source)
    hidden = shape_of(arrays, f"{blocks}/MlpBlock_0/Dense_0/kernel", 3, source)[2]
    ratio = mlp_ratio(width, hidden)
    sizes = {"width": width, "depth": depth, "num_heads": heads, "mlp_ratio": ratio}
    return {**sizes, "norm_epsilon": 1e-6}


def check(weights: Weights) -> None:
    """Raise Inexpressible if big_vision's SigLIP cannot be such a model."""
    assumptions = siglip.assumptions(weights) | _ACTIVATIONS
    check_assumptions(weights, "big_vision's SigLIP", assumptions)


def to_tensors(weights: Weights, dtype: DType | None = None) -> Tensors:
    """Return the arrays under big_vision's names. Raises Inexpressible if it lacks the model."""
    check(weights)
    tensors = from_params(rows(weights.config), weights.params)
    return {f"{_ROOT}{name}": cast(x, dtype) for name, x in tensors.items()}


def write(weights: Weights, path: Path, *, dtype: DType | None = None) -> None:
    """Write the `.npz`."""
    write_npz(path, to_tensors(weights, dtype))


def _load(weights: Weights, path: Path) -> verify.Reference:
    """Load a file by open_clip's model of these sizes and its loader of such files.

    Its GELU has to be changed to big_vision's.
    """
    if weights.preprocess.max_patches is not None:
        message = "no released library reads big_vision's NaFlex files"
        raise verify.Unverifiable(message)
    with verify.library("open_clip", "open_clip_torch"):
        try:
            settings = model_cfg(open_clip.as_computed(weights))
        except InputError as error:
            message = "open_clip, which reads these files too, has no image tower of these sizes"
            raise verify.Unverifiable(message) from error
        del settings["custom_text"]
        import torch
        from open_clip.convert import load_big_vision_weights
        from open_clip.model import CustomTextCLIP

        model = CustomTextCLIP(**settings).eval()
        load_big_vision_weights(model, str(path))
        for name, module in list(model.named_modules()):
            if type(module).__name__.startswith("GELU"):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, torch.nn.GELU("tanh"))
    return verify.Reference(
        name=verify.named("open_clip_torch"),
        outputs=functools.partial(
            verify.torch_outputs, model.encode_image, model.encode_text, model
        ),
        notes=("token ids and preprocessing: an .npz stores neither",),
    )


TARGET = Target(write=write, load=_load, check=check)
