"""Our numbers against a reference implementation's.

The bound is 1e-5 of ‖a − b‖/‖b‖ on image features, text features and logits, float32 on CPU.
"""

import importlib.util
import sys
import types
import warnings
from typing import Any

import jax
import numpy as np
import packaging.version
import torch

from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.tensor_files import read_tensors
from clip_jax.convert.verify import BOUND, our_outputs, relative_difference
from clip_jax.convert.weights import Weights, default_preprocess
from clip_jax.models.clip import CLIP, CLIPConfig

TEXTS = ["a photo of a cat", "Ünïcödé &amp; <b>HTML</b>!", "seven  o'clock 42", "😀"]


def import_openai_clip():
    """Import `clip` of openai-clip, which imports `pkg_resources`, gone from new setuptools."""
    if "pkg_resources" not in sys.modules and importlib.util.find_spec("pkg_resources") is None:
        stub: Any = types.ModuleType("pkg_resources")
        stub.packaging = packaging
        sys.modules.setdefault("pkg_resources", stub)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import clip
    return clip


def lively(model):
    """BatchNorm at work: fresh gains of 0 and statistics of 0 and 1 would hide mistakes."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def random_weights(config: CLIPConfig, dtype=np.float16) -> Weights:
    """Weights of the size that initialisation has, biases and statistics not at rest.

    In float32, but rounded to `dtype`: `clip.load` of openai-clip loses none of float16's.
    """
    rng = np.random.default_rng(0)

    def draw(path, x):
        names = [key.key for key in path]
        shape = x.shape[1:] if "resblocks" in names else x.shape
        if names[-1] in ("scale", "var"):
            values = rng.uniform(0.5, 1.5, x.shape)
        elif names[-1] == "logit_scale":
            values = np.log(1 / 0.07)
        elif names[-1] == "logit_bias":
            values = -10.0
        elif names[-1] == "kernel":
            # Larger ones would saturate the softmax, and rounding would grow from layer to layer.
            heads = names[-2] in ("in_proj", "q_proj", "k_proj", "v_proj")
            fan_in = np.prod(shape[:1] if heads else shape[:-1])
            values = rng.standard_normal(x.shape, np.float32) * np.float32(fan_in**-0.5)
        else:
            values = rng.standard_normal(x.shape, np.float32) * np.float32(0.1)
        return np.asarray(values, dtype).astype(np.float32)

    shapes = jax.eval_shape(CLIP(config).init, jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return Weights(config=config, params=params, preprocess=default_preprocess(config))


# ------------------------------------------------------------------ the libraries' own loaders


def loaded(to, path):
    """What a library makes of a file that we wrote: its model, its tokenizer as a function."""
    if to == "openai":
        import clip

        model, _ = clip.load(str(path), device="cpu")
        return model, lambda texts: clip.tokenize(texts, model.context_length, truncate=True)
    if to == "open-clip":
        import open_clip

        model = open_clip.create_model(f"local-dir:{path}").eval()
        return model, open_clip.get_tokenizer(f"local-dir:{path}")
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(path, local_files_only=True).eval()
    processor = CLIPProcessor.from_pretrained(path, local_files_only=True)
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return model, lambda texts: processor(text=texts, **options)["input_ids"]


def texts_for(to):
    """Texts that a library tokenizes as OpenAI does: transformers unescapes no HTML."""
    return [text for text in TEXTS if to != "hugging-face" or "&" not in text]


# ------------------------------------------------------------------ the comparison


def outputs(model, images, ids):
    """A PyTorch model's features and logits."""
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        tokens = torch.from_numpy(ids).long()
        if hasattr(model, "encode_image"):  # openai-clip and open_clip
            image, text = model.encode_image(pixels), model.encode_text(tokens)
        else:  # transformers
            image = model.get_image_features(pixel_values=pixels).pooler_output
            text = model.get_text_features(input_ids=tokens).pooler_output
        unit = [x / x.norm(dim=-1, keepdim=True) for x in (image, text)]
        logits = unit[0] @ unit[1].T * model.logit_scale.exp()
        bias = getattr(model, "logit_bias", None)
        logits = logits if bias is None else logits + bias
    names = ("image_features", "text_features", "logits")
    return {n: x.numpy() for n, x in zip(names, (image, text, logits), strict=True)}


def same_ids(weights, ours, theirs):
    """Whether token ids are the same: all, or, where theirs are padded with end of text, as those
    of transformers, and the model does not see it, up to that, with our padding behind it."""
    text = weights.config.text
    end = text.clip_vocab_size - 1
    padded = np.array(ours)
    unseen = text.causal and text.pool != "last"
    if unseen and (theirs[:, -1] == end).all() and (ours[:, -1] != end).any():
        after = np.cumsum(padded == end, axis=1) > 0
        if (padded[after & (padded != end)] != weights.config.text.tokenizer.pad_id).any():
            return False
        padded[after] = end
    return np.array_equal(padded, theirs)


def differences(weights, our_ids, theirs, images, their_ids):
    """Relative difference to their outputs by name; infinite where token ids differ."""
    if not same_ids(weights, our_ids, their_ids):
        return dict.fromkeys(theirs, float("inf"))
    ours = our_outputs(weights.config, weights.params, images, our_ids)
    return {name: relative_difference(ours[name], theirs[name]) for name in theirs}


def check_parity(weights, model, images, our_ids, their_ids):
    """Return the largest difference to a PyTorch model, which is within the bound.

    Each side has its own token ids.
    """
    theirs = outputs(model, images, their_ids)
    largest = max(differences(weights, our_ids, theirs, images, their_ids).values())
    assert largest <= BOUND
    return largest


def read_back(weights, path, to, original):
    """Write what was read, by way of our own folder; the tensors are the original file's, bit for
    bit."""
    ours = path.with_name(f"{path.name} ours")
    write_weights(weights, ours, "clip-jax")
    write_weights(read_weights(ours), path, to)
    names = {"open-clip": "open_clip_model.safetensors", "hugging-face": "model.safetensors"}
    again = read_tensors(path / names[to] if to in names else path)
    assert again.keys() == original.keys()
    for name, array in original.items():
        assert again[name].dtype == array.dtype, name
        assert again[name].shape == array.shape, name
        assert again[name].tobytes() == array.tobytes(), name
