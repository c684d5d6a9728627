"""How images become pixels, in Hugging Face's files.

`preprocessor_config.json`, or the `image_processor` of `processor_config.json`, in which today's
processors keep theirs and which then counts.
"""

from pathlib import Path
from typing import Any

from clip_jax.convert.files import read_json, write_json
from clip_jax.convert.settings import channels_of, number_of
from clip_jax.data.images import Interpolation, Preprocess
from clip_jax.refused import Refused

CONFIG_NAME = "preprocessor_config.json"
PROCESSOR_NAME = "processor_config.json"
_RESAMPLE: dict[Interpolation, int] = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def read(folder: Path, default: Preprocess) -> Preprocess:
    """Read what a processor would do with images for the model; `default` where no file says it.

    Refused names what we do not have.
    """
    settings = _find(folder)
    if settings is None:
        return default
    content, where = settings
    size = default.image_size
    resize, crop = content.get("size", size), content.get("crop_size", size)
    resize = {"shortest_edge": resize} if isinstance(resize, int) else resize
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    square = {"height": size, "width": size}
    cropped = content.get("do_center_crop", default.resize_mode == "shortest")
    if resize == square and (not cropped or crop == square):
        mode = "squash"
    elif resize == {"shortest_edge": size} and cropped and crop == square:
        mode = "shortest"
    else:
        raise Refused(
            f"{where}: size={resize!r:.99}, crop_size={crop!r:.99}, do_center_crop={cropped!r:.99} "
            f"is not supported for an image size of {size}."
        )
    kinds = {number: name for name, number in _RESAMPLE.items()}
    resample = content.get("resample", _RESAMPLE["bicubic"])
    scale = number_of(content.get("rescale_factor", 1 / 255), f"{where}: rescale_factor")
    steps = ("do_resize", "do_rescale", "do_normalize")
    if (
        type(resample) is not int
        or resample not in kinds
        or abs(scale * 255 - 1) > 1e-6
        or not all(content.get(step, True) for step in steps)
    ):
        raise Refused(
            f"{where}: resample={resample!r:.99}, rescale_factor={scale} or a step that is left "
            f"out ({', '.join(steps)}) is not supported."
        )
    mean, std = content.get("image_mean"), content.get("image_std")
    return Preprocess(
        image_size=size,
        mean=default.mean if mean is None else channels_of(mean, f"{where}: image_mean"),
        std=default.std if std is None else channels_of(std, f"{where}: image_std", True),
        interpolation=kinds[resample],
        resize_mode=mode,
    )


def _find(folder: Path) -> tuple[dict[str, Any], str] | None:
    """Return the settings that transformers would take, and where they stand."""
    path = folder / PROCESSOR_NAME
    if path.exists():
        content = read_json(path).get("image_processor")
        if content is not None:
            if not isinstance(content, dict):
                raise Refused(f"{path}: image_processor is {content!r:.99}; an object is needed.")
            return content, f"{path}: image_processor"
    path = folder / CONFIG_NAME
    return (read_json(path), str(path)) if path.exists() else None


def write(folder: Path, preprocess: Preprocess, siglip: bool = False) -> None:
    """Write the settings of an image processor that does the same, and no other's beside it."""
    size = preprocess.image_size
    square = {"height": size, "width": size}
    shortest = preprocess.resize_mode == "shortest"
    settings = {
        "image_processor_type": f"{'Siglip' if siglip and not shortest else 'CLIP'}ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if shortest else square,
        "resample": _RESAMPLE[preprocess.interpolation],
        "do_center_crop": shortest,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
    write_json(folder / CONFIG_NAME, settings)
    (folder / PROCESSOR_NAME).unlink(missing_ok=True)  # which would count instead
