"""A finished model from wherever it lies: a run, our folder, OpenAI's, open_clip's, Hugging Face's.

Also the conversion between these formats, with proof.
"""

import functools
import json
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32
from rich.console import Console
from rich.progress import track

from clip_jax import sharding
from clip_jax.checkpoint import restore_params
from clip_jax.convert.formats import Format, check_said, read_weights, write_weights
from clip_jax.convert.positions import resize_positions
from clip_jax.convert.verify import Verification, verify
from clip_jax.convert.weights import DType, TokenizerConfig, Weights, cast, default_inputs
from clip_jax.data.images import ImageLike, Preprocess
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.models.clip import CLIP, CLIPConfig, Params
from clip_jax.models.layers import Activation
from clip_jax.models.serialize import from_dict
from clip_jax.optim import TOWERS, Tower


@dataclass(frozen=True)
class Model:
    """A model ready to use: its functions, its weights, and how its inputs are made.

    `model.clip.encode_image(model.params, images)` is the pure function underneath.
    """

    config: CLIPConfig
    params: Params
    image_preprocess: Preprocess
    tokenizer_config: TokenizerConfig

    @property
    def clip(self) -> CLIP:
        return CLIP(self.config)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return self.tokenizer_config.build()

    def tokenize(self, texts: str | Sequence[str], truncate: bool = False) -> Int32[Any, "B L"]:
        """Turn texts into token ids; a text that is too long is an error, or cut."""
        return self.tokenizer(texts, self.config.text.context_length, truncate)

    def preprocess(self, images: ImageLike | Sequence[ImageLike]) -> Float[Any, "B H W C"]:
        """Turn images of any kind, or one, into the model's input."""
        many = images if isinstance(images, list | tuple) else [typing.cast(ImageLike, images)]
        return np.stack([self.image_preprocess(image) for image in many])

    @functools.cached_property
    def _placed(self) -> tuple[Mesh, Params]:
        """All devices of this process, and the parameters copied to each."""
        mesh = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices())
        return mesh, jax.device_put(self.params, sharding.replicated(mesh))

    def encode_image(
        self, images: Float[Any, "B H W C"], *, batch_size: int = 64
    ) -> Float[Array, "B E"]:
        """Embed what `preprocess` returns, `batch_size` at a time; features are not normalised."""
        return self._in_batches("encode_image", np.asarray(images), batch_size)

    def encode_text(
        self, tokens: Int32[Any, "B L"], *, batch_size: int = 256
    ) -> Float[Array, "B E"]:
        """Embed what `tokenize` returns, `batch_size` at a time; features are not normalised."""
        return self._in_batches("encode_text", np.asarray(tokens), batch_size)

    def _in_batches(self, method: str, rows: np.ndarray, batch_size: int) -> Float[Array, "B E"]:
        """Run over all local devices; a terminal sees the progress of more than a few batches."""
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        mesh, params = self._placed
        placed = sharding.batch_sharding(mesh)
        features = np.empty((len(rows), self.config.embed_dim), np.float32)
        starts = range(0, len(rows), batch_size)
        hidden = len(starts) < 8 or not sys.stderr.isatty()
        for start in track(starts, method, console=Console(stderr=True), disable=hidden):
            batch = rows[start : start + batch_size]
            padding = padded_size(len(batch), sharding.batch_shards(mesh), batch_size) - len(batch)
            padded = np.concatenate([batch, np.repeat(batch[-1:], padding, axis=0)])
            encoded = _encode(self.clip, method, params, jax.device_put(padded, placed))
            features[start : start + len(batch)] = np.asarray(encoded)[: len(batch)]
        return jnp.asarray(features)


def padded_size(rows: int, shards: int, batch_size: int) -> int:
    """Return how many rows to compute for `rows`: a power of two for each of `shards` devices.

    No more than the full batch takes; so a batch size is compiled for few shapes.
    """
    full, each = -(-batch_size // shards), -(-rows // shards)
    return shards * min(full, 1 << (each - 1).bit_length())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(clip: CLIP, method: str, params: Params, inputs: Array) -> Float[Array, "B E"]:
    return getattr(clip, method)(params, inputs)


def load(
    path: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    image_size: int | None = None,
    activation: Activation | None = None,
    architecture: str | None = None,
) -> Model:
    """Load a model from a run's work directory, a model folder or a foreign file.

    `dtype` is that of the computation. `image_size` other than the model's resizes its positions.
    `activation` and `architecture` answer what a bare file of tensors cannot say; the error that
    asks for them explains. Foreign files are read as data: nothing in them is executed.
    """
    weights = _read(Path(path), image_size, activation, architecture)
    params = jax.tree.map(lambda x: jnp.asarray(cast(np.asarray(x), "float32")), weights.params)
    config = replace(weights.config, dtype=dtype)
    return Model(config, params, weights.preprocess, weights.tokenizer)


def starting_params(
    path: str | Path, config: CLIPConfig, towers: Sequence[Tower] = ("image", "text")
) -> Params:
    """Read the weights with which a training of the architecture `config` can begin, in float32.

    Positions are fitted: the image tower's resized to its image size, the text tower's cut to its
    context length. With one tower alone, neither the other nor the logit scale is returned.
    Raises ValueError that names the first parameter whose shape is another.
    """
    weights = _read(Path(path), config.vision.image_size, None, None)
    params = dict(weights.params)
    text, length = params["text"], config.text.context_length
    params["text"] = text | {"positional_embedding": text["positional_embedding"][:length]}
    names = [TOWERS[tower] for tower in towers]
    if "image" in towers and "batch_stats" in params:
        names.append("batch_stats")
    if set(towers) == set(TOWERS):
        names = list(params)
    expected = jax.eval_shape(CLIP(config).init, jax.random.key(0))
    taken = {name: params[name] for name in names}

    def shapes(tree: Params) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {sharding.path_name(path): x.shape for path, x in leaves}

    has, needs = shapes(taken), shapes({name: expected.get(name, {}) for name in taken})
    for name in sorted(has.keys() | needs.keys()):
        if has.get(name) != needs.get(name):
            raise ValueError(
                f"init_from={str(path)!r} has {name} {has.get(name, 'not at all')}, and the model "
                f"needs {needs.get(name, 'none')}: give the same architecture under --model, or "
                "take one tower with --init-towers."
            )
    return jax.tree.map(lambda x: cast(np.asarray(x), "float32"), taken)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to convert, to what, and whether to prove it."""

    source: Path  # a run's work directory, a model folder, or a file (.pt, .bin, .safetensors)
    destination: Path  # folder to write; with --to openai a file
    to: Format  # whose format to write
    plain: bool = False  # with --to openai: a state dict, not the TorchScript archive
    # load the result with its own library (extra `peers`), compare; exit code 1 above 1e-5
    verify: bool = False
    dtype: DType | None = None  # of the tensors written; by default as they are
    image_size: int | None = None  # pixels; positions are resized to it
    activation: Activation | None = None  # of a bare file of tensors, which does not say it
    architecture: str | None = None  # such as ViT-H-14, of a bare file whose sizes no model has
    overwrite: bool = False  # replace what is at the destination


def convert(config: ConvertConfig) -> Verification | None:
    """Write a model in another format; with `verify` return how far the peer's numbers are off.

    Raises ValueError when the source cannot be read, the format cannot express the model, or
    something is at the destination already.
    """
    source, destination = config.source, config.destination
    if source.exists() and destination.exists() and source.resolve() == destination.resolve():
        raise ValueError(f"{source} is both source and destination; choose another destination.")
    occupied = any(destination.iterdir()) if destination.is_dir() else destination.exists()
    if occupied and not config.overwrite:
        raise ValueError(f"something is at {destination} already; say --overwrite to replace it.")
    if config.to == "openai" and destination.is_dir():
        raise ValueError(f"{destination} is a directory; --to openai writes a file, such as x.pt.")
    if config.to != "openai" and destination.is_file():
        raise ValueError(f"{destination} is a file; --to {config.to} writes a folder.")
    weights = _read(source, config.image_size, config.activation, config.architecture)
    try:
        write_weights(weights, destination, config.to, plain=config.plain, dtype=config.dtype)
    except OSError as error:
        raise ValueError(f"{destination} cannot be written: {error.strerror or error}.") from error
    if not config.verify:
        return None
    return verify(weights, destination, config.to, plain=config.plain, dtype=config.dtype)


def _read(
    path: Path, image_size: int | None, activation: Activation | None, architecture: str | None
) -> Weights:
    if _is_run(path):
        weights = _read_run(path)
        check_said(weights, path, activation, architecture)
    else:
        weights = read_weights(path, activation=activation, architecture=architecture)
    if image_size in (None, weights.config.vision.image_size):
        return weights
    return resize_positions(weights, image_size)


def _is_run(path: Path) -> bool:
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()


def _read_run(workdir: Path) -> Weights:
    """Read the newest checkpoint's weights; the optimizer's state is left where it is."""
    content = json.loads((workdir / "config.json").read_text())
    config = from_dict(CLIPConfig, content.get("model"), f"{workdir / 'config.json'}: model")
    # How it was trained is no part of the finished model, and no other format keeps it.
    rest = {name: getattr(CLIPConfig, name) for name in ("dtype", "remat", "attention")}
    config = replace(config, **rest)
    params = jax.tree.map(np.asarray, restore_params(workdir / "checkpoints", CLIP(config)))
    preprocess, tokenizer = default_inputs(config)
    return Weights(config=config, params=params, preprocess=preprocess, tokenizer=tokenizer)
