"""Text towers BERT, RoBERTa and XLM-RoBERTa, in open_clip and in AltCLIP and ChineseCLIP."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from clip_jax.convert import hugging_face_clip, hugging_face_family
from clip_jax.convert.hugging_face_family import IMAGE, Family
from clip_jax.convert.settings import Settings, Table, by_table, count_of, read_json
from clip_jax.convert.state_dict import Convention
from clip_jax.convert.target import Assumptions, Inexpressible
from clip_jax.convert.tensor_files import Tensors
from clip_jax.convert.tokenizer_files import missing
from clip_jax.convert.tokenizer_settings import CONFIG_NAME
from clip_jax.errors import InputError
from clip_jax.models import zoo
from clip_jax.models.bert import BertConfig
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.text import TokenizerConfig
from clip_jax.models.vit import ViTConfig

# ------------------------------------------------------------------ names of tensors

_TOWER = Convention(
    names=(
        (r"^text/token_embedding$", "text/embeddings/word_embeddings/weight"),
        (r"^text/positional_embedding$", "text/embeddings/position_embeddings/weight"),
        (r"^text/type_embedding$", "text/embeddings/token_type_embeddings/weight"),
        (r"^text/ln_pre/", "text/embeddings/LayerNorm/"),
        (r"^text/transformer/resblocks/", "text/encoder/layer/{}/"),
        (r"^(text/.*)/attn/in_proj/", r"\1/attention/self/[query,key,value]/"),
        (r"^(text/.*)/attn/out_proj/", r"\1/attention/output/dense/"),
        (r"^(text/.*)/ln_1/", r"\1/attention/output/LayerNorm/"),
        (r"^(text/.*)/mlp/c_fc/", r"\1/intermediate/dense/"),
        (r"^(text/.*)/mlp/c_proj/", r"\1/output/dense/"),
        (r"^(text/.*)/ln_2/", r"\1/output/LayerNorm/"),
    ),
    axes=((r"^text/(text_projection|projection_hidden/kernel)$", "E D -> D E"),),
)
_CLASSES = Convention(
    names=(
        (r"^text/text_projection$", "text_projection/weight"),
        (r"^text/ln_final/", "text_model/pre_LN/"),
        (r"^text/projection_hidden/", "text_model/transformation/"),
    ),
)


def open_clip_convention(text: BertConfig) -> Convention:
    """Return open_clip's names, without the tower's prefix."""
    last = "proj/2" if text.head == "mlp" else "proj"
    return _TOWER + Convention(
        names=(
            (r"^text/text_projection$", f"text/{last}/weight"),
            (r"^text/projection_hidden/", "text/proj/0/"),
            (r"^text/(embeddings|encoder)/", r"text/transformer/\1/"),
        ),
    )


# ------------------------------------------------------------------ open_clip: models by name


def _text(name: str, **changes: Any) -> BertConfig:
    return replace(cast(BertConfig, zoo.get(name).text), **changes)


KNOWN = {
    "roberta-base": _text("roberta-ViT-B-32"),
    "roberta-large": _text("xlm-roberta-large-ViT-H-14", vocab_size=50_265),
    "xlm-roberta-base": _text("xlm-roberta-base-ViT-B-32"),
    "xlm-roberta-large": _text("xlm-roberta-large-ViT-H-14"),
}
_OTHERS = {
    "google/mt5-": "mT5, an encoder with relative positions",
    "facebook/nllb-": "NLLB, the encoder of a translation model",
}
_POOLERS = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "first"}


def read_open_clip(section: Settings) -> BertConfig:
    """Read a text tower that open_clip builds with transformers. Raises InputError for others."""
    name = section.get("hf_model_name", "", str)
    text = KNOWN.get(name.removeprefix("FacebookAI/"))
    pooler = section.get("hf_pooler_type", "mean_pooler", str)
    head = section.get("hf_proj_type", "mlp", str)
    if text is None or pooler not in _POOLERS or head not in ("linear", "mlp"):
        kinds = (kind for start, kind in _OTHERS.items() if name.startswith(start))
        why = next((f": clip_jax has no {kind}" for kind in kinds), "")
        raise InputError(
            f"{section.where}: hf_model_name={name!r:.99}, hf_pooler_type={pooler!r:.99}, "
            f"hf_proj_type={head!r:.99} is not supported{why}; supported are {', '.join(KNOWN)}, "
            f"with {' or '.join(_POOLERS)}, and linear or mlp."
        )
    length = section.count("context_length", 77)
    return replace(text, context_length=length, pool=_POOLERS[pooler], head=head)


def write_open_clip(text: BertConfig) -> dict[str, Any]:
    """Return open_clip's settings. Raises Inexpressible if no published model has the sizes."""
    free = {x: getattr(text, x) for x in ("context_length", "pool", "head", "tokenizer")}
    name = next((name for name, tower in KNOWN.items() if replace(tower, **free) == text), None)
    if name is None:
        raise Inexpressible(
            "open_clip builds BERT only by the names of published models, and no one has "
            f"text.width={text.width}, text.depth={text.depth}, text.vocab_size={text.vocab_size} "
            f"and the other settings of this one (known are {', '.join(KNOWN)})"
        )
    poolers = {ours: theirs for theirs, ours in _POOLERS.items()}
    tokenizer = {} if text.tokenizer.file else {"hf_tokenizer_name": name}
    return {
        "hf_model_name": name,
        "hf_proj_type": text.head,
        "hf_pooler_type": poolers[text.pool],
        "hf_model_pretrained": False,
        "context_length": text.context_length,
        **tokenizer,
    }


# ------------------------------------------------------------------ transformers' own classes

_SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "num_positions",
    "type_vocab_size": "token_types",
    "layer_norm_eps": "norm_epsilon",
}
_FIXED = ("head", "pool", "first_position")  # fields in which a class has no other values


def _table(default: BertConfig) -> Table:
    return {theirs: (ours, getattr(default, ours)) for theirs, ours in _SETTINGS.items()}


def _read(content: dict[str, Any], path: Path, default: BertConfig) -> CLIPConfig:
    image, words = hugging_face_family.sections(content, path)
    width = 768 if default.head == "norm" else 512  # the defaults of transformers' two classes
    embed_dim = count_of(content.get("projection_dim", width), f"{path}: projection_dim")
    vision = hugging_face_family.tower_fields(image, IMAGE, "quick_gelu")
    fields = hugging_face_family.tower_fields(words, _table(default), "gelu")
    needed = {"project_dim": embed_dim, "pad_token_id": default.first_position - 1}
    for name, value in needed.items() if default.head == "norm" else ():
        if (other := words.get(name, value, int)) != value:
            raise InputError(
                f"{path}: text_config.{name}={other} is not supported; it must be {value}."
            )
    lengths = [default.context_length, fields["num_positions"] - default.first_position]
    text = replace(default, **fields, context_length=min(lengths + _longest(path.parent)))
    text = replace(text, tokenizer=ids(words, text))
    return CLIPConfig(embed_dim=embed_dim, vision=ViTConfig(**vision), text=text)


def ids(section: Settings, text: BertConfig) -> TokenizerConfig:
    """Return the rules of a vocabulary without files, by the special ids in `text_config`.

    Raises InputError for an id that is not in the vocabulary.
    """
    rules = missing(text, "none")
    numbers = {"pad_token_id": section.values.get("pad_token_id", max(text.first_position - 1, 0))}
    names = {"pad_token_id": "pad_id"}
    if text.head == "norm" or section.values.get("eos_token_id") is not None:
        numbers["bos_token_id"] = section.values.get("bos_token_id", 0)
        numbers["eos_token_id"] = section.values.get("eos_token_id", 2)
        names |= {"bos_token_id": "begin_id", "eos_token_id": "end_id"}
    for name, number in numbers.items():
        if type(number) is not int or not 0 <= number < text.vocab_size:
            raise InputError(
                f"{section.where}.{name} is {number!r:.99}; it must be a token id below vocab_size="
                f"{text.vocab_size}."
            )
    return replace(rules, **{names[name]: number for name, number in numbers.items()})


def _longest(folder: Path) -> list[int]:
    """Return the length of texts that a folder's tokenizer file names, if it names one."""
    path = folder / CONFIG_NAME
    length = read_json(path).get("model_max_length") if path.exists() else None
    return [length] if type(length) is int else []


def _write(config: CLIPConfig, model_type: str) -> dict[str, Any]:
    text = cast(BertConfig, config.text)
    rules = text.tokenizer
    words = {
        **by_table(_table(text), text),
        **({"project_dim": config.embed_dim} if text.head == "norm" else {}),
        "bos_token_id": rules.begin_id,
        "eos_token_id": rules.end_id,
        "pad_token_id": rules.pad_id,
        "hidden_act": hugging_face_family.activation_name(text),
    }
    vision = hugging_face_family.tower_settings(IMAGE, config.vision)
    return hugging_face_clip.projected(model_type, vision, words, config.embed_dim)


def _family(class_name: str, model_type: str, prefix: str, default: BertConfig) -> Family:
    """Return the row of a class, whose text tower has this default and this prefix of tensors."""
    tower = Convention(names=((r"^text/", f"{prefix}/"),))
    assumptions: Assumptions = {
        **hugging_face_clip.IMAGE_ASSUMPTIONS,
        "text": BertConfig,
        "only_tower": None,
        **{f"text.{field}": getattr(default, field) for field in _FIXED},
    }

    def fits(config: CLIPConfig) -> bool:
        text = config.text
        return isinstance(text, BertConfig) and (text.head == "norm") == (default.head == "norm")

    return Family(
        class_name=class_name,
        model_type=model_type,
        fits=fits,
        assumptions=lambda weights: assumptions,
        convention=_TOWER + _CLASSES + tower + hugging_face_family.convention("text_projection"),
        read=functools.partial(_read, default=default),
        write=_write,
    )


def _renamed(tensors: Tensors, *_: Any) -> Tensors:
    """Return the tensors with the names that transformers wrote before its version 5."""
    old = "vision_model.encoder.layer."
    return {name.replace(old, "vision_model.encoder.layers."): x for name, x in tensors.items()}


_CHINESE = _text("ChineseCLIP-ViT-B-16", vocab_size=30_522)
ALTCLIP = replace(
    _family("AltCLIPModel", "altclip", "text_model/roberta", _text("AltCLIP")), from_file=_renamed
)
CHINESE_CLIP = _family("ChineseCLIPModel", "chinese_clip", "text_model", _CHINESE)
