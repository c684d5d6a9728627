"""What a training step may read of each sample besides its image and text."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from clip_jax.models.images import ImageSpec
from clip_jax.models.text import TextConfig


class ImageInput(NamedTuple):
    """The sample's image for another tower, with the same crop and augmentation."""

    spec: ImageSpec


@dataclass(frozen=True)
class TextInput:
    """Token ids of a caption of the sample, int32 [B, L]. Two inputs are equal if their ids are."""

    text: TextConfig = field(compare=False)  # tokenizer and context length
    synthetic: bool = False  # a synthetic caption instead of the one that the student reads
    tokenization: Any = field(init=False)

    def __post_init__(self) -> None:
        text = self.text
        ids = text.clip_vocab_size if text.tokenizer.file == "clip" else None
        object.__setattr__(self, "tokenization", (text.tokenizer, ids, text.context_length))


class StoredInput(NamedTuple):
    """Embeddings that are stored with the sample, of all teachers side by side, [B, Σ widths]."""

    of: Literal["image", "text", "synthetic"]
    widths: tuple[int, ...]  # of each teacher, in the order of the data


class LabelInput(NamedTuple):
    """The number of the sample's class, int32 [B]."""

    classes: tuple[str, ...] = ()  # in this order; empty: any


Input = ImageInput | TextInput | StoredInput | LabelInput


def shapes_of(x: Input, batch_size: int) -> Any:
    """Return the shapes of a batch."""
    if isinstance(x, ImageInput):
        return x.spec.shapes(batch_size)
    if isinstance(x, TextInput):
        return jax.ShapeDtypeStruct((batch_size, x.text.context_length), jnp.int32)
    if isinstance(x, LabelInput):
        return jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return jax.ShapeDtypeStruct((batch_size, sum(x.widths)), jnp.float32)
