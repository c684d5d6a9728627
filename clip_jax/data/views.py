"""Views of an image with crops and augmentations of their own, and what is masked in them."""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from clip_jax.data.augment import AugmentConfig, augment
from clip_jax.data.images import Decoder, ImageLike, View, read_views
from clip_jax.models.images import Patches, stack
from clip_jax.models.inputs import Input, MaskInput, ViewInput


def draw(
    image: ImageLike,
    inputs: Mapping[str, Input],
    key: tuple[int, int],
    *,
    scaled: bool = True,
    decoder: Decoder = "pillow",
) -> dict[str, Any]:
    """Return those of a sample's inputs that are views or masks, each a batch of one.

    They depend on `key`, seed and position of the sample, and on the input's name alone: the image
    itself is that of a run without views. With `scaled`, a JPEG is decoded at the size that the
    most detailed view needs. Raises ImageError.
    """
    views = {name: x for name, x in inputs.items() if isinstance(x, ViewInput)}
    masks = {name: x for name, x in inputs.items() if isinstance(x, MaskInput)}
    if not views:
        return {}
    rngs = {
        name: np.random.Generator(np.random.Philox(key=[*key]).jumped(_jumps(name)))
        for name in (*views, *masks)
    }
    each = [(name, x) for name, x in views.items() for _ in range(x.count)]
    wanted = [View(x.spec, x.area, rngs[name]) for name, x in each]
    packed: dict[str, list[Any]] = {name: [] for name in views}
    crops = read_views(image, wanted, scaled=scaled, decoder=decoder)
    for (name, x), crop in zip(each, crops, strict=True):
        how = AugmentConfig(flip=x.flip, color_jitter=x.color_jitter, grayscale=x.grayscale)
        packed[name].append(x.spec.pack(augment(crop, rngs[name], how)[None]))
    arrays: dict[str, Any] = {name: stack(several) for name, several in packed.items()}
    for name, x in masks.items():
        (view,) = packed[x.view]
        patches = int(view.length[0]) if isinstance(view, Patches) else x.patches
        masked = np.full(x.count(x.patches), -1, np.int32)
        chosen = rngs[name].permutation(patches)[: x.count(patches)]
        masked[: len(chosen)] = np.sort(chosen)
        arrays[name] = masked[None]
    return arrays


def _jumps(name: str) -> int:
    """Return the number of the generator of an input; the sample's is 0, its texts' 1."""
    return 2 + zlib.crc32(name.encode())
