"""What a training step may read of each sample besides its image and text."""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct

from clip_jax.models.images import Images, ImageSpec
from clip_jax.models.text import TextConfig


@dataclass(frozen=True)
class ImageInput:
    """The sample's image for another tower, with the same crop and augmentation."""

    spec: ImageSpec

    def shapes(self, batch_size: int) -> Images:
        """Return the shapes of a batch."""
        return self.spec.shapes(batch_size)


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

    def shapes(self, batch_size: int) -> ShapeDtypeStruct:
        """Return the shape of a batch."""
        return jax.ShapeDtypeStruct((batch_size, self.text.context_length), jnp.int32)


@dataclass(frozen=True)
class StoredInput:
    """Embeddings that are stored with the sample, of all teachers side by side, [B, width]."""

    of: Literal["image", "text", "synthetic"]
    width: int

    def shapes(self, batch_size: int) -> ShapeDtypeStruct:
        """Return the shape of a batch."""
        return jax.ShapeDtypeStruct((batch_size, self.width), jnp.float32)


Input = ImageInput | TextInput | StoredInput
