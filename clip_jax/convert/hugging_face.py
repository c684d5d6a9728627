"""Hugging Face's format: a folder for a model and a processor of transformers.

`CLIPModel` and `MetaClip2Model` differ in the end of text: MetaCLIP 2 uses the configured id; in
CLIP, id 2 means the highest id. `SiglipModel` is for SigLIP and fixed-resolution SigLIP 2,
`Siglip2Model` for SigLIP 2 of native aspect ratios (NaFlex). `AltCLIPModel` and `ChineseCLIPModel`
have CLIP's image tower and the text tower of `bert`; `Tipsv2Model` is in `tips`. One tower of a
CLIP alone is a `CLIPVisionModelWithProjection` or a `CLIPTextModelWithProjection`.
"""

import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.convert import bert, image_processor, tips, tokenizer_files, verify
from clip_jax.convert.settings import Settings, Table, by_table, count_of, read_json, write_json
from clip_jax.convert.state_dict import (
    TORCH,
    Convention,
    Row,
    check_floating,
    from_params,
    table,
    to_params,
)
from clip_jax.convert.target import Assumptions, Target, check_assumptions, fixed, rounded
from clip_jax.convert.tensor_files import read_tensors, write_safetensors
from clip_jax.convert.weights import DType, Weights, cast, mlp_ratio, square_side
from clip_jax.errors import InputError, naming
from clip_jax.models.bert import BertConfig
from clip_jax.models.clip import CLIPConfig, Params
from clip_jax.models.images import NaFlex, Patches
from clip_jax.models.layers import Activation
from clip_jax.models.text import Cleaning, TextConfig, TokenizerConfig
from clip_jax.models.tips import TipsConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.optim.wrappers import TOWERS, Tower

WEIGHTS_NAME = "model.safetensors"
_WEIGHTS_NAMES = (
    WEIGHTS_NAME,
    f"{WEIGHTS_NAME}.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_POSITION_IDS = ("embeddings.position_ids", "embeddings.token_type_ids")  # buffers of old files
_ACTIVATIONS: dict[str, Activation] = {  # of several names for ours, the last is written
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_CLEANING: dict[str, Cleaning] = {"siglip": "punctuation", "siglip2": "lower"}  # of texts
_LEGACY_EOS = 2  # a wrong id in old configurations; Hugging Face reads it as "argmax"

# ------------------------------------------------------------------ names of tensors

_TEXT_HEAD = "text_model.head"
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
_SIGLIP = Convention(axes=((r"^logit_", "1 -> "),))
_NAFLEX = Convention(axes=((r"^visual/conv1/kernel$", "D (P Q C) -> P Q C D"),))  # a linear layer


def _is_naflex(config: CLIPConfig) -> bool:
    return isinstance(config.vision.image_spec, NaFlex)


def rows(config: CLIPConfig) -> list[Row]:
    """Return the table of parameters."""
    if isinstance(config.vision, TipsConfig):
        return table(config, tips.CONVENTION)
    if isinstance(config.text, BertConfig):
        model_class = bert.CLASSES[bert.class_of(config.text)]
        return table(config, model_class.convention + _TOWERS + TORCH)
    towers, projection = _TOWERS, "text_projection/"
    if config.vision.has_map_head:
        towers, projection = _TOWERS + _SIGLIP, "text/head/"
        if _is_naflex(config):
            towers += _NAFLEX
    text = Convention(
        names=(
            (r"^text/text_projection$", f"{projection}weight"),
            (r"^text/text_projection_bias$", f"{projection}bias"),
            (r"^text/", "text_model/"),
        ),
    )
    return table(config, towers + text + TORCH)


# ------------------------------------------------------------------ settings

_IMAGE: Table = {
    "image_size": ("image_size", 224), "patch_size": ("patch_size", 32),
    "hidden_size": ("width", 768), "intermediate_size": ("mlp_width", 3072),
    "num_hidden_layers": ("depth", 12), "num_attention_heads": ("num_heads", 12),
    "layer_norm_eps": ("norm_epsilon", 1e-5),
}  # fmt: skip
_TEXT: Table = {
    "vocab_size": ("vocab_size", 49_408), "max_position_embeddings": ("context_length", 77),
    "hidden_size": ("width", 512), "intermediate_size": ("mlp_width", 2048),
    "num_hidden_layers": ("depth", 12), "num_attention_heads": ("num_heads", 8),
    "layer_norm_eps": ("norm_epsilon", 1e-5),
}  # fmt: skip
_SIGLIP_IMAGE: Table = {
    **_IMAGE, "patch_size": ("patch_size", 16), "layer_norm_eps": ("norm_epsilon", 1e-6),
}  # fmt: skip
_NAFLEX_IMAGE = {name: row for name, row in _SIGLIP_IMAGE.items() if name != "image_size"}
_SIGLIP_TEXT: Table = {
    **_TEXT,
    "vocab_size": ("vocab_size", 32_000), "max_position_embeddings": ("context_length", 64),
    "hidden_size": ("width", 768), "intermediate_size": ("mlp_width", 3072),
    "num_attention_heads": ("num_heads", 12), "layer_norm_eps": ("norm_epsilon", 1e-6),
}  # fmt: skip

CLIP_ASSUMPTIONS: Assumptions = {
    "vision": ViTConfig,
    "text": TextConfig,
    "vision.activation": tuple(_ACTIVATIONS.values()),
    "text.activation": tuple(_ACTIVATIONS.values()),
    "vision.max_patches": None,
    "decoder": None,
    "has_logit_bias": False,
    "vision.pool": "class_token",
    "vision.pre_norm": True,
    "vision.patch_bias": False,
    "vision.projection": True,
    "vision.projection_bias": False,
    "vision.layer_scale": None,
    "text.causal": True,
    "text.pool": ("argmax", "eos"),
    "text.projection": True,
    "text.projection_bias": False,
    "preprocess.resize_mode": ("shortest", "squash"),
}
SIGLIP_ASSUMPTIONS: Assumptions = {  # also big_vision's
    "vision": ViTConfig,
    "text": TextConfig,
    "decoder": None,
    "has_logit_bias": True,
    "vision.pool": "map",
    "vision.class_token": False,
    "vision.pre_norm": False,
    "vision.patch_bias": True,
    "vision.projection": False,
    "vision.layer_scale": None,
    "text.causal": False,
    "text.pool": "last",
    "vision.activation": tuple(_ACTIVATIONS.values()),
    "text.activation": tuple(_ACTIVATIONS.values()),
    "preprocess.resize_mode": ("shortest", "squash"),
}


def check_siglip(weights: Weights, name: str, more: Assumptions) -> None:
    """Raise InputError if a SigLIP implementation called `name` cannot express the model."""
    assumptions = {
        **SIGLIP_ASSUMPTIONS,
        "text.projection_bias": weights.config.text.projection,
        **more,
    }
    if _is_naflex(weights.config):
        assumptions["preprocess.resize_mode"] = "naflex"
    check_assumptions(weights, name, assumptions)


def _sections(content: dict[str, Any], source: str) -> tuple[Settings, Settings]:
    """Return the settings of both towers; in old files, `…_dict` replaces the tower's section."""
    sections = []
    for tower in ("vision_config", "text_config"):
        name = tower if content.get(f"{tower}_dict") is None else f"{tower}_dict"
        section = Settings(content.get(name) or {}, f"{source}: {name}")
        if (channels := section.count("num_channels", 3)) != 3:
            raise InputError(
                f"{section.where}.num_channels={channels} is not supported; it must be 3."
            )
        sections.append(section)
    return sections[0], sections[1]


def _tower(section: Settings, table: Table, activation: str) -> dict[str, Any]:
    fields = section.fields(table)
    name = section.get("hidden_act", activation, object)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise InputError(f"{section.where}.hidden_act={name!r:.99} is none of {[*_ACTIVATIONS]}.")
    ratio = mlp_ratio(fields["width"], fields.pop("mlp_width"))
    return {**fields, "mlp_ratio": ratio, "activation": _ACTIVATIONS[name]}


def _read_clip(content: dict[str, Any], source: str) -> CLIPConfig:
    sections = _sections(content, source)
    embed_dim = count_of(content.get("projection_dim", 512), f"{source}: projection_dim")
    vision = _tower(sections[0], _IMAGE, "quick_gelu")
    if kind := bert.CLASSES.get(content["model_type"]):
        text = _tower(sections[1], kind.table, "gelu")
        needed = {"project_dim": embed_dim, "pad_token_id": kind.text.first_position - 1}
        for name, value in needed.items() if kind.text.head == "norm" else ():
            if (other := sections[1].get(name, value, int)) != value:
                raise InputError(
                    f"{source}: text_config.{name}={other} is not supported; it must be {value}."
                )
        length = min(kind.text.context_length, text["num_positions"] - kind.text.first_position)
        tower = replace(kind.text, **text, context_length=length)
        tower = replace(tower, tokenizer=bert.ids(sections[1], tower))
        return CLIPConfig(embed_dim=embed_dim, vision=ViTConfig(**vision), text=tower)
    text = _tower(sections[1], _TEXT, "quick_gelu")
    eos = sections[1].count("eos_token_id", 49_407)
    # An end of text with the highest id is also that of argmax.
    argmax = content["model_type"] == "clip" and eos in (_LEGACY_EOS, text["vocab_size"] - 1)
    return CLIPConfig(
        embed_dim=embed_dim,
        vision=ViTConfig(**vision),
        text=TextConfig(
            **text,
            pool="argmax" if argmax else "eos",
            eos_token_id=TextConfig.eos_token_id if argmax else eos,
        ),
    )


def _read_siglip(content: dict[str, Any], source: str) -> CLIPConfig:
    sections = _sections(content, source)
    naflex = content["model_type"] == "siglip2"
    table = _NAFLEX_IMAGE if naflex else _SIGLIP_IMAGE
    vision = _tower(sections[0], table, "gelu_pytorch_tanh")
    if naflex:
        patches = sections[0].count("num_patches", 256)
        side = square_side(patches, "num_patches", sections[0].where)
        vision |= {"image_size": side * vision["patch_size"], "max_patches": patches}
    text = _tower(sections[1], _SIGLIP_TEXT, "gelu_pytorch_tanh")
    projected = sections[1].count("projection_size", text["width"])
    has_head = sections[0].get("vision_use_head", True, object)
    if not has_head or projected != vision["width"]:
        raise InputError(
            f"{source}: vision_use_head={has_head!r:.99} with projection_size={projected} for "
            f"images of {vision['width']} is not supported: both embeddings need the same width."
        )
    return CLIPConfig(
        embed_dim=vision["width"],
        vision=ViTConfig(**vision, **fixed(SIGLIP_ASSUMPTIONS, "vision")),
        text=TextConfig(**text, **fixed(SIGLIP_ASSUMPTIONS, "text"), projection_bias=True),
        init_logit_scale=10.0,
        init_logit_bias=-10.0,
    )


def config_json(weights: Weights, dtype: str) -> dict[str, Any]:
    """Return the content of `config.json`."""
    config, text = weights.config, weights.config.text
    if isinstance(config.vision, TipsConfig):
        return {
            "architectures": ["Tipsv2Model"],
            "model_type": tips.MODEL_TYPE,
            "dtype": dtype,
            "vision_config": by_table(tips.IMAGE, config.vision),
            "text_config": by_table(tips.TEXT, text),
        }
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    vision_config = by_table(_IMAGE, config.vision)
    vision_config["hidden_act"] = names[typing.cast(Activation, config.vision.activation)]
    is_bert = isinstance(text, BertConfig)
    own = bert.settings(text, config.embed_dim) if is_bert else by_table(_TEXT, text)
    text_config = {**own, "hidden_act": names[text.activation]}
    top: dict[str, Any] = {}
    if config.vision.has_map_head:
        kind, model_type = "Siglip", "siglip"
        if _is_naflex(config):
            kind, model_type = "Siglip2", "siglip2"
            del vision_config["image_size"]
            vision_config["num_patches"] = typing.cast(ViTConfig, config.vision).grid ** 2
        text_config["projection_size"] = config.embed_dim
    else:
        is_metaclip = text.pool == "eos" and text.tokenizer.file != "clip"
        kind, model_type = ("MetaClip2", "metaclip_2") if is_metaclip else ("CLIP", "clip")
        if is_bert:
            model_type = bert.class_of(text)
            kind = bert.CLASSES[model_type].name.removesuffix("Model")
        else:
            text_config["eos_token_id"] = eos = text.end_of_text_id
        if kind == "CLIP":
            text_config |= {"bos_token_id": eos - 1, "pad_token_id": eos}
        top = {"projection_dim": config.embed_dim, "logit_scale_init_value": 2.6592}
        for section in (vision_config, text_config):
            section["projection_dim"] = config.embed_dim
    if only := weights.only_tower:
        name, content = {"image": ("Vision", vision_config), "text": ("Text", text_config)}[only]
        return {
            "architectures": [f"CLIP{name}ModelWithProjection"],
            "dtype": dtype,
            "model_type": f"clip_{name.lower()}_model",
            **content,
        }
    return {
        "architectures": [f"{kind}Model"],
        "model_type": model_type,
        "dtype": dtype,
        **top,
        "vision_config": {"model_type": f"{model_type}_vision_model", **vision_config},
        "text_config": {"model_type": f"{model_type}_text_model", **text_config},
    }


# ------------------------------------------------------------------ folders


def read(folder: Path) -> Weights:
    """Read a folder. Raises InputError, which names what is missing or not supported."""
    path = folder / "config.json"
    content = read_json(path)
    kind = str(content.get("model_type"))
    only, field, projection = _ALONE.get(kind, (None, "", ""))
    if kind not in _MODEL_TYPES and only is None:
        known = ", ".join(f"{name} ({kind!r})" for kind, name in _MODEL_TYPES.items())
        raise InputError(
            f"{path} has model_type={kind!r:.99}; supported are Hugging Face's {known}."
        )
    file = next((folder / n for n in _WEIGHTS_NAMES if (folder / n).exists()), None)
    if file is None:
        raise InputError(f"{folder} has none of {', '.join(_WEIGHTS_NAMES)}; add the weights.")
    tensors = {n: x for n, x in read_tensors(file).items() if not n.endswith(_POSITION_IDS)}
    if only is not None:
        kind, size = "clip", content.get("projection_dim", 512)
        content = {"model_type": kind, f"{field}_config": content, "projection_dim": size}
        own = (f"{field}_model.", projection)  # without projection, names may have no prefix
        tensors = {n if n.startswith(own) else f"{own[0]}{n}": x for n, x in tensors.items()}
    with naming(path):
        if kind == tips.MODEL_TYPE:
            config = tips.read(*_sections(content, str(path)))
        else:
            config = (_read_siglip if "siglip" in kind else _read_clip)(content, str(path))
    if only is not None and f"{projection}.weight" not in tensors:
        tower = replace(getattr(config, field), projection=False)
        config = replace(config, embed_dim=tower.width, **{field: tower})
    if kind == tips.MODEL_TYPE:
        check_floating(tensors, str(file))
        initial = Settings(content, str(path)).number("temperature_init_value", tips.INITIAL)
        tensors = tips.from_file(tensors, initial)
    if kind == "altclip":  # transformers 5 writes another name than it did before
        old = "vision_model.encoder.layer."
        tensors = {n.replace(old, "vision_model.encoder.layers."): x for n, x in tensors.items()}
    vision = typing.cast(ViTConfig, config.vision)
    patch_size = vision.patch_size if vision.max_patches else None
    own = {"siglip": "Siglip", "siglip2": "Siglip2", tips.MODEL_TYPE: "Tipsv2"}.get(kind, "CLIP")
    preprocess = image_processor.read(folder, vision.image_size, own, patch_size)
    if isinstance(config.text, BertConfig):
        length = bert.context_length(folder, config.text)
        config = replace(config, text=replace(config.text, context_length=length))
    default = (
        TokenizerConfig(file="", clean="none") if kind == tips.MODEL_TYPE else TokenizerConfig()
    )
    if isinstance(config.text, BertConfig):
        default = config.text.tokenizer
    elif kind not in ("clip", tips.MODEL_TYPE):
        cleaning: Cleaning = _CLEANING.get(kind, "none")
        default = tokenizer_files.missing(config.text, cleaning)
    config = replace(
        config,
        vision=replace(vision, max_patches=preprocess.max_patches),
        text=replace(config.text, tokenizer=tokenizer_files.read(folder, config.text, default)),
        image_mean=preprocess.mean,
        image_std=preprocess.std,
    )
    params = to_params(_rows_of(config, only), tensors, config, str(file))
    return Weights(config=config, params=params, preprocess=preprocess, only_tower=only)


# Classes of transformers with one tower of a CLIP: our tower and field, and the projection's name.
_ALONE: dict[str, tuple[Tower, str, str]] = {
    "clip_vision_model": ("image", "vision", "visual_projection"),
    "clip_text_model": ("text", "text", "text_projection"),
}


def _rows_of(config: CLIPConfig, tower: Tower | None) -> list[Row]:
    """Return the table of one tower alone, or (None) of the model."""
    return [row for row in rows(config) if not tower or row.ours.startswith(f"{TOWERS[tower]}/")]


_MODEL_TYPES = {
    "clip": "CLIPModel",
    "metaclip_2": "MetaClip2Model",
    "siglip": "SiglipModel",
    "siglip2": "Siglip2Model",
    tips.MODEL_TYPE: "Tipsv2Model",
    **{kind: each.name for kind, each in bert.CLASSES.items()},
}


def check(weights: Weights) -> None:
    """Raise InputError if transformers' model and processor cannot express the model."""
    advice = ""
    if isinstance(weights.config.vision, TipsConfig):
        check_assumptions(weights, "Hugging Face's Tipsv2Model", tips.ASSUMPTIONS, advice)
    elif isinstance(weights.config.text, BertConfig):
        kind = bert.CLASSES[bert.class_of(weights.config.text)]
        image = {name: x for name, x in CLIP_ASSUMPTIONS.items() if not name.startswith("text")}
        check_assumptions(weights, f"Hugging Face's {kind.name}", image, advice)
    elif weights.config.vision.has_map_head:
        name = "Siglip2Model" if _is_naflex(weights.config) else "SiglipModel"
        check_siglip(weights, f"Hugging Face's {name}", {})
    else:
        more: Assumptions = {}
        if weights.only_tower:
            advice = "one tower alone can start a run, too, by --init-from and --init-towers."
            if weights.only_tower == "text" and weights.config.text.eos_token_id == _LEGACY_EOS:
                more = {"text.pool": "argmax"}  # as CLIPTextModel pools with such an id
        check_assumptions(weights, "Hugging Face's CLIPModel", CLIP_ASSUMPTIONS | more, advice)
        return
    if weights.only_tower:
        raise InputError("--tower is supported for CLIP alone, whose towers have classes.")


def write(weights: Weights, folder: Path, *, dtype: DType | None = None) -> None:
    """Write all files that transformers' model and processor need offline. See `check`."""
    check(weights)
    config, only = weights.config, weights.only_tower
    tensors = from_params(_rows_of(config, only), weights.params)
    if isinstance(config.vision, TipsConfig):
        tensors = tips.to_file(tensors)
    elif not config.text.projection:  # SiglipModel always has a projection: write the identity
        kind, width = tensors["text_model.final_layer_norm.weight"].dtype, config.text.width
        tensors[f"{_TEXT_HEAD}.weight"] = np.eye(width, dtype=kind)
        tensors[f"{_TEXT_HEAD}.bias"] = np.zeros(width, kind)
    tensors = {n: x if n == tips.TEMPERATURE else cast(x, dtype) for n, x in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    kind = next(x for n, x in sorted(tensors.items()) if x.ndim > 1).dtype.name
    write_json(folder / "config.json", config_json(weights, kind))
    if only != "text":
        own = "Siglip" if config.vision.has_map_head else "CLIP"
        own = "Tipsv2" if isinstance(config.vision, TipsConfig) else own
        image_processor.write(folder, weights.preprocess, own)
    if only != "image":
        tokenizer_files.write(folder, config.text)


def _rounded(weights: Weights, dtype: DType | None) -> Params:
    """Return the parameters in a file; TIPSv2's temperature is never rounded."""
    params = rounded(weights, dtype)
    is_tips = isinstance(weights.config.vision, TipsConfig)
    return params | {"logit_scale": weights.params["logit_scale"]} if is_tips else params


def outputs(
    weights: Weights, path: Path, inputs: verify.Inputs, adapt: Any = lambda model: model
) -> verify.Outputs:
    """Return the outputs of the model in a folder, as `adapt` changes it."""
    with verify.library("transformers", "transformers"):
        import torch
        import transformers

        if only := weights.only_tower:
            kind = getattr(transformers, read_json(path / "config.json")["architectures"][0])
            of_tower = verify.torch_inputs(inputs)[only == "text"]
            with torch.no_grad():
                features = kind.from_pretrained(path)(of_tower)[f"{only}_embeds"]
            return {f"{only}_features": features.numpy()}

        # In float32 from the start: buffers, too, would be rounded.
        options = {"local_files_only": True, "dtype": torch.float32}
        model = transformers.AutoModel.from_pretrained(path, **options)
        model = adapt(model).eval().float()

        def encode_image(images: Any) -> Any:
            if not isinstance(images, Patches):
                return model.get_image_features(pixel_values=images).pooler_output
            valid = torch.arange(images.pixels.shape[1]) < images.length[:, None]
            return model.get_image_features(
                pixel_values=images.pixels,
                pixel_attention_mask=valid.int(),
                spatial_shapes=images.grid.long(),
            ).pooler_output

        def encode_text(ids: Any) -> Any:
            text = weights.config.text
            mask = (ids != text.tokenizer.pad_id).long() if text.masks_padding else None
            return model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output

        if hasattr(model, "temperature"):
            model.logit_scale = -model.temperature.log()
        return verify.torch_outputs(encode_image, encode_text, model, inputs)


TARGET = Target(
    write=write,
    reference="transformers",
    outputs=outputs,
    rounded=_rounded,
    check=check,
    names=("config.json", WEIGHTS_NAME, image_processor.PROCESSOR_NAME),
    use="`transformers.AutoModel.from_pretrained(FOLDER)`, and `AutoProcessor`. Of a NaFlex model, "
    "`AutoImageProcessor` and `AutoTokenizer`: `AutoProcessor` always makes 256 patches of 16 "
    "pixels (transformers 5.24).",
)
