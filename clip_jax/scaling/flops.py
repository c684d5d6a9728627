"""FLOPs of CLIP by formula, per tower, in the three conventions that published numbers use.

A convention changes a number by up to a factor of two, so each has a name:

- `matmul`: 2 × multiply-adds of all matmuls and convolutions, attention's included, over the whole
  sequence whatever the mask. open_clip's profile; this project's own figures and MFU.
- `fvcore`: multiply-adds, not doubled, plus 5 per element of a LayerNorm and 2 per element of a
  BatchNorm, as fvcore counts them ("GMACs"). The compute axis of Cherti et al. 2023.
- `no_attention`: `matmul` without the two products of attention (scores, and scores × values):
  what "6 × parameters × tokens" stands for.

MFU divides the `matmul` count of a training step (3 × forward, recomputation not counted, even the
patch projection's unneeded input gradient counted) by the chips' peak.

One thing is not a convention but a waste: open_clip's attention pool of a ResNet lets every place
of the map query and uses the mean token's answer alone. `forward` counts it, to be comparable with
published numbers; `training`, and so MFU, counts the one query that is needed, and computed here.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

from clip_jax.models.clip import CLIPConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

Convention = Literal["matmul", "fvcore", "no_attention"]
Tower = Literal["image", "text"]

BACKWARD = 2  # a gradient for the input and one for the weights, each as large as the forward


class Operations(NamedTuple):
    """What a forward pass does, before a convention weighs it."""

    macs: int = 0  # multiply-adds of convolutions and matmuls with weights
    attention_macs: int = 0  # multiply-adds of the two products between activations
    layer_norm: int = 0  # elements normalised
    batch_norm: int = 0  # elements normalised

    def plus(self, *others: "Operations") -> "Operations":
        return Operations(*(sum(counts) for counts in zip(self, *others, strict=True)))

    def weigh(self, convention: Convention) -> int:
        match convention:
            case "matmul":
                return 2 * (self.macs + self.attention_macs)
            case "fvcore":
                macs = self.macs + self.attention_macs
                return macs + 5 * self.layer_norm + 2 * self.batch_norm
            case "no_attention":
                return 2 * self.macs


class Flops(NamedTuple):
    """Of one image-text pair, forward. The unit is the convention's: FLOPs, or MACs (`fvcore`)."""

    image: int
    text: int

    @property
    def total(self) -> int:
        return self.image + self.text


class TrainingFlops(NamedTuple):
    """Of one optimizer step over the global batch: each tower's, and the similarity matrix's."""

    image: int
    text: int
    loss: int

    @property
    def total(self) -> int:
        return self.image + self.text + self.loss


def forward(
    config: CLIPConfig,
    convention: Convention = "matmul",
    *,
    image_size: int | None = None,
    text_length: int | None = None,
    patch_dropout: float = 0.0,
) -> Flops:
    """Count the forward pass of one image-text pair.

    Args:
      config: the architecture.
      convention: what counts (see the module).
      image_size: pixels; the config's own by default.
      text_length: tokens; the config's context length by default.
      patch_dropout: share of the patches dropped after the patch projection (FLIP).

    Raises:
      ValueError: a size that the architecture cannot take.
    """
    return Flops(
        _image(config, image_size, patch_dropout, queries=None).weigh(convention),
        _text(config, text_length).weigh(convention),
    )


def training(
    config: CLIPConfig,
    batch_size: int,
    convention: Convention = "matmul",
    *,
    image_size: int | None = None,
    text_length: int | None = None,
    patch_dropout: float = 0.0,
    locked: tuple[Tower, ...] = (),
) -> TrainingFlops:
    """Count one training step: 3 × forward; a locked tower (LiT) 1 ×; nothing recomputed.

    The loss is the global `[batch_size, batch_size]` similarity, computed once: whatever its form
    (dense, blocked, ring), every pair of the global batch meets once.

    Args:
      config: the architecture.
      batch_size: pairs in the global batch.
      convention: what counts (see the module).
      image_size: pixels; the config's own by default.
      text_length: tokens; the config's context length by default.
      patch_dropout: share of the patches dropped after the patch projection (FLIP).
      locked: towers that take no gradient.
    """
    image = _image(config, image_size, patch_dropout, queries=1).weigh(convention)
    text = _text(config, text_length).weigh(convention)
    similarity = Operations(macs=batch_size * batch_size * config.embed_dim).weigh(convention)
    # Each locked tower spares the loss one of its two gradients.
    return TrainingFlops(
        image=batch_size * image * (1 if "image" in locked else 1 + BACKWARD),
        text=batch_size * text * (1 if "text" in locked else 1 + BACKWARD),
        loss=similarity * (1 + BACKWARD - len(set(locked))),
    )


def _image(
    config: CLIPConfig, image_size: int | None, patch_dropout: float, queries: int | None
) -> Operations:
    vision = config.vision
    if image_size is not None:
        vision = replace(vision, image_size=image_size)
    if not 0 <= patch_dropout < 1:
        raise ValueError(f"patch_dropout={patch_dropout} must be at least 0 and less than 1.")
    if isinstance(vision, ViTConfig):
        return vit(vision, config.embed_dim, patch_dropout)
    if patch_dropout:
        raise ValueError(f"patch_dropout={patch_dropout}: a ResNet has no patches; set it to 0.")
    return resnet(vision, config.embed_dim, queries)


def _text(config: CLIPConfig, text_length: int | None) -> Operations:
    text = config.text
    length = text.context_length if text_length is None else text_length
    if not 1 <= length <= text.context_length:
        raise ValueError(
            f"text_length={length} must lie between 1 and text.context_length="
            f"{text.context_length}."
        )
    return text_transformer(text, config.embed_dim, length)


def transformer(tokens: int, width: int, mlp_width: int, depth: int) -> Operations:
    """Count the residual blocks: per token 4·width² for attention and 2·width·mlp_width."""
    return Operations(
        macs=depth * tokens * (4 * width * width + 2 * width * mlp_width),
        attention_macs=depth * 2 * tokens * tokens * width,
        layer_norm=depth * 2 * tokens * width,
    )


def vit(config: ViTConfig, embed_dim: int, patch_dropout: float = 0.0) -> Operations:
    """Count the image tower as a vision transformer, for one image."""
    c, width = config, config.width
    kept = c.num_patches if not patch_dropout else max(1, int(c.num_patches * (1 - patch_dropout)))
    tokens = kept + c.class_token
    # SigLIP normalises every token before pooling, the others one vector after it.
    norms = (tokens if c.pre_norm else 0) + (tokens if c.pool == "map" else 1)
    ends = Operations(
        macs=c.num_patches * c.patch_size**2 * 3 * width + c.projection * width * embed_dim,
        layer_norm=norms * width,
    )
    parts = [transformer(tokens, width, c.mlp_width, c.depth)]
    if c.pool == "map":  # one query: its projections and MLP are of one token
        parts.append(
            Operations(
                macs=2 * width * width + 2 * tokens * width * width + 2 * width * c.mlp_width,
                attention_macs=2 * tokens * width,
                layer_norm=width,
            )
        )
    return ends.plus(*parts)


def text_transformer(config: TextConfig, embed_dim: int, tokens: int) -> Operations:
    """Count the text tower, for one text; looking an embedding up costs nothing."""
    c = config
    # OpenAI and open_clip normalise every token, then read one.
    ends = Operations(macs=c.width * embed_dim, layer_norm=tokens * c.width)
    return ends.plus(transformer(tokens, c.width, c.mlp_width, c.depth))


def resnet(config: ResNetConfig, embed_dim: int, queries: int | None = 1) -> Operations:
    """Count the image tower as a modified ResNet, for one image.

    `queries` is how many tokens query in the attention pool: the one whose answer is used, or all
    (None) as in published profiles, which is 5% more for RN50.
    """
    width, size = config.width, config.image_size // 2
    # Stem: three 3×3 convolutions, the first with stride 2, then 2×2 average pooling.
    macs = 9 * size**2 * (3 * (width // 2) + (width // 2) ** 2 + width // 2 * width)
    batch_norm = size**2 * 2 * width
    size, inputs = size // 2, width
    for stage, blocks in enumerate(config.layers):
        planes = width * 2**stage
        outputs = 4 * planes
        for block in range(blocks):
            # Strides are average pools (anti-aliasing), after the 3×3 convolution, before the 1×1.
            out_size = size // 2 if stage > 0 and block == 0 else size
            macs += size**2 * (inputs * planes + 9 * planes**2) + out_size**2 * planes * outputs
            batch_norm += size**2 * 2 * planes + out_size**2 * outputs
            if block == 0:  # the shortcut changes width
                macs += out_size**2 * inputs * outputs
                batch_norm += out_size**2 * outputs
            inputs, size = outputs, out_size
    tokens = size**2 + 1
    queries = tokens if queries is None else queries
    pool = Operations(
        macs=2 * tokens * inputs**2 + queries * (inputs**2 + inputs * embed_dim),
        attention_macs=2 * queries * tokens * inputs,
    )
    return Operations(macs=macs, batch_norm=batch_norm).plus(pool)
