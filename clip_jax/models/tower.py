"""What every tower answers: the base classes of the configs of image towers and of text towers.

A tower is a frozen dataclass derived from `ImageTowerConfig` or `TextTowerConfig`, whose `module`
returns its Flax module. The rest of the package asks these classes alone, so a new tower is one
file. `module` and `operations` must be defined; every other answer has a default, which a tower may
replace by a field or a property.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float, Int

from clip_jax.errors import InputError
from clip_jax.models import layers
from clip_jax.models.images import NaFlex, Square
from clip_jax.models.layers import Layout, Operations, Remat
from clip_jax.parts import Part

AnyTower = TypeVar("AnyTower", bound="ImageTowerConfig")
AnyTextTower = TypeVar("AnyTextTower", bound="TextTowerConfig")
Arrays = dict[str, Any]  # path in the model's parameters, such as visual/proj → array
Cleaning = Literal["none", "lower", "whitespace", "punctuation", "canonicalize", "clip"]


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """What both kinds of towers answer about their layers and parameters."""

    # Part of a step, and the pattern of its modules' names, beside those of `layers.PARTS`; for the
    # table of `plan`.
    parts: ClassVar[tuple[tuple[str, str], ...]] = ()
    activation = pool = "custom"  # conversion knows the values of the towers that formats have
    num_heads = head_width = 1  # of the attention of `attention_tokens`
    # Parameters whose last dimension is that of embeddings, the projection first; see `cut_to`.
    embedding_parameters: ClassVar[tuple[str, ...]] = ()

    @property
    def short_name(self) -> str:
        """The kind of tower and its size in one word, for tables of runs."""
        return type(self).__name__.removesuffix("Config")

    @property
    def num_layers(self) -> int:
        """Number of layers, which `optim.layer_decay` counts and `image_tokens` can select."""
        return 0

    @property
    def first_layers(self) -> Mapping[str, int]:
        """Path of a module in the tower → number of its layer, from 1; 0: before the first layer.

        A stack, whose parameters have the dimension `depth`, has the number of its first layer.
        Modules and parameters that are not listed come after the last layer.
        """
        name = type(self).__name__
        raise InputError(
            f"{name} does not say which layer a parameter belongs to: set optim.layer_decay=1, or "
            f"define {name}.first_layers and num_layers."
        )

    def layer_of(self, path: str) -> int | None:
        """Return the number of the layer of a parameter, a path below the tower's name.

        0: before the first layer; None: after the last; of a stack: its first layer.
        """
        numbers, names = self.first_layers, path.split("/")
        prefixes = ("/".join(names[:end]) for end in range(1, len(names) + 1))
        return next((numbers[prefix] for prefix in prefixes if prefix in numbers), None)

    @property
    def attention_tokens(self) -> int | None:
        """Tokens of each self-attention in training (`Layout.attend`); None: the tower has none."""
        return None

    def check_width(self, embed_dim: int) -> None:
        """Raise InputError unless embeddings can have `embed_dim` dimensions; by default any."""

    def onnx(self, graph: Any, inputs: str) -> str:
        """Add the tower to an `export.graph.Graph`; return the name of its features [B, E].

        `inputs` is the name of normalised pixels [B, 3, H, W], or of token ids [B, L]. A tower of
        your own is exported to ONNX by means of this method.
        """
        name = type(self).__name__
        raise InputError(
            f"{name} has no form in ONNX: use --format stablehlo, or define {name}.onnx, which "
            "adds the tower to a graph."
        )


def parts_of(towers: Iterable[TowerConfig] = ()) -> dict[str, str]:
    """Return the parts of a step with these towers: name → pattern of its modules' names."""
    patterns: dict[str, list[str]] = {}
    for part, pattern in (*layers.PARTS, *(x for tower in towers for x in tower.parts)):
        patterns.setdefault(part, []).append(pattern)
    return {part: "|".join(dict.fromkeys(alike)) for part, alike in patterns.items()}


@dataclass(frozen=True, kw_only=True)
class ImageTowerConfig(TowerConfig, Part):
    """Base of image towers. The module embeds images by `(images, keys=None, *, train=False)`."""

    image_size: int = 224  # Height and width of input images, in pixels.

    # Settings of some towers, fixed for all others.
    patch_size = 1  # pixels beyond the last full patch are ignored
    patch_dropout = 0.0  # fraction of patches dropped in training, by keys of the batch's rows
    num_patches = 0  # of an image, with padding; 0: the tower has no patches
    # Whether the module has `tokens`, `pool_and_tokens` and `ln_post` like `ViT`, which a caption
    # decoder and losses of single tokens need.
    has_tokens = False
    # Whether kernels with the dimensions P and Q are `layers.Einsum` of patches, which can have
    # low-rank adapters; convolutions cannot.
    has_linear_patches = False
    extra_positions = 0  # position embeddings before those of the grid
    grid = 0  # rows and columns of position embeddings
    resize_method = "cubic"  # how the grid is resized, in terms of `jax.image.resize`
    licence = ""  # what model cards say about the licence of released towers of this kind

    @property
    def max_patches(self) -> int | None:
        """Most patches of an image at its own aspect ratio (NaFlex); None: images are square."""
        return None

    @property
    def batch_norm_group(self) -> int | None:
        """Samples normalised together in training; None: the batch; 1: there is no BatchNorm."""
        return 1

    @property
    def positions_path(self) -> str | None:
        """Path of position embeddings in the model's parameters; None: there are none."""
        return None

    def module(self, embed_dim: int, remat: Remat, unroll: int, layout: Layout) -> nn.Module:
        """Return the Flax module, whose parameters have named dimensions (`layers.named`)."""
        raise NotImplementedError

    def operations(self, embed_dim: int, *, training: bool = False) -> Operations:
        """Count the tower's operations for one image, in training without dropped patches."""
        raise NotImplementedError

    @property
    def image_spec(self) -> Square | NaFlex:
        """The shape of the tower's input."""
        if self.max_patches is None:
            return Square(self.image_size)
        return NaFlex(self.max_patches, self.patch_size)

    @property
    def is_naflex(self) -> bool:
        """Whether images are patches at their own aspect ratio."""
        return self.max_patches is not None

    @property
    def summary(self) -> str:
        """The architecture in one line, for model cards."""
        return type(self).__name__

    def pooled_width(self, embed_dim: int) -> int:
        """Channels before the projection, and of the tokens that a caption decoder attends to."""
        return embed_dim

    def caption_tokens(self, *, training: bool = False) -> int:
        """Return how many tokens a caption decoder attends to, in training without dropped ones."""
        return 0

    @property
    def pads_caption_tokens(self) -> bool:
        """Whether images differ in the number of valid tokens that a caption decoder attends to."""
        return self.is_naflex

    def patch_attention(
        self, weights: Arrays, length: Int[Array, " B"] | None
    ) -> Float[Array, "B L"]:
        """Return how much the embedding attends to each patch; `length` counts the valid ones.

        `weights` are those that the module recorded (`layers.record`), by its modules' names.
        """
        kind = type(self).__name__.removesuffix("Config")
        raise InputError(
            f"attention maps need a vision transformer, and this model has a {kind}: use a model "
            "with a ViT as image tower."
        )

    def unprojected(self: AnyTower, embed_dim: int, params: Arrays) -> tuple[AnyTower, int, Arrays]:
        """Return the tower for linear probes, the width of its features, and its parameters.

        `params` are the tower's. By default features are embeddings.
        """
        return self, embed_dim, params

    # ------------------------------------------------------------------ other sizes

    def with_max_patches(self: AnyTower, max_patches: int | None) -> AnyTower:
        """Return the tower for images of at most this many patches (NaFlex); None: unchanged.

        Raises InputError if the tower takes square images only.
        """
        if max_patches is None:
            return self
        kind = type(self).__name__.removesuffix("Config")
        raise InputError(
            f"tokens={max_patches} needs a ViT as image tower (NaFlex), and this model has a "
            f"{kind}, for {self.image_size} pixels; omit it."
        )

    def with_patch_size(self: AnyTower, patch_size: int) -> AnyTower:
        """Return the tower that cuts images into other patches by means of the same parameters.

        Raises InputError if the tower cannot, as by default.
        """
        if patch_size == self.patch_size:
            return self
        kind = type(self).__name__.removesuffix("Config")
        raise InputError(
            f"patches of {patch_size} pixels need an image tower whose parameters fit several "
            f"sizes, and this model has a {kind} with vision.patch_size={self.patch_size}; train "
            "with that size alone."
        )

    def with_patch_dropout(self: AnyTower, fraction: float) -> AnyTower:
        """Return the tower that drops this fraction of patches in training, if it can drop any."""
        return self

    def with_image_size(self: AnyTower, image_size: int) -> AnyTower:
        """Return the tower for square images of `image_size` pixels."""
        return replace(self, image_size=image_size)

    def fit(self: AnyTower, params: Arrays, before: AnyTower) -> Arrays:
        """Return the model's parameters for this tower, from those of the same at another size.

        By default position embeddings are resized: a grid of a tower for square images as in
        open_clip, antialiased; all others are kept.
        """
        if self.positions_path is None or self.grid == before.grid:
            return params
        table = np.asarray(params[self.positions_path])
        first, grid = np.split(table, [self.extra_positions])
        resized = np.asarray(before.resize_grid(grid.astype(np.float32), self.grid))
        table = np.concatenate([first, resized.astype(table.dtype)])
        return params | {self.positions_path: table}

    def resize_grid(self, grid: Float[Any, "N D"], side: int) -> Float[Any, "n D"]:
        """Resize a square grid of position embeddings to `side` rows and columns."""
        x = rearrange(jnp.asarray(grid), "(h w) D -> h w D", h=self.grid)
        x = jax.image.resize(x, (side, side, x.shape[-1]), self.resize_method)
        return rearrange(x, "h w D -> (h w) D")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Part):
    """Vocabulary and rules that turn texts into token ids; other rules give other ids."""

    # Vocabulary. clip: OpenAI's bundled BPE with OpenAI's rules; otherwise the path of a
    # tokenizer.json or a sentencepiece model, local or in a bucket. Empty: weights without one.
    file: str = "clip"
    # Cleaning before tokenization. lower: lower case. whitespace: repair mojibake and HTML, single
    # spaces. punctuation: lower case, no ASCII punctuation (SigLIP in Hugging Face).
    # canonicalize: repair, then punctuation (SigLIP in open_clip). clip: whitespace, then lower.
    clean: Cleaning = "clip"
    begin_id: int | None = None  # Token id before each text. None: none.
    end_id: int | None = None  # Token id after each text. None: none.
    pad_id: int = 0  # Token id that pads texts to the context length.
    # Token id that becomes 0 wherever it is (open_clip's strip_sep_token, as in CLIPA). None: none.
    zeroed_id: int | None = None
    pad_side: Literal["right", "left"] = "right"  # Side of the padding.
    # How texts that are too long are cut: before end_id (keep_end) or with it (drop_end).
    cut: Literal["keep_end", "drop_end"] = "keep_end"

    def __post_init__(self) -> None:
        layers.check_sizes(self, "text.tokenizer.")

    def make(self, text: "TextTowerConfig") -> Any:
        """Return the tokenizer of a text tower, if a subclass has its own; None: that of `file`.

        It has a `vocab_size`, returns ids [B, length] of `(texts, length, truncate)`, and
        `decode(ids)` is a text. The subclass sets `file` to "", since it stores no vocabulary.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig(TowerConfig, Part):
    """Base of text towers. The module embeds token ids [B, L]."""

    context_length: int = 77  # Maximum tokens per text, begin and end of text included.
    vocab_size: int = 49_408  # Number of token ids; the default is that of CLIP's BPE.
    tokenizer: TokenizerConfig = TokenizerConfig()
    # First positions that stay as they are where those of weights with a shorter context are
    # stretched to this one (Long-CLIP, arXiv:2403.15378). 0: all are interpolated.
    kept_positions: int = 20
    # Context length from which positions were stretched, a record that a run and `convert` write.
    # None: they were not.
    stretched_from: int | None = None

    # Settings of some towers, fixed for all others.
    masks_padding = False  # whether padding, on the right, is neither attended to nor pooled
    # Whether the embedding is the state of a learned token after the text's.
    has_class_token = False
    writes_captions = False  # whether it is a `TextTransformer` that caption decoders can extend

    @property
    def positions_path(self) -> str | None:
        """Path of position embeddings in the model's parameters; None: there are none."""
        return "text/positional_embedding"

    def module(self, **options: Any) -> nn.Module:
        """Return the Flax module with `embed_dim`, `dtype`, `remat`, `unroll` and `layout`."""
        raise NotImplementedError

    def operations(self, embed_dim: int, tokens: int) -> Operations:
        """Count the tower's operations for one text of `tokens` tokens."""
        raise NotImplementedError

    @property
    def sees_padding(self) -> bool:
        """Whether a text's embedding depends on the id and the amount of its padding."""
        return not self.masks_padding

    def used_tokens(self, tokens: Int[Any, "*B L"]) -> Int[Any, "*B"]:
        """Return the number of first tokens on which each text's embedding depends, NumPy's for
        NumPy's; only for towers that do not see padding."""
        ends = np.arange(1, tokens.shape[-1] + 1)
        return ((tokens != self.tokenizer.pad_id) * ends).max(-1).clip(1)

    @property
    def inference_lengths(self) -> tuple[int, ...]:
        """Numbers of tokens to which texts are padded in inference, where each is compiled."""
        shorter = () if self.sees_padding else (32, 128, 512)
        return (*(n for n in shorter if n < self.context_length), self.context_length)

    def shortened(self, tokens: Int[Any, "B L"]) -> Int[Any, "B l"]:
        """Remove padding that no embedding depends on, down to one of `inference_lengths`."""
        if tokens.shape[1] != self.context_length or len(self.inference_lengths) == 1:
            return tokens
        longest = self.used_tokens(tokens).max(initial=1)
        return tokens[:, : min(n for n in self.inference_lengths if n >= longest)]

    @property
    def num_positions(self) -> int:
        """Rows of the table of position embeddings."""
        return self.context_length + self.has_class_token

    def with_context_length(
        self: AnyTextTower, context_length: int, kept_positions: int = 20
    ) -> AnyTextTower:
        """Return the tower for texts of at most `context_length` tokens; see `fit`.

        Raises InputError if a text's embedding depends on its padding, since each length would need
        a training of its own, or if the positions cannot be stretched.
        """
        before = self.context_length
        if context_length == before:
            return self
        if self.sees_padding and not self.has_class_token:
            raise InputError(
                f"context_length={context_length} does not fit a text tower whose embeddings "
                f"depend on the padding (pool={self.pool!r}): it was trained with texts padded to "
                f"{before} tokens, and short texts would get other embeddings. Keep {before}."
            )
        after = replace(self, context_length=context_length)
        if self.positions_path is None or after.num_positions <= self.num_positions:
            return after
        if not 0 <= kept_positions <= before - 2:
            raise InputError(
                f"kept_positions={kept_positions} must be from 0 to {before - 2}, so that two of "
                f"the {before} positions can be stretched to context_length={context_length}."
            )
        return replace(after, kept_positions=kept_positions, stretched_from=before)

    def fit(self, params: Arrays, before: "TextTowerConfig") -> Arrays:
        """Return the model's parameters for this tower, from those of the same with another context
        length.

        Position embeddings are cut, or stretched (`stretched`) after the first `kept_positions`. A
        class token keeps its own.
        """
        path = self.positions_path
        if path not in params or self.num_positions == before.num_positions:
            return params
        table = np.asarray(params[path])
        texts, last = np.split(table, [before.context_length])
        if self.context_length > before.context_length:
            texts = stretched(texts, self.context_length, self.kept_positions)
        return params | {path: np.concatenate([texts[: self.context_length], last])}

    @property
    def end_of_text_id(self) -> int:
        """The end-of-text id of CLIP's vocabulary."""
        return self.vocab_size - 1

    @property
    def clip_vocab_size(self) -> int:
        """Number of ids of CLIP's BPE, end of text included; the model may have more above."""
        return self.end_of_text_id + 1

    @property
    def begin_id(self) -> int | None:
        """The id before each text; in CLIP's vocabulary the last but one."""
        is_clip = self.tokenizer.file == "clip"
        return self.end_of_text_id - 1 if is_clip else self.tokenizer.begin_id

    @property
    def end_id(self) -> int | None:
        """The id after each text; in CLIP's vocabulary the last."""
        is_clip = self.tokenizer.file == "clip"
        return self.end_of_text_id if is_clip else self.tokenizer.end_id


def stretched(table: Float[np.ndarray, "L D"], length: int, kept: int) -> Float[np.ndarray, "l D"]:
    """Stretch position embeddings to `length` rows as Long-CLIP does (arXiv:2403.15378, 3.1).

    The first `kept` rows stay. The others are linear interpolations between rows of the table, at
    distances of (L − kept) / (length − kept), beginning with row `kept` itself. Rows after the last
    of the table are extrapolated from its last two. With `kept` 0, all rows are interpolated.
    """
    steps = np.arange(length - kept) * (len(table) - kept) / (length - kept)
    below = np.minimum(kept + steps.astype(int), len(table) - 2)
    above = (kept + steps - below)[:, None]  # more than 1 after the last row of the table
    exact = table.astype(np.float64)
    values = (1 - above) * exact[below] + above * exact[below + 1]
    return np.concatenate([table[:kept], values.astype(table.dtype)])
