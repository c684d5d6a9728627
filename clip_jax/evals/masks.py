"""Images with masks on disk, to be segmented."""

import numpy as np
from jaxtyping import Int

from clip_jax.data.class_folders import read_class_names
from clip_jax.data.images import ImageError, opened
from clip_jax.data.sources import SampleError
from clip_jax.data.sources.image_folder import image_files
from clip_jax.errors import InputError
from clip_jax.evals.datasets import Missing, Segmented, Split
from clip_jax.storage.files import AnyPath

_MASKS = ("masks", "annotations")  # folders beside `images`; the second is ADE20K's
_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid"),
    "test": ("test",),
}
_WHOLE_NUMBERS = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # Pillow's modes with one per pixel


def open_masks(path: AnyPath, split: Split) -> Segmented:
    """Open images with masks of the same names, and the names of their classes.

    `images/` and `masks/` (or `annotations/`) are in the folder or in that of each split (`train`,
    `val`, `test`), or have a folder for each split themselves, as ADE20K's. Without `test`, the
    validation images are the test split. A mask is a PNG with one integer per pixel, and
    `classnames.txt` has a name per line. Raises Missing without such a split, and InputError for
    missing names or masks.
    """
    splits = {name: pair for name in _NAMES if (pair := _folders(path, name))}
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    elif not splits:
        for name in _MASKS:
            if (path / "images").is_dir() and (path / name).is_dir():
                splits["test"] = path / "images", path / name
    if not splits:
        raise InputError(
            f"there are no images with masks in {path}; segments:PATH needs PATH/images and "
            "PATH/masks with files of the same names, both optionally below train, val and test."
        )
    if split not in splits:
        raise Missing(f"{path} has no {split} split; put it in {path / split}.")
    names = path / "classnames.txt"
    if not names.is_file():
        raise InputError(f"there is no {names}; write the name of each class on a line, in order.")
    images, masks = splits[split]
    files = [
        (image, (masks / image.relative_to(images)).with_suffix(".png"))
        for image in image_files([images])
    ]
    if missing := [mask for _, mask in files if not mask.is_file()]:
        raise InputError(
            f"{len(missing)} of {len(files)} images in {images} have no mask; the first would be "
            f"{missing[0]}. Add it, or remove the image."
        )

    def load(index: int) -> tuple[AnyPath, Int[np.ndarray, "H W"]]:
        image, mask = files[index]
        return image, read_mask(mask)

    return Segmented(len(files), load, read_class_names(names), key=lambda i: str(files[i][0]))


def read_mask(path: AnyPath) -> Int[np.ndarray, "H W"]:
    """Return a mask's integers; of an image with a palette, its indices. Raises SampleError."""
    try:
        with opened(path) as image:
            if image.mode not in _WHOLE_NUMBERS:
                raise SampleError(
                    f"the mask has {len(image.getbands())} channels ({image.mode}) and needs one, "
                    "the class of each pixel"
                )
            return np.asarray(image).astype(np.int64)
    except ImageError as error:
        raise SampleError(f"the mask {path}: {error}") from error


def _folders(path: AnyPath, split: Split) -> tuple[AnyPath, AnyPath] | None:
    """Return the folders of a split's images and masks; None if it has none."""
    for name in _NAMES[split]:
        for masks in _MASKS:
            for pair in (
                (path / name / "images", path / name / masks),
                (path / "images" / name, path / masks / name),
            ):
                if all(folder.is_dir() for folder in pair):
                    return pair
    return None
