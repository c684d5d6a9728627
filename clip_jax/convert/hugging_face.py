"""Hugging Face's format: a folder for a model and a processor of transformers.

`FAMILIES` has a row for each class of models: what it can express, the names of its tensors, and
its settings.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from clip_jax.convert import (
    bert,
    dino,
    hugging_face_clip,
    image_processor,
    siglip,
    tips,
    tokenizer_files,
    verify,
)
from clip_jax.convert.hugging_face_family import Family
from clip_jax.convert.settings import Settings, read_json, write_json
from clip_jax.convert.state_dict import Row, from_params, table, to_params
from clip_jax.convert.target import Target, check_assumptions, rounded
from clip_jax.convert.tensor_files import read_tensors, write_safetensors
from clip_jax.convert.weights import DType, Weights, cast
from clip_jax.errors import InputError, naming
from clip_jax.models.clip import CLIPConfig, Params
from clip_jax.models.images import Images, Patches, pixels_of
from clip_jax.optim.wrappers import TOWERS, Tower

# A model is written as the first family that it fits.
FAMILIES: tuple[Family, ...] = (
    *dino.FAMILIES,
    tips.TIPS,
    bert.ALTCLIP,
    bert.CHINESE_CLIP,
    siglip.SIGLIP,
    siglip.SIGLIP_2,
    hugging_face_clip.METACLIP_2,
    hugging_face_clip.CLIP,
)
WEIGHTS_NAME = "model.safetensors"
_WEIGHTS_NAMES = (
    WEIGHTS_NAME,
    f"{WEIGHTS_NAME}.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_POSITION_IDS = ("embeddings.position_ids", "embeddings.token_type_ids")  # buffers of old files


class _OneTower(NamedTuple):
    """A class of transformers for one tower of a model with two."""

    name: str
    tower: Tower
    field: str  # of CLIPConfig
    projection: str  # in the file
    family: str = "clip"  # model_type of the class of both towers


_ALONE = {  # by model_type
    "clip_vision_model": _OneTower(
        "CLIPVisionModelWithProjection", "image", "vision", "visual_projection"
    ),
    "clip_text_model": _OneTower("CLIPTextModelWithProjection", "text", "text", "text_projection"),
}
_READ_ALONE = _ALONE | {  # these are not written
    "siglip_vision_model": _OneTower(
        "SiglipVisionModel", "image", "vision", "visual_projection", "siglip"
    )
}


def family_of(config: CLIPConfig) -> Family:
    """Return the family as which a model is written, if it can be written at all."""
    return next(family for family in FAMILIES if family.fits(config))


def rows(config: CLIPConfig) -> list[Row]:
    """Return the table of parameters."""
    return table(config, family_of(config).convention)


def _rows_of(config: CLIPConfig, tower: Tower | None) -> list[Row]:
    """Return the table of one tower alone, or (None) of the model."""
    return [row for row in rows(config) if not tower or row.ours.startswith(f"{TOWERS[tower]}/")]


def class_name(weights: Weights) -> str:
    """Return the class of transformers that a model is written for."""
    family = family_of(weights.config)
    names = {alone.tower: alone.name for alone in _ALONE.values()}
    only = weights.only_tower
    return family.class_name if only in (None, family.only_tower) else names[only]


def config_json(weights: Weights, dtype: str) -> dict[str, Any]:
    """Return the content of `config.json`."""
    family = family_of(weights.config)
    settings = family.write(weights.config, family.model_type)
    for model_type, alone in _ALONE.items():
        if alone.tower == weights.only_tower != family.only_tower:
            section = settings[f"{alone.field}_config"] | {"model_type": model_type}
            return {"architectures": [alone.name], "dtype": dtype, **section}
    return {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "dtype": dtype,
        **settings,
    }


def read(folder: Path) -> Weights:
    """Read a folder. Raises InputError, which names what is missing or not supported."""
    path = folder / "config.json"
    content = read_json(path)
    alone = _READ_ALONE.get(str(content.get("model_type")))
    file = next((folder / n for n in _WEIGHTS_NAMES if (folder / n).exists()), None)
    if alone is not None:
        size, width = content.get("projection_dim", 512), content.get("hidden_size", 768)
        content = {
            "model_type": alone.family,
            "projection_dim": size,
            "text_config": {"projection_size": width},
            f"{alone.field}_config": content,
        }
    family = _family_named(content.get("model_type"), path)
    if file is None:
        raise InputError(f"{folder} has none of {', '.join(_WEIGHTS_NAMES)}; add the weights.")
    tensors = {n: x for n, x in read_tensors(file).items() if not n.endswith(_POSITION_IDS)}
    with naming(path):
        config = family.read(content, path)
    if alone is not None:
        # Without a projection, names may have no prefix.
        prefixes = (f"{alone.field}_model.", alone.projection)
        tensors = {
            name if name.startswith(prefixes) else f"{prefixes[0]}{name}": x
            for name, x in tensors.items()
        }
        if f"{alone.projection}.weight" not in tensors:
            tower = replace(getattr(config, alone.field), projection=False)
            config = replace(config, embed_dim=tower.width, **{alone.field: tower})
    tensors = family.from_file(tensors, Settings(content, str(path)), str(file))
    vision, text = config.vision, config.text
    patch_size = vision.patch_size if vision.is_naflex else None
    preprocess = image_processor.read(
        folder,
        vision.image_size,
        family.processor,
        patch_size,
        at_any_size=family.only_tower is not None,  # DINO's models are for images of any size
    )
    tokenizer = tokenizer_files.read(folder, text, text.tokenizer)
    config = replace(
        config,
        vision=vision.with_max_patches(preprocess.max_patches),
        text=replace(text, tokenizer=tokenizer),
        image_mean=preprocess.mean,
        image_std=preprocess.std,
    )
    tower = alone.tower if alone else family.only_tower
    params = to_params(_rows_of(config, tower), tensors, config, str(file))
    return Weights(config=config, params=params, preprocess=preprocess, only_tower=tower)


def _family_named(model_type: Any, path: Path) -> Family:
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    kinds = dict.fromkeys(f"{family.class_name} ({family.model_type!r})" for family in FAMILIES)
    names = ", ".join(kinds)
    raise InputError(
        f"{path} has model_type={str(model_type)!r:.99}; supported are Hugging Face's {names}."
    )


_REASONS = {"only_tower": "of transformers' classes, only CLIP's have one for each tower"}
_ALONE_REASONS = {"only_tower": "its class has no text tower: use --tower image"}


def check(weights: Weights) -> None:
    """Raise Inexpressible if transformers' model and processor cannot express the model."""
    family = family_of(weights.config)
    name = f"Hugging Face's {family.class_name}"
    reasons = _REASONS if family.only_tower is None else _ALONE_REASONS
    check_assumptions(weights, name, family.assumptions(weights), reasons)
    if weights.only_tower != "image":
        tokenizer_files.check(weights.config.text)


def write(weights: Weights, folder: Path, *, dtype: DType | None = None) -> None:
    """Write all files that transformers' model and processor need offline. See `check`."""
    check(weights)
    config, only = weights.config, weights.only_tower
    family, table_ = family_of(config), _rows_of(config, only)
    tensors = family.to_file(from_params(table_, weights.params), config)
    exact = {name for row in table_ if row.ours in family.exact for name in row.names}
    tensors = {n: x if n in exact else cast(x, dtype) for n, x in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    stored = next(x for n, x in sorted(tensors.items()) if x.ndim > 1).dtype.name
    write_json(folder / "config.json", config_json(weights, stored))
    if only != "text":
        image_processor.write(folder, weights.preprocess, family.processor)
    if only != "image":
        tokenizer_files.write(folder, config.text)


def _rounded(weights: Weights, dtype: DType | None) -> Params:
    """Return the parameters in a file, of which some are never rounded."""
    exact = {name: weights.params[name] for name in family_of(weights.config).exact}
    params = rounded(weights, dtype)
    return params | exact if exact else params


def load(
    weights: Weights, path: Path, adapt: Any = lambda model: model, package: str = "transformers"
) -> verify.Reference:
    """Load the model in a folder by transformers, as `adapt` of `package` changes it."""
    only = weights.only_tower
    notes: list[str] = []
    with verify.library("transformers", "transformers"):
        import torch
        import transformers

        # In float32 from the start: buffers, too, would be rounded.
        options = {"local_files_only": True, "dtype": torch.float32}
        kind = transformers.AutoModel
        if only:
            kind = getattr(transformers, read_json(path / "config.json")["architectures"][0])
        model = adapt(kind.from_pretrained(path, **options)).eval().float()
        processor = tokenizer = None
        names = (image_processor.CONFIG_NAME, image_processor.PROCESSOR_NAME)
        if any((path / name).exists() for name in names) and only != "text":
            processor, note = _image_processor(path, weights)
            notes += note
        elif only != "text":
            notes.append("preprocessing: the folder has no image processor")
        if tokenizer_files.exist(path) and only != "image":
            tokenizer = _tokenizer(path, weights.config.text.context_length)
        elif only != "image":
            notes.append("token ids: the folder has no tokenizer")
    kinds = [] if processor is None else [kind.__name__ for kind in type(processor).__mro__]
    return verify.Reference(
        name=verify.named(package),
        outputs=functools.partial(_outputs, model, weights),
        preprocess=None if processor is None else functools.partial(_preprocess, processor),
        is_torchvision=any("Torchvision" in name or name.endswith("Fast") for name in kinds),
        tokenize=tokenizer,
        notes=tuple(notes),
    )


def _image_processor(folder: Path, weights: Weights) -> tuple[Any, list[str]]:
    """Load the image processor of a folder: that of Pillow, if its class has one.

    It is None, with a note, if it makes images of another size than the model's.
    """
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        options = {"local_files_only": True, "backend": "pil"}
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **options)
    finally:
        transformers.logging.set_verbosity(level)
    if family_of(weights.config).only_tower is not None:
        made = pixels_of(_preprocess(processor, Image.new("RGB", (64, 64)))).shape[1]
        if made != weights.config.vision.image_size:
            size = weights.config.vision.image_size
            return None, [f"preprocessing: the folder's images have {made} pixels, not {size}"]
    return processor, []


def _preprocess(processor: Any, image: Image.Image) -> Images:
    """Return a batch of one image by an image processor of transformers."""
    out = {name: x.numpy() for name, x in processor(image, return_tensors="pt").items()}
    if "spatial_shapes" not in out:
        return out["pixel_values"].transpose(0, 2, 3, 1)
    length = out["pixel_attention_mask"].sum(axis=1)
    return Patches(out["pixel_values"], *(np.int32(x) for x in (out["spatial_shapes"], length)))


def _tokenizer(folder: Path, length: int) -> Callable[[Sequence[str]], np.ndarray]:
    """Return a folder's tokenizer as a function."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    settings = folder / tokenizer_files.CONFIG_NAME
    # Gemma's class ignores this setting of SigLIP 2's folders; training followed it.
    lowers = "Gemma" in type(tokenizer).__name__ and (
        settings.exists() and read_json(settings).get("do_lower_case") is True
    )

    def tokenize(texts: Sequence[str]) -> np.ndarray:
        options = {"padding": "max_length", "truncation": True, "max_length": length}
        texts = [text.lower() if lowers else text for text in texts]
        return tokenizer(texts, return_tensors="np", **options)["input_ids"]

    return tokenize


def _outputs(model: Any, weights: Weights, inputs: verify.Inputs) -> verify.Outputs:
    """Return the outputs of a model of transformers."""
    import torch

    if only := weights.only_tower:
        of_tower = verify.torch_inputs(inputs)[only == "text"]
        with torch.no_grad():
            out = model(of_tower)
        features = out.get(f"{only}_embeds", out.get("pooler_output"))
        return {f"{only}_features": features.numpy()}

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
    load=load,
    rounded=_rounded,
    check=check,
    has_single_towers=True,
    use_tower=lambda weights: f"`transformers.{class_name(weights)}.from_pretrained(FOLDER)`.",
    names=("config.json", WEIGHTS_NAME, image_processor.PROCESSOR_NAME),
    use="`transformers.AutoModel.from_pretrained(FOLDER)`, and `AutoProcessor`. Of a NaFlex model, "
    "`AutoImageProcessor` and `AutoTokenizer`: `AutoProcessor` always makes 256 patches of 16 "
    "pixels (transformers 5.24).",
)
