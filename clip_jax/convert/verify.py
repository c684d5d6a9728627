"""Proof of a conversion: the peer loads the result, both run on the same inputs."""

import contextlib
import functools
import importlib.util
import sys
import types
import warnings
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from clip_jax.convert import model_folder, open_clip, openai
from clip_jax.convert.formats import Format
from clip_jax.convert.open_clip_config import model_cfg
from clip_jax.convert.state_dict import to_params
from clip_jax.convert.weights import DType, Weights, cast
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIP, CLIPConfig, Params, l2_normalize
from clip_jax.models.decoder import MaMMUTConfig

BOUND = 1e-5  # relative difference that float32 explains
_BATCH = 4

Outputs = dict[str, np.ndarray]  # image_features, text_features, logits, caption_logits


@dataclass(frozen=True)
class Verification:
    """Relative differences ‖a − b‖/‖b‖ between our numbers (a) and the peer's (b)."""

    peer: str
    image_features: float
    text_features: float
    logits: float
    rounding_loss: float | None  # of ours, between exact and rounded weights; None: not rounded
    caption_logits: float = 0.0  # of a decoder, for all words; 0 without

    @property
    def max_relative_difference(self) -> float:
        values = (self.image_features, self.text_features, self.logits, self.caption_logits)
        return float(np.max(values))  # NaN if one is

    @property
    def passed(self) -> bool:
        return self.max_relative_difference <= BOUND  # False for NaN


class Unverifiable(InputError):
    """No reference implementation has such a model; the message says why, after "because"."""


def random_inputs(config: CLIPConfig, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw normalised pixels, and token ids as a tokenizer makes them: end of text, then zeros."""
    rng = np.random.default_rng(seed)
    size, text = config.vision.image_size, config.text
    images = rng.normal(size=(_BATCH, size, size, 3)).astype(np.float32)
    end_of_text = text.eos_token_id if text.pool == "eos" else text.vocab_size - 1
    tokens = rng.integers(1, text.vocab_size - 1, (_BATCH, text.context_length), dtype=np.int32)
    tokens += tokens >= end_of_text  # which stands at one place alone
    for row, end in zip(tokens, rng.integers(1, text.context_length, _BATCH), strict=True):
        row[end] = end_of_text
        row[end + 1 :] = 0
    return images, tokens


def our_outputs(config: CLIPConfig, params: Params, images: Any, tokens: Any) -> Outputs:
    """Run our model in float32."""
    params = jax.tree.map(lambda x: jnp.asarray(cast(np.asarray(x), "float32")), params)
    with jax.default_matmul_precision("highest"):
        outputs = _run(CLIP(replace(config, dtype="float32")), params, images, tokens)
    return {name: np.asarray(x) for name, x in outputs.items()}


@functools.partial(jax.jit, static_argnums=0)
def _run(model: CLIP, params: Params, images: Array, tokens: Array) -> dict[str, Array]:
    written: dict[str, Array] = {}
    if model.config.decoder is None:
        image_features = model.encode_image(params, images)
        text_features = model.encode_text(params, tokens)
    else:
        image_features, image_tokens = model.encode_image_and_tokens(params, images)
        text_features, states = model.encode_text_and_write(params, tokens, image_tokens)
        written["caption_logits"] = model.vocabulary_logits(params, states)
    logits = l2_normalize(image_features) @ l2_normalize(text_features).T
    logits = logits * jnp.exp(params["logit_scale"]) + params.get("logit_bias", 0.0)
    features = {"image_features": image_features, "text_features": text_features}
    return {**features, "logits": logits, **written}


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    """‖a − b‖/‖b‖ in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def features_difference(changed: Weights, weights: Weights) -> float:
    """Return how far a change of the model moves its image features, on random pixels."""
    images, tokens = random_inputs(weights.config)
    ours = [our_outputs(w.config, w.params, images, tokens) for w in (changed, weights)]
    return relative_difference(ours[0]["image_features"], ours[1]["image_features"])


def verify(
    weights: Weights, path: Path, to: Format, *, plain: bool = False, dtype: DType | None = None
) -> Verification:
    """Load what was written at `path` with the format's own library and compare.

    openai-clip rounds weights to float16 whatever the file holds, and `dtype` may have rounded
    them: then the peer is compared with our model on the rounded weights, and the loss by rounding
    is told apart. Raises InputError if the peer is not installed, Unverifiable if it has no such
    model.
    """
    if to == "open-clip" and isinstance(weights.config.decoder, MaMMUTConfig):
        raise Unverifiable("MaMMUT is in LAION's fork of open_clip alone, which is in no package")
    images, tokens = random_inputs(weights.config)
    params = _rounded(weights, to, plain, dtype)
    ours = our_outputs(weights.config, params, images, tokens)
    match to:
        case "openai":
            peer, theirs = "openai-clip", _openai_outputs(path, plain, images, tokens)
        case "open-clip":
            peer, theirs = "open_clip", _open_clip_outputs(path, images, tokens)
        case "hugging-face":
            peer, theirs = "transformers", _hugging_face_outputs(path, images, tokens)
        case "big-vision":
            peer, theirs = "open_clip", _big_vision_outputs(weights, path, images, tokens)
        case "clip-jax":
            again = model_folder.read(path)
            peer, theirs = "clip_jax", our_outputs(again.config, again.params, images, tokens)
    loss = None
    if params is not weights.params:
        exact = our_outputs(weights.config, weights.params, images, tokens)
        loss = max(relative_difference(ours[name], exact[name]) for name in exact)
    differences = {name: relative_difference(ours[name], theirs[name]) for name in ours}
    return Verification(peer=peer, rounding_loss=loss, **differences)


def _rounded(weights: Weights, to: Format, plain: bool, dtype: DType | None) -> Params:
    """Return the weights that the peer will compute with."""
    if to == "openai" and not plain:
        dtype = "float16"
    if dtype in (None, "float32"):
        return weights.params
    if to == "openai":
        tensors = openai.without_bookkeeping(openai.to_tensors(weights, dtype))
        return to_params(openai.rows(weights.config), tensors, weights.config, "rounded weights")
    return jax.tree.map(lambda x: cast(x, dtype), weights.params)


def _need(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise InputError(
            f"--verify compares with {package}, which is not installed: "
            "pip install 'clip-jax-pods[peers]'."
        )


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Peers warn of their own age."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _openai_outputs(path: Path, plain: bool, images: np.ndarray, tokens: np.ndarray) -> Outputs:
    _need("clip", "openai-clip")
    with _quiet():
        known = "pkg_resources" in sys.modules or importlib.util.find_spec("pkg_resources")
        if not known:
            # openai-clip 1.0.1 takes `packaging` from there; new setuptools no longer has it.
            import packaging.version

            stub: Any = types.ModuleType("pkg_resources")
            stub.packaging = packaging
            sys.modules.setdefault("pkg_resources", stub)
        import clip
        import torch
        from clip.model import build_model

        if plain:  # its loader cannot read one
            state = torch.load(path, map_location="cpu", weights_only=True)
            model = build_model(dict(state)).float()
            sizes = set(openai.SIZES)
            model.load_state_dict({n: x.float() for n, x in state.items() if n not in sizes})
        else:
            model, _ = clip.load(str(path), device="cpu")
        return _torch_outputs(model.encode_image, model.encode_text, model, images, tokens)


def _open_clip_outputs(path: Path, images: np.ndarray, tokens: np.ndarray) -> Outputs:
    _need("open_clip", "open_clip_torch")
    with _quiet():
        import open_clip

        model = open_clip.create_model(f"local-dir:{path}").eval()
        if not hasattr(model, "text_decoder"):
            return _torch_outputs(model.encode_image, model.encode_text, model, images, tokens)
        import torch

        encode = (functools.partial(f, normalize=False) for f in (  # CoCa's default is another
            model.encode_image, model.encode_text
        ))  # fmt: skip
        found = _torch_outputs(*encode, model, images, tokens)
        with torch.no_grad():
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
            written = model(pixels, torch.from_numpy(tokens).long())["logits"]
        return found | {"caption_logits": written.numpy()}


def _big_vision_outputs(
    weights: Weights, path: Path, images: np.ndarray, tokens: np.ndarray
) -> Outputs:
    """Of open_clip's model of these sizes and its loader of big_vision's files.

    Its GELU is big_vision's only once it is set so.
    """
    _need("open_clip", "open_clip_torch")
    try:
        settings = model_cfg(open_clip.as_computed(weights))
    except InputError as error:
        message = "open_clip, which reads these files too, has no image tower of these sizes"
        raise Unverifiable(message) from error
    del settings["custom_text"]
    with _quiet():
        import torch
        from open_clip.convert import load_big_vision_weights
        from open_clip.model import CustomTextCLIP

        model = CustomTextCLIP(**settings).eval()
        load_big_vision_weights(model, str(path))
        for name, module in list(model.named_modules()):
            if type(module).__name__.startswith("GELU"):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, torch.nn.GELU("tanh"))
        return _torch_outputs(model.encode_image, model.encode_text, model, images, tokens)


def _hugging_face_outputs(path: Path, images: np.ndarray, tokens: np.ndarray) -> Outputs:
    _need("transformers", "transformers")
    with _quiet():
        from transformers import AutoModel

        model = AutoModel.from_pretrained(path, local_files_only=True).eval().float()

        def encode_image(pixels: Any) -> Any:
            return model.get_image_features(pixel_values=pixels).pooler_output

        def encode_text(ids: Any) -> Any:
            return model.get_text_features(input_ids=ids).pooler_output

        return _torch_outputs(encode_image, encode_text, model, images, tokens)


def _torch_outputs(
    encode_image: Any, encode_text: Any, model: Any, images: np.ndarray, tokens: np.ndarray
) -> Outputs:
    import torch

    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        image_features = encode_image(pixels).float()
        text_features = encode_text(torch.from_numpy(tokens).long()).float()
        normalize = torch.nn.functional.normalize
        logits = normalize(image_features, dim=-1) @ normalize(text_features, dim=-1).T
        logits = logits * model.logit_scale.exp()
        if getattr(model, "logit_bias", None) is not None:
            logits = logits + model.logit_bias
        outputs = (image_features, text_features, logits)
    names = ("image_features", "text_features", "logits")
    return {name: x.numpy() for name, x in zip(names, outputs, strict=True)}
