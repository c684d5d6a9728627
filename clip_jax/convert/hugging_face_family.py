"""Interface of a family of models in transformers, and what its families share.

Each family has a module with one or more rows of this type, listed in `hugging_face.FAMILIES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax.convert.settings import Settings, Table, by_table
from clip_jax.convert.state_dict import TORCH, Convention
from clip_jax.convert.target import Assumptions
from clip_jax.convert.tensor_files import Tensors
from clip_jax.convert.weights import Weights, mlp_ratio
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.layers import Activation
from clip_jax.optim import Tower


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one class of transformers."""

    class_name: str
    model_type: str  # in config.json
    fits: Callable[[CLIPConfig], bool]  # whether a model is written as this class
    assumptions: Callable[[Weights], Assumptions]
    convention: Convention
    # Returns the architecture, given the content and the path of config.json. Its tokenizer is that
    # of a folder without such files. Raises InputError for an option that we do not have.
    read: Callable[[dict[str, Any], Path], CLIPConfig]
    # The inverse, without class, model_type and dtype; it is also given the model_type.
    write: Callable[[CLIPConfig, str], dict[str, Any]]
    processor: str = "CLIP"  # class of the image processor, without the ending ImageProcessor
    # Change the tensors on the file's side of the convention; `from_file` is also given the content
    # of config.json and the name of the file, `to_file` the architecture.
    from_file: Callable[[Tensors, Settings, str], Tensors] = lambda tensors, *_: tensors
    to_file: Callable[[Tensors, CLIPConfig], Tensors] = lambda tensors, _: tensors
    exact: tuple[str, ...] = ()  # parameters that are never rounded
    only_tower: Tower | None = None  # the one tower that the class has; None: both


# ------------------------------------------------------------------ names of tensors

_TOWERS = Convention(
    names=(
        (r"^(visual|text)/transformer/resblocks/", r"\1/encoder/layers/{}/"),
        (r"^visual/conv1/", "visual/embeddings/patch_embedding/"),
        (r"^visual/class_embedding", "visual/embeddings/class_embedding"),
        (r"^(visual|text)/positional_embedding", r"\1/embeddings/position_embedding/weight"),
        (r"^text/token_embedding", "text/embeddings/token_embedding"),
        (r"^visual/ln_pre/", "visual/pre_layrnorm/"),  # their spelling
        (r"^visual/ln_post/", "visual/post_layernorm/"),
        (r"^text/ln_final/", "text/final_layer_norm/"),
        (r"/ln_([12])/", r"/layer_norm\1/"),
        (r"/attn/in_proj/", "/self_attn/[q,k,v]_proj/"),
        (r"/attn/out_proj/", "/self_attn/out_proj/"),
        (r"/c_fc/", "/fc1/"),
        (r"/c_proj/", "/fc2/"),
        (r"attn_pool/latent", "head/probe"),
        (r"attn_pool/(q|kv)/", r"head/attention/\1/"),
        (r"attn_pool/proj/", "head/attention/out_proj/"),
        (r"attn_pool/norm/", "head/layernorm/"),
        (r"attn_pool/", "head/"),
        (r"^visual/proj$", "visual_projection/weight"),
        (r"^visual/", "vision_model/"),
    ),
    axes=((r"^visual/proj$|^text/text_projection$", "E D -> D E"),),
)


def convention(projection: str) -> Convention:
    """Return the names of two transformers, of which `projection` is the text tower's last map."""
    text = Convention(
        names=(
            (r"^text/text_projection$", f"{projection}/weight"),
            (r"^text/text_projection_bias$", f"{projection}/bias"),
            (r"^text/", "text_model/"),
        ),
    )
    return _TOWERS + text + TORCH


# ------------------------------------------------------------------ settings

ACTIVATIONS: dict[str, Activation] = {  # of several names for ours, the last is written
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
IMAGE: Table = {
    "image_size": ("image_size", 224), "patch_size": ("patch_size", 32),
    "hidden_size": ("width", 768), "intermediate_size": ("mlp_width", 3072),
    "num_hidden_layers": ("depth", 12), "num_attention_heads": ("num_heads", 12),
    "layer_norm_eps": ("norm_epsilon", 1e-5),
}  # fmt: skip
TEXT: Table = {
    "vocab_size": ("vocab_size", 49_408), "max_position_embeddings": ("context_length", 77),
    "hidden_size": ("width", 512), "intermediate_size": ("mlp_width", 2048),
    "num_hidden_layers": ("depth", 12), "num_attention_heads": ("num_heads", 8),
    "layer_norm_eps": ("norm_epsilon", 1e-5),
}  # fmt: skip


def sections(content: dict[str, Any], path: Path) -> tuple[Settings, Settings]:
    """Return the settings of both towers; in old files, `…_dict` replaces the tower's section."""
    towers = []
    for tower in ("vision_config", "text_config"):
        name = tower if content.get(f"{tower}_dict") is None else f"{tower}_dict"
        section = Settings(content.get(name) or {}, f"{path}: {name}")
        if (channels := section.count("num_channels", 3)) != 3:
            raise InputError(
                f"{section.where}.num_channels={channels} is not supported; it must be 3."
            )
        towers.append(section)
    return towers[0], towers[1]


def tower_fields(section: Settings, table: Table, activation: str) -> dict[str, Any]:
    """Return the fields of a tower's configuration; `activation` is their default."""
    fields = section.fields(table)
    name = section.get("hidden_act", activation, object)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise InputError(f"{section.where}.hidden_act={name!r:.99} is none of {[*ACTIVATIONS]}.")
    ratio = mlp_ratio(fields["width"], fields.pop("mlp_width"))
    return {**fields, "mlp_ratio": ratio, "activation": ACTIVATIONS[name]}


def activation_name(tower: Any) -> str:
    """Return their name of a tower's activation."""
    return {ours: theirs for theirs, ours in ACTIVATIONS.items()}[tower.activation]


def tower_settings(table: Table, tower: Any) -> dict[str, Any]:
    """Return the section of a tower: inverse of `tower_fields`."""
    return {**by_table(table, tower), "hidden_act": activation_name(tower)}


def with_types(
    model_type: str, vision: dict[str, Any], text: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return both sections with the names of their types."""
    return {
        "vision_config": {"model_type": f"{model_type}_vision_model", **vision},
        "text_config": {"model_type": f"{model_type}_text_model", **text},
    }
