"""Caption decoders in ONNX's operators: CoCa's above the text tower, MaMMUT's within it."""

from dataclasses import replace

from clip_jax.export.graph import Graph
from clip_jax.export.towers import (
    attended_others,
    block,
    causal_mask,
    embedded,
    image_tokens,
    key_mask,
    mlp,
    split_heads,
    transformer,
)  # fmt: skip
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.decoder import MaMMUTConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig


def caption_logits(graph: Graph, config: CLIPConfig, pixels: str, ids: str) -> str:
    """Return the logits [B, L, V] of each token's successor, in float32.

    Of normalised pixels [B, 3, H, W] and ids [B, L], the begin token first; all is computed again
    for each token more.
    """
    text, decoder, vision = config.text, config.decoder, config.vision
    if decoder is None or not isinstance(vision, ViTConfig):
        raise ValueError("there is no decoder that attends to a vision transformer's tokens")
    image = image_tokens(graph, vision, pixels)
    length = graph.op("Shape", ids, start=1, end=2)
    causal = causal_mask(graph, text, length)
    x = embedded(graph, text, ids, length)
    if isinstance(decoder, MaMMUTConfig):
        image = graph.linear(image, graph.weight("decoder/image_projection"))
        x = _layers(graph, text, "text", decoder.cross_every, x, image, causal)
        x = graph.layer_norm(x, "text/ln_final", text.norm_epsilon)
    else:
        x = transformer(graph, text, "text", x, _seen(graph, text, ids, length, causal))
        own = replace(text, depth=decoder.depth, num_heads=decoder.num_heads)
        x = _layers(graph, own, "decoder", 1, x, image, causal)
        x = graph.layer_norm(x, "decoder/ln_final", text.norm_epsilon)
    return graph.exact(graph.linear(x, graph.weight("decoder/vocab_projection")))


def _seen(graph: Graph, text: TextConfig, ids: str, length: str, causal: str) -> str:
    """The mask of CoCa's text tower, whose class token stands behind all that is written."""
    if text.pool != "class_token":
        return causal
    keys = graph.op(
        "Slice", key_mask(graph, text, ids), graph.integers(0), length, graph.integers(3)
    )
    return graph.op("Min", causal, keys)


def _layers(
    graph: Graph, text: TextConfig, tower: str, blocks: int, x: str, image: str, mask: str
) -> str:
    """Layers of so many blocks; behind the first of each is one that attends to the image."""
    path = f"{tower}/transformer/layers"
    for layer in range(text.depth // blocks):
        for i in range(blocks):
            x = block(graph, text, x, f"{path}/self_{i}", layer, mask)
            if i == 0:
                x = _cross_block(graph, text, x, image, f"{path}/cross", layer)
    return x


def _cross_block(graph: Graph, text: TextConfig, x: str, image: str, path: str, layer: int) -> str:
    heads, width, attn = text.num_heads, text.width, f"{path}/attn"
    image = graph.layer_norm(image, f"{path}/ln_1_kv", text.norm_epsilon, layer)
    q = graph.layer_norm(x, f"{path}/ln_1", text.norm_epsilon, layer)
    kernel, bias = (graph.weight(f"{attn}/q/{name}", layer) for name in ("kernel", "bias"))
    q = graph.linear(q, kernel.reshape(width, -1), bias.reshape(-1))
    (q,) = split_heads(graph, q, 1, heads, width // heads)
    y = attended_others(graph, q, image, attn, (heads, width // heads), layer)
    x = graph.op("Add", x, y)
    return graph.op("Add", x, mlp(graph, text, x, path, layer))
