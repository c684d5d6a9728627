"""What a training step may read of each sample besides its image and text."""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from clip_jax.models.images import Images, ImageSpec
from clip_jax.models.text import TextConfig


@dataclass(frozen=True)
class Input:
    """One array of each sample, which the input pipeline makes."""

    def shapes(self, batch_size: int) -> Any:
        """Return the shapes of a batch."""
        raise NotImplementedError

    @property
    def is_synthetic(self) -> bool:
        """Whether it needs synthetic captions."""
        return False


@dataclass(frozen=True)
class ImageInput(Input):
    """The sample's image for another tower, with the same crop and augmentation."""

    spec: ImageSpec

    def shapes(self, batch_size: int) -> Images:
        return self.spec.shapes(batch_size)


@dataclass(frozen=True)
class ViewInput(Input):
    """Views of the sample's image with crops and augmentations of their own, [B, count, ...]. All
    views of an image come from one decode."""

    spec: ImageSpec
    count: int
    area: tuple[float, float] = (1.0, 1.0)  # smallest and largest share of the image in a crop
    # Probabilities of the augmentations, whose strengths are the defaults of `AugmentConfig`.
    flip: float = 0.0
    color_jitter: float = 0.0
    grayscale: float = 0.0

    def shapes(self, batch_size: int) -> Images:
        def each(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch_size, self.count, *x.shape[1:]), x.dtype)

        return jax.tree.map(each, self.spec.shapes(batch_size))


@dataclass(frozen=True)
class MaskInput(Input):
    """The numbers of the patches that are masked in a view of the sample, int32 [B, most], drawn at
    random, ascending. Images with fewer patches have fewer of them; the rest is −1."""

    view: str  # the name of a `ViewInput` of one view
    patches: int  # most patches of the view
    ratio: float  # share of the patches that is masked

    def count(self, patches: int) -> int:
        """Return how many of so many patches are masked, at least one."""
        return max(round(self.ratio * patches), 1)

    def shapes(self, batch_size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, self.count(self.patches)), jnp.int32)


@dataclass(frozen=True)
class TextInput(Input):
    """Token ids of a caption of the sample, int32 [B, L]. Two inputs are equal if their ids are."""

    text: TextConfig = field(compare=False)  # tokenizer and context length
    synthetic: bool = False  # a synthetic caption instead of the one that the student reads
    tokenization: Any = field(init=False)

    def __post_init__(self) -> None:
        text = self.text
        ids = text.clip_vocab_size if text.tokenizer.file == "clip" else None
        object.__setattr__(self, "tokenization", (text.tokenizer, ids, text.context_length))

    def shapes(self, batch_size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, self.text.context_length), jnp.int32)

    @property
    def is_synthetic(self) -> bool:
        return self.synthetic


@dataclass(frozen=True)
class FurtherTexts(Input):
    """Token ids of further texts of the sample, int32 [B, count, L]: other captions of the image,
    or parts of the caption. Rows without a text repeat the caption; see `CountInput`."""

    text: TextConfig  # tokenizer and context length
    count: int
    sentences: int | None  # most adjacent sentences in a part of the caption; None: other captions

    @staticmethod
    def counter(name: str) -> str:
        """Return the name of the number of texts, `CountInput`, of the input of this name."""
        return f"{name}_count"

    def shapes(self, batch_size: int) -> jax.ShapeDtypeStruct:
        shape = (batch_size, self.count, self.text.context_length)
        return jax.ShapeDtypeStruct(shape, jnp.int32)


@dataclass(frozen=True)
class CountInput(Input):
    """The number of further texts that the sample has, at most `FurtherTexts.count`, int32 [B]."""

    def shapes(self, batch_size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size,), jnp.int32)


@dataclass(frozen=True)
class StoredInput(Input):
    """Embeddings that are stored with the sample, of all teachers side by side, [B, Σ widths].

    By the name `image` or `text` they replace the images or the token ids of a batch.
    """

    of: Literal["image", "text", "synthetic"]
    widths: tuple[int, ...]  # of each teacher, in the order of the data
    # What they must be of, by name (see `data.reinforced.origin`); empty: any tower's.
    origin: tuple[tuple[str, int | str], ...] = ()

    def shapes(self, batch_size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, sum(self.widths)), jnp.float32)

    @property
    def is_synthetic(self) -> bool:
        return self.of == "synthetic"


@dataclass(frozen=True)
class LabelInput(Input):
    """The number of the sample's class, int32 [B]."""

    classes: tuple[str, ...] = ()  # in this order; empty: any

    def shapes(self, batch_size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size,), jnp.int32)
