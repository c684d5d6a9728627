"""Content of a model file of any format: architecture, weights, preprocessing."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from clip_jax.convert.on_demand import Parameter, loaded
from clip_jax.convert.state_dict import flatten, unflatten
from clip_jax.convert.tensor_files import Tensors
from clip_jax.data.images import Preprocess
from clip_jax.errors import InputError, naming
from clip_jax.models import zoo
from clip_jax.models.clip import CLIPConfig, Params, Vision, l2_normalize, parameters
from clip_jax.models.lora import LoRAConfig
from clip_jax.models.tower import TowerConfig
from clip_jax.optim import Tower
from clip_jax.storage.files import AnyPath

DType = Literal["float32", "float16", "bfloat16"]  # dtype of tensors in files


class Head(NamedTuple):
    """A classifier of image embeddings: logits are logit scale × unit embedding · kernelᵀ."""

    classes: tuple[str, ...]
    templates: tuple[str, ...]  # prompts that it began as the mean of
    kernel: np.ndarray  # [classes, E], float32


class Adapters(NamedTuple):
    """Low-rank adapters, and the weights that they change; arrays are as in `Weights.params`."""

    lora: LoRAConfig
    params: Params
    base: str  # path of the weights
    digest: str  # of the weights
    weights: Params  # of the base; nothing before it is open


class Stored(NamedTuple):
    """The tower that a run did not compute and does not save, as its embeddings were stored."""

    tower: Tower
    weights: str  # path of the weights that have it
    digest: str  # of its parameters


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model as stored in a file."""

    config: CLIPConfig
    # NumPy arrays in the file's dtypes, so no precision is lost; of open weights, what reads them
    # (`on_demand.Parameter`)
    params: Params
    preprocess: Preprocess = field(default_factory=Preprocess)
    head: Head | None = None
    template: str | None = None  # prompt template that suits the model; None: none is recorded
    adapters: Adapters | None = None  # those merged into `params`
    stored: Stored | None = None  # the tower that `params` of a run lack; see `weight_files.joined`
    only_tower: Tower | None = None  # the one tower that `params` has; None: it has all
    path: str = ""  # by which open weights are named in messages
    # "run", or the format of the files: a name of `formats.TARGETS`, "perception-models", "dinotxt"
    format: str = ""
    # reads `params` of a run, given shapes and shardings: each device reads only its shards
    read_sharded: Callable[[Params, Params], Params] | None = None


def read_all(weights: Weights) -> Weights:
    """Read what open weights read on demand; return the same model with arrays."""
    adapters = weights.adapters
    if adapters is not None:
        base = loaded(adapters.weights)
        adapters = adapters._replace(params=loaded(adapters.params), weights=base)
    params = loaded(weights.params)
    return replace(weights, params=params, adapters=adapters, read_sharded=None)


def default_preprocess(config: CLIPConfig, like: Preprocess | None = None) -> Preprocess:
    """Return preprocessing as in `like`, by default OpenAI's or NaFlex's, with a model's sizes,
    mean and std."""
    vision = config.vision
    size, mean, std = vision.image_size, config.image_mean, config.image_std
    preprocess = replace(like or Preprocess(), image_size=size, mean=mean, std=std)
    return _for_naflex(preprocess, vision) if vision.is_naflex else preprocess


def _for_naflex(preprocess: Preprocess, vision: Vision) -> Preprocess:
    """Return preprocessing with the sizes of a NaFlex tower."""
    return replace(
        preprocess,
        image_size=vision.image_size,
        resize_mode="naflex",
        max_patches=vision.max_patches,
        patch_size=vision.patch_size,
    )


def with_vocabulary(config: CLIPConfig, file: str) -> CLIPConfig:
    """Return a model's configuration with another path of its vocabulary."""
    tokenizer = replace(config.text.tokenizer, file=file)
    return replace(config, text=replace(config.text, tokenizer=tokenizer))


def shape_of(tensors: Tensors, name: str, ndim: int, source: str) -> tuple[int, ...]:
    """Return a tensor's shape. Raises InputError if it is missing or has other axes."""
    if name not in tensors:
        raise InputError(
            f"{source} lacks the tensor {name}, so it is no CLIP model of this format (its first "
            f"tensors are {sorted(tensors)[:5]})."
        )
    if tensors[name].ndim != ndim or 0 in tensors[name].shape:
        raise InputError(
            f"{source}: {name} has shape {list(tensors[name].shape)}; it must have {ndim} axes."
        )
    return tensors[name].shape


def count_blocks(tensors: Tensors, prefix: str) -> int:
    """Count the numbered blocks below a prefix."""
    return len({n[len(prefix) :].split(".", 1)[0] for n in tensors if n.startswith(prefix)})


def square_side(count: int, what: str, source: str) -> int:
    """Return √count. Raises InputError if it is not an integer."""
    side = math.isqrt(max(count, 0))
    if count < 1 or side * side != count:
        raise InputError(
            f"{source}: {what} has {count} positions, which is not the square of an integer."
        )
    return side


def mlp_ratio(width: int, mlp_width: int) -> float:
    """Return a ratio r with int(width · r) = mlp_width, if possible a published one."""
    for ratio in (4.0, *_PUBLISHED_RATIOS, mlp_width / width):
        if int(width * ratio) == mlp_width:
            return ratio
    return (mlp_width + 0.5) / width


_PUBLISHED_RATIOS = sorted(
    {getattr(c.vision, "mlp_ratio", 4.0) for c in zoo.ARCHITECTURES.values()}
)


def same_sizes(config: CLIPConfig, source: str) -> CLIPConfig:
    """Return the published architecture of these sizes, for the number of attention heads.

    Raises InputError if there is none.
    """
    for published in zoo.ARCHITECTURES.values():
        if _sizes(published) == _sizes(config):
            return published
    raise InputError(
        f"{source} has no configuration and its sizes are no published model's, so its number of "
        "attention heads is unknown. Put its open_clip_config.json beside it, or convert it by the "
        "software that wrote it."
    )


def _sizes(config: CLIPConfig) -> list[object]:
    names, towers = ("width", "layers", "depth", "mlp_width"), (config.vision, config.text)
    kinds = [type(tower) for tower in towers]
    sizes = (getattr(tower, name, None) for tower in towers for name in names)
    return [*sizes, *kinds, config.decoder]


def cast(array: np.ndarray, dtype: DType | None) -> np.ndarray:
    """Cast a floating-point array; None: keep its dtype."""
    if dtype is None or array.dtype.kind in "iub":
        return array
    return np.asarray(array).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def with_input(
    weights: Weights, *, image_size: int | None = None, tokens: int | None = None
) -> Weights:
    """Return the model for square images of `image_size` pixels, or for NaFlex images of at most
    `tokens` patches; both None: the same model.

    Position embeddings are resized to the image size, except the class token's (of a ResNet, the
    mean token's): by antialiased bicubic interpolation, as in open_clip, for TIPSv2 by bilinear
    one, or of a NaFlex model by its own bilinear one, so that the new model computes what it does
    on such a grid. Raises InputError for sizes that the architecture cannot have.
    """
    vision, preprocess = weights.config.vision, weights.preprocess
    is_naflex = preprocess.max_patches is not None
    if image_size is not None and tokens is not None:
        raise InputError(
            f"image_size={image_size} and tokens={tokens} exclude each other: image_size makes a "
            "model of fixed resolution, tokens one of any aspect ratio (NaFlex); omit one."
        )
    if weights.only_tower == "text":
        return weights
    if tokens is not None:
        vision = vision.with_max_patches(tokens)
        config = replace(weights.config, vision=vision)
        return replace(weights, config=config, preprocess=_for_naflex(preprocess, vision))
    if image_size is None or (image_size == vision.image_size and not is_naflex):
        return weights
    vision = vision.with_image_size(image_size)
    preprocess = replace(preprocess, image_size=image_size)
    if is_naflex:
        preprocess = replace(preprocess, resize_mode="squash", max_patches=None, patch_size=None)
    config = replace(weights.config, vision=vision)
    resized = replace(weights, config=config, preprocess=preprocess)
    params = flatten(weights.params)
    fitted = vision.fit(params, weights.config.vision)
    _check_fit(fitted, config, vision, f"image_size={image_size}")
    if fitted is params:
        return resized
    return replace(resized, params=unflatten(fitted), adapters=None, read_sharded=None)


def with_context(weights: Weights, context_length: int | None, kept_positions: int = 20) -> Weights:
    """Return the model for texts of at most `context_length` tokens; None: the same model.

    Positions of texts are cut, or stretched as in Long-CLIP: the first `kept_positions` stay, so
    that texts of up to one token more keep their embeddings. Raises InputError, which names the
    weights, if the embeddings depend on the padding.
    """
    before = weights.config.text
    if context_length is None or context_length == before.context_length:
        return weights
    with naming(weights.path):
        if weights.only_tower == "image":
            raise InputError(f"context_length={context_length} needs a text tower; omit it.")
        text = before.with_context_length(context_length, kept_positions)
    longer = replace(weights, config=replace(weights.config, text=text))
    params = flatten(weights.params)
    fitted = text.fit(params, before)
    _check_fit(fitted, longer.config, text, f"context_length={context_length}")
    if fitted is params:
        return longer
    return replace(longer, params=unflatten(fitted), adapters=None, read_sharded=None)


def cut_to(weights: Weights, dim: int | None, path: str | AnyPath) -> Weights:
    """Return the model with the first `dim` channels of its embeddings; None: all of them.

    The projections of the towers are cut; a tower without one gets one, which selects channels. A
    classifier is cut, too, and keeps the lengths of its rows. Short embeddings are as good as long
    ones only if the model was trained for them (Matryoshka, `Contrastive.widths`). Raises
    InputError, which names `path`, for other numbers of channels, or if the architecture does not
    end in projections.
    """
    config = weights.config
    if dim is None or dim == config.embed_dim:
        return weights
    if not 1 <= dim < config.embed_dim:
        raise InputError(
            f"dim={dim}, but the embeddings of {path} have {config.embed_dim} channels; choose at "
            "most so many."
        )
    params, towers = flatten(weights.params), {}
    for name, tower in (("vision", config.vision), ("text", config.text)):
        folder = "visual" if name == "vision" else name
        paths = [f"{folder}/{x}" for x in tower.embedding_parameters]
        if folder in weights.params and not getattr(tower, "projection", True):
            tower = replace(tower, projection=True)
            params[paths[0]] = np.eye(config.embed_dim, dim, dtype=np.float32)
        else:
            params |= {x: _first_channels(params[x], dim) for x in paths if x in params}
        towers[name] = tower
    try:
        config = replace(config, embed_dim=dim, **towers)
        shapes = {path: box.value.shape for path, box in parameters(config).items()}
        wrong = [x for x in params if params[x].shape != shapes.get(x)]
        reason = f"{wrong[0]} depends on their width." if wrong else ""
    except InputError as error:
        reason = str(error)
    if reason:
        raise InputError(
            f"the embeddings of {path} cannot be cut to dim={dim}: {reason} Leave out dim, and cut "
            "the embeddings that the model computes."
        )
    head = weights.head
    if head is not None:
        kernel = head.kernel[:, :dim]
        lengths = np.linalg.norm(head.kernel, axis=1, keepdims=True)
        head = head._replace(kernel=l2_normalize(kernel) * lengths)
    cut = replace(weights, config=config, params=unflatten(params), head=head)
    return replace(cut, adapters=None, read_sharded=None)


def _first_channels(x: Any, dim: int) -> Parameter:
    """Return the first channels of the last dimension, which are read on demand."""
    return Parameter((*x.shape[:-1], dim), lambda index: np.asarray(x)[..., :dim][index])


def _check_fit(params: dict[str, Any], config: CLIPConfig, tower: TowerConfig, size: str) -> None:
    """Raise InputError, which names the size, unless parameters have the shapes of the model's."""
    for path, box in parameters(config).items():
        if path in params and params[path].shape != box.value.shape:
            kind = type(tower).__name__
            raise InputError(
                f"{size}: {path} has shape {params[path].shape}, and a {kind} of that size needs "
                f"{box.value.shape}. Omit it, or define {kind}.fit, which fits parameters to "
                "another size."
            )


def whole_model(weights: Weights) -> Weights:
    """Return the same weights. Raises InputError if they are one tower alone."""
    if only := weights.only_tower:
        raise InputError(
            f"{weights.path} holds the {only} tower of a model alone. Give a whole model, start "
            f"one by --init-from and --init-towers {only}, or convert it by --to hugging-face."
        )
    return weights


def at_length(weights: Weights, tokens: int | None, path: str | AnyPath) -> Weights:
    """Return a NaFlex model for images of at most `tokens` patches; None: its own number.

    Raises InputError, which names `path`, for a model of fixed resolution.
    """
    if tokens is not None and weights.preprocess.max_patches is None:
        raise InputError(
            f"tokens={tokens} is for NaFlex models, and {path} has a fixed resolution of "
            f"{weights.config.vision.image_size} pixels. Omit it, or make a NaFlex model: "
            f"clip-jax convert {path} NEW --to clip-jax --tokens {tokens}."
        )
    return with_input(weights, tokens=tokens)
