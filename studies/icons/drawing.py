"""Drawings: an icon as a square PNG, on a background and in a colour."""

import hashlib
import io

import numpy as np
import resvg_py
from icon_sets import Icon
from PIL import Image

INK = ("black", "white")  # of the evaluation: black on white
# Foreground and background of monochrome icons in training: three quarters are dark on light.
COLOURS = (
    INK,
    ("#1f2937", "#f3f4f6"),
    ("#1d4ed8", "white"),
    ("#b91c1c", "#fef2f2"),
    ("#15803d", "#f7fee7"),
    ("#6b21a8", "#faf5ff"),
    ("white", "#111827"),
    ("#fde68a", "#1e3a8a"),
)


def colours_of(icon: Icon) -> tuple[str, str]:
    """Choose the colours of an icon in training by its key; coloured icons are drawn on white."""
    if not icon.is_monochrome:
        return INK
    digest = hashlib.blake2b(icon.key.encode(), digest_size=8).digest()
    return COLOURS[int.from_bytes(digest) % len(COLOURS)]


def png(icon: Icon, size: int, colours: tuple[str, str] = INK) -> bytes | None:
    """Draw an icon in the middle of a square of `size` pixels; None if nothing is to be seen."""
    ink, paper = colours
    box = " ".join(f"{number:g}" for number in icon.box)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}"><rect width="{size}" height="{size}" fill="{paper}"/>'
        f'<svg width="{size}" height="{size}" viewBox="{box}" color="{ink}">{icon.body}</svg></svg>'
    )
    try:
        image = bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))
    except BaseException as error:  # resvg 0.48 panics at some filters of fluent-emoji
        if type(error).__name__ != "PanicException":
            raise
        return None
    return None if _is_plain(image) else image


def _is_plain(image: bytes) -> bool:
    """Return whether all pixels of an image are equal, as those of an icon that only moves."""
    with Image.open(io.BytesIO(image)) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    return bool((pixels == pixels[0, 0]).all())
