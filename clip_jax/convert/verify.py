"""Numerical check: compare a reference implementation and our model on the same inputs.

The inputs are photographs and sentences, prepared by the reference's own preprocessing and
tokenizer, and random pixels and token ids, which reach what these do not.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import math
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from PIL import Image

from clip_jax.convert.weights import Weights, cast, with_vocabulary
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.display import table
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIP, CLIPConfig, Params, l2_normalize
from clip_jax.models.images import Images, NaFlex, Patches, concatenate, pixels_of, with_pixels
from clip_jax.models.text import TextConfig

BOUND = 1e-5  # relative difference that float32 rounding can cause
PIXEL_BOUND = 1e-5  # the same of a normalised pixel, absolute
_LEVEL = 2.01 / 255  # by which torchvision's pixels differ from Pillow's, before normalisation
# Sentences with capitals, punctuation, accents and other scripts; the last is longer than any
# context. None has what only some libraries repair, such as HTML entities.
TEXTS = (
    "a photo of a cat",
    "Two DOGS play on the beach, at 7 o'clock!",
    "café, naïve, Ünïcödé: 42 - 日本語 😀",
    " ".join(["a red apple and a green pear"] * 30),
)
# Sizes of random images in pixels, as different as can be: of NaFlex, one row and one column, too.
_SIZES = ((640, 480), (480, 640), (10_000, 1), (1, 10_000))
_BATCH = len(_SIZES)

Inputs = tuple[Any, np.ndarray]  # Images, normalised; token ids [B, L]
Outputs = dict[str, np.ndarray]  # image_features, text_features, logits, caption_logits


# Fields of `Verification` → what differs if they are too large.
PARTS = {
    "texts_with_other_ids": "token ids",
    "pixels": "preprocessing",
    "image_features": "image tower",
    "text_features": "text tower",
    "caption_logits": "caption decoder",
    "logits": "logit scale or bias",
}


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Relative differences ‖a − b‖/‖b‖ between the outputs of a model here and in another program.

    Of a conversion, b is the reference implementation's; of an export, b is ours. Both compute from
    the same pixels and token ids.
    """

    reference: str | None = None  # library that loaded a conversion's source or result
    model: Literal["source", "result"] | None = None  # which of both it loaded
    runtime: str | None = None  # program that ran an export
    bound: float | None = None  # largest difference that passes; None: BOUND
    rounding_loss: float | None = None  # of ours by rounding the weights; None: not rounded
    image_features: float | None = None  # None: the model has one tower alone
    text_features: float | None = None
    logits: float | None = None  # None: the export has none
    caption_logits: float | None = None  # of a decoder, for all token ids; None: none
    # texts of which the other tokenizer makes other token ids; None: it has none
    texts_with_other_ids: int | None = None
    # largest difference of a normalised pixel between both preprocessings; None: it has none
    pixels: float | None = None
    pixel_bound: float = PIXEL_BOUND  # largest that passes
    not_compared: tuple[str, ...] = ()  # parts that were not, and why

    @property
    def max_relative_difference(self) -> float:
        values = (self.image_features, self.text_features, self.logits, self.caption_logits)
        return float(np.max([x for x in values if x is not None]))  # NaN if one is

    @property
    def differing(self) -> tuple[str, ...]:
        """The parts in which the difference arises; none if the verification passes."""
        bounds = {"texts_with_other_ids": 0.0, "pixels": self.pixel_bound}
        bound = BOUND if self.bound is None else self.bound
        parts = [
            part
            for name, part in PARTS.items()
            if (x := getattr(self, name)) is not None and not x <= bounds.get(name, bound)  # NaN
        ]
        inherited = {PARTS["logits"]} if {"image tower", "text tower"} & {*parts} else set()
        return tuple(part for part in parts if part not in inherited)

    @property
    def passed(self) -> bool:
        return not self.differing


@dataclass(frozen=True)
class Verifications:
    """The comparisons of a conversion, and why others could not be made."""

    made: tuple[Verification, ...]
    notes: tuple[str, ...] = ()  # what was not compared

    @property
    def max_relative_difference(self) -> float:
        return float(np.max([x.max_relative_difference for x in self.made]))

    @property
    def passed(self) -> bool:
        return all(x.passed for x in self.made)

    @property
    def not_compared(self) -> tuple[str, ...]:
        """What was not compared, and why."""
        parts = [f"{x.model}: {note}" for x in self.made for note in x.not_compared]
        return (*self.notes, *parts)

    def describe(self) -> str:
        """Return a table of the comparisons, what was not compared, and where models differ."""
        names = [name for name in PARTS if any(getattr(x, name) is not None for x in self.made)]
        rows = [[x.reference, x.model, *(_shown(name, x) for name in names)] for x in self.made]
        headers = ["logits" if name == "logits" else PARTS[name] for name in names]
        drawn = table(["library", "loads the", *headers], rows, left=2)
        lines = [line.rstrip() for line in drawn.splitlines() if line.strip()]
        lines += [
            f"{'rounding loss':<24} {x.rounding_loss:.2g} ({x.reference} loads the {x.model})"
            for x in self.made
            if x.rounding_loss
        ]
        lines += [f"{'not compared':<24} {note}" for note in self.not_compared]
        for x in self.made:
            if x.differing:
                differing = ", ".join(x.differing)
                lines.append(f"{'DIFFERENT':<24} {differing}: {x.reference} loads the {x.model}")
        return "\n".join(lines)


def _shown(name: str, verification: Verification) -> str:
    """Return one difference as text."""
    value = getattr(verification, name)
    if value is None:
        return "-"
    if name == "texts_with_other_ids":
        return f"{value} of {len(TEXTS)} texts differ" if value else "equal"
    return f"{value:.2g}"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A model as another library loads it, with that library's preprocessing and tokenizer."""

    name: str  # of the library, with its version
    outputs: Callable[[Inputs], Outputs]
    # Returns a batch of one normalised image; None: the library has none for the model.
    preprocess: Callable[[Image.Image], Images] | None = None
    is_torchvision: bool = False  # whether that resizes with torchvision's own rounding
    tokenize: Callable[[Sequence[str]], np.ndarray] | None = None  # token ids [B, L]
    notes: tuple[str, ...] = ()  # what it lacks, and why


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
    # Models that differ only in where their vocabulary is run the same program.
    name = config.text.tokenizer.file.rpartition("/")[2]
    config = with_vocabulary(replace(config, init_logit_scale=1.0), name)
    params = jax.tree.map(lambda x: jnp.asarray(cast(np.asarray(x), "float32")), params)
    with jax.default_matmul_precision("highest"):
        outputs = _run(CLIP(replace(config, dtype="float32")), params, images, tokens)
    return {name: np.asarray(x) for name, x in outputs.items()}


@functools.partial(jax.jit, static_argnums=0)
def _run(model: CLIP, params: Params, images: Images, tokens: Array) -> dict[str, Array]:
    if len(alone := {"visual", "text"} & params.keys()) < 2:  # one tower
        params = {"logit_scale": jnp.zeros(()), "logit_bias": jnp.zeros(()), **params}
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
    """Return ‖a − b‖/‖b‖, in float64; 0 if a equals b, also if both are zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    difference, norm = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
    if difference == 0:  # the first logits of a caption decoder whose head is zero
        return 0.0
    return difference / norm if norm else math.inf


def features_difference(changed: Weights, weights: Weights) -> float:
    """Return the relative difference of image features of two models, on random pixels."""
    images, tokens = random_inputs(weights.config)
    ours = [our_outputs(w.config, w.params, images, tokens) for w in (changed, weights)]
    return relative_difference(ours[0]["image_features"], ours[1]["image_features"])


class NotInstalled(InputError):
    """The library of a format is not installed."""


@contextlib.contextmanager
def library(module: str, package: str) -> Generator[None]:
    """Require a reference implementation; silence its deprecation warnings.

    Raises NotInstalled without it, and InputError if it fails.
    """
    if importlib.util.find_spec(module) is None:
        raise NotInstalled(
            f"--verify compares with {package}, which is not installed: "
            "pip install 'clip-jax-pods[peers]'."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def named(package: str) -> str:
    """Return a package's name with its version."""
    name = package.removesuffix("_torch")  # of open_clip
    try:
        return f"{name} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:  # a checkout
        return name


# ------------------------------------------------------------------ the comparison


def photographs() -> list[Image.Image]:
    """Return photographs of several shapes, one of them smaller than most models' input."""
    folder = resources.files("clip_jax.convert") / "photographs"
    images = []
    for name in ("cat.jpg", "coffee.jpg"):
        with (folder / name).open("rb") as file:
            images.append(Image.open(file).convert("RGB"))
    cat, coffee = images
    return [cat, coffee, cat.crop((130, 60, 190, 105)), coffee.crop((0, 150, 300, 250))]


def tokenizer_of(text: TextConfig) -> Callable[[Sequence[str]], np.ndarray]:
    """Return the tokenizer of our model as `Reference.tokenize`."""
    return lambda texts: make_tokenizer(text)(list(texts), text.context_length, True)


def compare(
    reference: Reference, weights: Weights, params: Params | None = None
) -> tuple[Verification, Outputs, Inputs]:
    """Compare a reference with our model, with `params` instead of its own parameters if not None.

    Also returns our outputs, and the inputs of both.
    """
    config, differences = weights.config, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images, tokens = random_inputs(config)
        if weights.only_tower != "text":
            photos, differences["pixels"] = _photographs(reference, weights)
            images = concatenate([images, photos])
        if weights.only_tower != "image":
            ids, differences["texts_with_other_ids"] = _token_ids(reference, config.text)
            tokens = np.concatenate([tokens, random_inputs(config, 1)[1] if ids is None else ids])
        inputs = (images, tokens)
        theirs = reference.outputs(inputs)
    ours = our_outputs(config, weights.params if params is None else params, *inputs)
    differences |= {name: relative_difference(ours[name], theirs[name]) for name in ours}
    if reference.is_torchvision:
        differences["pixel_bound"] = _LEVEL / min(weights.preprocess.std)
    verification = Verification(
        reference=reference.name, not_compared=reference.notes, **differences
    )
    return verification, ours, inputs


def _photographs(reference: Reference, weights: Weights) -> tuple[Images, float | None]:
    """Return photographs as a reference prepares them, and by how much ours differ.

    Without its preprocessing, or if its images have another shape, they are ours.
    """
    images, preprocess = photographs(), weights.preprocess
    ours = preprocess.normalize(concatenate([preprocess.batch(image) for image in images]))
    if reference.preprocess is None:
        return ours, None
    theirs = concatenate([reference.preprocess(image) for image in images])
    shapes = [[x.shape for x in jax.tree.leaves(batch)] for batch in (ours, theirs)]
    if shapes[0] != shapes[1]:
        return ours, float("inf")
    a, b = pixels_of(ours), pixels_of(theirs)
    if isinstance(ours, Patches) and isinstance(theirs, Patches):
        same = np.array_equal(ours.grid, theirs.grid) and np.array_equal(ours.length, theirs.length)
        if not same:
            return theirs, float("inf")
        valid = np.arange(a.shape[1]) < ours.length[:, None]  # padding may have any value
        a, b = a[valid], b[valid]
    return theirs, float(np.abs(a - b).max())


def _token_ids(reference: Reference, text: TextConfig) -> tuple[np.ndarray | None, int | None]:
    """Return the ids of sentences by a reference's tokenizer, and for how many ours differ.

    Without its tokenizer, or if the model cannot take its ids, they are ours; None without ours.
    """
    ours = tokenizer_of(text)(TEXTS) if text.tokenizer.file else None
    if reference.tokenize is None:
        return ours, None
    theirs = np.asarray(reference.tokenize(TEXTS), np.int32)
    if ours is None:
        return theirs, None
    if theirs.shape != ours.shape or theirs.min() < 0 or theirs.max() >= text.vocab_size:
        return ours, len(TEXTS)
    seen = np.ones(ours.shape, bool)
    ends = not text.sees_padding and not text.masks_padding and text.tokenizer.pad_side == "right"
    if ends and text.end_id is not None:
        is_end = ours == text.end_id  # what follows the first does not matter
        seen = np.cumsum(is_end, axis=1) - is_end == 0
    return theirs, int(((ours != theirs) & seen).any(axis=1).sum())


def torch_inputs(inputs: Inputs) -> tuple[Any, Any]:
    """Return pixels `[B, C, H, W]`, or `Patches` whose arrays are tensors, and ids as tensors."""
    import torch

    images, tokens = jax.tree.map(torch.from_numpy, inputs)
    if not isinstance(images, Patches):
        images = images.permute(0, 3, 1, 2).contiguous()
    return images, tokens.long()


def torch_transform(transform: Callable[[Image.Image], Any]) -> Callable[[Image.Image], Images]:
    """Return a transform of PyTorch, whose images are [C, H, W], as `Reference.preprocess`."""
    return lambda image: transform(image).permute(1, 2, 0).numpy()[None]


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
