"""The towers in ONNX's operators: the same functions as `models/`, of the same parameters.

Images come as [batch, 3, height, width], normalised; layers are unrolled; BatchNorm's running
statistics are folded into the convolutions before it.
"""

import numpy as np
from einops import rearrange

from clip_jax.export.graph import Graph
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

_MASKED = np.float32(np.finfo(np.float32).min / 2)  # of a score; −∞ is no number to some runtimes


def image_tower(graph: Graph, config: CLIPConfig, pixels: str) -> str:
    """Embed normalised pixels [B, 3, H, W]; returns features [B, E] in float32, not normalised."""
    x = graph.computed(pixels)
    vision = config.vision
    x = _resnet(graph, vision, x) if isinstance(vision, ResNetConfig) else _vit(graph, vision, x)
    return graph.exact(x)


def text_tower(graph: Graph, config: CLIPConfig, ids: str) -> str:
    """Embed token ids [B, L]; returns features [B, E] in float32, not normalised."""
    text = config.text
    if sees_padding(text):
        ids = _at_full_length(graph, text, ids)
    length = graph.op("Shape", ids, start=1, end=2)
    x = embedded(graph, text, ids, length)
    if text.pool == "class_token":
        token = graph.weight("text/class_embedding") + graph.weight("text/positional_embedding")[-1]
        shape = graph.op("Shape", ids, start=0, end=1)
        shape = graph.op("Concat", shape, graph.integers(1, 1), axis=0)
        token = graph.op("Expand", graph.number(token[None, None]), shape)
        x, mask = graph.op("Concat", x, token, axis=1), key_mask(graph, text, ids)
        if text.causal:
            mask = graph.op("Min", mask, _triangle(text.num_positions))
    else:
        mask = causal_mask(graph, text, length) if text.causal else None
    x = transformer(graph, text, "text", x, mask)
    match text.pool:
        case "mean":
            x = graph.layer_norm(x, "text/ln_final", text.norm_epsilon)
            x = graph.op("ReduceMean", x, graph.integers(1), keepdims=0)
        case "last" | "class_token":
            x = graph.op("Gather", x, np.int64(-1), axis=1)
        case "argmax" | "eos":
            x = graph.op("GatherND", x, _end(graph, text, ids), batch_dims=1)
    if text.pool != "mean":
        x = graph.layer_norm(x, "text/ln_final", text.norm_epsilon)
    if text.projection:
        x = graph.linear(x, graph.weight("text/text_projection"))
    if text.projection_bias:
        x = graph.op("Add", x, graph.number(graph.weight("text/text_projection_bias")))
    return graph.exact(x)


def sees_padding(text: TextConfig) -> bool:
    """Say whether a text's embedding depends on the id of its padding and on how much there is."""
    return not text.causal or text.pool in ("last", "class_token", "mean")


def _at_full_length(graph: Graph, text: TextConfig, ids: str) -> str:
    """Pad ids [B, L] to the context length, as the model's tokenizer does."""
    from onnx import TensorProto

    ids, one = graph.op("Cast", ids, to=TensorProto.INT64), graph.integers(1)
    whole = graph.integers(*[text.tokenizer.pad_id] * text.context_length)[None]
    rows, length = (graph.op("Shape", ids, start=axis, end=axis + 1) for axis in range(2))
    missing = graph.op("Slice", whole, length, graph.integers(text.context_length), one)
    missing = graph.op("Expand", missing, graph.op("Concat", rows, one, axis=0))
    parts = (ids, missing) if text.tokenizer.pad_side == "right" else (missing, ids)
    return graph.op("Concat", *parts, axis=1)


def embedded(graph: Graph, text: TextConfig, ids: str, length: str) -> str:
    """Look ids [B, L] up, and add the positions of the first L."""
    start, axis = graph.integers(0), graph.integers(0)
    positions = graph.weight("text/positional_embedding")[: text.context_length]
    table = graph.number(graph.weight("text/token_embedding"), "text/token_embedding")
    x = graph.op("Gather", table, ids, axis=0)
    return graph.op("Add", x, graph.op("Slice", graph.number(positions), start, length, axis))


def causal_mask(graph: Graph, text: TextConfig, length: str) -> str:
    """What is added to scores [L, L] so that no token sees one behind it."""
    whole = _triangle(text.context_length)
    both = graph.op("Concat", length, length, axis=0)
    return graph.op("Slice", whole, graph.integers(0, 0), both, graph.integers(0, 1))


def _triangle(size: int) -> np.ndarray:
    return np.triu(np.full((size, size), _MASKED), 1)


def key_mask(graph: Graph, text: TextConfig, ids: str) -> str:
    """What is added to scores [B, 1, 1, L + 1] so that padding is not seen; the class token is.

    Without `correct_class_mask` the class token's column stands before the others.
    """
    is_pad = graph.op("Equal", ids, np.array(text.tokenizer.pad_id, np.int64))
    keys = graph.op("Where", is_pad, _MASKED, np.float32(0))
    pads = (0, 0, 0, 1) if text.correct_class_mask else (0, 1, 0, 0)
    keys = graph.op("Pad", keys, graph.integers(*pads))
    return graph.op("Reshape", keys, graph.integers(0, 1, 1, -1))


def _end(graph: Graph, text: TextConfig, ids: str) -> str:
    """Places [B, 1] of the states that stand for the texts."""
    from onnx import TensorProto

    ids = graph.op("Cast", ids, to=TensorProto.INT32)
    if text.pool == "eos":
        ids = graph.op("Equal", ids, np.int32(text.eos_token_id))
        ids = graph.op("Cast", ids, to=TensorProto.INT32)
    return graph.op("ArgMax", ids, axis=1, keepdims=1)


def _vit(graph: Graph, config: ViTConfig, x: str) -> str:
    x = _vit_states(graph, config, x)
    match config.pool:
        case "class_token":
            x = graph.op("Gather", x, np.int64(0), axis=1)
        case "mean" if config.class_token:
            x = _without_first(graph, x)
        case "queries":
            x = _query_pool(graph, config, x)
            x = graph.op("Gather", x, np.int64(0), axis=1)
    if config.pool in ("mean", "mean_all"):
        x = graph.op("ReduceMean", x, graph.integers(1), keepdims=0)
    x = graph.layer_norm(x, "visual/ln_post", config.norm_epsilon)
    if config.pool == "map":
        x = _attention_pool(graph, config, x)
    return graph.linear(x, graph.weight("visual/proj")) if config.projection else x


def image_tokens(graph: Graph, config: ViTConfig, pixels: str) -> str:
    """Return what a caption decoder attends to, [B, M, C], of normalised pixels [B, 3, H, W]."""
    x = _vit_states(graph, config, graph.computed(pixels))
    if config.pool == "queries":
        x = _query_pool(graph, config, x)
    if config.pool == "queries" or (config.class_token and config.pool in ("mean", "class_token")):
        x = _without_first(graph, x)
    if config.pool in ("mean", "mean_all"):
        return x
    return graph.layer_norm(x, "visual/ln_post", config.norm_epsilon)


def _vit_states(graph: Graph, config: ViTConfig, x: str) -> str:
    patch = config.patch_size
    kernel = rearrange(graph.weight("visual/conv1/kernel"), "P Q C D -> D C P Q")
    inputs = [graph.number(kernel)]
    if config.patch_bias:
        inputs.append(graph.number(graph.weight("visual/conv1/bias")))
    x = graph.op("Conv", x, *inputs, kernel_shape=[patch, patch], strides=[patch, patch])
    x = _places(graph, x, config.width)
    positions = graph.weight("visual/positional_embedding").copy()
    if config.class_token:  # a place more, which holds nothing yet
        positions[0] += graph.weight("visual/class_embedding")
        x = graph.op("Pad", x, graph.integers(0, 1, 0, 0, 0, 0))
    x = graph.op("Add", x, graph.number(positions))
    if config.pre_norm:
        x = graph.layer_norm(x, "visual/ln_pre", config.norm_epsilon)
    return transformer(graph, config, "visual", x)


def _without_first(graph: Graph, x: str) -> str:
    return graph.op("Slice", x, graph.integers(1), graph.integers(2**31), graph.integers(1))


def _places(graph: Graph, x: str, channels: int) -> str:
    """[B, C, H, W] to [B, H·W, C]."""
    x = graph.op("Reshape", x, graph.integers(0, channels, -1))
    return graph.op("Transpose", x, perm=[0, 2, 1])


def transformer(
    graph: Graph, config: ViTConfig | TextConfig, tower: str, x: str, mask: str | None = None
) -> str:
    """A tower's blocks; of MaMMUT's layers those that do not attend to the image."""
    layers, each = f"{tower}/transformer/layers", 1
    while graph.has(f"{layers}/self_{each}/ln_1/scale"):
        each += 1
    is_mammut = graph.has(f"{layers}/self_0/ln_1/scale")
    for index in range(config.depth):
        layer, i = divmod(index, each)
        path = f"{layers}/self_{i}" if is_mammut else f"{tower}/transformer/resblocks"
        x = block(graph, config, x, path, layer, mask)
    return x


def block(
    graph: Graph, config: ViTConfig | TextConfig, x: str, path: str, layer: int, mask: str | None
) -> str:
    """One layer of the stack of blocks at a path."""
    heads, width = config.num_heads, config.width
    dim = width // heads
    y = graph.layer_norm(x, f"{path}/ln_1", config.norm_epsilon, layer)
    kernel, bias = (graph.weight(f"{path}/attn/in_proj/{n}", layer) for n in ("kernel", "bias"))
    y = graph.linear(y, kernel.reshape(width, -1), bias.reshape(-1))
    q, k, v = split_heads(graph, y, 3, heads, dim)
    y = graph.merged(graph.attended(q, k, v, dim, mask), width)
    y = _projected(graph, y, f"{path}/attn/out_proj", layer)
    x = graph.op("Add", x, _scaled(graph, y, f"{path}/ls_1/gamma", layer))
    if not graph.has(f"{path}/mlp/c_fc/kernel"):
        return x
    y = mlp(graph, config, x, path, layer)
    return graph.op("Add", x, _scaled(graph, y, f"{path}/ls_2/gamma", layer))


def split_heads(graph: Graph, x: str, count: int, heads: int, dim: int) -> list[str]:
    """[B, L, S·N·K] to S times [B, N, L, K]."""
    x = graph.op("Reshape", x, graph.integers(0, 0, count, heads, dim))
    x = graph.op("Transpose", x, perm=[2, 0, 3, 1, 4])
    return [graph.op("Gather", x, np.int64(part), axis=0) for part in range(count)]


def _projected(graph: Graph, x: str, path: str, layer: int | None = None) -> str:
    kernel = graph.weight(f"{path}/kernel", layer)
    return graph.linear(
        x, kernel.reshape(-1, kernel.shape[-1]), graph.weight(f"{path}/bias", layer)
    )


def _scaled(graph: Graph, x: str, path: str, layer: int) -> str:
    if not graph.has(path):
        return x
    return graph.op("Mul", x, graph.number(graph.weight(path, layer)))


def mlp(
    graph: Graph,
    config: ViTConfig | TextConfig,
    x: str,
    path: str,
    layer: int | None = None,
    norm: str = "ln_2",
) -> str:
    """The MLP at a path, and the norm before it."""
    hidden, out = (
        [graph.weight(f"{path}/mlp/{name}/{part}", layer) for part in ("kernel", "bias")]
        for name in ("c_fc", "c_proj")
    )
    x = graph.layer_norm(x, f"{path}/{norm}", config.norm_epsilon, layer)
    return graph.linear(graph.activation(graph.linear(x, *hidden), config.activation), *out)


def attended_others(
    graph: Graph,
    q: str,
    other: str,
    path: str,
    shape: tuple[int, int],
    layer: int | None = None,
    out: str = "out_proj",
) -> str:
    """Attention of queries [B, N, L, K] to others [B, M, C]; `shape` is (N, K)."""
    heads, dim = shape
    kernel, bias = (graph.weight(f"{path}/kv/{name}", layer) for name in ("kernel", "bias"))
    y = graph.linear(other, kernel.reshape(len(kernel), -1), bias.reshape(-1))
    k, v = split_heads(graph, y, 2, heads, dim)
    y = graph.merged(graph.attended(q, k, v, dim), heads * dim)
    return _projected(graph, y, f"{path}/{out}", layer)


def _constant_queries(graph: Graph, query: np.ndarray, path: str) -> tuple[str, tuple[int, int]]:
    """[Q, D] projected: [1, N, Q, K], which no image changes; and (N, K)."""
    kernel = graph.weight(f"{path}/q/kernel")
    q = np.einsum("QD,DNK->NQK", query.astype(np.float64), kernel)
    q = (q + graph.weight(f"{path}/q/bias")[:, None])[None]
    return graph.constant(graph.number(q)), (kernel.shape[1], kernel.shape[2])


def _attention_pool(graph: Graph, config: ViTConfig, x: str) -> str:
    """SigLIP's: one query, and an MLP."""
    path = "visual/attn_pool"
    q, shape = _constant_queries(graph, graph.weight(f"{path}/latent")[0], path)
    x = attended_others(graph, q, x, path, shape, out="proj")
    x = graph.op("Add", x, mlp(graph, config, x, path, norm="norm"))
    return graph.op("Gather", x, np.int64(0), axis=1)


def _query_pool(graph: Graph, config: ViTConfig, x: str) -> str:
    """CoCa's: many queries, normed as what they attend to is."""
    path = "visual/attn_pool"
    query = graph.weight(f"{path}/query").astype(np.float64)
    query = query - query.mean(-1, keepdims=True)
    query = query / np.sqrt(np.square(query).mean(-1, keepdims=True) + config.norm_epsilon)
    query = query * graph.weight(f"{path}/ln_q/scale") + graph.weight(f"{path}/ln_q/bias")
    q, shape = _constant_queries(graph, query, f"{path}/attn")
    x = graph.layer_norm(x, f"{path}/ln_k", config.norm_epsilon)
    return attended_others(graph, q, x, f"{path}/attn", shape)


# ------------------------------------------------------------------ ResNets


def _resnet(graph: Graph, config: ResNetConfig, x: str) -> str:
    for name, norm, stride in (("conv1", "bn1", 2), ("conv2", "bn2", 1), ("conv3", "bn3", 1)):
        x = graph.op("Relu", _conv(graph, x, f"visual/{name}", f"visual/{norm}", stride))
    x = _avg_pool(graph, x, 2)
    for i, depth in enumerate(config.layers):
        for block in range(depth):
            stride = 2 if i and block == 0 else 1
            x = _bottleneck(graph, x, f"visual/layer{i + 1}/{block}", stride)
    return _attention_pool_2d(graph, config, _places(graph, x, config.output_width))


def _conv(graph: Graph, x: str, conv: str, norm: str, stride: int = 1) -> str:
    """A convolution with the norm behind it."""
    kernel = graph.weight(f"{conv}/kernel").astype(np.float64)
    scale, bias = (graph.weight(f"{norm}/{name}").astype(np.float64) for name in ("scale", "bias"))
    mean, var = (graph.weight(f"batch_stats/{norm}/{name}") for name in ("mean", "var"))
    scale = scale / np.sqrt(var.astype(np.float64) + 1e-5)
    size = kernel.shape[0]
    return graph.op(
        "Conv",
        x,
        graph.number(rearrange(kernel * scale, "P Q C D -> D C P Q"), f"{conv}/kernel"),
        graph.number(bias - mean * scale, f"{norm}/bias"),
        kernel_shape=[size, size],
        strides=[stride, stride],
        pads=[size // 2] * 4,
    )


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


def _attention_pool_2d(graph: Graph, config: ResNetConfig, x: str) -> str:
    heads, width, path = config.num_heads, config.output_width, "visual/attnpool"
    dim = width // heads
    mean = graph.op("ReduceMean", x, graph.integers(1), keepdims=1)
    x = graph.op("Concat", mean, x, axis=1)
    x = graph.op("Add", x, graph.number(graph.weight(f"{path}/positional_embedding")))
    query = graph.op("Slice", x, graph.integers(0), graph.integers(1), graph.integers(1))
    parts = []
    for name, tokens in (("q_proj", query), ("k_proj", x), ("v_proj", x)):
        kernel, bias = graph.weight(f"{path}/{name}/kernel"), graph.weight(f"{path}/{name}/bias")
        y = graph.linear(tokens, kernel.reshape(width, -1), bias.reshape(-1))
        y = graph.op("Reshape", y, graph.integers(0, 0, heads, dim))
        parts.append(graph.op("Transpose", y, perm=[0, 2, 1, 3]))
    q, k, v = parts
    x = graph.merged(graph.attended(q, k, v, dim), width)
    x = graph.op("Gather", x, np.int64(0), axis=1)
    kernel = graph.weight(f"{path}/c_proj/kernel")
    return graph.linear(x, kernel.reshape(width, -1), graph.weight(f"{path}/c_proj/bias"))
