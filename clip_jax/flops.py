"""FLOPs of CLIP by formula, per tower, in the three conventions that published numbers use.

Each tower counts its own operations (`operations` of its config); this adds them up. A convention
changes a number by up to a factor of two, so each has a name:

- `matmul`: 2 × multiply-adds of all matmuls and convolutions, attention's included, over the whole
  sequence whatever the mask. open_clip's profile; this project's own figures and MFU.
- `fvcore`: multiply-adds, not doubled, plus 5 per element of a LayerNorm and 2 per element of a
  BatchNorm, as fvcore counts them ("GMACs"). The compute axis of Cherti et al. 2023.
- `no_attention`: `matmul` without the two products of attention (scores, and scores × values):
  what "6 × parameters × tokens" stands for.

MFU divides the `matmul` count of a training step (3 × forward, recomputation not counted, even the
patch projection's unneeded input gradient counted) by the chips' peak.

One thing is not a convention but a waste: open_clip's attention pool of a ResNet lets each position
of the map query and uses the mean token's answer alone. `forward` counts it, to be comparable with
published numbers; `training`, and so MFU, counts the one query that is needed, and computed here.
So with CoCa: `forward` writes the last token too, and projects its queries for each image.
"""

from dataclasses import replace
from typing import Any, Literal, NamedTuple

from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.layers import Operations
from clip_jax.models.vit import ViTConfig

Convention = Literal["matmul", "fvcore", "no_attention"]
Tower = Literal["image", "text"]

BACKWARD = 2  # a gradient for the input and one for the weights, each as large as the forward


def weigh(counts: Operations, convention: Convention) -> int:
    """Add up what a convention counts."""
    macs = counts.macs + counts.attention_macs
    match convention:
        case "matmul":
            return 2 * macs
        case "fvcore":
            return macs + 5 * counts.layer_norm + 2 * counts.batch_norm
        case "no_attention":
            return 2 * counts.macs


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
    locked = run.optim.locked
    macs = sum(term.macs(run.model, run.batch_size, locked) for term in run.objective)
    return training(run.model, run.batch_size, locked=locked)._replace(loss=2 * macs)


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
    counts = _count(config, image_size, text_length)
    return Flops(*(weigh(x, convention) for x in counts))


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
    counts = _count(config, image_size, text_length, training=True, locked=locked)
    image, text, written = (weigh(x, convention) for x in counts)
    similarity = weigh(Operations(macs=batch_size * batch_size * config.embed_dim), convention)
    # Each locked tower spares the loss one of its two gradients.
    return TrainingFlops(
        image=batch_size * image * (1 if "image" in locked else 1 + BACKWARD),
        text=batch_size * text * (1 if "text" in locked else 1 + BACKWARD),
        loss=similarity * (1 + BACKWARD - len(set(locked))),
        decoder=batch_size * written * (1 + BACKWARD),
    )


def _count(
    config: CLIPConfig,
    image_size: int | None,
    text_length: int | None,
    training: bool = False,
    locked: tuple[Tower, ...] = (),
) -> tuple[Operations, Operations, Operations]:
    """Count the image tower, the text tower and the decoder, in training without the last token."""
    vision, text, decoder = config.vision, config.text, config.decoder
    if image_size is not None:
        vision = replace(vision, image_size=image_size)
    tokens = text.context_length if text_length is None else text_length
    if not 1 <= tokens <= text.context_length:
        raise InputError(
            f"text_length={tokens} must lie between 1 and text.context_length="
            f"{text.context_length}."
        )
    is_dropped = training and "image" not in locked
    image = vision.operations(config.embed_dim, training=is_dropped)
    if decoder is None or not isinstance(vision, ViTConfig):
        return image, text.operations(config.embed_dim, tokens), Operations()
    seen = vision.caption_tokens(vision.kept_patches if is_dropped else vision.num_patches)
    return (
        image,
        decoder.text_operations(text, config.embed_dim, tokens),
        decoder.operations(text, tokens - training, seen, config.image_token_width),
    )
