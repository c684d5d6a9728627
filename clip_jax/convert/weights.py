"""What a model file says, whatever its format: architecture, weights, and how inputs are made."""

import math
from dataclasses import dataclass, field
from typing import Literal

import ml_dtypes
import numpy as np

from clip_jax.convert.files import Tensors
from clip_jax.data.images import Preprocess
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.models import zoo
from clip_jax.models.clip import CLIPConfig, Params
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

Cleaning = Literal["lower", "whitespace", "canonicalize"]
DType = Literal["float32", "float16", "bfloat16"]  # of tensors in files


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How texts become token ids."""

    name: str = "clip"  # clip: OpenAI's BPE (its first merges, for a smaller vocabulary)
    vocab_size: int = 49_408
    context_length: int = 77  # ids; longer texts are an error or cut, end of text kept
    # lower: ftfy, HTML unescaped, lower case, as OpenAI does; others are open_clip's
    clean: Cleaning = "lower"
    pad_id: int = 0

    def build(self) -> Tokenizer:
        """Return the tokenizer, ValueError if it is not CLIP's."""
        if self.name != "clip" or self.clean != "lower" or self.pad_id:
            raise ValueError(
                f"this model needs the tokenizer {self.name!r} with clean={self.clean!r} and "
                f"pad_id={self.pad_id}; clip_jax has CLIP's BPE (clean='lower', pad_id=0). "
                "Make token ids with the model's own tokenizer and give those."
            )
        return Tokenizer(self.vocab_size)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One model as a file holds it."""

    config: CLIPConfig
    params: Params  # NumPy arrays in the file's dtypes, so that nothing is lost on the way
    preprocess: Preprocess = field(default_factory=Preprocess)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    batches_tracked: int = 0  # BatchNorm's counter in PyTorch's files; no number depends on it


def tokenizer_size(text: TextConfig) -> int:
    """Return how many ids the tokenizer has: up to the end of text, which may have ids above it."""
    return text.eos_token_id + 1 if text.pool == "eos" else text.vocab_size


def default_inputs(config: CLIPConfig) -> tuple[Preprocess, TokenizerConfig]:
    """Return OpenAI's way to make inputs, for a model's image size and vocabulary."""
    preprocess = Preprocess(
        image_size=config.vision.image_size, mean=config.image_mean, std=config.image_std
    )
    tokenizer = TokenizerConfig(
        vocab_size=tokenizer_size(config.text), context_length=config.text.context_length
    )
    return preprocess, tokenizer


def shape_of(tensors: Tensors, name: str, ndim: int, source: str) -> tuple[int, ...]:
    """Return a tensor's shape, or a ValueError that names what is missing."""
    if name not in tensors:
        raise ValueError(
            f"{source} lacks the tensor {name}: it holds no CLIP model of this format (its first "
            f"tensors are {sorted(tensors)[:5]})."
        )
    if tensors[name].ndim != ndim or 0 in tensors[name].shape:
        raise ValueError(
            f"{source}: {name} has shape {list(tensors[name].shape)}, not {ndim} axes."
        )
    return tensors[name].shape


def count_blocks(tensors: Tensors, prefix: str) -> int:
    """Count the numbered blocks below a prefix."""
    return len({n[len(prefix) :].split(".", 1)[0] for n in tensors if n.startswith(prefix)})


def square_side(count: int, what: str, source: str) -> int:
    """Return √count. ValueError if it is not whole."""
    side = math.isqrt(max(count, 0))
    if count < 1 or side * side != count:
        raise ValueError(f"{source}: {what} has {count} positions, which make no square image.")
    return side


def mlp_ratio(width: int, mlp_width: int) -> float:
    """Return a ratio r with int(width · r) = mlp_width, the published one where there is one."""
    for ratio in (4.0, *_PUBLISHED_RATIOS, mlp_width / width):
        if int(width * ratio) == mlp_width:
            return ratio
    return (mlp_width + 0.5) / width


_PUBLISHED_RATIOS = sorted(
    {c.vision.mlp_ratio for c in zoo.ARCHITECTURES.values() if isinstance(c.vision, ViTConfig)}
)


def same_sizes(config: CLIPConfig, architecture: str | None, source: str) -> CLIPConfig:
    """Return the published architecture of these sizes: it has what no tensor shows, the heads.

    With `architecture` that one, which has to fit. ValueError if there is none.
    """
    if architecture is not None:
        try:
            known = zoo.get(architecture)
        except KeyError as error:
            raise ValueError(error.args[0]) from error
        if type(known.vision) is not type(config.vision) or _sizes(known) != _sizes(config):
            raise ValueError(
                f"{source} is no {architecture}: its towers have widths, depths and MLP widths "
                f"{_sizes(config)}, that architecture has {_sizes(known)}."
            )
        return known
    for known in zoo.ARCHITECTURES.values():
        if type(known.vision) is type(config.vision) and _sizes(known) == _sizes(config):
            return known
    raise ValueError(
        f"{source} has no configuration and its sizes are no published model's, so its number of "
        "attention heads is unknown. Put an open_clip_config.json beside it, or convert it where "
        "its configuration is known."
    )


def _sizes(config: CLIPConfig) -> tuple[object, ...]:
    vision, text = config.vision, config.text
    if isinstance(vision, ResNetConfig):
        image = (vision.layers, vision.width)
    else:
        image = (vision.width, vision.depth, vision.mlp_width)
    return (*image, text.width, text.depth, text.mlp_width)


def cast(array: np.ndarray, dtype: DType | None) -> np.ndarray:
    """Change a floating array's dtype; None: as it is."""
    if dtype is None or array.dtype.kind in "iub":
        return array
    return np.asarray(array).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
