"""CLIP as pure functions of a nested dict of parameters (paper, figure 3)."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from clip_jax.errors import InputError
from clip_jax.models import layers
from clip_jax.models.attention import Backend
from clip_jax.models.bert import BertConfig
from clip_jax.models.conv_stem import ConvStemConfig
from clip_jax.models.convnext import ConvNeXtConfig
from clip_jax.models.decoder import Caption
from clip_jax.models.decoders import DecoderConfig
from clip_jax.models.dino import DinoConfig
from clip_jax.models.image_head import ImageHead, ImageHeadConfig
from clip_jax.models.images import (
    OPENAI_MEAN,
    OPENAI_STD,
    Images,
    ImageTokens,
    Patches,
    as_dtype,
    is_normalized,
    join_tokens,
    normalize,
    split_tokens,
)
from clip_jax.models.layers import DType, Layout, Remat, named
from clip_jax.models.outputs import output
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.rotary import RotaryConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.tips import TipsConfig, TipsTextConfig
from clip_jax.models.tower import TowerConfig
from clip_jax.models.vit import Masked, ViTConfig

Params = dict[str, Any]
ByLength = Callable[[Callable[[Array], Array], Array], Array]
AnyArray = TypeVar("AnyArray", np.ndarray, Array)
Vision = (
    ViTConfig
    | ResNetConfig
    | ConvStemConfig
    | RotaryConfig
    | TipsConfig
    | DinoConfig
    | ConvNeXtConfig
)
Text = TextConfig | BertConfig | TipsTextConfig


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Architecture of a CLIP model: two towers and the embedding space they share."""

    embed_dim: int = 512  # Dimensions of the shared embedding space.
    vision: Vision = field(default_factory=ViTConfig)
    text: Text = field(default_factory=TextConfig)
    # Caption decoder: CoCa's, MaMMUT's or CapPa's. None: no captions.
    decoder: DecoderConfig | None = None
    # Head of dino.txt on all tokens of the image tower, which is trained also if the tower is
    # locked. None: the embedding is the tower's own.
    image_head: ImageHeadConfig | None = None
    init_logit_scale: float = 1 / 0.07  # Initial inverse temperature; SigLIP uses 10.
    init_logit_bias: float | None = None  # Initial logit bias; SigLIP uses −10. None: no bias.
    image_mean: tuple[float, float, float] = OPENAI_MEAN  # Mean of RGB in [0, 1], subtracted.
    image_std: tuple[float, float, float] = OPENAI_STD  # Standard deviation of RGB in [0, 1].
    dtype: DType = "bfloat16"  # Type of matmuls; parameters, norms and softmax are float32.
    # Activations saved for the backward pass, which recomputes the others. none: all are saved;
    # hidden: each block's q, k, v, attention output, residual and the MLP's hidden state;
    # residual: the same without the hidden state; attention: q, k, v and attention output; full:
    # none are saved.
    remat: Remat = "none"
    # Blocks per iteration of a tower's loop. As many as the tower has: no loop, with which B/16 and
    # B/32 are faster on TPUs, and need less memory, but compile longer.
    unroll: int = 1
    # Attention backend in training. auto: by device and sequence length; xla: any device; short and
    # splash: TPUs; cudnn: GPUs, bfloat16.
    attention: Backend = "auto"

    def __post_init__(self) -> None:
        layers.check_sizes(
            self,
            "model.",
            init_logit_scale="(0, inf)",
            init_logit_bias="(-inf, inf)",
            image_mean="(-inf, inf)",
            image_std="(0, inf)",
        )
        if self.image_head is None:
            self.vision.check_width(self.embed_dim)
        else:
            self.image_head.check(self.vision, self.embed_dim)
        self.text.check_width(self.embed_dim)
        if self.decoder is not None:
            if self.image_head is not None:
                raise InputError(
                    "model.decoder and model.image_head exclude each other: set one to None."
                )
            if not (self.vision.has_tokens and self.text.writes_captions):
                raise InputError(
                    "model.decoder needs a vision transformer, not a ResNet or a ConvNeXt, and a "
                    "TextConfig: choose others, or set model.decoder to None."
                )
            self.decoder.check(self.text, self.image_token_width)

    @property
    def has_logit_bias(self) -> bool:
        """Whether the probability of each pair is a sigmoid (SigLIP) instead of a softmax."""
        return self.init_logit_bias is not None

    @property
    def image_token_width(self) -> int:
        """Channels of the tokens that a decoder attends to."""
        return self.vision.pooled_width(self.embed_dim)

    @property
    def towers(self) -> dict[str, TowerConfig]:
        """The towers, the head and the decoder by their names in the parameter tree."""
        towers: dict[str, TowerConfig] = {"visual": self.vision, "text": self.text}
        others = {"image_head": self.image_head, "decoder": self.decoder}
        return towers | {name: x for name, x in others.items() if x is not None}

    def layers_from(self, path: str) -> int:
        """Return the number of layers from that of a parameter to its tower's last, both included.

        Parameters before the first layer have one more, those after the last 0; a stack has that of
        its first layer.
        """
        name, _, inside = path.partition("/")
        tower = self.towers.get(name)
        layer = tower.layer_of(inside) if tower else None
        if tower is None or layer is None:
            return 0
        count = tower.num_layers
        if name == "visual" and self.image_head is not None:
            count += self.image_head.num_layers
        if name == "text" and self.decoder is not None:
            count = self.decoder.text_layers(count)
        return count + 1 - layer

    def dimensions(self) -> dict[str, str]:
        """Return path → dimension names for every parameter; see `layers` for the names."""
        return {path: " ".join(x.names) for path, x in parameters(self).items()}


class Towers(nn.Module):
    """Flax module of the towers, the decoder and the logit scale, with one tree of parameters."""

    config: CLIPConfig
    layout: Layout = Layout()

    def setup(self) -> None:
        c = self.config
        self.visual = c.vision.module(c.embed_dim, c.remat, c.unroll, self.layout)
        options: dict[str, Any] = {
            "embed_dim": c.embed_dim,
            "dtype": c.dtype,
            "remat": c.remat,
            "unroll": c.unroll,
            "layout": self.layout,
        }
        if c.image_head is not None:
            sizes = (cast(ViTConfig, c.vision), c.embed_dim, c.remat, c.unroll, self.layout)
            self.image_head = ImageHead(c.image_head, *sizes)
        if c.decoder is None:
            self.text = c.text.module(**options)
        else:
            self.text, self.decoder = c.decoder.modules(c.text, c.image_token_width, options)
        scale = named("", nn.initializers.constant(math.log(c.init_logit_scale)))
        self.logit_scale = self.param("logit_scale", scale, ())
        if c.init_logit_bias is not None:
            bias = named("", nn.initializers.constant(c.init_logit_bias))
            self.logit_bias = self.param("logit_bias", bias, ())

    def run(self, function: Callable[["Towers"], Any]) -> Any:
        """Return `function` of the bound modules."""
        return function(self)


@dataclass(frozen=True)
class CLIP:
    """Functions of one architecture; hashable, so it can be a static argument of `jit`.

    Parameters are plain nested float32 dicts: `visual`, `text`, `logit_scale` (its logarithm, as
    OpenAI stores it) and, for SigLIP, `logit_bias`; for a ResNet also `batch_stats`, BatchNorm's
    running statistics, which have no gradient. Features are float32, by default not normalised.
    """

    config: CLIPConfig
    layout: Layout = Layout()  # how arrays are sharded over a mesh

    def init(self, key: Array) -> Params:
        """Initialise parameters as OpenAI does; jit with `out_shardings` to create them sharded."""
        return nn.unbox(self.draw(key))

    def draw(self, key: Array) -> Params:
        """Initialise parameters in boxes with the names of their dimensions (`layers.named`)."""
        c = self.config
        shapes = c.vision.image_spec.shapes(1)
        images = {"image": jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)}
        texts = {"text": jnp.zeros((1, c.text.context_length), jnp.int32)}
        needs = () if c.decoder is None else ("caption_states",)
        compute = functools.partial(_outputs, images, texts, needs, None, False, None, None)
        variables = cast(Params, Towers(c).init(key, compute, method="run"))
        return variables.pop("params") | variables

    def normalize(self, images: Images) -> Images:
        """Normalise bytes by the model's mean and standard deviation; keep normalised images."""
        if is_normalized(images):
            return images
        return normalize(images, self.config.image_mean, self.config.image_std)

    def encode_image(
        self, params: Params, images: Images, *, normalize: bool = False
    ) -> Float[Array, "B E"]:
        """Embed normalised images, pixels `[B, H, W, 3]` or patches.

        With `normalize`, embeddings have unit length.
        """
        inputs = as_dtype(images, self.config.dtype)
        features = self._run(params, lambda towers: _embedded(towers, inputs)).astype(jnp.float32)
        return l2_normalize(features) if normalize else features

    def encode_text(
        self, params: Params, tokens: Int[Array, "B L"], *, normalize: bool = False
    ) -> Float[Array, "B E"]:
        """Embed token ids `[B, L]`, L at most the context length.

        With `normalize`, embeddings have unit length.
        """
        features = self._run(params, lambda towers: towers.text(tokens)).astype(jnp.float32)
        return l2_normalize(features) if normalize else features

    def encode_image_and_tokens(
        self, params: Params, images: Images
    ) -> tuple[Float[Array, "B E"], ImageTokens]:
        """Embed normalised images; return also the tokens that the caption decoder attends to."""
        inputs = as_dtype(images, self.config.dtype)

        def pooled(towers: Towers) -> tuple[Array, ImageTokens]:
            visual = _with_tokens(towers)
            return visual.pool_and_tokens(visual.tokens(inputs)[0])

        features, tokens = self._run(params, pooled)
        return features.astype(jnp.float32), tokens

    def encode_text_and_write(
        self, params: Params, tokens: Int[Array, "B L"], image_tokens: ImageTokens
    ) -> tuple[Float[Array, "B E"], Float[Array, "B l D"]]:
        """Embed texts; return also the decoder's states, which predict `DecoderConfig.labels`.

        `vocabulary_logits` of these states are the logits of the labels.
        """
        self.needs_decoder()
        features, states = self._run(
            params, lambda towers: towers.decoder.embed_and_write(towers.text, tokens, image_tokens)
        )
        return features.astype(jnp.float32), states

    def outputs(
        self,
        params: Params,
        images: dict[str, Images],
        texts: dict[str, Int[Array, "B *T L"]],
        needs: Sequence[str] = (),
        keys: Key[Array, " B"] | None = None,
        train: bool = False,
        by_length: ByLength | None = None,
        caption_keys: Key[Array, " B"] | None = None,
    ) -> tuple[dict[str, Float[Array, "B ..."]], Params]:
        """Compute the model outputs that the terms of a loss need, by the names of `losses.Term`.

        `images` (normalised) and `texts` hold the batch as "image" and "text", and further inputs
        by their names. A tower without inputs is not computed. With `keys`, one per image, a ViT
        applies patch dropout; with `caption_keys`, a decoder predicts some captions in parallel.
        `by_length(tower, tokens)` embeds texts by calls of the text tower.
        Returns the outputs (embeddings are float32 and not normalised) and `batch_stats`, with
        `train` as updated by BatchNorm.
        """
        options = (keys, train, by_length, caption_keys)
        compute = functools.partial(_outputs, images, texts, needs, *options)
        out, updates = self._run(params, compute, mutable=["batch_stats"])
        embeddings = {
            name: x.astype(jnp.float32) for name, x in out.items() if output(name).is_embedding
        }
        return out | embeddings, updates.get("batch_stats", {})

    def decode_next(
        self,
        params: Params,
        tokens: Int[Array, " R"],
        image_tokens: ImageTokens | None,
        cache: Caption,
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "R V"], Caption]:
        """Return the logits of the token that follows the one at `position`, and the new KV cache.

        `params` come from `apart`. Image tokens are needed with the first token only; later `cache`
        (see `empty_cache`) holds their keys and values. An image may have several adjacent rows.
        """
        more = (tokens[:, None], image_tokens, cache, position)
        states, cache = self._run(params, lambda towers: towers.decoder.step(towers.text, *more))
        return self.vocabulary_logits(params, states)[:, 0], cache

    def empty_cache(self, rows: int, length: int) -> Caption:
        """Return an empty KV cache for `length` tokens of each row."""
        c = self.config
        return self.needs_decoder().empty_cache(c.text, rows, length, c.dtype)

    def vocabulary_logits(
        self, params: Params, states: Float[Array, "B L D"]
    ) -> Float[Array, "B L V"]:
        """Return the logits of every token id for states of the decoder."""
        kernel = params["decoder"]["vocab_projection"].astype(states.dtype)
        logits = self.layout.einsum("BLD,DV->BLV", states, kernel).astype(jnp.float32)
        bias = params["decoder"].get("vocab_bias")
        return logits if bias is None else logits + bias

    def needs_decoder(self) -> DecoderConfig:
        """Return the decoder's configuration. Raises InputError if the model has none."""
        if self.config.decoder is None:
            raise InputError(
                "this model has no decoder for captions; use a CoCa, MaMMUT or CapPa model."
            )
        return self.config.decoder

    def image_tokens(
        self, params: Params, images: Images, layer: int = -1, norm: bool = False
    ) -> Float[Array, "B L D"]:
        """Return the states after one block of a vision transformer, any class token's first.

        `layer` counts from 0 or, negative, from the end (LLaVA takes −2); `norm` applies `ln_post`.
        Patches past an image's length have undefined states.
        """
        inputs = as_dtype(images, self.config.dtype)

        def states(towers: Towers) -> Array:
            visual = _with_tokens(towers)
            compute = functools.partial(visual.tokens, inputs)
            x, _ = split_tokens(_states_after(layer, self.config.vision.num_layers, compute))
            return visual.ln_post(x) if norm else x

        return self._run(params, states).astype(jnp.float32)

    def encode_patches(
        self, params: Params, images: Images, *, values: bool = False
    ) -> Float[Array, "B L e"]:
        """Embed each patch of square images: what the pooling makes of its state alone.

        Compare these with `for_patches` of text embeddings. With `values`, tokens attend in the
        last block to themselves alone, so that each has its own value (MaskCLIP, arXiv:2112.01071).
        Raises InputError for image towers without patches, and for `values` of a tower with one
        block or with dino.txt's head.
        """
        vision, inputs = self.config.vision, as_dtype(images, self.config.dtype)
        states = self._value_states(params, inputs) if values else None

        def patches(towers: Towers) -> Array:
            visual = _with_tokens(towers)
            x = visual.tokens(inputs)[0] if states is None else states
            if self.config.image_head is not None:
                return towers.image_head(visual.ln_post(x), each=True)
            extra = x.shape[1] - cast(ViTConfig, vision).num_patches
            alone = rearrange(x[:, extra:], "B L D -> (B L) 1 D")
            # Of equal tokens, every pooling is that of one of them.
            pooled = visual.pool_and_tokens(jnp.repeat(alone, 1 + extra, axis=1))[0]
            return rearrange(pooled, "(B L) E -> B L E", B=len(x))

        return self._run(params, patches).astype(jnp.float32)

    def pooled_and_patches(
        self, params: Params, images: Images, masked: Masked | None = None
    ) -> tuple[Float[Array, "B E"], Float[Array, "B L D"]]:
        """Embed normalised images; return also the states of their patches after `ln_post`.

        `masked` patches are replaced by a token. Square images may have another size than the
        model's: the position embeddings are resized as for a model of that size. States of patches
        past an image's length are undefined.
        """
        side = None if isinstance(images, Patches) else images.shape[1]
        model, params = self._resized(params, side)
        inputs = as_dtype(images, self.config.dtype)

        def both(towers: Towers) -> tuple[Array, Array]:
            visual = _with_tokens(towers)
            tokens, _ = visual.tokens(inputs, masked=masked)
            states, _ = split_tokens(tokens)
            extra = cast(ViTConfig, model.config.vision).extra_tokens
            return visual.pool_and_tokens(tokens)[0], visual.ln_post(states[:, extra:])

        pooled, patches = model._run(params, both)
        return pooled.astype(jnp.float32), patches.astype(jnp.float32)

    def _resized(self, params: Params, side: int | None) -> tuple["CLIP", Params]:
        """Return the model and its parameters for square images of `side` pixels; None: as is."""
        before = self.config.vision
        if side in (None, before.image_size):
            return self, params
        vision = before.with_image_size(side)
        model = replace(self, config=replace(self.config, vision=vision))
        path = vision.positions_path
        if path is None or vision.grid == before.grid:
            return model, params
        name = path.split("/")[-1]
        first, grid = jnp.split(params["visual"][name], [vision.extra_positions])
        table = jnp.concatenate([first, before.resize_grid(grid, vision.grid)])
        return model, params | {"visual": params["visual"] | {name: table}}

    def for_patches(self, texts: Float[AnyArray, "B E"]) -> Float[AnyArray, "B e"]:
        """Return the part of text embeddings that patches are compared with: of dino.txt's head,
        which has the class token's half first, the second half."""
        return texts if self.config.image_head is None else texts[:, texts.shape[1] // 2 :]

    def _value_states(self, params: Params, inputs: Any) -> Float[Array, "B L D"]:
        """Return the states after the last block, in which tokens attend to themselves alone."""
        vision = self.config.vision
        if not isinstance(vision, ViTConfig) or vision.depth < 2 or self.config.image_head:
            raise InputError(
                "values=True needs a vision transformer of at least two blocks without "
                "model.image_head; use values=False, or another model."
            )
        visual = params["visual"]
        stack = visual["transformer"]["resblocks"]
        first, last = (
            jax.tree.map(lambda x, part=part: x[part], stack) for part in (np.s_[:-1], -1)
        )
        shorter = replace(
            self, config=replace(self.config, vision=replace(vision, depth=vision.depth - 1))
        )
        before = params | {"visual": visual | {"transformer": {"resblocks": first}}}
        x = shorter._run(before, lambda towers: towers.visual.tokens(inputs)[0])
        only_itself = jnp.broadcast_to(jnp.eye(x.shape[1], dtype=bool), (len(x), *x.shape[1:2] * 2))
        block = layers.Block(vision.block(self.layout))
        return block.apply({"params": last}, x, None, only_itself)[0]

    def patch_attention(self, params: Params, images: Images) -> Float[Array, "B L"]:
        """Return how much the embedding attends to each patch of a vision transformer.

        It is the attention rollout (arXiv:2005.00928), without the shares of other tokens. Patches
        past an image's length have none.
        """
        vision, inputs = self.config.vision, as_dtype(images, self.config.dtype)
        _, recorded = self._run(
            params, lambda towers: _embedded(towers, inputs), mutable=["intermediates"]
        )
        length = images.length if isinstance(images, Patches) else None
        weights = recorded.get("intermediates", {})
        if self.config.image_head is None:
            return vision.patch_attention(weights.get("visual", {}), length)
        # Of a tower with the head's blocks, half by its class token and half by its patches.
        stacks = (weights[name]["transformer"] for name in ("visual", "image_head"))
        blocks = {"transformer": jax.tree.map(lambda *x: jnp.concatenate(x), *stacks)}
        mean = replace(cast(ViTConfig, vision), pool="mean")
        halves = (tower.patch_attention(blocks, length) for tower in (vision, mean))
        return functools.reduce(jnp.add, halves) / 2

    def text_tokens(
        self, params: Params, tokens: Int[Array, "B L"], layer: int = -1, norm: bool = False
    ) -> Float[Array, "B L D"]:
        """Return the states of all tokens after one block; `norm` applies `ln_final`.

        Diffusion models condition on these: Stable Diffusion 1 on the last block with `norm`, 2 on
        layer −2 with `norm`, XL on layer −2 without.
        """

        def states(towers: Towers) -> Array:
            compute = functools.partial(towers.text.states, tokens)
            x = _states_after(layer, self.config.text.num_layers, compute)
            x = x[:, : tokens.shape[1]]  # without the class token
            if norm and "ln_final" not in params["text"]:
                raise InputError("norm=True: this text tower has no norm after its last block.")
            return towers.text.ln_final(x) if norm else x

        return self._run(params, states).astype(jnp.float32)

    def _run(self, params: Params, function: Callable[[Towers], Any], **options: Any) -> Any:
        """Return `function` of the modules bound to these parameters."""
        trainable, batch_stats = split_batch_stats(params)
        variables = {"params": trainable, "batch_stats": batch_stats}
        return Towers(self.config, self.layout).apply(variables, function, method="run", **options)


@functools.lru_cache(maxsize=32)
def parameters(config: CLIPConfig) -> dict[str, Any]:
    """Return path → box of each parameter, with `value.shape` and `names`, without allocating."""

    def is_box(x: Any) -> bool:
        return isinstance(x, nn.Partitioned)

    boxes = jax.eval_shape(CLIP(config).draw, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(boxes, is_leaf=is_box)
    if bare := [path_name(path) for path, x in leaves if not is_box(x)]:
        raise ValueError(f"dimensions of {bare} have no names; draw them with `layers.named`.")
    return {path_name(path): x for path, x in leaves}


def _with_tokens(towers: Towers) -> Any:
    """Return the image tower's module, which has the methods `tokens` and `pool_and_tokens`."""
    if not towers.config.vision.has_tokens:
        raise InputError(
            "image tokens need a vision transformer, not a ResNet or a ConvNeXt: use a model with "
            "another vision."
        )
    return towers.visual


def _embedded(
    towers: Towers, images: Any, keys: Array | None = None, train: bool = False
) -> Float[Array, "B E"]:
    """Embed images by the image tower, and by the head on its tokens if there is one."""
    if towers.config.image_head is None:
        return towers.visual(images, keys, train=train)
    visual = _with_tokens(towers)
    return _of_head(towers, visual.tokens(images, keys=keys, train=train)[0])


def _of_head(towers: Towers, tokens: ImageTokens) -> Float[Array, "B E"]:
    """Embed images by the head, from the states of the image tower's last block."""
    x, length = split_tokens(tokens)
    return towers.image_head(join_tokens(_with_tokens(towers).ln_post(x), length))


def _outputs(
    images: dict[str, Images],
    texts: dict[str, Array],
    needs: Sequence[str],
    keys: Array | None,
    train: bool,
    by_length: ByLength | None,
    caption_keys: Array | None,
    towers: Towers,
) -> dict[str, Array]:
    """Compute the outputs of `CLIP.outputs`; each tower runs once for each of its inputs."""
    out: dict[str, Array] = {}
    pixels = {name: as_dtype(x, towers.config.dtype) for name, x in images.items()}
    tokens_of = {name: x for name in needs if (x := output(name)).part == "tokens"}
    of_image = {name: x.layer for name, x in tokens_of.items() if x.tower == "image"}
    of_text = {name: x.layer for name, x in tokens_of.items() if x.tower == "text"}
    tokens: Any = texts.get("text")
    writes, image_tokens = "caption_states" in needs, None
    others = {f"text:{name}": x for name, x in texts.items() if name != "text"}
    if writes or of_image:
        visual = _with_tokens(towers)
        last, every = visual.tokens(pixels["image"], bool(of_image), keys, train)
        if towers.config.image_head is None:
            out["image"], image_tokens = visual.pool_and_tokens(last)
        else:
            out["image"] = _of_head(towers, last)
        out |= {name: cast(Array, every)[layer] for name, layer in of_image.items()}
    elif "image" in pixels:
        out["image"] = _embedded(towers, pixels["image"], keys, train)
    if writes:
        decoder = towers.decoder
        out["text"], out["caption_states"] = decoder.embed_and_write(
            towers.text, tokens, image_tokens, caption_keys
        )
    elif tokens is not None and not of_text:
        others = {"text": tokens} | others
    if of_text:
        last, every = towers.text.states(tokens, collect=True)
        out.setdefault("text", towers.text.pool(last, tokens))
        states = cast(Array, every)[:, :, : tokens.shape[1]]  # without the class token
        out |= {name: states[layer] for name, layer in of_text.items()}
    # In the order of the dicts, which is the same in every process; that of a set is not.
    for name in pixels:
        if name != "image":
            out[f"image:{name}"] = _embedded(towers, pixels[name], train=train)
    if others:  # in one pass; the texts of a pair stay on its device
        several = [x if x.ndim == 3 else x[:, None] for x in others.values()]
        rows = rearrange(jnp.concatenate(several, 1), "B T L -> (B T) L")
        embeddings = towers.text(rows) if by_length is None else by_length(towers.text, rows)
        ends = list(itertools.accumulate(x.shape[1] for x in several))
        parts = jnp.split(rearrange(embeddings, "(B T) E -> B T E", T=ends[-1]), ends[:-1], 1)
        for (name, x), y in zip(others.items(), parts, strict=True):
            out[name] = y if x.ndim == 3 else y[:, 0]
    return out


def _states_after(layer: int, depth: int, compute: Callable[..., Any]) -> Any:
    """Return the states after a block; the last one's output needs no collecting."""
    if not -depth <= layer < depth:
        raise InputError(
            f"layer={layer}: the tower has {depth} blocks; use 0 to {depth - 1} or −{depth} to −1."
        )
    collect = layer not in (-1, depth - 1)
    last, every = compute(collect=collect)
    return every[layer] if collect else last


def l2_normalize(x: AnyArray) -> AnyArray:
    """Scale vectors to unit length; NumPy arrays by NumPy."""
    if isinstance(x, np.ndarray):
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return x * inverse_norm(x)


def inverse_norm(x: Float[Array, "*B E"]) -> Float[Array, "*B 1"]:
    """Return the factor that gives vectors unit length."""
    return jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def split_batch_stats(params: Params) -> tuple[Params, Params]:
    """Split a tree into trainable parameters and BatchNorm's statistics (empty for a ViT)."""
    trainable = {name: tree for name, tree in params.items() if name != "batch_stats"}
    return trainable, params.get("batch_stats", {})


def join_batch_stats(trainable: Params, batch_stats: Params) -> Params:
    """Undo `split_batch_stats`."""
    return {**trainable, "batch_stats": batch_stats} if batch_stats else trainable


def path_name(path: tuple[Any, ...]) -> str:
    """Write a tree path as `visual/conv1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def count(params: Params) -> int:
    """Count the parameters of a tree of arrays or shapes, without running statistics."""
    trainable, _ = split_batch_stats(params)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(trainable))
