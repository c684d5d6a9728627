"""The towers in ONNX operators: the same functions as in `models/`, of the same parameters.

Images are [batch, 3, height, width], normalised, or patches (see `patches`). Layers are
unrolled; BatchNorm's running statistics are folded into the convolutions before it. Caption logits
have no KV cache: all tokens are computed again for each new one.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from einops import rearrange

from clip_jax import parts
from clip_jax.errors import InputError
from clip_jax.export.graph import Graph
from clip_jax.export.patches import GRID, MASK
from clip_jax.models.cappa import CapPaConfig
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.conv_stem import STEM, ConvStemConfig
from clip_jax.models.convnext import ConvNeXtConfig
from clip_jax.models.decoder import MaMMUTConfig
from clip_jax.models.layers import BlockConfig, BlockInit, Layout
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.tower import ImageTowerConfig, TowerConfig
from clip_jax.models.vit import ViTConfig

Tables = tuple[np.ndarray, np.ndarray]  # cosines and sines of rotary positions
_MASKED = np.float32(np.finfo(np.float32).min / 2)  # a score; some runtimes do not support −∞


def image_tower(graph: Graph, config: CLIPConfig, pixels: str) -> str:
    """Embed normalised pixels [B, 3, H, W] or, of a NaFlex model, [B, L, P·P·3].

    Returns features [B, E] in float32, not normalised.
    """
    pixels = graph.computed(pixels)
    if config.image_head is not None:
        return graph.exact(_of_head(graph, config, pixels))
    return graph.exact(_features(config.vision, graph, pixels))


def text_tower(graph: Graph, config: CLIPConfig, ids: str) -> str:
    """Embed token ids [B, L]; returns features [B, E] in float32, not normalised."""
    return graph.exact(_features(config.text, graph, ids))


def _features(tower: TowerConfig, graph: Graph, inputs: str) -> str:
    """Embed normalised pixels, or token ids."""
    if type(tower).onnx is not TowerConfig.onnx or _has_other_module(tower):
        return tower.onnx(graph, inputs)
    return _of_family(tower, graph, inputs)


def _has_other_module(tower: Any) -> bool:
    """Say whether a user's class computes something else than the built-in one that it extends."""
    built_in: Any = next(kind for kind in type(tower).__mro__ if parts.origin(kind) is None)
    return type(tower).module is not built_in.module


@functools.singledispatch
def _of_family(tower: TowerConfig, graph: Graph, inputs: str) -> str:
    """Embed the inputs of a built-in tower; each family has its function below."""
    return tower.onnx(graph, inputs)


def _project(graph: Graph, x: str) -> str:
    """Add an image tower's projection, if it has one."""
    if graph.has("visual/proj"):
        x = graph.linear(x, graph.weight("visual/proj"))
    if graph.has("visual/proj_bias"):
        x = graph.op("Add", x, graph.number(graph.weight("visual/proj_bias")))
    return x


# ------------------------------------------------------------------ texts


@_of_family.register
def _(text: TextConfig, graph: Graph, ids: str) -> str:
    if text.sees_padding:
        ids = _at_full_length(graph, text, ids)
    length = graph.op("Shape", ids, start=1, end=2)
    x, mask = _embedded(graph, text, ids, length), None
    if text.has_class_token:
        token = graph.weight("text/class_embedding") + graph.weight("text/positional_embedding")[-1]
        x = graph.op("Concat", x, _to_each(graph, token[None], x), axis=1)
        mask = _key_mask(graph, text, ids)
        if text.causal:
            mask = graph.op("Min", mask, _triangle(text.num_positions))
    elif text.causal:
        mask = _causal_mask(graph, text, length)
    valid = None
    if text.masks_padding:
        pad = np.int64(text.tokenizer.pad_id)
        is_pad = graph.op("Equal", graph.cast(ids, np.int64), pad)
        valid = graph.cast(graph.op("Not", is_pad), np.float32)
        # Padding is what follows the last other token.
        valid = graph.op("Min", graph.op("CumSum", valid, np.int64(1), reverse=1), np.float32(1))
        mask = _padding_mask(graph, valid)
    x = _stack(graph, text, "text", x, mask)
    match text.pool:
        case "mean":
            x = graph.mean(_norm(graph, text, "text/ln_final", x), valid)
        case "first":
            x = _norm(graph, text, "text/ln_final", graph.op("Gather", x, np.int64(0), axis=1))
        case "last" | "class_token":
            x = _norm(graph, text, "text/ln_final", graph.op("Gather", x, np.int64(-1), axis=1))
        case "argmax" | "eos":
            x = graph.op("GatherND", x, _end(graph, text, ids), batch_dims=1)
            x = _norm(graph, text, "text/ln_final", x)
        case _:
            raise InputError(
                f"text.pool={text.pool!r} has no form in ONNX; use --format stablehlo."
            )
    if text.head != "linear":
        bias = graph.weight("text/projection_hidden/bias") if text.head == "norm" else None
        x = graph.linear(x, graph.weight("text/projection_hidden/kernel"), bias)
        x = graph.activation(x, "gelu") if text.head == "mlp" else x
    if text.projection:
        x = graph.linear(x, graph.weight("text/text_projection"))
    if text.projection_bias:
        x = graph.op("Add", x, graph.number(graph.weight("text/text_projection_bias")))
    return x


def caption_logits(graph: Graph, config: CLIPConfig, pixels: str, ids: str) -> str:
    """Return the logits [B, L, V] of each next token, in float32.

    Inputs are normalised pixels as for `image_tower`, and ids [B, L], the begin token first.
    """
    text, vision = config.text, config.vision
    if config.decoder is None:
        raise ValueError("the model has no decoder")
    image, seen = _caption_tokens(vision, graph, graph.computed(pixels))
    length = graph.op("Shape", ids, start=1, end=2)
    mask = causal = _causal_mask(graph, text, length)
    if isinstance(config.decoder, CapPaConfig):
        return _cappa(graph, config.decoder, ids, causal, image, seen)
    x = _embedded(graph, text, ids, length)
    if isinstance(config.decoder, MaMMUTConfig):
        tower = "text"
        image = graph.linear(image, graph.weight("decoder/image_projection"))
    else:
        tower = "decoder"
        if text.has_class_token:  # it is after all written tokens
            keys = _key_mask(graph, text, ids)
            keys = graph.op("Slice", keys, graph.integers(0), length, graph.integers(3))
            mask = graph.op("Min", causal, keys)
        x = _stack(graph, text, "text", x, mask)
    x = _norm(graph, text, f"{tower}/ln_final", _stack(graph, text, tower, x, causal, image, seen))
    return graph.exact(graph.linear(x, graph.weight("decoder/vocab_projection")))


def _cappa(
    graph: Graph, c: CapPaConfig, ids: str, causal: str, image: str, seen: str | None
) -> str:
    """Add a CapPa decoder of ids [B, L]; `causal` and `seen` are additive masks, see `_stack`."""
    table = graph.number(graph.weight("decoder/token_embedding"), "decoder/token_embedding")
    positions = graph.number(graph.weight("decoder/positional_embedding"))
    length = graph.op("Shape", ids, start=1, end=2)
    positions = graph.op("Slice", positions, graph.integers(0), length, graph.integers(0))
    x = graph.op("Add", graph.op("Gather", table, ids, axis=0), positions)
    block, path = c.block(Layout()), "decoder/transformer/layers"
    for layer in range(c.depth):
        y = graph.layer_norm(x, f"{path}/ln_1", block.epsilon, layer)
        q, k, v = graph.heads(y, f"{path}/attn/in_proj", layer)
        y = graph.attention(f"{path}/attn/out_proj", q, k, v, layer=layer, mask=causal)
        x = graph.op("Add", x, y)
        y = graph.layer_norm(x, f"{path}/ln_2", block.epsilon, layer)
        (q,) = graph.heads(y, f"{path}/attn_cross/q", layer)
        k, v = graph.heads(image, f"{path}/attn_cross/kv", layer)
        y = graph.attention(f"{path}/attn_cross/out_proj", q, k, v, layer=layer, mask=seen)
        x = graph.op("Add", x, y)
        y = graph.layer_norm(x, f"{path}/ln_3", block.epsilon, layer)
        x = graph.op("Add", x, _mlp(graph, block, y, path, layer))
    x = graph.layer_norm(x, "decoder/ln_final", block.epsilon)
    head = (graph.weight(f"decoder/vocab_{name}") for name in ("projection", "bias"))
    return graph.exact(graph.linear(x, *head))


def _at_full_length(graph: Graph, text: TextConfig, ids: str) -> str:
    """Pad ids [B, L] to the context length, as the model's tokenizer does."""
    ids, unit = graph.cast(ids, np.int64), graph.integers(1)
    padding = graph.integers(*[text.tokenizer.pad_id] * text.context_length)[None]
    rows, length = (graph.op("Shape", ids, start=axis, end=axis + 1) for axis in range(2))
    missing = graph.op("Slice", padding, length, graph.integers(text.context_length), unit)
    missing = graph.op("Expand", missing, graph.op("Concat", rows, unit, axis=0))
    parts = (ids, missing) if text.tokenizer.pad_side == "right" else (missing, ids)
    return graph.op("Concat", *parts, axis=1)


def _embedded(graph: Graph, text: TextConfig, ids: str, length: str) -> str:
    """Look up token embeddings of ids [B, L] and add position embeddings."""
    table = graph.number(graph.weight("text/token_embedding"), "text/token_embedding")
    x = graph.op("Gather", table, ids, axis=0)
    if text.token_scale != 1:
        x = graph.op("Mul", x, graph.number(text.token_scale))
    positions = text.fixed_positions()
    if positions is None:
        positions = graph.weight("text/positional_embedding")
    if text.has_token_types:
        positions = positions + graph.weight("text/type_embedding")[0]
    first = text.first_position
    positions = graph.number(positions[first : first + text.context_length])
    positions = graph.op("Slice", positions, graph.integers(0), length, graph.integers(0))
    return _norm(graph, text, "text/ln_pre", graph.op("Add", x, positions))


def _causal_mask(graph: Graph, text: TextConfig, length: str) -> str:
    """Return the additive mask of scores [L, L] that hides later tokens."""
    both = graph.op("Concat", length, length, axis=0)
    axes = graph.integers(0, 1)
    return graph.op("Slice", _triangle(text.context_length), graph.integers(0, 0), both, axes)


def _triangle(size: int) -> np.ndarray:
    return np.triu(np.full((size, size), _MASKED), 1)


def _key_mask(graph: Graph, text: TextConfig, ids: str) -> str:
    """Return the additive mask of scores [B, 1, 1, L + 1] that hides padding, not the class token.

    Without `correct_class_mask`, the class token's column is before the others.
    """
    is_pad = graph.op("Equal", ids, np.array(text.tokenizer.pad_id, np.int64))
    keys = graph.op("Where", is_pad, _MASKED, np.float32(0))
    pads = (0, 0, 0, 1) if text.correct_class_mask else (0, 1, 0, 0)
    keys = graph.op("Pad", keys, graph.integers(*pads))
    return graph.op("Reshape", keys, graph.integers(0, 1, 1, -1))


def _end(graph: Graph, text: TextConfig, ids: str) -> str:
    """Return the positions [B, 1] of the states that are pooled."""
    ids = graph.cast(ids, np.int32)
    if text.pool == "eos":
        ids = graph.cast(graph.op("Equal", ids, np.int32(text.eos_token_id)), np.int32)
    return graph.op("ArgMax", ids, axis=1, keepdims=1)


def _norm(graph: Graph, text: TextConfig, path: str, x: str) -> str:
    """Add a norm, if the tower has it."""
    return graph.layer_norm(x, path, text.norm_epsilon) if graph.has(f"{path}/scale") else x


# ------------------------------------------------------------------ blocks


def _stack(
    graph: Graph,
    config: ViTConfig | TextConfig,
    tower: str,
    x: str,
    mask: str | None = None,
    image: str | None = None,
    seen: str | None = None,
    rotation: Tables | None = None,
) -> str:
    """Add a tower's blocks; with `image` also the cross-attention blocks between them.

    `mask` and `seen` are additive masks of scores: of the tokens, and of the image's.
    """
    layers, block = f"{tower}/transformer/layers", config.block(Layout())
    blocks = (f"{layers}/self_{i}" for i in itertools.count())
    paths = [*itertools.takewhile(lambda path: graph.has(f"{path}/ln_1/scale"), blocks)]
    paths = paths or [f"{tower}/transformer/resblocks"]
    for layer in range(len(graph.weight(f"{paths[0]}/ln_1/scale"))):
        for path in paths:
            x = _block(graph, block, x, path, layer, mask, rotation)
            if path == paths[0] and image is not None:
                x = _cross_block(graph, block, x, image, seen, f"{layers}/cross", layer)
    return x


def _block(
    graph: Graph,
    c: BlockConfig,
    x: str,
    path: str,
    layer: int,
    mask: str | None,
    rotation: Tables | None,
) -> str:
    def add(number: int, x: str, branch: Callable[[str], str]) -> str:
        def norm(x: str) -> str:
            return graph.layer_norm(x, f"{path}/ln_{number}", c.epsilon, layer)

        y = branch(norm(x) if c.norm == "before" else x)
        y = _scaled(graph, norm(y) if c.norm == "branch" else y, f"{path}/ls_{number}/gamma", layer)
        y = graph.op("Add", x, y)
        return norm(y) if c.norm == "after" else y

    def attend(x: str) -> str:
        q, k, v = graph.heads(x, f"{path}/attn/in_proj", layer)
        if rotation is not None:
            q, k = (_rotated(graph, x, rotation, c.pair_distance) for x in (q, k))
        inner = (f"{path}/attn/ln", c.epsilon) if c.inner_norm else None
        return graph.attention(f"{path}/attn/out_proj", q, k, v, layer=layer, mask=mask, norm=inner)

    x = add(1, x, attend)
    if not graph.has(f"{path}/mlp/c_fc/kernel"):
        return x
    return add(2, x, lambda x: _mlp(graph, c, x, path, layer))


def _rotated(graph: Graph, x: str, rotation: Tables, distance: int) -> str:
    """Turn queries or keys [B, N, L, K], as `attention.rotate`."""
    cos, sin = map(graph.number, rotation)
    index = np.arange(cos.shape[-1]).reshape(-1, 2, distance)[:, ::-1].reshape(-1)
    swapped = graph.op("Gather", x, index, axis=-1)
    return graph.op("Add", graph.op("Mul", x, cos), graph.op("Mul", swapped, sin))


def _cross_block(
    graph: Graph, c: BlockConfig, x: str, image: str, seen: str | None, path: str, layer: int
) -> str:
    image = graph.layer_norm(image, f"{path}/ln_1_kv", c.epsilon, layer)
    y = graph.layer_norm(x, f"{path}/ln_1", c.epsilon, layer)
    (q,) = graph.heads(y, f"{path}/attn/q", layer)
    kv = graph.heads(image, f"{path}/attn/kv", layer)
    y = graph.attention(f"{path}/attn/out_proj", q, *kv, layer=layer, mask=seen)
    x = graph.op("Add", x, y)
    y = graph.layer_norm(x, f"{path}/ln_2", c.epsilon, layer)
    return graph.op("Add", x, _mlp(graph, c, y, path, layer))


def _scaled(graph: Graph, x: str, path: str, layer: int) -> str:
    if not graph.has(path):
        return x
    return graph.op("Mul", x, graph.number(graph.weight(path, layer)))


def _mlp(graph: Graph, c: BlockConfig, x: str, path: str, layer: int | None = None) -> str:
    """Add the MLP at a path."""
    y = graph.dense(x, f"{path}/mlp/c_fc", layer)
    if c.activation == "swiglu":
        gate = graph.activation(graph.dense(x, f"{path}/mlp/c_gate", layer), c.activation)
        y = graph.op("Mul", gate, y)
    else:
        y = graph.activation(y, c.activation)
    if c.inner_norm:
        y = graph.layer_norm(y, f"{path}/mlp/ln", c.epsilon, layer)
    return graph.dense(y, f"{path}/mlp/c_proj", layer)


# ------------------------------------------------------------------ vision transformers


@_of_family.register
def _(vision: ViTConfig, graph: Graph, x: str) -> str:
    return _project(graph, _vit(graph, vision, x)[0])


@functools.singledispatch
def _caption_tokens(vision: ImageTowerConfig, graph: Graph, x: str) -> tuple[str, str | None]:
    """Return the tokens that a decoder attends to, and the additive mask of their padding."""
    raise InputError(
        f"captions of a {type(vision).__name__} have no form in ONNX; use --format stablehlo."
    )


@_caption_tokens.register
def _(vision: ViTConfig, graph: Graph, x: str) -> tuple[str, str | None]:
    if _has_other_module(vision):
        return _caption_tokens.dispatch(ImageTowerConfig)(vision, graph, x)
    return _vit(graph, vision, x, tokens=True)


def _vit(graph: Graph, config: ViTConfig, x: str, tokens: bool = False) -> tuple[str, str | None]:
    """Add the pooled state, or the decoder's image tokens, as in `ViT.pool_and_tokens`.

    Returns also the additive mask of scores that hides padding of these tokens, if there is any.
    """
    x, valid = _vit_states(graph, config, x)

    def normed(x: str) -> str:
        return graph.layer_norm(x, "visual/ln_post", config.norm_epsilon)

    def first(x: str) -> str:
        return graph.op("Gather", x, np.int64(0), axis=1)

    valid_patches = None if valid is None else _after(graph, valid, config.extra_tokens)
    mask = _padding_mask(graph, valid)
    match config.pool:
        case "class_token":
            x = _after(graph, x, config.extra_tokens) if tokens else first(x)
            return normed(x), _padding_mask(graph, valid_patches)
        case "mean":
            x = _after(graph, x, config.extra_tokens)
            x = x if tokens else normed(graph.mean(x, valid_patches))
            return x, _padding_mask(graph, valid_patches)
        case "mean_all":
            return x if tokens else normed(graph.mean(x, valid)), mask
        case "map":
            x = normed(x)
            return x if tokens else first(_attention_pool(graph, config, x, mask)), mask
        case "queries":
            x = _query_pool(graph, config, x, mask)
            return normed(_after(graph, x, 1) if tokens else first(x)), None
    raise InputError(f"vision.pool={config.pool!r} has no form in ONNX; use --format stablehlo.")


def _of_head(graph: Graph, config: CLIPConfig, pixels: str) -> str:
    """Embed images by a vision transformer and the head on its tokens, as `ImageHead`."""
    vision, head = cast(ViTConfig, config.vision), config.image_head
    assert head is not None
    if _has_other_module(vision):
        raise InputError(
            f"dino.txt's head on a {type(vision).__name__} has no form in ONNX; use --format "
            "stablehlo."
        )
    x, valid = _vit_states(graph, vision, pixels)
    x = graph.layer_norm(x, "visual/ln_post", vision.norm_epsilon)
    mask = _padding_mask(graph, valid)
    block, path = head.block(vision, Layout()), "image_head/transformer/resblocks"
    for layer in range(head.depth):
        x = _block(graph, block, x, path, layer, mask, None)
    x = graph.layer_norm(x, "image_head/ln_post", block.epsilon)
    patches = _after(graph, x, vision.extra_tokens)
    count = None if valid is None else _after(graph, valid, vision.extra_tokens)
    both = [graph.op("Gather", x, np.int64(0), axis=1), graph.mean(patches, count)]
    if graph.has("image_head/proj/kernel"):
        both = [graph.linear(half, graph.weight("image_head/proj/kernel")) for half in both]
    return graph.op("Concat", *both, axis=1)


def _after(graph: Graph, x: str, count: int) -> str:
    """Leave out the first tokens."""
    start, end, axis = graph.integers(count), graph.integers(2**31), graph.integers(1)
    return graph.op("Slice", x, start, end, axis) if count else x


def _vit_states(graph: Graph, config: ViTConfig, x: str) -> tuple[str, str | None]:
    """Add the tower up to its last block; return also which tokens are valid [B, L] (None: all)."""
    extra, valid = config.extra_tokens, None
    positions, first = np.zeros((config.num_patches, config.width)), config.extra_positions
    if config.positions_path is not None:
        positions = graph.weight(config.positions_path)
    tokens = np.zeros((extra, config.width), np.float32)  # class token and registers
    if config.class_token:
        tokens[0] = graph.weight("visual/class_embedding")
    if config.registers:
        tokens[config.class_token :] = graph.weight("visual/registers")
    tokens[:first] += positions[:first]
    if config.max_patches is None:
        x = _by_position(graph, _patches(graph, config, x), config.width)
        if extra:  # empty positions, to which the tokens are added
            x = graph.op("Pad", x, graph.integers(0, extra, 0, 0, 0, 0))
        x = graph.op("Add", x, graph.number(np.concatenate([tokens, positions[first:]])))
    else:
        kernel = graph.weight("visual/conv1/kernel").reshape(-1, config.width)
        x = graph.linear(
            x, kernel, graph.weight("visual/conv1/bias") if config.patch_bias else None
        )
        resized = _resized_positions(graph, config, positions[first:], x)
        x, valid = graph.op("Add", x, graph.computed(resized)), graph.cast(MASK, np.float32)
        if extra:
            x = graph.op("Concat", _to_each(graph, tokens, x), x, axis=1)
            valid = graph.op("Pad", valid, graph.integers(0, extra, 0, 0), np.float32(1))
    if config.pre_norm:
        x = graph.layer_norm(x, "visual/ln_pre", config.norm_epsilon)
    mask = _padding_mask(graph, valid)
    return _stack(graph, config, "visual", x, mask, rotation=config.rotation()), valid


def _patches(graph: Graph, config: ViTConfig, x: str) -> str:
    """Add the convolution, or the stem, that turns pixels into patches [B, D, H, W]."""
    if isinstance(config, ConvStemConfig):
        for i, size in enumerate(STEM[:-1]):
            path = "visual/conv1/{}" + str(i)
            x = _conv(graph, x, path.format("conv"), path.format("bn"), size, False)
            x = graph.activation(x, "gelu")
        return _strided(graph, x, f"visual/conv1/conv{len(STEM) - 1}")
    return _strided(graph, x, "visual/conv1")


def _strided(graph: Graph, x: str, path: str) -> str:
    """Add a convolution whose stride is its size."""
    kernel, sizes = graph.weight(f"{path}/kernel"), [graph.weight(f"{path}/kernel").shape[0]] * 2
    inputs = [graph.number(rearrange(kernel, "P Q C D -> D C P Q"))]
    inputs += [graph.number(graph.weight(f"{path}/bias"))] if graph.has(f"{path}/bias") else []
    return graph.op("Conv", x, *inputs, kernel_shape=sizes, strides=sizes)


def _resized_positions(graph: Graph, config: ViTConfig, table: np.ndarray, x: str) -> str:
    """Resize position embeddings [N, D] for x [B, L, D], as `vit.resize_positions`, in float32."""
    side, last = config.grid, graph.integers(-1)
    counts = graph.op("Max", GRID, graph.integers(1))
    rows, columns = (
        graph.op("Slice", counts, graph.integers(i), graph.integers(i + 1), graph.integers(1))
        for i in range(2)
    )
    length = graph.op("Gather", graph.op("Shape", x), np.int64(1), axis=0)
    index = graph.op("Range", np.int64(0), length, np.int64(1))

    def weights(index: str, count: str) -> str:
        scale = graph.op("Div", np.float32(side), graph.cast(count, np.float32))
        scale = graph.op("Unsqueeze", scale, last)
        centers = graph.op("Add", graph.cast(index, np.float32), np.float32(0.5))
        centers = graph.op("Mul", graph.op("Unsqueeze", centers, last), scale)
        distance = graph.op("Sub", np.arange(side, dtype=np.float32) + np.float32(0.5), centers)
        distance = graph.op("Div", graph.op("Abs", distance), graph.op("Max", scale, np.float32(1)))
        near = graph.op("Relu", graph.op("Sub", np.float32(1), distance))
        total = graph.op("ReduceSum", near, last, keepdims=1)  # of padding 0
        return graph.op("Div", near, graph.op("Max", total, np.float32(1e-6)))

    down = graph.op("Unsqueeze", weights(graph.op("Div", index, columns), rows), last)
    across = weights(graph.op("Mod", index, columns), columns)
    both = graph.op("Mul", down, graph.op("Unsqueeze", across, graph.integers(2)))
    both = graph.op("Reshape", both, graph.integers(0, 0, side * side))
    return graph.op("MatMul", both, table)


def _padding_mask(graph: Graph, valid: str | None) -> str | None:
    """Return the additive mask of scores [B, 1, 1, L] of tokens that are 0 in `valid` [B, L]."""
    if valid is None:
        return None
    hidden = graph.op("Mul", graph.op("Sub", np.float32(1), valid), _MASKED)
    return graph.op("Unsqueeze", hidden, graph.integers(1, 2))


def _to_each(graph: Graph, tokens: np.ndarray, x: str) -> str:
    """Repeat tokens [L, D] for each row of x: [B, L, D]."""
    shape = graph.op("Shape", x, start=0, end=1)
    shape = graph.op("Concat", shape, graph.integers(1, 1), axis=0)
    return graph.op("Expand", graph.number(tokens[None]), shape)


def _by_position(graph: Graph, x: str, channels: int) -> str:
    """Add the reshaping of [B, C, H, W] to [B, H·W, C]."""
    x = graph.op("Reshape", x, graph.integers(0, channels, -1))
    return graph.op("Transpose", x, perm=[0, 2, 1])


def _constant_queries(graph: Graph, query: np.ndarray, path: str) -> str:
    """Project queries [Q, D] to [1, N, Q, K] at export, since no image changes them."""
    q = np.einsum("QD,DNK->NQK", query.astype(np.float64), graph.weight(f"{path}/kernel"))
    q = (q + graph.weight(f"{path}/bias")[:, None])[None]
    return graph.constant(graph.number(q))


def _attention_pool(graph: Graph, config: ViTConfig, x: str, mask: str | None) -> str:
    """Add SigLIP's attention pooling: one query, and an MLP."""
    path = "visual/attn_pool"
    q = _constant_queries(graph, graph.weight(f"{path}/latent")[0], f"{path}/q")
    x = graph.attention(f"{path}/proj", q, *graph.heads(x, f"{path}/kv"), mask=mask)
    y = graph.layer_norm(x, f"{path}/norm", config.norm_epsilon)
    block = config.block(Layout())._replace(inner_norm=False)
    return graph.op("Add", x, _mlp(graph, block, y, path))


def _query_pool(graph: Graph, config: ViTConfig, x: str, mask: str | None) -> str:
    """Add CoCa's attention pooling: many queries; a norm for them and one for the tokens."""
    path = "visual/attn_pool"
    query = graph.weight(f"{path}/query").astype(np.float64)
    query = query - query.mean(-1, keepdims=True)
    query = query / np.sqrt(np.square(query).mean(-1, keepdims=True) + config.norm_epsilon)
    query = query * graph.weight(f"{path}/ln_q/scale") + graph.weight(f"{path}/ln_q/bias")
    q = _constant_queries(graph, query, f"{path}/attn/q")
    x = graph.layer_norm(x, f"{path}/ln_k", config.norm_epsilon)
    kv = graph.heads(x, f"{path}/attn/kv")
    return graph.attention(f"{path}/attn/out_proj", q, *kv, mask=mask)


# ------------------------------------------------------------------ ConvNeXts


@_of_family.register
def _(config: ConvNeXtConfig, graph: Graph, x: str) -> str:
    def last(x: str) -> str:  # channels, for norms and linear maps
        return graph.op("Transpose", x, perm=[0, 2, 3, 1])

    def first(x: str) -> str:
        return graph.op("Transpose", x, perm=[0, 3, 1, 2])

    def norm(x: str, path: str, layer: int | None = None) -> str:
        return graph.layer_norm(x, f"visual/{path}", config.norm_epsilon, layer)

    for stage, depth in enumerate(config.layers):
        if stage:
            x = first(norm(last(x), f"ln{stage}"))
        x = _strided(graph, x, f"visual/conv{stage}")
        x = x if stage else first(norm(last(x), "ln0"))
        path = f"stage{stage}/resblocks"
        block = BlockConfig(1, 0, config.activation, 0, BlockInit.image(1, 1))
        for layer in range(depth):
            kernel = graph.weight(f"visual/{path}/conv/kernel", layer)
            inputs = (
                graph.number(rearrange(kernel, "P Q C D -> D C P Q")),
                graph.number(graph.weight(f"visual/{path}/conv/bias", layer)),
            )
            y = graph.op(
                "Conv", x, *inputs, group=kernel.shape[-1], kernel_shape=[7, 7], pads=[3] * 4
            )
            y = _mlp(graph, block, norm(last(y), f"{path}/ln", layer), f"visual/{path}", layer)
            y = _scaled(graph, y, f"visual/{path}/ls/gamma", layer)
            x = graph.op("Add", x, first(y))
    x = norm(graph.op("ReduceMean", x, graph.integers(2, 3), keepdims=0), "ln_post")
    if config.head == "mlp":
        x = graph.activation(graph.dense(x, "visual/fc"), "gelu")
    return _project(graph, x)


# ------------------------------------------------------------------ ResNets


@_of_family.register
def _(config: ResNetConfig, graph: Graph, x: str) -> str:
    for name, norm, stride in (("conv1", "bn1", 2), ("conv2", "bn2", 1), ("conv3", "bn3", 1)):
        x = graph.op("Relu", _conv(graph, x, f"visual/{name}", f"visual/{norm}", stride))
    x = _avg_pool(graph, x, 2)
    for i, depth in enumerate(config.layers):
        for block in range(depth):
            stride = 2 if i and block == 0 else 1
            x = _bottleneck(graph, x, f"visual/layer{i + 1}/{block}", stride)
    x, path = _by_position(graph, x, config.output_width), "visual/attnpool"
    mean = graph.op("ReduceMean", x, graph.integers(1), keepdims=1)
    x = graph.op("Concat", mean, x, axis=1)
    x = graph.op("Add", x, graph.number(graph.weight(f"{path}/positional_embedding")))
    query = graph.op("Slice", x, graph.integers(0), graph.integers(1), graph.integers(1))
    inputs = (("q_proj", query), ("k_proj", x), ("v_proj", x))
    qkv = [y for name, tokens in inputs for y in graph.heads(tokens, f"{path}/{name}")]
    x = graph.attention(f"{path}/c_proj", *qkv)
    return graph.op("Gather", x, np.int64(0), axis=1)


def _conv(graph: Graph, x: str, conv: str, norm: str, stride: int = 1, half: bool = True) -> str:
    """Add a convolution, padded by half its size or not, with the BatchNorm after it folded in."""
    kernel = graph.weight(f"{conv}/kernel").astype(np.float64)
    scale, bias = (graph.weight(f"{norm}/{name}").astype(np.float64) for name in ("scale", "bias"))
    mean, var = (graph.weight(f"batch_stats/{norm}/{name}") for name in ("mean", "var"))
    scale = scale / np.sqrt(var.astype(np.float64) + 1e-5)
    folded = graph.number(rearrange(kernel * scale, "P Q C D -> D C P Q"), f"{conv}/kernel")
    shift, size = graph.number(bias - mean * scale, f"{norm}/bias"), kernel.shape[0]
    options = {"kernel_shape": [size] * 2, "strides": [stride] * 2, "pads": [half * size // 2] * 4}
    return graph.op("Conv", x, folded, shift, **options)


def _avg_pool(graph: Graph, x: str, size: int) -> str:
    if size == 1:
        return x
    return graph.op("AveragePool", x, kernel_shape=[size, size], strides=[size, size])


def _bottleneck(graph: Graph, x: str, path: str, stride: int) -> str:
    y = graph.op("Relu", _conv(graph, x, f"{path}/conv1", f"{path}/bn1"))
    y = graph.op("Relu", _conv(graph, y, f"{path}/conv2", f"{path}/bn2"))
    y = _conv(graph, _avg_pool(graph, y, stride), f"{path}/conv3", f"{path}/bn3")
    if graph.has(f"{path}/downsample/0/kernel"):
        x = _avg_pool(graph, x, stride)
        x = _conv(graph, x, f"{path}/downsample/0", f"{path}/downsample/1")
    return graph.op("Relu", graph.op("Add", x, y))
