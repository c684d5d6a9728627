"""ONNX files in the layouts that transformers.js and immich load, run by onnxruntime to verify."""

import importlib.util
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from clip_jax.convert import image_processor, tokenizer_files
from clip_jax.convert.open_clip_config import is_open_clips_own, preprocess_cfg, text_cfg
from clip_jax.convert.settings import read_json, write_json
from clip_jax.convert.weights import DType, Weights
from clip_jax.data.tokenizers import json_file, make_tokenizer
from clip_jax.data.tokenizers.vocabulary import JSON_NAME
from clip_jax.errors import InputError
from clip_jax.export import patches
from clip_jax.export.graph import INLINE_BYTES, Graph
from clip_jax.export.towers import caption_logits, image_tower, text_tower
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.images import Images, NaFlex, Patches
from clip_jax.models.text import TextConfig

# Texts that --verify tokenizes: cases, signs, and more words than any context has.
TEXTS = ("A photo of a CAT.", "snake_case, it's 42 O'Clock!", "Naïve CAFÉ: e-mail", "x " * 2_000)

Layout = Literal["transformers-js", "immich"]


@dataclass(frozen=True)
class Names:
    """Names of a layout's files, their inputs and outputs."""

    image: str  # path in the folder
    text: str
    clip: str | None  # both towers and the logits; None: the layout has none
    captions: str | None  # the decoder's logits; None: the layout or the model has none
    pixels: str  # inputs
    ids: str
    ids_type: Any
    image_output: str
    text_output: str


def names(layout: Layout, config: CLIPConfig, dtype: DType) -> Names:
    """Return a layout's names for a model."""
    if layout == "immich":
        files = ("visual/model.onnx", "textual/model.onnx", None, None)
        return Names(*files, "image", "text", np.int32, "embedding", "embedding")
    kinds = ("vision_model", "text_model", "model", "caption_model")
    suffix = "_fp16" if dtype == "float16" else ""
    image, text, clip, captions = (f"onnx/{kind}{suffix}.onnx" for kind in kinds)
    files = (image, text, clip, None if config.decoder is None else captions)
    siglip = config.has_logit_bias or isinstance(config.vision.image_spec, NaFlex)
    image, text = ("pooler_output",) * 2 if siglip else ("image_embeds", "text_embeds")
    return Names(*files, "pixel_values", "input_ids", np.int64, image, text)


def write(
    weights: Weights,
    folder: Path,
    layout: Layout = "transformers-js",
    *,
    dtype: DType = "float32",
    normalize: bool = False,
    inline_bytes: int = INLINE_BYTES,
) -> None:
    """Write a folder of ONNX files, with preprocessing and tokenizer in the reader's format.

    With `normalize`, embeddings are normalised (immich's always are). Weights above `inline_bytes`
    are in a second file. Raises InputError if the reader does not support the model, or the package
    `onnx` is missing.
    """
    _need("onnx", "--format onnx")
    check(weights, layout)
    config, called = weights.config, names(layout, weights.config, dtype)
    size = config.vision.image_size
    external = {}

    def save(path: str, graph: Graph, inputs: list, outputs: list) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if graph.save(folder / path, inputs, outputs, inline_bytes):
            external[Path(path).name] = True

    def images(batch: str) -> list[tuple[str, Any, tuple]]:
        if not isinstance(spec := config.vision.image_spec, NaFlex):
            return [(called.pixels, np.float32, (batch, 3, size, size))]
        shapes, kinds = patches.shapes(spec, batch, "patches"), {called.pixels: np.float32}
        return [(name, kinds.get(name, np.int64), shape) for name, shape in shapes.items()]

    def ids(batch: str) -> list[tuple[str, Any, tuple]]:
        return [(called.ids, called.ids_type, (batch, "sequence_length"))]

    unit = normalize or layout == "immich"
    for path, tower, inputs, output in (
        (called.image, image_tower, images("batch"), called.image_output),
        (called.text, text_tower, ids("batch"), called.text_output),
    ):
        graph = Graph(weights.params, dtype == "float16")
        features = tower(graph, config, inputs[0][0])
        features = graph.unit(features) if unit else features
        save(path, graph, inputs, [(output, features, ("batch", config.embed_dim))])
    if called.clip:
        graph = Graph(weights.params, dtype == "float16")
        inputs = ids("text_batch") + images("image_batch")
        save(called.clip, graph, inputs, _logits(graph, config, called))
    if called.captions:
        graph = Graph(weights.params, dtype == "float16")
        logits = caption_logits(graph, config, called.pixels, called.ids)
        shape = ("batch", "sequence_length", config.text.vocab_size)
        save(called.captions, graph, images("batch") + ids("batch"), [("logits", logits, shape)])
    _write_beside(weights, folder, layout, external)


def check(weights: Weights, layout: Layout) -> None:
    """Raise InputError if a layout's reader lacks the preprocessing or the padding."""
    if weights.preprocess.resize_mode == "longest":
        raise InputError(
            f"{layout} does not support preprocess.resize_mode='longest'; use --format stablehlo."
        )
    if layout == "immich" and weights.preprocess.crop_ratio != 1:
        raise InputError(
            "immich crops the middle of an image whose shorter side is the model's image size; "
            f"preprocess.crop_ratio={weights.preprocess.crop_ratio} needs another --layout."
        )
    if layout == "immich" and isinstance(weights.config.vision.image_spec, NaFlex):
        raise InputError(
            "immich supports square images only, and this model takes patches "
            f"(vision.max_patches={weights.preprocess.max_patches}, NaFlex); use another --layout."
        )
    if layout == "immich" and weights.config.text.tokenizer.pad_side == "left":
        raise InputError(
            "immich pads texts on the right; text.tokenizer.pad_side='left' needs another --layout."
        )


def _logits(graph: Graph, config: CLIPConfig, called: Names) -> list[tuple[str, str, tuple]]:
    """Add both towers and their similarities; return outputs as named in transformers."""
    image = graph.unit(image_tower(graph, config, called.pixels))
    text = graph.unit(text_tower(graph, config, called.ids))
    scale = np.exp(graph.weight("logit_scale"))
    logits = graph.op("MatMul", image, graph.op("Transpose", text, perm=[1, 0]))
    logits = graph.op("Mul", logits, scale)
    if graph.has("logit_bias"):
        logits = graph.op("Add", logits, graph.weight("logit_bias"))
    other = graph.op("Transpose", logits, perm=[1, 0])
    return [
        ("logits_per_image", logits, ("image_batch", "text_batch")),
        ("logits_per_text", other, ("text_batch", "image_batch")),
        ("text_embeds", text, ("text_batch", config.embed_dim)),
        ("image_embeds", image, ("image_batch", config.embed_dim)),
    ]


def _write_beside(
    weights: Weights, folder: Path, layout: Layout, external: dict[str, bool]
) -> None:
    config, preprocess = weights.config, weights.preprocess
    own_padding = config.text.sees_padding
    if layout == "immich":
        is_open_clips, words = is_open_clips_own(config.text), dict[str, Any]()
        if config.text.has_token_types:  # a BERT, which open_clip describes by a model of the hub
            words["context_length"] = config.text.context_length
        else:
            words |= text_cfg(config.text)
        if not is_open_clips:
            # tokenizer.json cleans: immich does not lower case, and joins at underscores.
            words["tokenizer_kwargs"] = {"clean": "whitespace"}
        vision = {"image_size": config.vision.image_size}
        content = {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": words}
        write_json(folder / "config.json", content)
        size, fill = [preprocess.image_size] * 2, preprocess.fill
        content = preprocess_cfg(preprocess) | {"size": size, "mode": "RGB", "fill_color": fill}
        write_json(folder / "visual/preprocess_cfg.json", content)
        tokenizer_files.write(
            folder / "textual", config.text, is_open_clips, as_json=True, own_padding=own_padding
        )
        return
    siglip, spec = config.has_logit_bias, config.vision.image_spec
    kind, size = "siglip" if siglip else "clip", {"image_size": config.vision.image_size}
    if isinstance(spec, NaFlex):
        kind = "siglip2"
        size = {"num_patches": config.vision.grid**2, "patch_size": spec.patch_size}
    content = {
        "architectures": ["CLIPModel" if kind == "clip" else f"{kind.title()}Model"],
        "model_type": kind,
        "projection_dim": config.embed_dim,
        "vision_config": {"model_type": f"{kind}_vision_model"} | size,
        "text_config": {
            "model_type": f"{kind}_text_model",
            "max_position_embeddings": config.text.context_length,
            "vocab_size": config.text.vocab_size,
        },
    }
    if external:
        content["transformers.js_config"] = {"use_external_data_format": external}
    write_json(folder / "config.json", content)
    image_processor.write(folder, preprocess, "Siglip" if siglip else "CLIP")
    tokenizer_files.write(folder, config.text, as_json=True, own_padding=own_padding)


# ------------------------------------------------------------------ verification


def outputs(
    folder: Path,
    layout: Layout,
    config: CLIPConfig,
    dtype: DType,
    images: Images,
    tokens: np.ndarray,
) -> dict[str, np.ndarray]:
    """Run the files by onnxruntime on normalised images and token ids [B, L].

    Returns `image_features`, `text_features` and, if the layout has them, `logits` and
    `caption_logits` (of all tokens but the last). Raises InputError, which names a file that is
    missing, truncated, or of another kind.
    """
    _need("onnxruntime", "--verify")
    called = names(layout, config, dtype)
    if isinstance(images, Patches):
        pixels = patches.to_arrays(images)
    else:
        pixels = {called.pixels: np.ascontiguousarray(images.transpose(0, 3, 1, 2))}
    ids = {called.ids: tokens.astype(called.ids_type)}
    (image,) = _run(folder / called.image, [called.image_output], pixels)
    (text,) = _run(folder / called.text, [called.text_output], ids)
    features = {"image_features": image, "text_features": text}
    if called.captions and config.decoder is not None:
        read = config.decoder.inputs(config.text, jnp.asarray(tokens))
        begun = {called.ids: np.asarray(read, called.ids_type)}
        (features["caption_logits"],) = _run(folder / called.captions, ["logits"], pixels | begun)
    if called.clip:
        (features["logits"],) = _run(folder / called.clip, ["logits_per_image"], pixels | ids)
    return features


def other_ids(folder: Path, layout: Layout | None, text: TextConfig) -> int:
    """Count the TEXTS whose ids by the exported tokenizer.json differ from the model's.

    Texts are tokenized and padded as by the layout's reader (None: StableHLO's). The padding id may
    differ if it does not change features.
    """
    path = folder / ("textual" if layout == "immich" else "") / JSON_NAME
    settings, theirs = read_json(path.with_name("tokenizer_config.json")), json_file.load(str(path))
    token, length = settings.get("pad_token"), text.context_length
    name = str(token.get("content") if isinstance(token, dict) else token)
    pad = theirs.token_to_id(name) if text.sees_padding else text.tokenizer.pad_id
    if pad is None:
        raise InputError(
            f"{path} lacks pad_token={name!r:.99} of its tokenizer_config.json; export again."
        )
    side, texts = settings.get("padding_side", "right"), TEXTS
    if layout == "immich":
        side, words = "right", read_json(folder / "config.json").get("text_cfg")
        texts = [" ".join(x.split()) for x in texts]
        if isinstance(words, dict) and words.get("tokenizer_kwargs") == {"clean": "canonicalize"}:
            texts = [x.translate(str.maketrans("", "", string.punctuation)).lower() for x in texts]
    theirs.enable_padding(direction=side, pad_id=pad, length=length)
    theirs.enable_truncation(length)
    ids, ours = theirs.encode_batch(texts), make_tokenizer(text)(TEXTS, length, True)
    return sum(row.ids != expected.tolist() for row, expected in zip(ids, ours, strict=True))


def _run(path: Path, wanted: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    if not path.is_file():
        raise InputError(f"there is no {path}; write it by clip-jax export --format onnx.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its messages are in the exception
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        return session.run(wanted, inputs)
    except Exception as error:  # its types are not public
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{path} cannot be run ({why:.300}): it is truncated, its weights beside it are, or "
            "it is another model's. Export it again."
        ) from error


def _need(module: str, what: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{what} needs the package {module}: pip install 'clip-jax-pods[onnx]'.")
