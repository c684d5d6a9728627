"""The towers and caption decoders that open_clip builds: a row for each kind.

A row has the settings in both directions, the names of tensors, and what open_clip assumes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from clip_jax.convert import bert, timm
from clip_jax.convert.settings import Settings, Table, by_table, count_of, number_of
from clip_jax.convert.state_dict import Convention
from clip_jax.convert.target import Assumptions
from clip_jax.data.tokenizers.clip_bpe import FULL_VOCAB_SIZE
from clip_jax.errors import InputError
from clip_jax.models.bert import BertConfig
from clip_jax.models.clip import CLIPConfig, Text, Vision
from clip_jax.models.decoder import CoCaConfig, MaMMUTConfig
from clip_jax.models.decoders import DecoderConfig
from clip_jax.models.layers import Activation
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig


@dataclass(frozen=True, kw_only=True)
class TowerFamily:
    """Towers of one kind."""

    fits: Callable[[Any], bool]  # whether a tower of ours is written as one
    describes: Callable[[Settings], bool]  # whether a section of the configuration is of one
    # Returns the tower of a section, given whether the model has QuickGELU. Raises InputError for
    # an option that we do not have.
    read: Callable[[Settings, bool], Any]
    write: Callable[[Any], dict[str, Any]]  # the section, without the tokenizer
    convention: Callable[[Any], Convention] = lambda tower: Convention()
    assumptions: Callable[[CLIPConfig], Assumptions] = lambda config: {}
    is_custom: bool = False  # whether open_clip needs the class with both towers apart


@dataclass(frozen=True, kw_only=True)
class DecoderFamily:
    """Caption decoders of one kind."""

    fits: Callable[[DecoderConfig], bool]
    # Returns the text tower and the decoder, given model_cfg, text_cfg, the text tower so far and
    # the path of the configuration; None: it has no such decoder.
    read: Callable[[Settings, Settings, TextConfig, Path], tuple[TextConfig, DecoderConfig] | None]
    write: Callable[[CLIPConfig], tuple[dict[str, Any], dict[str, Any]]]  # of model_cfg, text_cfg
    convention: Callable[[CLIPConfig], Convention]
    assumptions: Assumptions
    unverifiable: str = ""  # why no library has such a model


_GELUS: tuple[Activation, ...] = ("gelu", "gelu_tanh")
_ACTIVATIONS: tuple[Activation, ...] = ("quick_gelu", *_GELUS)


def _activation(section: Settings, quick_gelu: bool) -> Activation:
    options = section.get("act_kwargs", {}, dict)
    if quick_gelu and not options:
        return "quick_gelu"
    if not quick_gelu and options in ({}, {"approximate": "none"}):
        return "gelu"
    if not quick_gelu and options == {"approximate": "tanh"}:
        return "gelu_tanh"
    raise InputError(
        f"{section.where}.act_kwargs={options!r:.99} with quick_gelu={quick_gelu} is not supported."
    )


def _epsilon(section: Settings) -> float:
    options = section.get("norm_kwargs", {}, dict)
    if set(options) - {"eps"}:
        raise InputError(f"{section.where}.norm_kwargs={options!r:.99}: only eps is supported.")
    return number_of(options.get("eps", 1e-5), f"{section.where}.norm_kwargs.eps", True)


def _options(tower: ViTConfig | TextConfig) -> dict[str, Any]:
    """Return the settings of activation and norms: inverse of the two functions above."""
    options: dict[str, Any] = {}
    if tower.activation == "gelu_tanh":
        options["act_kwargs"] = {"approximate": "tanh"}
    if tower.norm_epsilon != 1e-5:
        options["norm_kwargs"] = {"eps": tower.norm_epsilon}
    return options


# ------------------------------------------------------------------ image towers of timm


def _read_timm(section: Settings, quick_gelu: bool) -> Vision:
    name = section.get("timm_model_name", "", str)
    head = section.get("timm_pool", "avg", str), section.values.get("timm_proj", "linear")
    section.used.add("timm_proj")
    tower = timm.tower(name, head, section.count("image_size", 224), section.where)
    if tower.max_patches is None:
        return tower
    return tower.with_max_patches(section.count("image_seq_len", tower.max_patches))


def _write_timm(vision: Vision) -> dict[str, Any]:
    pool, projection = timm.family_named(vision).head
    return {
        "image_size": vision.image_spec.side,
        "timm_model_name": timm.name_of(vision),
        "timm_model_pretrained": False,
        "timm_pool": pool,
        "timm_proj": projection,
    }


TIMM = TowerFamily(
    fits=lambda vision: timm.family_of(vision) is not None,
    describes=lambda section: section.get("timm_model_name", None, str) is not None,
    read=_read_timm,
    write=_write_timm,
    convention=lambda vision: timm.family_named(vision).convention,
    is_custom=True,
)


# ------------------------------------------------------------------ image towers of open_clip

_RESNET: Table = {"width": ("width", 64), "head_width": ("head_width", 64)}
_VIT: Table = {
    "width": ("width", 768), "head_width": ("head_width", 64), "patch_size": ("patch_size", 16),
    "mlp_ratio": ("mlp_ratio", 4.0),
}  # fmt: skip
_QUERIES: Table = {
    "attn_pooler_queries": ("pool_queries", 256), "attn_pooler_heads": ("pool_heads", 8),
}  # fmt: skip
_POOLS: dict[str, Any] = {"tok": "class_token", "avg": "mean", "avg_all": "mean_all"}


def _image_size(section: Settings) -> int:
    section.used |= {"timm_pool", "timm_proj"}
    size = section.get("image_size", 224, object)
    if isinstance(size, list):
        if len(size) != 2 or size[0] != size[1]:
            raise InputError(
                f"{section.where}.image_size={size!r:.99} is not supported: it must be square."
            )
        size = size[0]
    return count_of(size, f"{section.where}.image_size")


def _read_resnet(section: Settings, quick_gelu: bool) -> ResNetConfig:
    image_size, layers = _image_size(section), section.get("layers", [], list)
    section.used |= {"patch_size", "mlp_ratio"}
    if len(layers) != 4 or any(type(x) is not int or not 1 <= x <= 200 for x in layers):
        raise InputError(
            f"{section.where}.layers={layers!r:.99}: a ResNet needs four stages of 1 to 200 blocks."
        )
    stages = cast(tuple[int, int, int, int], tuple(layers))
    sizes = section.fields(_RESNET)
    heads = max(sizes["width"] * 32 // sizes.pop("head_width"), 1)
    return ResNetConfig(image_size=image_size, layers=stages, num_heads=heads, **sizes)


def _write_resnet(vision: ResNetConfig) -> dict[str, Any]:
    size, layers = vision.image_spec.side, list(vision.layers)
    sizes = by_table(_RESNET, vision)
    return {"image_size": size, "layers": layers, "patch_size": None, **sizes}


RESNET = TowerFamily(
    fits=lambda vision: isinstance(vision, ResNetConfig),
    describes=lambda section: isinstance(section.values.get("layers"), list),
    read=_read_resnet,
    write=_write_resnet,
)


def _read_vit(section: Settings, quick_gelu: bool) -> ViTConfig:
    image_size, layers = _image_size(section), section.get("layers", 12, object)
    pool = section.get("pool_type", "tok", str)
    ln_after = section.get("final_ln_after_pool", False, bool)
    queries = section.get("attentional_pool", False, object)
    if queries not in (False, True):
        raise InputError(
            f"{section.where}.attentional_pool={queries!r:.99} is not supported, since open_clip "
            "calls it untested; use true or false."
        )
    if pool not in _POOLS or (pool != "tok" and (queries or not ln_after)):
        raise InputError(
            f"{section.where}.pool_type={pool!r:.99} with final_ln_after_pool={ln_after} is not "
            "supported: clip_jax normalises after pooling."
        )
    scale = section.get("ls_init_value", None, object)
    sizes = section.fields(_VIT)
    return ViTConfig(
        image_size=image_size,
        depth=count_of(layers, f"{section.where}.layers"),
        num_heads=max(sizes["width"] // sizes.pop("head_width"), 1),
        **sizes,
        pool="queries" if queries else _POOLS[pool],
        **section.fields(_QUERIES),
        pre_norm=not section.get("no_ln_pre", False, bool),
        activation=_activation(section, quick_gelu),
        norm_epsilon=_epsilon(section),
        layer_scale=None if scale is None else number_of(scale, f"{section.where}.ls_init_value"),
    )


def _write_vit(vision: ViTConfig) -> dict[str, Any]:
    content: dict[str, Any] = {"image_size": vision.image_spec.side, "layers": vision.depth}
    content |= by_table(_VIT, vision) | _options(vision)
    if vision.layer_scale is not None:
        content["ls_init_value"] = vision.layer_scale
    if not vision.pre_norm:
        content["no_ln_pre"] = True
    if vision.pool == "queries":
        content |= {"attentional_pool": True, **by_table(_QUERIES, vision)}
    elif vision.pool != "class_token":
        names = {ours: theirs for theirs, ours in _POOLS.items()}
        content |= {"pool_type": names[vision.pool], "final_ln_after_pool": True}
    return content


def _vit_assumptions(config: CLIPConfig) -> Assumptions:
    activations = _ACTIVATIONS
    if text_family(config.text) is TRANSFORMER:  # open_clip has one setting for both towers
        is_quick = config.text.activation == "quick_gelu"
        activations = ("quick_gelu",) if is_quick else _GELUS
    return {
        "vision": (ViTConfig, ResNetConfig),
        "vision.activation": activations,
        "vision.pool": ("class_token", "mean"),
        "vision.class_token": True,
        "vision.patch_bias": False,
        "vision.projection": True,
        "vision.projection_bias": False,
        "vision.max_patches": None,
    }


VIT = TowerFamily(
    fits=lambda vision: True,  # the last kind, whose assumptions are in errors
    describes=lambda section: True,
    read=_read_vit,
    write=_write_vit,
    assumptions=_vit_assumptions,
)
IMAGE_TOWERS = (TIMM, RESNET, VIT)


def image_family(vision: Vision) -> TowerFamily:
    """Return the kind as which an image tower is written, if it can be written at all."""
    return next(family for family in IMAGE_TOWERS if family.fits(vision))


# ------------------------------------------------------------------ text towers

_TEXT: Table = {
    "context_length": ("context_length", 77), "vocab_size": ("vocab_size", FULL_VOCAB_SIZE),
    "width": ("width", 512), "layers": ("depth", 12), "heads": ("num_heads", 8),
    "mlp_ratio": ("mlp_ratio", 4.0),
}  # fmt: skip


def _read_text(section: Settings, quick_gelu: bool) -> TextConfig:
    pool = section.get("pool_type", "argmax", str)
    correct = section.get("correct_cls_mask", False, bool)
    is_coca = section.get("embed_cls", False, bool)
    eos = section.count("eos_id", 2)
    projection = section.get("proj_type", "linear", str)
    if pool not in ("argmax", "eos", "last") or projection not in ("linear", "none"):
        raise InputError(
            f"{section.where}: pool_type={pool!r:.99} with proj_type="
            f"{projection!r:.99} is not supported."
        )
    return TextConfig(
        **section.fields(_TEXT),
        causal=not section.get("no_causal_mask", False, bool),
        pool="class_token" if is_coca else pool,
        correct_class_mask=correct or not is_coca,
        eos_token_id=eos if pool == "eos" else TextConfig.eos_token_id,
        projection=projection == "linear",
        projection_bias=section.get("proj_bias", False, bool) and projection == "linear",
        activation=_activation(section, quick_gelu),
        norm_epsilon=_epsilon(section),
    )


def _write_text(text: TextConfig) -> dict[str, Any]:
    options = {
        "no_causal_mask": None if text.causal else True,
        "pool_type": text.pool if text.pool != "argmax" else None,
        "eos_id": text.eos_token_id if text.pool == "eos" else None,
        "pad_id": text.tokenizer.pad_id or None if text.pool == "class_token" else None,
        "proj_type": None if text.projection else "none",
        "proj_bias": text.projection_bias or None,
    }
    content = {**by_table(_TEXT, text), **_options(text)}
    return content | {name: value for name, value in options.items() if value is not None}


def _text_assumptions(config: CLIPConfig) -> Assumptions:
    return {
        "text": (TextConfig, BertConfig),
        "text.pool": ("argmax", "eos", "last"),
        "text.activation": _ACTIVATIONS,
    }


def _text_convention(text: TextConfig) -> Convention:
    if not text.projection_bias:
        return Convention()
    return Convention(
        names=(
            (r"text_projection$", "text_projection/weight"),
            (r"text_projection_bias$", "text_projection/bias"),
        ),
        axes=((r"text_projection$", "E D -> D E"),),
    )


BERT = TowerFamily(
    fits=lambda text: isinstance(text, BertConfig),
    describes=lambda section: bool(section.get("hf_model_name", None, str)),
    read=lambda section, quick_gelu: bert.read_open_clip(section),
    write=bert.write_open_clip,
    convention=bert.open_clip_convention,
    assumptions=lambda config: {"text.head": ("linear", "mlp")},
    is_custom=True,
)
TRANSFORMER = TowerFamily(
    fits=lambda text: True,  # the last kind, whose assumptions are in errors
    describes=lambda section: True,
    read=_read_text,
    write=_write_text,
    convention=_text_convention,
    assumptions=_text_assumptions,
)
TEXT_TOWERS = (BERT, TRANSFORMER)


def text_family(text: Text) -> TowerFamily:
    """Return the kind as which a text tower is written, if it can be written at all."""
    return next(family for family in TEXT_TOWERS if family.fits(text))


# ------------------------------------------------------------------ caption decoders

_COCA: Table = {"layers": ("depth", 12), "heads": ("num_heads", 8)}
# Settings of multimodal_cfg that open_clip ignores.
_UNREAD = {
    "context_length",
    "vocab_size",
    "mlp_ratio",
    "dim_head",
    "n_queries",
    "attn_pooler_heads",
    "output_tokens",
}
DECODERS_TEXT: Assumptions = {  # of the text tower of any decoder
    "text.norm_epsilon": 1e-5,
    "text.mlp_ratio": 4.0,
    "text.activation": ("quick_gelu", "gelu"),
}
_POOL = Convention(
    names=(
        (r"attn_pool/attn/q/kernel", "attn_pool/attn/q_proj_weight"),
        (r"attn_pool/attn/kv/kernel", "attn_pool/attn/[k,v]_proj_weight"),
    ),
)


def _decoder_convention(config: CLIPConfig, vocabulary: str, blocks: int = 1) -> Convention:
    """Return the names, given that of the map to token ids, and text blocks per layer."""
    decoder = Convention(
        names=(
            (r"^text/class_embedding", "text/cls_emb"),
            (r"^decoder/image_projection", "map_viz2txt_kv"),
            (r"^decoder/vocab", vocabulary),
            (r"^decoder/", "text_decoder/"),
            (r"/transformer/layers/self_(\d+)/", rf"/resblocks.{{\1:{blocks}}}/"),
            (r"/transformer/layers/cross/", "/cross_attn/{}/"),
        ),
    )
    # If all widths are the same, the attentional pool's projections are one tensor.
    is_fused = cast(ViTConfig, config.vision).width == config.embed_dim
    return decoder if is_fused else _POOL + decoder


def _read_mammut(
    top: Settings, section: Settings, text: TextConfig, path: Path
) -> tuple[TextConfig, MaMMUTConfig] | None:
    if not section.get("does_full_decoding", False, bool):
        return None
    decoder = MaMMUTConfig(
        cross_every=section.count("cross_attn_ratio", 1),
        first_mlp=section.get("has_mlp", True, bool),
    )
    return replace(text, causal=False, pool="mean", projection=False), decoder


def _write_mammut(config: CLIPConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    decoder = cast(MaMMUTConfig, config.decoder)
    return {}, {
        "does_full_decoding": True,
        "cross_attn_ratio": decoder.cross_every,
        "has_mlp": decoder.first_mlp,
    }


def _mammut_convention(config: CLIPConfig) -> Convention:
    blocks = cast(MaMMUTConfig, config.decoder).cross_every
    return _decoder_convention(config, "text/text", blocks)


MAMMUT = DecoderFamily(
    fits=lambda decoder: isinstance(decoder, MaMMUTConfig),
    read=_read_mammut,
    write=_write_mammut,
    convention=_mammut_convention,
    assumptions={
        "vision.pool": "mean_all",
        "text.correct_class_mask": (True, False),
        "text.pool": "mean",
        "text.projection": False,
        "text.projection_bias": False,
        "text.causal": False,
        **DECODERS_TEXT,
    },
    unverifiable="only LAION's fork of open_clip has MaMMUT, and no package has the fork",
)


def _read_coca(
    top: Settings, section: Settings, text: TextConfig, path: Path
) -> tuple[TextConfig, CoCaConfig] | None:
    """Read `multimodal_cfg`. Raises InputError if the decoder does not fit the text tower."""
    settings = top.get("multimodal_cfg", None, dict)
    if not settings:
        return None
    multimodal = Settings(settings, f"{path}: multimodal_cfg", _UNREAD)
    width = multimodal.count("width", 512)
    if width != text.width:
        raise InputError(
            f"{multimodal.where}.width={width} must equal text_cfg.width={text.width}, since the "
            "decoder takes those states."
        )
    decoder = CoCaConfig(**multimodal.fields(_COCA))
    multimodal.finish()
    return text, decoder


def _write_coca(config: CLIPConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    text = config.text
    multimodal = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        **by_table(_COCA, config.decoder),
    }
    return {"multimodal_cfg": multimodal}, {"embed_cls": True}


COCA = DecoderFamily(
    fits=lambda decoder: isinstance(decoder, CoCaConfig),
    read=_read_coca,
    write=_write_coca,
    convention=lambda config: _decoder_convention(config, "text_decoder/text"),
    assumptions={
        "decoder.mlp_ratio": 4.0,
        "vision.pool": ("queries", "class_token"),
        "text.correct_class_mask": False,
        "text.pool": "class_token",
        "text.projection": True,
        "text.projection_bias": False,
        "text.causal": True,
        **DECODERS_TEXT,
    },
)
DECODERS = (MAMMUT, COCA)


def decoder_family(decoder: DecoderConfig) -> DecoderFamily:
    """Return the kind of a caption decoder. Raises InputError if open_clip has none like it."""
    for family in DECODERS:
        if family.fits(decoder):
            return family
    raise InputError(
        f"open_clip has no decoder like {type(decoder).__name__}; keep this project's model folder."
    )
