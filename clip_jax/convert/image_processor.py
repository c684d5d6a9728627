"""Preprocessing of images in Hugging Face's files.

It is the `image_processor` of `processor_config.json`, in which current processors store it and
which takes precedence, or `preprocessor_config.json`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_jax.convert.settings import count_of, number_of, read_json, write_json
from clip_jax.data.images import Interpolation, Preprocess
from clip_jax.errors import InputError, naming
from clip_jax.models.images import IMAGENET_MEAN, IMAGENET_STD, INCEPTION_MEAN, INCEPTION_STD
from clip_jax.serialize import from_dict, to_dict

CONFIG_NAME = "preprocessor_config.json"
PROCESSOR_NAME = "processor_config.json"
_RESAMPLE: dict[Interpolation, int] = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
_SIGLIP = Preprocess(
    mean=INCEPTION_MEAN, std=INCEPTION_STD, resize_mode="squash", rules="transformers"
)
# Defaults of the classes of transformers.
_CLASSES = {
    "CLIP": Preprocess(rules="transformers"),
    "Siglip": _SIGLIP,
    "ViT": replace(_SIGLIP, interpolation="bilinear"),
    # transformers 5 loads the torchvision class by any of its names, if torchvision is installed.
    "Siglip2": replace(
        _SIGLIP, interpolation="bilinear", resize_mode="naflex", max_patches=256, patch_size=16,
        rules="torchvision",
    ),
    **dict.fromkeys(("Bit", "ChineseCLIP"), Preprocess(rules="transformers")),
    "Tipsv2": replace(
        _SIGLIP, image_size=448, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear",
        rules="torchvision",
    ),
    "DINOv3ViT": replace(
        _SIGLIP, mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bilinear",
        rules="torchvision",
    ),
}  # fmt: skip
_SQUARES = ("Tipsv2", "ViT", "DINOv3ViT")  # classes in which a size of one number means a square
_TORCHVISION = ("Tipsv2", "DINOv3ViT")  # classes that have no form without torchvision


def read(
    folder: Path,
    size: int,
    model: str = "CLIP",
    patch_size: int | None = None,
    *,
    at_any_size: bool = False,
) -> Preprocess:
    """Read the preprocessing of a processor, for a model of images of `size` pixels.

    With `patch_size` it is that of a NaFlex model. Missing and null settings have the defaults of
    the file's class, or if it has none, of the class of `model` (CLIP, Siglip, …). With
    `at_any_size`, the processor's own size is not the model's: its steps make images of the model's
    size. Raises InputError, which names an unsupported setting.
    """
    stored, where = _find(folder)
    content = {name: value for name, value in (stored or {}).items() if value is not None}
    kind = content.get("image_processor_type", content.get("feature_extractor_type"))
    name = str(kind or model).removesuffix("Fast").removesuffix("Pil")
    name = name.removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    if name not in _CLASSES:
        names = ", ".join(f"{name}ImageProcessor" for name in _CLASSES)
        raise InputError(
            f"{where}: image_processor_type={kind!r:.99} is not supported; it must be one of "
            f"{names}. Set it to the one with the same steps, and write all of its settings."
        )
    if (name == "Siglip2") != (model == "Siglip2"):
        raise InputError(
            f"{where}: image_processor_type={kind!r:.99} does not fit the model in config.json; "
            "Siglip2ImageProcessor and model_type='siglip2' (NaFlex) need each other."
        )
    its_class = _CLASSES[name]
    default = replace(its_class, image_size=size)
    kinds = {number: name for name, number in _RESAMPLE.items()}
    resample = content.get("resample", _RESAMPLE[default.interpolation])
    scale = number_of(content.get("rescale_factor", 1 / 255), f"{where}: rescale_factor")
    if not content.get("do_normalize", name != "Tipsv2"):
        content = {**content, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    elif name == "Tipsv2" and not {"image_mean", "image_std"} <= set(content):
        raise InputError(f"{where}: do_normalize=True needs image_mean and image_std; add them.")
    steps = ("do_resize", "do_rescale")
    if (
        type(resample) is not int
        or resample not in kinds
        or abs(scale * 255 - 1) > 1e-6
        or not all(content.get(step, True) for step in steps)
        or content.get("do_pad")
    ):
        raise InputError(
            f"{where}: resample={resample!r:.99}, rescale_factor={scale}, do_pad or a step that is "
            f"off ({', '.join(steps)}) is not supported."
        )
    values = {
        "mean": content.get("image_mean", default.mean),
        "std": content.get("image_std", default.std),
        "interpolation": kinds[resample],
    }
    if patch_size:
        values |= _patches(content, default, patch_size, where)
        values["rules"] = "transformers" if str(kind).endswith("Pil") else default.rules
    else:
        # Without any file the size is the model's, and not that of the class.
        missing = size if stored is None else its_class.image_size
        if at_any_size:
            content = _at_size(content, size)
        values |= _resizing(content, default, missing, name in _SQUARES, where)
    with naming(where):
        return from_dict(Preprocess, to_dict(default) | values, where)


def _patches(
    content: dict[str, Any], default: Preprocess, patch_size: int, where: str
) -> dict[str, int]:
    size = content.get("patch_size", default.patch_size)
    if size != patch_size:
        raise InputError(
            f"{where}: patch_size={size!r:.99} differs from the model's, {patch_size}; correct it, "
            "or add this file if it is missing."
        )
    most = content.get("max_num_patches", default.max_patches)
    return {"max_patches": count_of(most, f"{where}: max_num_patches"), "patch_size": patch_size}


def _at_size(content: dict[str, Any], size: int) -> dict[str, Any]:
    """Return the settings with the sizes of images of `size` pixels, and margins in proportion."""
    content = dict(content)
    resize, crop = content.get("size"), content.get("crop_size")
    match crop:
        case {"height": int() as side, "width": int() as width} if side == width:
            content["crop_size"] = _square(size)
        case int() as side:
            content["crop_size"] = size
        case _:
            side = None
    if not content.get("do_center_crop", True):
        side = None
    match resize:
        case {"shortest_edge": int() as shorter}:
            content["size"] = {"shortest_edge": round(size * shorter / side) if side else size}
        case {"height": int() as height, "width": int() as width} if height == width:
            content["size"] = _square(round(size * height / side) if side else size)
        case int():
            content["size"] = size
    return content


def _resizing(
    content: dict[str, Any], default: Preprocess, missing: int, squares: bool, where: str
) -> dict[str, Any]:
    """Return how a processor resizes and crops, as fields of `Preprocess`."""
    size, squashes = default.image_size, default.resize_mode == "squash"
    square = _square(size)
    resize = content.get("size", _square(missing) if squashes else {"shortest_edge": missing})
    crop = content.get("crop_size", None if squashes else missing)
    if isinstance(resize, int):
        resize = _square(resize) if squares else {"shortest_edge": resize}
    crop = _square(crop) if isinstance(crop, int) else crop
    cropped = content.get("do_center_crop", not squashes)
    if resize == square and (not cropped or crop == square):
        return {"resize_mode": "squash"}
    if cropped and crop == square:
        match resize:
            case {"shortest_edge": int() as shorter} if shorter >= size:
                return {"resize_mode": "shortest", "crop_ratio": size / shorter}
            case {"height": int() as side, "width": other} if side == other and side >= size:
                return {"resize_mode": "squash", "crop_ratio": size / side}
    raise InputError(
        f"{where}: size={resize!r:.99}, crop_size={crop!r:.99}, do_center_crop={cropped!r:.99} "
        f"is not supported for a model with image size {size}."
    )


def _square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


def _find(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Return the settings that transformers would use and their file; None if it is missing."""
    path = folder / PROCESSOR_NAME
    if path.exists():
        content = read_json(path).get("image_processor")
        if content is not None:
            if not isinstance(content, dict):
                raise InputError(
                    f"{path}: image_processor is {content!r:.99}; an object is needed."
                )
            return content, f"{path}: image_processor"
    path = folder / CONFIG_NAME
    return read_json(path) if path.exists() else None, str(path)


def write(folder: Path, preprocess: Preprocess, model: str = "CLIP") -> None:
    """Write the settings of an equivalent image processor, and remove any other's.

    `model` begins the name of the model's class, which is written if it resizes in this way.
    """
    square, shorter = _square(preprocess.image_size), preprocess.shorter_side
    shortest = preprocess.resize_mode == "shortest"
    if preprocess.resize_mode == "naflex":
        name = f"Siglip2ImageProcessor{'Pil' if preprocess.rules == 'transformers' else ''}"
        sizes = {"patch_size": preprocess.patch_size, "max_num_patches": preprocess.max_patches}
    else:
        fits = shortest == (model == "Bit")
        fits = fits and (model not in _TORCHVISION or preprocess.rules == "torchvision")
        name = f"{model if fits else 'CLIP'}ImageProcessor"
        sizes = {
            "size": {"shortest_edge": shorter} if shortest else _square(shorter),
            "do_center_crop": shortest or preprocess.crop_ratio != 1,
            "crop_size": square,
        }
    settings = {
        "image_processor_type": name,
        "do_convert_rgb": True,
        "do_resize": True,
        **sizes,
        "resample": _RESAMPLE[preprocess.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
    write_json(folder / CONFIG_NAME, settings)
    (folder / PROCESSOR_NAME).unlink(missing_ok=True)  # it would take precedence
