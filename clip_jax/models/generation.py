"""Generate captions in one compiled loop over tokens with a KV cache, for every method."""

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from clip_jax.errors import InputError, check_ranges
from clip_jax.models.clip import CLIP, Params
from clip_jax.models.decoder import Caption
from clip_jax.models.images import ImageTokens, split_tokens
from clip_jax.models.layers import apart
from clip_jax.models.text import TextConfig

MAX_LENGTH = 30


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of caption generation."""

    # Decoding method. greedy: the most probable token at each step. sample: a random token, which
    # does not depend on other images. beams: the most probable caption of a beam search.
    method: Literal["greedy", "sample", "beams"] = "greedy"
    # Maximum number of tokens, begin and end of text included. None: 30, or the model's context
    # length if that is less.
    max_length: int | None = None
    min_length: int = 5  # Minimum tokens before the end of text, begin of text included.
    top_k: int | None = None  # For sample: draw from the k most probable tokens. None: all.
    top_p: float | None = None  # For sample: fewest tokens of this total probability. None: all.
    temperature: float = 1.0  # For sample: divisor of the logits.
    seed: int = 0  # For sample: random seed.
    beams: int = 4  # For beams: number of captions searched in parallel.
    length_penalty: float = 1.0  # For beams: log probability is divided by length to this power.

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "generation.",
            max_length="[2, inf)",
            min_length="[1, inf)",
            top_k="[1, inf)",
            top_p="(0, 1]",
            temperature="(0, inf)",
            seed="[0, 4294967295]",
            beams="[1, inf)",
            length_penalty="[0, inf)",
        )
        if self.max_length is not None and self.min_length >= self.max_length:
            raise InputError(
                f"generation.min_length={self.min_length} must be less than "
                f"generation.max_length={self.max_length}; change one of them."
            )

    def within(self, text: TextConfig) -> "GenerationConfig":
        """Return the settings with the maximum length filled in.

        Raises InputError if it is more than the model's context length.
        """
        most = text.context_length
        if self.max_length is None:
            length = min(most, MAX_LENGTH)
            return replace(self, max_length=length, min_length=min(self.min_length, length - 1))
        if self.max_length > most:
            raise InputError(
                f"generation.max_length={self.max_length} is more than the model's "
                f"text.context_length={most}; lower it."
            )
        return self


def generate(
    clip: CLIP,
    params: Params,
    image_tokens: ImageTokens,
    config: GenerationConfig = GenerationConfig(),
    seed: Integer[Array, "*B"] | None = None,
) -> Int[Array, "B L"]:
    """Generate a caption for each image: ids from begin to end of text, then padding.

    As in open_clip's `generate`, a generated padding id also ends a row. `seed` replaces the
    config's, so that another seed needs no compilation; an array [B] is a seed for each image,
    whose caption is the same as with that seed alone. Raises InputError if the model has no decoder
    or too short a context.
    """
    clip.needs_decoder()
    config = config.within(clip.config.text)
    if config.method == "beams":
        return _search(clip, params, image_tokens, config)
    choose = functools.partial(_choose, config=config, seed=config.seed if seed is None else seed)
    return _write(clip, params, image_tokens, config, choose)


def begin_and_end(text: TextConfig, start: int | None = None) -> tuple[int, int]:
    """Return the first id of a caption and the last.

    `start` is the decoder's own first id. Raises InputError if the tokenizer lacks one that is
    needed.
    """
    begin = start if text.begin_id is None else text.begin_id
    if begin is None or text.end_id is None:
        raise InputError(
            f"captions need begin and end ids, and text.tokenizer has begin_id={text.begin_id}, "
            f"end_id={text.end_id}; set both."
        )
    return begin, text.end_id


def _without_start(ids: Int[Array, "B L"], text: TextConfig) -> Int[Array, "B L"]:
    """Remove the decoder's own first id from captions of a tokenizer without one."""
    if text.begin_id is not None:
        return ids
    return jnp.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=text.tokenizer.pad_id)


def _choose(
    logits: Float[Array, "B V"], position: Int[Array, ""], *, config: GenerationConfig, seed: Any
) -> Int[Array, " B"]:
    if config.method == "greedy":
        return logits.argmax(-1)
    if config.top_k is not None:
        least = jax.lax.top_k(logits, min(config.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if config.top_p is not None:
        order = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(order), axis=-1) - jax.nn.softmax(order)
        candidates = jnp.where(before < config.top_p, order, jnp.inf)  # always keeps the first
        logits = jnp.where(logits < candidates.min(-1, keepdims=True), -jnp.inf, logits)

    # Rows of one seed share the noise, so an image's caption does not depend on the others.
    # Threefry, whatever JAX's default is, for the same captions everywhere.
    def noise(seed: Any) -> Float[Array, " V"]:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, logits.shape[-1:])

    drawn = jax.vmap(noise)(seed) if jnp.ndim(seed) else noise(seed)
    return (logits / config.temperature + drawn).argmax(-1)


def _write(
    clip: CLIP, params: Params, image_tokens: ImageTokens, config: GenerationConfig, choose: Any
) -> Int[Array, "B L"]:
    text, length = clip.config.text, cast(int, config.max_length)
    params = apart(params)
    (begin, end), pad = begin_and_end(text, clip.needs_decoder().start), text.tokenizer.pad_id
    rows = len(split_tokens(image_tokens)[0])

    def extend(ids: Array, logits: Array, position: Array, done: Array) -> tuple[Array, Array]:
        """Write the token that follows the one at `position` into its row."""
        is_end = jnp.arange(logits.shape[-1]) == end
        logits = jnp.where(is_end & (position + 1 < config.min_length), -jnp.inf, logits)
        chosen = jnp.where(position + 2 == length, end, choose(logits, position))
        chosen = jnp.where(done, pad, chosen).astype(ids.dtype)
        ids = jax.lax.dynamic_update_slice_in_dim(ids, chosen[:, None], position + 1, axis=1)
        return ids, done | (chosen == end) | (chosen == pad)

    def body(state: Any) -> Any:
        ids, position, done, cache = state
        token = jax.lax.dynamic_index_in_dim(ids, position, axis=1, keepdims=False)
        logits, cache = clip.decode_next(params, token, None, cache, position)
        ids, done = extend(ids, logits, position, done)
        return ids, position + 1, done, cache

    ids = jnp.full((rows, length), pad, jnp.int32).at[:, 0].set(begin)
    first = jnp.zeros((), jnp.int32)
    cache = clip.empty_cache(rows, length)
    logits, cache = clip.decode_next(params, ids[:, 0], image_tokens, cache, first)
    ids, done = extend(ids, logits, first, jnp.zeros(rows, bool))
    state = (ids, first + 1, done, cache)
    ids = jax.lax.while_loop(lambda s: (s[1] < length - 1) & ~s[2].all(), body, state)[0]
    return _without_start(ids, text)


def _search(
    clip: CLIP, params: Params, image_tokens: ImageTokens, config: GenerationConfig
) -> Int[Array, "B L"]:
    """Run a beam search, which stops when no open beam can beat the best finished caption."""
    text, length, count = clip.config.text, cast(int, config.max_length), config.beams
    params = apart(params)
    (begin, end), pad = begin_and_end(text, clip.needs_decoder().start), text.tokenizer.pad_id
    images = len(split_tokens(image_tokens)[0])

    def extend(state: Any, logits: Array, cache: Caption) -> Any:
        ids, position, scores, best_ids, best, _ = state
        gains = jax.nn.log_softmax(logits).reshape(images, count, -1)
        vocabulary = jnp.arange(gains.shape[-1])
        # Captions that end here,
        ended = (scores + gains[:, :, end]) / (position + 1.0) ** config.length_penalty
        ended = jnp.where(position + 1 < config.min_length, -jnp.inf, ended)
        winner = ended.argmax(1)
        caption = jnp.take_along_axis(ids, winner[:, None, None], axis=1)[:, 0]
        caption = caption.at[:, position + 1].set(end)
        score = ended.max(1)
        best_ids = jnp.where((score > best)[:, None], caption, best_ids)
        best = jnp.maximum(score, best)
        # and those that continue.
        gains = jnp.where((vocabulary == end) | (vocabulary == pad), -jnp.inf, gains)
        total = (scores[:, :, None] + gains).reshape(images, -1)
        scores, chosen = jax.lax.top_k(total, count)
        parents, tokens = jnp.divmod(chosen, len(vocabulary))
        ids = jnp.take_along_axis(ids, parents[:, :, None], axis=1)
        ids = ids.at[:, :, position + 1].set(tokens.astype(ids.dtype))
        cache = _reorder(cache, (parents + count * jnp.arange(images)[:, None]).ravel())
        return ids, position + 1, scores, best_ids, best, cache

    def body(state: Any) -> Any:
        ids, position, *_, cache = state
        token = jax.lax.dynamic_index_in_dim(ids, position, axis=2, keepdims=False).ravel()
        return extend(state, *clip.decode_next(params, token, None, cache, position))

    def goes_on(state: Any) -> Array:
        _, position, scores, _, best, _ = state
        attainable = scores[:, 0] / (length - 1.0) ** config.length_penalty
        return (position < length - 1) & (best < attainable).any()

    ids = jnp.full((images, count, length), pad, jnp.int32).at[:, :, 0].set(begin)
    first = jnp.zeros((), jnp.int32)
    scores = jnp.full((images, count), -jnp.inf).at[:, 0].set(0)  # equal at first: only one counts
    cache = clip.empty_cache(images * count, length)
    begun = clip.decode_next(params, ids[:, :, 0].ravel(), image_tokens, cache, first)
    start = (ids, first, scores, ids[:, 0], jnp.full(images, -jnp.inf), None)
    ids = jax.lax.while_loop(goes_on, body, extend(start, *begun))[3]
    return _without_start(ids, text)


def _reorder(cache: Caption, rows: Int[Array, " R"]) -> Caption:
    """Copy each row's keys and values from row `rows`; those of images are shared by their rows."""
    text, blocks = jax.tree.map(
        lambda x: x[rows], (cache.text, [layer.blocks for layer in cache.decoder])
    )
    layers = zip(cache.decoder, blocks, strict=True)
    return Caption(text, [layer._replace(blocks=kv) for layer, kv in layers])
