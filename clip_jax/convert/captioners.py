"""CoCa in open_clip's layout, MaMMUT in LAION's fork of it: names of tensors and settings."""

from dataclasses import replace
from typing import Any, cast

from clip_jax.convert.openai import BLOCK, vit_rows
from clip_jax.convert.settings import Settings
from clip_jax.convert.state_dict import (
    Row,
    block_rows,
    heads_out,
    norm,
    query_rows,
    split_queries,
)
from clip_jax.convert.target import Assumptions
from clip_jax.convert.tensor_files import Tensors
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.decoder import CoCaConfig, DecoderConfig, MaMMUTConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

# Settings of open_clip's that it does not read.
_UNREAD = {"context_length", "vocab_size", "mlp_ratio", "dim_head", "n_queries",
           "attn_pooler_heads", "output_tokens"}  # fmt: skip


def rows(config: CLIPConfig) -> list[Row]:
    """The table, of tensors that `split` has parted."""
    vision = cast(ViTConfig, config.vision)
    rows = vit_rows(vision)
    if vision.pool == "queries":
        rows += _pool_rows(vision.width == config.embed_dim)
    rows += [
        Row("text/token_embedding", "text.token_embedding.weight"),
        Row("text/positional_embedding", "text.positional_embedding"),
        *norm("text/ln_final", "text.ln_final"),
        Row("logit_scale", "logit_scale"),
    ]
    if config.has_logit_bias:
        rows.append(Row("logit_bias", "logit_bias"))
    if isinstance(config.decoder, MaMMUTConfig):
        return [
            *rows,
            *_layer_rows("text", config.decoder.cross_every, config.decoder.first_mlp),
            Row("decoder/image_projection", "map_viz2txt_kv"),
            Row("decoder/vocab_projection", "text.text_projection"),
        ]
    return [
        *rows,
        *block_rows("text/transformer/resblocks", "text.transformer.resblocks.{}", BLOCK),
        Row("text/class_embedding", "text.cls_emb"),
        Row("text/text_projection", "text.text_projection"),
        *_layer_rows("decoder", 1, True),
        *norm("decoder/ln_final", "text_decoder.ln_final"),
        Row("decoder/vocab_projection", "text_decoder.text_projection"),
    ]


def _pool_rows(fused: bool) -> list[Row]:
    """Rows of the attentional pool, whose projections are one tensor if all widths are the same."""
    ours, theirs = "visual/attn_pool", "visual.attn_pool"
    q, kv = f"{ours}/attn/q", f"{ours}/attn/kv"
    projections = query_rows(f"{ours}/attn", *(f"{theirs}.attn.in_proj_*.{x}" for x in ("q", "kv")))
    if not fused:
        weights = tuple(f"{theirs}.attn.{name}_proj_weight" for name in "kv")
        projections = [row for row in projections if not row.ours.endswith("kernel")] + [
            Row(f"{q}/kernel", f"{theirs}.attn.q_proj_weight", "(N K) D -> D N K"),
            Row(f"{kv}/kernel", weights, "S (N K) D -> D S N K"),
        ]
    return [
        Row(f"{ours}/query", f"{theirs}.query"),
        *norm(f"{ours}/ln_q", f"{theirs}.ln_q"),
        *norm(f"{ours}/ln_k", f"{theirs}.ln_k"),
        *projections,
        *heads_out(f"{ours}/attn/out_proj", f"{theirs}.attn.out_proj"),
    ]


def _layer_rows(tower: str, blocks: int, first_mlp: bool) -> list[Row]:
    """Rows of layers that attend to the image, `blocks` of the text's own in each."""
    layers, theirs = f"{tower}/transformer/layers", {"text": "text", "decoder": "text_decoder"}
    name = theirs[tower]
    own = [
        row._replace(first=i, step=blocks)
        for i in range(blocks)
        for row in block_rows(f"{layers}/self_{i}", f"{name}.resblocks.{{}}", BLOCK)
        if first_mlp or not row.ours.startswith((f"{layers}/self_0/mlp", f"{layers}/self_0/ln_2"))
    ]
    cross = f"{name}.cross_attn.{{}}"
    block = [
        row for row in block_rows(f"{layers}/cross", cross, BLOCK) if "in_proj" not in row.ours
    ]  # fmt: skip
    return [
        *own,
        *block,
        *norm(f"{layers}/cross/ln_1_kv", f"{cross}.ln_1_kv"),
        *query_rows(f"{layers}/cross/attn", *(f"{cross}.attn.in_proj_*.{x}" for x in ("q", "kv"))),
    ]


def split(tensors: Tensors) -> Tensors:
    """Split the projections of attention to the image into the query's and the others'."""
    return split_queries(
        tensors,
        lambda name: (
            ".attn.in_proj_" in name
            and (".cross_attn." in name or name.startswith("visual.attn_pool."))
        ),
    )


def read_coca(section: Settings, text: TextConfig) -> CoCaConfig:
    """Read `multimodal_cfg`. Raises InputError if its decoder does not fit the text tower."""
    section.used |= _UNREAD
    width = section.count("width", 512)
    if width != text.width:
        raise InputError(
            f"{section.where}.width={width} is not text_cfg.width={text.width}, whose states it "
            "takes."
        )
    _check_text(text, section.where)
    return CoCaConfig(depth=section.count("layers", 12), num_heads=section.count("heads", 8))


def read_mammut(section: Settings, text: TextConfig) -> tuple[TextConfig, MaMMUTConfig]:
    """Read what `text_cfg` says of MaMMUT's one tower for both."""
    _check_text(text, section.where)
    decoder = MaMMUTConfig(
        cross_every=section.count("cross_attn_ratio", 1),
        first_mlp=section.get("has_mlp", True, bool),
    )
    return replace(text, causal=False, pool="mean", projection=False), decoder


def _check_text(text: TextConfig, where: str) -> None:
    """Raise InputError where the decoder, which open_clip builds with the usual ones, would have
    others."""
    if text.norm_epsilon != 1e-5 or text.activation == "gelu_tanh" or text.mlp_ratio != 4.0:
        raise InputError(
            f"{where}: a decoder beside a text tower with norm_kwargs, act_kwargs or mlp_ratio is "
            "not supported: open_clip's has the usual ones."
        )


def settings(config: CLIPConfig) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return what is added to the top level, to `vision_cfg` and to `text_cfg`."""
    vision, text = cast(ViTConfig, config.vision), config.text
    top: dict[str, Any] = {"custom_text": True}
    image: dict[str, Any] = {"output_tokens": True}
    if vision.pool == "queries":
        image |= {
            "attentional_pool": True,
            "attn_pooler_queries": vision.pool_queries,
            "attn_pooler_heads": vision.pool_heads,
        }
    if vision.pool == "mean_all":
        image |= {"pool_type": "avg_all", "final_ln_after_pool": True}
    words: dict[str, Any] = {"output_tokens": True}
    if isinstance(config.decoder, MaMMUTConfig):
        words |= {
            "does_full_decoding": True,
            "cross_attn_ratio": config.decoder.cross_every,
            "has_mlp": config.decoder.first_mlp,
        }
    elif config.decoder is not None:
        words["embed_cls"] = True
        top["multimodal_cfg"] = {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": config.decoder.num_heads,
            "layers": config.decoder.depth,
        }
    return top, image, words


def assumptions(decoder: DecoderConfig) -> Assumptions:
    """Return what open_clip's layout assumes of a model with a decoder."""
    is_coca = isinstance(decoder, CoCaConfig)
    return {
        "decoder.mlp_ratio": 4.0,
        "vision.pool": ("queries", "class_token") if is_coca else "mean_all",
        "text.correct_class_mask": False if is_coca else (True, False),
        "text.pool": "class_token" if is_coca else "mean",
        "text.projection": is_coca,
        "text.projection_bias": False,
        "text.causal": is_coca,
        "text.norm_epsilon": 1e-5,
        "text.mlp_ratio": 4.0,
        "text.activation": ("quick_gelu", "gelu"),
    }
