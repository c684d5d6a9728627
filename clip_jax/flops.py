"""FLOPs of CLIP by formula, per tower, in the three conventions that published numbers use.

Each tower counts its own operations (`operations` of its config); this adds them up. A convention
changes a number by up to a factor of two, so each has a name:

- `matmul`: 2 × multiply-adds of all matmuls and convolutions, attention's included, over the full
  sequence whatever the mask. Used by open_clip's profile, and here for all figures and MFU.
- `laion`: as `matmul`, without attention's scores and weighted sums, which the profiler of
  arXiv:2506.04598 does not see; of captioners, the profiled step of training. Its caption pass has
  one token less. MaMMUT also applies the vocabulary head in the contrastive pass; CoCa encodes
  each text twice.
- `fvcore`: multiply-adds, not doubled, plus 5 per element of a LayerNorm and 2 per element of a
  BatchNorm, as fvcore counts them ("GMACs"). The compute axis of Cherti et al. 2023.

MFU divides the `matmul` count of a training step (3 × forward, recomputation not counted, even the
patch projection's unneeded input gradient counted) by the chips' peak.

`forward` also counts unneeded work of open_clip, to be comparable with published numbers: its
attention pool of a ResNet queries at every position and uses only the mean token's result, and its
CoCa decodes the last token and projects its queries for each image. `training`, and so MFU, counts
only what is needed, and computed here.
"""

import functools
from dataclasses import replace
from typing import Literal, NamedTuple, cast

from clip_jax.losses import SoftmaxConfig
from clip_jax.losses.objective import active, needs, needs_text, reads
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.decoder import CoCaConfig, MaMMUTConfig
from clip_jax.models.layers import Operations
from clip_jax.models.lora import adapted
from clip_jax.models.outputs import output
from clip_jax.models.vit import ViTConfig
from clip_jax.optim.wrappers import TOWERS, Tower
from clip_jax.step import StepConfig

Convention = Literal["matmul", "laion", "fvcore"]

BACKWARD = 2  # a gradient for the input and one for the weights, each as large as the forward


class Flops(NamedTuple):
    """Operations of one image-text pair, forward, or of one optimizer step over the global batch.

    The unit is the convention's: FLOPs, or MACs (`fvcore`).
    """

    image: int
    text: int
    decoder: int = 0  # with its vocabulary projection; 0 without a decoder
    loss: int = 0  # the similarity matrix of a step
    teacher: int = 0  # forward passes of the objective's frozen models

    @property
    def total(self) -> int:
        return sum(self)


def of_step(config: StepConfig) -> Flops:
    """Count one step, with dropped patches, locked towers and adapters; nothing of a stored tower;
    texts in groups by length (`text_lengths`) as they are padded there."""
    locked, lora = config.optim.locked, config.lora
    if lora is not None:  # no gradient passes a tower without adapters
        has = {each.kernel.split("/")[0] for each in adapted(config.model, lora)}
        locked += tuple(tower for tower, name in TOWERS.items() if name not in has)
    if config.stored is not None and config.stored not in locked:
        locked += (config.stored,)
    objective = active(config.objective)
    macs = sum(term.macs(config.model, config.batch_size, locked) for term in objective)
    teachers = [model for term in objective for model in term.frozen().values()]
    each = [(forward(x.config), x.texts) for x in teachers]
    teacher = config.batch_size * sum(of.image + texts * of.text for of, texts in each)
    count = functools.partial(
        _towers, batch_size=config.batch_size, locked=locked, has_adapters=lora is not None
    )
    towers = count(config.model)
    if config.text_lengths is not None:

        def text_at(tokens: int) -> int:
            text = replace(config.model.text, context_length=tokens)
            return count(replace(config.model, text=text)).text

        towers = towers._replace(text=config.text_lengths.mean(text_at))
    embedded = [x for x in map(output, needs(objective)) if x.is_embedding and x.input != x.tower]
    inputs = reads(objective, config.model)
    number = {"image": 1, "text": int(needs_text(objective, config.model))}
    for x in embedded:
        number[x.tower] += getattr(inputs.get(x.input), "count", 1)
    images, texts = number["image"], number["text"]
    towers = towers._replace(image=towers.image * images, text=towers.text * texts)
    passes = {name: of for term in objective for name, of in term.passes(config.model).items()}
    for of in passes.values():
        times = config.batch_size * (1 + BACKWARD * of.is_trained)
        towers = towers._replace(image=towers.image + times * _weigh(of.operations))
    if config.stored is not None:
        towers = towers._replace(**{config.stored: 0})
    if "caption_states" not in needs(objective):
        towers = towers._replace(decoder=0)
    return towers._replace(loss=2 * macs, teacher=teacher)


def forward(config: CLIPConfig, convention: Convention = "matmul") -> Flops:
    """Count the forward pass of one image-text pair, with all patches."""
    if convention != "laion" or not isinstance(config.decoder, CoCaConfig | MaMMUTConfig):
        return Flops(*(_weigh(counts, convention) for counts in _count(config)))
    image, text, written = _count(config, training=True, locked=("image",))  # with all patches
    words = config.text
    head = Operations(macs=words.context_length * words.width * words.vocab_size)
    text += text if isinstance(config.decoder, CoCaConfig) else head
    return Flops(*(_weigh(counts, convention) for counts in (image, text, written)))


def training(config: CLIPConfig, batch_size: int, locked: tuple[Tower, ...] = ()) -> Flops:
    """Count one step with a softmax loss by `matmul`: 3 × forward; a locked tower (LiT) 1 ×;
    nothing recomputed.

    Patches that the config drops (FLIP) cost their projection alone; a locked tower drops none. The
    head on a locked tower (dino.txt) costs 3 ×.

    The loss is the global `[batch_size, batch_size]` similarity, computed once: whatever its form
    (dense, blocked, ring), every pair of the global batch meets once.
    """
    macs = SoftmaxConfig().macs(config, batch_size, locked)
    return _towers(config, batch_size, locked)._replace(loss=2 * macs)


def _towers(
    config: CLIPConfig, batch_size: int, locked: tuple[Tower, ...], has_adapters: bool = False
) -> Flops:
    """Count towers and decoder in one step.

    With low-rank adapters (LoRA), frozen weights have no gradient, which leaves 2 × forward, and
    3 × in attention's own products. The adapters' share, about rank / width, is not counted.
    """
    image, text, written = _count(config, training=True, locked=locked)
    # The head on a locked tower has a backward pass.
    head = _head(config, training=False) if "image" in locked else Operations()

    def trained(of: Operations, tower: str = "") -> int:
        if tower in locked:
            return _weigh(of)
        return _weigh((1 + BACKWARD) * of) - has_adapters * 2 * (of.macs - of.attention)

    return Flops(
        image=batch_size * (trained(image, "image") + _weigh(BACKWARD * head)),
        text=batch_size * trained(text, "text"),
        decoder=batch_size * trained(written),
    )


def _weigh(counts: Operations, convention: Convention = "matmul") -> int:
    if convention != "fvcore":
        return 2 * (counts.macs - (convention == "laion") * counts.attention)
    return counts.macs + 5 * counts.layer_norm + 2 * counts.batch_norm


def _count(
    config: CLIPConfig, training: bool = False, locked: tuple[Tower, ...] = ()
) -> tuple[Operations, Operations, Operations]:
    """Count the image tower, the text tower and the decoder, in training without the last token."""
    vision, text, decoder = config.vision, config.text, config.decoder
    tokens = text.context_length
    is_dropped = training and "image" not in locked
    image = vision.operations(config.embed_dim, training=is_dropped)
    image += _head(config, training=is_dropped)
    if decoder is None:
        return image, text.operations(config.embed_dim, tokens), Operations()
    seen = vision.caption_tokens(training=is_dropped)
    read = decoder.num_labels(text) if training else tokens
    return (
        image,
        decoder.text_operations(text, config.embed_dim, tokens),
        decoder.operations(text, read, seen, config.image_token_width),
    )


def _head(config: CLIPConfig, *, training: bool) -> Operations:
    """Count the head on the image tower's tokens, if there is one."""
    head, vision = config.image_head, config.vision
    if head is None:
        return Operations()
    return head.operations(cast(ViTConfig, vision), config.embed_dim, training=training)
