"""Hugging Face's format: a folder that a model and a processor of transformers load."""

from dataclasses import replace
from pathlib import Path

from clip_jax.convert import clip_model, image_processor, siglip_model, tokenizer_files
from clip_jax.convert.settings import read_json, said_in, write_json
from clip_jax.convert.state_dict import Row, from_params, to_params
from clip_jax.convert.tensor_files import Tensors, read_tensors, write_safetensors
from clip_jax.convert.weights import DType, Weights, cast
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.text import TokenizerConfig
from clip_jax.models.vit import ViTConfig

WEIGHTS_NAME = "model.safetensors"
_WEIGHTS_NAMES = (
    WEIGHTS_NAME, f"{WEIGHTS_NAME}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_POSITION_IDS = "embeddings.position_ids"  # buffers of old files


def read(folder: Path) -> Weights:
    """Read a model's folder. Raises InputError, which names what is missing or unknown."""
    source = str(folder / "config.json")
    content = read_json(folder / "config.json")
    kind = content.get("model_type")
    if kind == "siglip2":
        raise InputError(
            f"{source} has model_type='siglip2': SigLIP 2 of native aspect ratios (NaFlex), whose "
            "images have no fixed size. Its fixed-resolution models ('siglip') are read."
        )
    siglip = kind == siglip_model.MODEL_TYPE
    if not siglip and kind not in clip_model.MODEL_TYPES:
        raise InputError(
            f"{source} has model_type={kind!r:.99}; Hugging Face's CLIPModel ('clip'), "
            "MetaClip2Model ('metaclip_2') and SiglipModel ('siglip') are read."
        )
    path = next((folder / n for n in _WEIGHTS_NAMES if (folder / n).exists()), None)
    if path is None:
        raise InputError(f"{folder} has none of {', '.join(_WEIGHTS_NAMES)}.")
    tensors = {n: x for n, x in read_tensors(path).items() if not n.endswith(_POSITION_IDS)}
    model = siglip_model if siglip else clip_model
    with said_in(folder / "config.json"):
        config = model.read_config(content, source)
    if siglip:
        tensors = siglip_model.split(tensors)
    preprocess = image_processor.read(folder, config.vision.image_size, siglip)
    vocabulary = TokenizerConfig()
    if kind != "clip":
        vocabulary = tokenizer_files.missing(config.text, "punctuation" if siglip else "none")
    text = replace(config.text, tokenizer=tokenizer_files.read(folder, config.text, vocabulary))
    config = replace(config, text=text, image_mean=preprocess.mean, image_std=preprocess.std)
    return Weights(
        config=config,
        params=to_params(rows(config), tensors, config, str(path)),
        preprocess=preprocess,
    )


def _is_siglip(config: CLIPConfig) -> bool:
    return isinstance(config.vision, ViTConfig) and config.vision.pool == "map"


def rows(config: CLIPConfig) -> list[Row]:
    """The table."""
    return siglip_model.rows(config) if _is_siglip(config) else clip_model.TABLE


def to_tensors(weights: Weights, dtype: DType | None = None) -> Tensors:
    """Return the state dict under Hugging Face's names. Raises InputError if it cannot be
    expressed."""
    siglip = _is_siglip(weights.config)
    (siglip_model if siglip else clip_model).check(weights)
    tensors = from_params(rows(weights.config), weights.params)
    tensors = siglip_model.join(tensors, weights.config) if siglip else tensors
    return {n: cast(x, dtype) for n, x in tensors.items()}


def write(weights: Weights, folder: Path, *, dtype: DType | None = None) -> None:
    """Write everything that transformers' model and processor need offline."""
    tensors = to_tensors(weights, dtype)
    siglip = _is_siglip(weights.config)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    kind = tensors["text_model.final_layer_norm.weight"].dtype.name
    config = (siglip_model if siglip else clip_model).config_json(weights, kind)
    write_json(folder / "config.json", config)
    image_processor.write(folder, weights.preprocess, siglip)
    tokenizer_files.write(folder, weights.config.text)
