"""StableHLO by jax.export: one artifact per tower for CPU, CUDA and TPU, run by JAX alone.

Weights are arguments, in a safetensors file: artifacts are limited to 2 GB and shared by all
checkpoints of a model. A model with a decoder has two more programs, which write a caption token by
token and pass on a KV cache of the image and the written tokens.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors.flax import load_file

from clip_jax.convert import model_folder
from clip_jax.convert.state_dict import flatten, unflatten
from clip_jax.convert.tokenizer_files import write_clip_tokenizer
from clip_jax.convert.weights import DType, Weights, cast
from clip_jax.errors import InputError, needing
from clip_jax.export import patches
from clip_jax.models.clip import CLIP, CLIPConfig, Params
from clip_jax.models.generation import begin_and_end
from clip_jax.models.images import Images, NaFlex, Patches
from clip_jax.models.layers import apart

IMAGE_NAME, TEXT_NAME = "image.stablehlo", "text.stablehlo"
FIRST_NAME, NEXT_NAME = "caption_first.stablehlo", "caption_next.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
_STEPS = 9  # tokens for which a decoder is compared

# Code for the model card: images.npy [B, H, W, 3], normalised pixels; tokens.npy [B, L], token ids.
READER = """\
import jax, jax.export, numpy as np
from safetensors.flax import load_file

weights = load_file("{folder}/model.safetensors")
image, text = (
    jax.export.deserialize(bytes(np.fromfile(f"{folder}/{name}.stablehlo", "u1")))
    for name in ("image", "text")
)
image_features = np.asarray(image.call(weights, np.load("images.npy")))
text_features = np.asarray(text.call(weights, np.load("tokens.npy")))
"""


def write(weights: Weights, folder: Path, *, dtype: DType = "float32") -> None:
    """Write a model folder, which `load` reads, too, with both towers as StableHLO.

    For a decoder, it also writes `caption_first(weights, pixels)`, which returns logits [b, V] of
    the token after the begin token and a state, a list of arrays, and `caption_next(weights, state,
    ids, position)`, which returns the next logits and state. `dtype` is that of the weights, and of
    the computation if it is bfloat16; features and logits are float32. The batch size is symbolic,
    and of NaFlex models the number of patches. Raises InputError if the package `flatbuffers`, or
    begin and end ids for captions, are missing.
    """
    with needing(
        "--format stablehlo needs the package flatbuffers: pip install 'clip-jax-pods[export]'."
    ):
        import flatbuffers  # noqa: F401
    if weights.config.decoder is not None:
        begin_and_end(weights.config.text, weights.config.decoder.start)
    model_folder.write(weights, folder, dtype=dtype)
    if weights.config.text.tokenizer.file == "clip":
        write_clip_tokenizer(folder, weights.config.text, weights.config.text.sees_padding)
    config = weights.config
    params = {
        path: jax.ShapeDtypeStruct(x.shape, cast(np.empty(0, x.dtype), dtype).dtype)
        for path, x in flatten(weights.params).items()
    }
    size, length = jax.export.symbolic_shape("b, n")
    images: Any = jax.ShapeDtypeStruct((size, *[config.vision.image_size] * 2, 3), jnp.float32)
    if isinstance(spec := config.vision.image_spec, NaFlex):
        images = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == patches.PIXELS else jnp.int32)
            for name, shape in patches.shapes(spec, size, length).items()
        }
    tokens = jax.ShapeDtypeStruct((size, config.text.context_length), jnp.int32)
    computed = "bfloat16" if dtype == "bfloat16" else "float32"  # CPUs have no float16 products
    model = CLIP(replace(config, dtype=computed))
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        IMAGE_NAME: (lambda tree, x: model.encode_image(tree, patches.from_arrays(x)), (images,)),
        TEXT_NAME: (model.encode_text, (tokens,)),
    }
    if config.decoder is not None:
        first, following = caption_programs(model)
        _, state = jax.eval_shape(_of_weights(first, computed), params, images)
        ids, position = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((size,), ()))
        programs |= {FIRST_NAME: (first, (images,)), NEXT_NAME: (following, (state, ids, position))}
    for name, (function, inputs) in programs.items():
        export = jax.export.export(jax.jit(_of_weights(function, computed)), platforms=PLATFORMS)
        (folder / name).write_bytes(export(params, *inputs).serialize())


def _of_weights(function: Callable[..., Any], computed: str) -> Callable[..., Any]:
    """Make a function of parameters one of a file's tensors by path."""

    def program(weights: dict[str, Array], *inputs: Any) -> Any:
        tree = unflatten({path: x.astype(jnp.float32) for path, x in weights.items()})
        # On TPUs the default would round float32 to bfloat16.
        with jax.default_matmul_precision("default" if computed == "bfloat16" else "highest"):
            return function(tree, *inputs)

    return program


def caption_programs(model: CLIP) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the functions for the first token and for each later token; see `write`."""
    begin, _ = begin_and_end(model.config.text, model.needs_decoder().start)
    length = model.config.text.context_length
    empty = jax.eval_shape(lambda: model.empty_cache(1, length))
    # Keys and values, and how many of them are valid where images differ in it.
    image = (0,) * (3 if model.config.vision.pads_caption_tokens else 2)
    structure = jax.tree.structure(
        empty._replace(decoder=[layer._replace(image=image) for layer in empty.decoder])
    )

    def first(params: Params, images: Any) -> tuple[Array, list[Array]]:
        features, image_tokens = model.encode_image_and_tokens(params, patches.from_arrays(images))
        rows = features.shape[0]  # symbolic
        cache = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])),
            model.empty_cache(1, length),
        )
        ids, position = jnp.full((rows,), begin, jnp.int32), jnp.zeros((), jnp.int32)
        logits, cache = model.decode_next(apart(params), ids, image_tokens, cache, position)
        return logits, jax.tree.leaves(cache)

    def following(
        params: Params, state: list[Array], ids: Array, position: Array
    ) -> tuple[Array, list[Array]]:
        cache = jax.tree.unflatten(structure, state)
        logits, cache = model.decode_next(apart(params), ids, None, cache, position)
        return logits, jax.tree.leaves(cache)

    return first, following


def spoken(config: CLIPConfig, tokens: np.ndarray) -> np.ndarray:
    """Replace begin and padding in ids [B, L], to get ids that a decoder may have written."""
    text, few = config.text, tokens[:, :_STEPS].copy()
    few[few == text.tokenizer.pad_id] = text.end_id
    if text.begin_id is not None:
        few[:, 0] = text.begin_id
    return few


def outputs(
    folder: Path, config: CLIPConfig, images: Images, tokens: np.ndarray
) -> dict[str, np.ndarray]:
    """Run a folder's programs as `onnx.outputs` does; `caption_logits` are those of `spoken` ids.

    Raises InputError if a file is missing, truncated, or another model's.
    """

    def read(name: str) -> Callable[..., Any]:
        exported = jax.export.deserialize(bytearray((folder / name).read_bytes()))
        return functools.partial(exported.call, weights)

    inputs = patches.to_arrays(images) if isinstance(images, Patches) else images
    try:
        weights = load_file(folder / "model.safetensors")
        results = {
            "image_features": read(IMAGE_NAME)(inputs),
            "text_features": read(TEXT_NAME)(tokens),
        }
        if config.decoder is not None:
            words = config.decoder.inputs(config.text, jnp.asarray(spoken(config, tokens)))
            following = read(NEXT_NAME)
            logits, state = read(FIRST_NAME)(inputs)
            steps = [logits]
            for position in range(1, words.shape[1]):
                logits, state = following(state, words[:, position], np.int32(position))
                steps.append(logits)
            results["caption_logits"] = jnp.stack(steps, axis=1)
        return {name: np.asarray(x) for name, x in results.items()}
    except Exception as error:  # its types are not public
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{folder} cannot be run ({why:.300}): one of its files is missing, truncated or "
            "another model's. Export it again."
        ) from error
