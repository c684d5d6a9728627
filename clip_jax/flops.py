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
So with CoCa: `forward` writes the last token too, and projects its queries for each image.
"""

from dataclasses import replace
from typing import Any, Literal, NamedTuple

from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.decoder import CoCaConfig, DecoderConfig, MaMMUTConfig
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
    decoder: int = 0  # where there is one, its vocabulary included

    @property
    def total(self) -> int:
        return sum(self)


class TrainingFlops(NamedTuple):
    """Of one optimizer step over the global batch: each tower's, and the similarity matrix's."""

    image: int
    text: int
    loss: int
    decoder: int = 0  # where there is one, its vocabulary included

    @property
    def total(self) -> int:
        return sum(self)


def of_step(run: Any) -> TrainingFlops:
    """Count one training step of a run's Config or Recipe, with its dropped patches and locks."""
    return training(run.model, run.batch_size, locked=run.optim.locked)


def forward(
    config: CLIPConfig,
    convention: Convention = "matmul",
    *,
    image_size: int | None = None,
    text_length: int | None = None,
) -> Flops:
    """Count the forward pass of one image-text pair, with all patches.

    Args:
      config: the architecture.
      convention: what counts (see the module).
      image_size: pixels; the config's own by default.
      text_length: tokens; the config's context length by default.

    Raises:
      InputError: a size that the architecture cannot take.
    """
    return Flops(
        _image(config, image_size, training=False).weigh(convention),
        _text(config, text_length).weigh(convention),
        _decoder(config, image_size, text_length, training=False).weigh(convention),
    )


def training(
    config: CLIPConfig,
    batch_size: int,
    convention: Convention = "matmul",
    *,
    image_size: int | None = None,
    text_length: int | None = None,
    locked: tuple[Tower, ...] = (),
) -> TrainingFlops:
    """Count one training step: 3 × forward; a locked tower (LiT) 1 ×; nothing recomputed.

    Patches that the config drops (FLIP) cost their projection alone; a locked tower drops none.

    The loss is the global `[batch_size, batch_size]` similarity, computed once: whatever its form
    (dense, blocked, ring), every pair of the global batch meets once.

    Args:
      config: the architecture.
      batch_size: pairs in the global batch.
      convention: what counts (see the module).
      image_size: pixels; the config's own by default.
      text_length: tokens; the config's context length by default.
      locked: towers that take no gradient.
    """
    image = _image(config, image_size, training="image" not in locked).weigh(convention)
    text = _text(config, text_length).weigh(convention)
    written = _decoder(
        config, image_size, text_length, training=True, dropped="image" not in locked
    ).weigh(convention)
    similarity = Operations(macs=batch_size * batch_size * config.embed_dim).weigh(convention)
    # Each locked tower spares the loss one of its two gradients.
    return TrainingFlops(
        image=batch_size * image * (1 if "image" in locked else 1 + BACKWARD),
        text=batch_size * text * (1 if "text" in locked else 1 + BACKWARD),
        loss=similarity * (1 + BACKWARD - len(set(locked))),
        decoder=batch_size * written * (1 + BACKWARD),
    )


def _image(config: CLIPConfig, image_size: int | None, training: bool) -> Operations:
    vision = config.vision
    if image_size is not None:
        vision = replace(vision, image_size=image_size)
    if isinstance(vision, ViTConfig):
        if training or vision.pool != "queries":
            kept = vision.kept_patches if training else vision.num_patches
            return vit(vision, config.embed_dim, kept)
        queries = Operations(macs=vision.pool_queries * config.embed_dim**2)
        return vit(vision, config.embed_dim, vision.num_patches).plus(queries)
    return resnet(vision, config.embed_dim, queries=1 if training else None)


def _text(config: CLIPConfig, text_length: int | None) -> Operations:
    text = config.text
    length = text.context_length if text_length is None else text_length
    if not 1 <= length <= text.context_length:
        raise InputError(
            f"text_length={length} must lie between 1 and text.context_length="
            f"{text.context_length}."
        )
    return text_transformer(text, config.embed_dim, length, config.decoder)


def _decoder(
    config: CLIPConfig, image_size: int | None, text_length: int | None, *,
    training: bool, dropped: bool = False,
) -> Operations:  # fmt: skip
    """Count the writing of one caption, in training without the last token; or nothing.

    `dropped`: patches are.
    """
    vision, text = config.vision, config.text
    if config.decoder is None or not isinstance(vision, ViTConfig):
        return Operations()
    if image_size is not None:
        vision = replace(vision, image_size=image_size)
    seen = vision.caption_tokens(vision.kept_patches if dropped else vision.num_patches)
    tokens = (text.context_length if text_length is None else text_length) - training
    words = Operations(macs=tokens * text.width * text.vocab_size, layer_norm=tokens * text.width)
    return words.plus(decoder(config.decoder, text, tokens, seen, config.image_token_width))


def decoder(
    config: DecoderConfig, text: TextConfig, tokens: int, seen: int, image_width: int
) -> Operations:
    """Count a decoder's layers for one caption that sees `seen` image tokens."""
    width = text.width
    if isinstance(config, CoCaConfig):
        depth, mlp_width = config.depth, int(width * config.mlp_ratio)
        own, crossed = transformer(tokens, width, mlp_width, depth), Operations()
    else:
        depth, mlp_width = text.depth // config.cross_every, text.mlp_width
        own = mammut_blocks(text, config, tokens)
        crossed, image_width = Operations(macs=seen * image_width * width), width
    cross = Operations(
        macs=depth * (2 * tokens * width * (width + mlp_width) + 2 * seen * image_width * width),
        attention_macs=depth * 2 * tokens * seen * width,
        layer_norm=depth * (2 * tokens * width + seen * image_width),
    )
    return own.plus(crossed, cross)


def mammut_blocks(text: TextConfig, config: MaMMUTConfig, tokens: int) -> Operations:
    """Count the text blocks of MaMMUT, of which some may have no MLP."""
    blocks = transformer(tokens, text.width, text.mlp_width, text.depth)
    bare = 0 if config.first_mlp else text.depth // config.cross_every
    return blocks._replace(
        macs=blocks.macs - bare * tokens * 2 * text.width * text.mlp_width,
        layer_norm=blocks.layer_norm - bare * tokens * text.width,
    )


def transformer(tokens: int, width: int, mlp_width: int, depth: int) -> Operations:
    """Count the residual blocks: per token 4·width² for attention and 2·width·mlp_width."""
    return Operations(
        macs=depth * tokens * (4 * width * width + 2 * width * mlp_width),
        attention_macs=depth * 2 * tokens * tokens * width,
        layer_norm=depth * 2 * tokens * width,
    )


def vit(config: ViTConfig, embed_dim: int, patches: int) -> Operations:
    """Count the image tower as a vision transformer, for one image of which it sees `patches`."""
    c, width = config, config.width
    tokens = patches + c.class_token
    # SigLIP normalises every token before pooling, the others one vector after it.
    norms = (tokens if c.pre_norm else 0) + (tokens if c.pool == "map" else 1)
    pooled_width = embed_dim if c.pool == "queries" else width
    ends = Operations(
        macs=c.num_patches * c.patch_size**2 * 3 * width + c.projection * pooled_width * embed_dim,
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
    if c.pool == "queries":  # the queries are projected once, not for each image
        queries = c.pool_queries
        parts.append(
            Operations(
                macs=2 * tokens * width * embed_dim + queries * embed_dim * embed_dim,
                attention_macs=2 * queries * tokens * embed_dim,
                layer_norm=tokens * width + queries * embed_dim - width,
            )
        )
    return ends.plus(*parts)


def text_transformer(
    config: TextConfig, embed_dim: int, tokens: int, decoder: DecoderConfig | None = None
) -> Operations:
    """Count the text tower, for one text; looking an embedding up costs nothing."""
    c = config
    tokens += c.pool == "class_token"
    # OpenAI and open_clip normalise every token, then read one.
    ends = Operations(macs=c.projection * c.width * embed_dim, layer_norm=tokens * c.width)
    if isinstance(decoder, MaMMUTConfig):
        return ends.plus(mammut_blocks(c, decoder, tokens))
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
