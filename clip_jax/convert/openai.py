"""OpenAI's format: released TorchScript archives, and plain state dicts of the same names."""

import functools
import importlib.util
import re
import sys
import types
import typing
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.convert import verify
from clip_jax.convert.on_demand import loaded
from clip_jax.convert.state_dict import TORCH, Convention, Row, from_params, table, to_params
from clip_jax.convert.target import Assumptions, Inexpressible, Target, assumed, check_assumptions
from clip_jax.convert.tensor_files import Tensors
from clip_jax.convert.weights import (
    DType,
    Weights,
    cast,
    count_blocks,
    default_preprocess,
    mlp_ratio,
    same_sizes,
    shape_of,
    square_side,
)
from clip_jax.data.images import Preprocess
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig, Params
from clip_jax.models.layers import Activation
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig, TokenizerConfig
from clip_jax.models.vit import ViTConfig

# Buffers of OpenAI's archives that repeat sizes.
SIZES = ("input_resolution", "context_length", "vocab_size")
COUNTER = "num_batches_tracked"  # BatchNorm's count of updates; unused
MASK = "attn_mask"  # the text tower's causal mask, which tracing saves
POSITIONS = "position_ids"  # 0, 1, 2, … in old files of text towers of Hugging Face


# Shared with open_clip, whose decoders keep `text.`
BLOCKS = Convention(
    names=(
        (r"^batch_stats/(.*)/", r"\1/running_"),
        (r"resblocks/", "resblocks/{}/"),
    ),
)
CONVENTION = Convention(names=((r"^text/", ""),)) + BLOCKS + TORCH


def rows(config: CLIPConfig) -> list[Row]:
    """Return the table of parameters."""
    return table(config, CONVENTION)


def infer(tensors: Tensors, source: str, *, activation: Activation | None = None) -> CLIPConfig:
    """Infer the architecture from the tensors.

    Tensors do not show the activation and the number of heads. OpenAI's files, recognised by their
    buffers, have QuickGELU and 64 channels per head. Other files have the heads of the published
    model of these sizes, and need `activation`; without it InputError asks for it.
    """
    openai = all(name in tensors for name in SIZES)
    is_resnet = any(name.startswith("visual.layer1.") for name in tensors)
    vision = (_infer_resnet if is_resnet else _infer_vit)(tensors, source)
    length, width = shape_of(tensors, "positional_embedding", 2, source)
    _, embed_dim = shape_of(tensors, "text_projection", 2, source)
    hidden, _ = shape_of(tensors, "transformer.resblocks.0.mlp.c_fc.weight", 2, source)
    text = TextConfig(
        context_length=length,
        vocab_size=shape_of(tensors, "token_embedding.weight", 2, source)[0],
        width=width,
        depth=count_blocks(tensors, "transformer.resblocks."),
        num_heads=_heads(width),
        mlp_ratio=mlp_ratio(width, hidden),
    )
    config = CLIPConfig(embed_dim=embed_dim, vision=vision, text=text)
    if openai:
        activation = "quick_gelu"
    else:
        published = same_sizes(config, source)
        if activation is None:
            raise InputError(
                f"{source} does not say whether it was trained with QuickGELU (OpenAI's models "
                "and those called -quickgelu) or GELU (most of open_clip's), and the wrong one "
                "costs accuracy without an error. Set --activation to quick_gelu or gelu."
            )
        text = replace(text, num_heads=published.text.num_heads)
        vision = replace(vision, num_heads=published.vision.num_heads)
    if not is_resnet:
        vision = replace(vision, activation=activation)
    return replace(config, vision=vision, text=replace(text, activation=activation))


def _heads(width: int) -> int:
    """Return the heads by OpenAI's rule: 64 channels per head (a placeholder if not divisible)."""
    return width // 64 if width % 64 == 0 else 1


def _infer_vit(tensors: Tensors, source: str) -> ViTConfig:
    width, _, patch, _ = shape_of(tensors, "visual.conv1.weight", 4, source)
    positions, _ = shape_of(tensors, "visual.positional_embedding", 2, source)
    block = "visual.transformer.resblocks."
    hidden, _ = shape_of(tensors, f"{block}0.mlp.c_fc.weight", 2, source)
    return ViTConfig(
        image_size=square_side(positions - 1, "visual.positional_embedding", source) * patch,
        patch_size=patch,
        width=width,
        depth=count_blocks(tensors, block),
        num_heads=_heads(width),
        mlp_ratio=mlp_ratio(width, hidden),
        pre_norm="visual.ln_pre.weight" in tensors,
        layer_scale=1e-4 if f"{block}0.ls_1.gamma" in tensors else None,
    )


def _infer_resnet(tensors: Tensors, source: str) -> ResNetConfig:
    width, *_ = shape_of(tensors, "visual.layer1.0.conv1.weight", 4, source)
    positions, _ = shape_of(tensors, "visual.attnpool.positional_embedding", 2, source)
    layers = tuple(count_blocks(tensors, f"visual.layer{i}.") for i in (1, 2, 3, 4))
    side = square_side(positions - 1, "visual.attnpool.positional_embedding", source)
    return ResNetConfig(
        image_size=side * 32,
        layers=typing.cast(tuple[int, int, int, int], layers),
        width=width,
        num_heads=_heads(width * 32),
    )


def without_bookkeeping(tensors: Tensors) -> Tensors:
    """Remove what is not a weight: repeated sizes, BatchNorm's counters, masks, positions."""
    return {
        name: x
        for name, x in tensors.items()
        if name not in SIZES and name.rpartition(".")[2] not in (COUNTER, MASK, POSITIONS)
    }


def read(tensors: Tensors, source: str, *, activation: Activation | None = None) -> Weights:
    """Read a state dict under OpenAI's names; see `infer` for `activation`."""
    config = infer(tensors, source, activation=activation)
    params = to_params(rows(config), without_bookkeeping(tensors), config, source)
    return Weights(config=config, params=params, preprocess=default_preprocess(config))


def _assumptions(config: CLIPConfig) -> Assumptions:
    """Return the settings of the model that `clip.load` builds, whatever the file has."""
    vision = config.vision
    size = vision.image_size - vision.image_size % vision.patch_size  # full patches only
    return {
        "vision": (ViTConfig, ResNetConfig),
        "text": TextConfig,
        "decoder": None,
        "has_logit_bias": False,
        "text.activation": "quick_gelu",
        "text.head_width": 64,
        "text.mlp_ratio": 4.0,
        "text.causal": True,
        "text.pool": "argmax",
        "text.projection": True,
        "text.projection_bias": False,
        "text.norm_epsilon": 1e-5,
        "vision.activation": ("quick_gelu", "relu"),
        "vision.head_width": 64,
        "vision.mlp_ratio": 4.0,
        "vision.pool": ("class_token", "attention"),
        "vision.pre_norm": True,
        "vision.patch_bias": False,
        "vision.projection": True,
        "vision.projection_bias": False,
        "vision.layer_scale": None,
        "vision.max_patches": None,
        "vision.norm_epsilon": 1e-5,
        "vision.image_size": size,
        **assumed("preprocess", Preprocess(image_size=vision.image_size), "rules"),
        **assumed("text.tokenizer", TokenizerConfig()),
    }


_ALWAYS_FLOAT32 = re.compile(
    r"(.*\.)?(ln_\w+|bn\d|downsample\.1)\.\w+|(.*\.)?(class|positional)_embedding"
    r"|token_embedding\.weight|logit_scale"
)


def _check_model(weights: Weights) -> None:
    check_assumptions(weights, "OpenAI's format", _assumptions(weights.config))


def check(weights: Weights) -> None:
    """Raise Inexpressible if the archive cannot express the model, or PyTorch cannot write it."""
    _check_model(weights)
    if importlib.util.find_spec("torch") is None:
        raise Inexpressible("writing OpenAI's .pt needs PyTorch", "install it (pip install torch)")


def to_tensors(weights: Weights, dtype: DType | None = None) -> Tensors:
    """Return the state dict under OpenAI's names, with the buffers of the released files.

    With `dtype` "float16", the same tensors are float16 as in OpenAI's files: matrices,
    convolutions and their biases, not norms and embeddings. None keeps each array's dtype. Raises
    Inexpressible if the format cannot express the model.
    """
    _check_model(weights)
    config, tensors = weights.config, _weights_as(dtype, weights)
    text = config.text
    sizes = (config.vision.image_size, text.context_length, text.vocab_size)
    return {
        **tensors,
        **counters(tensors),
        **{n: np.array(x) for n, x in zip(SIZES, sizes, strict=True)},
    }


def _weights_as(dtype: DType | None, weights: Weights) -> Tensors:
    """Return the weights under OpenAI's names, rounded as `to_tensors` does."""
    tensors = from_params(rows(weights.config), weights.params)
    for name, array in tensors.items():
        is_exact = dtype == "float16" and _ALWAYS_FLOAT32.fullmatch(name)
        tensors[name] = cast(array, "float32" if is_exact else dtype)
    return tensors


def counters(tensors: Tensors) -> Tensors:
    """Return the counters that PyTorch's BatchNorm has beside each running variance, at 0."""
    names = [name for name in tensors if name.endswith("running_var")]
    return {name.replace("running_var", COUNTER): np.array(0) for name in names}


def write(weights: Weights, path: Path, *, dtype: DType | None = None) -> None:
    """Write the archive that `clip.load` of openai-clip reads.

    The archive has weights and no program: `clip.load(path)` builds its own model from them, but
    `clip.load(path, jit=True)` has nothing to run. This is the only function that needs torch.
    """
    check(weights)
    tensors = to_tensors(weights, dtype)
    import torch

    root = torch.nn.Module()
    for name, array in tensors.items():
        *parents, last = name.split(".")
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, torch.nn.Module())
            module = module.get_submodule(parent)
        dtype_there = getattr(torch, array.dtype.name)
        plain = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
        tensor = torch.tensor(plain, dtype=dtype_there)
        if tensor.is_floating_point() and "running_" not in last:
            module.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
        else:
            module.register_buffer(last, tensor)
    with warnings.catch_warnings():  # TorchScript is deprecated, but needed by clip.load
        warnings.simplefilter("ignore")
        torch.jit.script(root).save(str(path))


def _rounded(weights: Weights, dtype: DType | None) -> Params:
    """Return the parameters in openai-clip, which always rounds matrices to float16."""
    tensors = _weights_as("float16", weights)
    return loaded(to_params(rows(weights.config), tensors, weights.config, "rounded weights"))


def _load(weights: Weights, path: Path) -> verify.Reference:
    """Load an archive or a state dict by openai-clip, or without it by open_clip."""
    text, size = weights.config.text, weights.config.vision.image_size
    if not importlib.util.find_spec("clip") and importlib.util.find_spec("open_clip"):
        import open_clip

        model = open_clip.load_openai_model(str(path), precision="fp32", device="cpu")
        return verify.Reference(
            name=verify.named("open_clip_torch"),
            outputs=functools.partial(
                verify.torch_outputs, model.encode_image, model.encode_text, model
            ),
            preprocess=verify.torch_transform(open_clip.image_transform(size, is_train=False)),
            tokenize=lambda texts: open_clip.tokenize(list(texts), text.context_length).numpy(),
        )
    with verify.library("clip", "openai-clip"):
        if "pkg_resources" not in sys.modules and not importlib.util.find_spec("pkg_resources"):
            # openai-clip 1.0.1 imports `packaging` from it; recent setuptools do not have it.
            import packaging.version

            stub: Any = types.ModuleType("pkg_resources")
            stub.packaging = packaging
            sys.modules.setdefault("pkg_resources", stub)
        import clip

        model, transform = clip.load(str(path), device="cpu")

    def tokenize(texts: Sequence[str]) -> np.ndarray:
        return clip.tokenize(list(texts), text.context_length, truncate=True).numpy()

    return verify.Reference(
        name=verify.named("openai-clip"),
        outputs=functools.partial(
            verify.torch_outputs, model.encode_image, model.encode_text, model
        ),
        preprocess=verify.torch_transform(transform),
        tokenize=tokenize,
    )


TARGET = Target(write=write, load=_load, rounded=_rounded, check=check)
