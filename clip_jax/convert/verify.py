"""Numerical check: compare a reference implementation and our model on the same inputs."""

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from clip_jax.convert.weights import Weights, cast
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIP, CLIPConfig, Params, l2_normalize
from clip_jax.models.images import Images, NaFlex, Patches, concatenate, pixels_of, with_pixels

BOUND = 1e-5  # relative difference that float32 rounding can cause
# Sizes of random images in pixels, as different as can be: of NaFlex, one row and one column, too.
_SIZES = ((640, 480), (480, 640), (10_000, 1), (1, 10_000))
_BATCH = len(_SIZES)

Inputs = tuple[Any, np.ndarray]  # Images, normalised; token ids [B, L]
Outputs = dict[str, np.ndarray]  # image_features, text_features, logits, caption_logits


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Relative differences ‖a − b‖/‖b‖ between the outputs of a model here and in another program.

    Of a conversion, b is the reference implementation's; of an export, b is ours.
    """

    reference: str | None = None  # library that loaded a conversion
    runtime: str | None = None  # program that ran an export
    bound: float | None = None  # largest difference that passes; None: BOUND
    rounding_loss: float | None = None  # of ours by rounding the weights; None: not rounded
    image_features: float | None = None  # None: the model has one tower alone
    text_features: float | None = None
    logits: float | None = None  # None: the export has none
    caption_logits: float | None = None  # of a decoder, for all token ids; None: none
    texts_with_other_ids: int | None = None  # by an export's tokenizer.json; None: it has none

    @property
    def max_relative_difference(self) -> float:
        values = (self.image_features, self.text_features, self.logits, self.caption_logits)
        return float(np.max([x for x in values if x is not None]))  # NaN if one is

    @property
    def passed(self) -> bool:
        bound = BOUND if self.bound is None else self.bound
        return self.max_relative_difference <= bound and not self.texts_with_other_ids  # no NaN


class Unverifiable(InputError):
    """No reference implementation has such a model; the message is a reason after "because"."""


def random_inputs(config: CLIPConfig, seed: int = 0) -> Inputs:
    """Draw normalised pixels, and token ids as of a tokenizer: end of text, then zeros.

    Of a NaFlex model, also the padding of the patches is random: it must not change anything.
    """
    rng = np.random.default_rng(seed)
    spec, text = config.vision.image_spec, config.text
    half = spec  # of a NaFlex model, every second image has padding
    if isinstance(spec, NaFlex):
        half = replace(spec, max_patches=-(-spec.max_patches // 2))
    sizes = [(half if i % 2 else spec).fit(*size)[::-1] for i, size in enumerate(_SIZES)]
    images = concatenate([spec.pack(np.zeros((1, *size, 3), np.uint8)) for size in sizes])
    pixels = rng.normal(size=pixels_of(images).shape).astype(np.float32)
    images = with_pixels(images, pixels)
    end_of_text = text.end_of_text_id
    least = text.tokenizer.pad_id + 1 if text.masks_padding else 1
    tokens = rng.integers(least, text.vocab_size - 1, (_BATCH, text.context_length), dtype=np.int32)
    tokens += tokens >= end_of_text  # so that it occurs only once
    for row, end in zip(tokens, rng.integers(1, text.context_length, _BATCH), strict=True):
        row[end] = end_of_text
        row[end + 1 :] = text.tokenizer.pad_id if text.masks_padding else 0
    return images, tokens


def our_outputs(config: CLIPConfig, params: Params, images: Any, tokens: Any) -> Outputs:
    """Return the outputs of our model in float32."""
    params = jax.tree.map(lambda x: jnp.asarray(cast(np.asarray(x), "float32")), params)
    with jax.default_matmul_precision("highest"):
        outputs = _run(CLIP(replace(config, dtype="float32")), params, images, tokens)
    return {name: np.asarray(x) for name, x in outputs.items()}


@functools.partial(jax.jit, static_argnums=0)
def _run(model: CLIP, params: Params, images: Images, tokens: Array) -> dict[str, Array]:
    if len(alone := {"visual", "text"} & params.keys()) < 2:  # one tower
        params = {"logit_scale": jnp.zeros(()), **params}
        if "visual" in alone:
            return {"image_features": model.encode_image(params, images)}
        return {"text_features": model.encode_text(params, tokens)}
    needs = () if model.config.decoder is None else ("caption_states",)
    out, _ = model.outputs(params, {"image": images}, {"text": tokens}, needs)
    logits = l2_normalize(out["image"]) @ l2_normalize(out["text"]).T
    logits = logits * jnp.exp(params["logit_scale"]) + params.get("logit_bias", 0.0)
    result = {"image_features": out["image"], "text_features": out["text"], "logits": logits}
    if needs:
        result["caption_logits"] = model.vocabulary_logits(params, out["caption_states"])
    return result


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Return ‖a − b‖/‖b‖, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def features_difference(changed: Weights, weights: Weights) -> float:
    """Return the relative difference of image features of two models, on random pixels."""
    images, tokens = random_inputs(weights.config)
    ours = [our_outputs(w.config, w.params, images, tokens) for w in (changed, weights)]
    return relative_difference(ours[0]["image_features"], ours[1]["image_features"])


@contextlib.contextmanager
def library(module: str, package: str) -> Generator[None]:
    """Require a reference implementation; silence its deprecation warnings."""
    if importlib.util.find_spec(module) is None:
        raise InputError(
            f"--verify compares with {package}, which is not installed: "
            "pip install 'clip-jax-pods[peers]'."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def torch_inputs(inputs: Inputs) -> tuple[Any, Any]:
    """Return pixels `[B, C, H, W]`, or `Patches` whose arrays are tensors, and ids as tensors."""
    import torch

    images, tokens = jax.tree.map(torch.from_numpy, inputs)
    if not isinstance(images, Patches):
        images = images.permute(0, 3, 1, 2).contiguous()
    return images, tokens.long()


def torch_outputs(encode_image: Any, encode_text: Any, model: Any, inputs: Inputs) -> Outputs:
    """Return the outputs of a PyTorch model, from its two encoders."""
    import torch

    with torch.no_grad():
        pixels, ids = torch_inputs(inputs)
        image, text = encode_image(pixels).float(), encode_text(ids).float()
        normalize = torch.nn.functional.normalize
        logits = normalize(image, dim=-1) @ normalize(text, dim=-1).T * model.logit_scale.exp()
        if getattr(model, "logit_bias", None) is not None:
            logits = logits + model.logit_bias
    outputs = {"image_features": image, "text_features": text, "logits": logits}
    return {name: x.numpy() for name, x in outputs.items()}
