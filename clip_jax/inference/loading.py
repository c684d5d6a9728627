"""Load a trained model from a run, a model folder or weights in another format."""

import functools
import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, UInt32

from clip_jax import processes, sharding
from clip_jax.checkpoints.retention import TEACHER, Unusable, named_step, of_teacher, split_name
from clip_jax.convert import run
from clip_jax.convert.conversion import check_free
from clip_jax.convert.formats import Format, read_weights, write_weights
from clip_jax.convert.weight_files import WeightFiles
from clip_jax.convert.weights import Head, Weights, at_length, cast, cut_to, whole_model
from clip_jax.data.images import ImageLike, Preprocess
from clip_jax.data.tokenizers import Tokenizer, make_tokenizer, read_captions
from clip_jax.errors import InputError
from clip_jax.evals import prompts
from clip_jax.evals.captioning import write
from clip_jax.evals.evaluator import (
    Encoder,
    attend_to_patches,
    compiled,
    embed_images,
    embed_texts,
)
from clip_jax.models import templates
from clip_jax.models.clip import CLIP, CLIPConfig, Params, l2_normalize, path_name
from clip_jax.models.generation import GenerationConfig
from clip_jax.models.images import Images, Patches, concatenate
from clip_jax.models.layers import Activation, DType
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

_WEIGHTS = 1 << 27  # attention weights of a batch that are held at once


@dataclass(frozen=True)
class Model:
    """A model ready to use: functions, weights, preprocessing and tokenizer.

    `model.clip.encode_image(model.params, images)` is the pure function underneath.
    """

    config: CLIPConfig
    params: Params
    image_preprocess: Preprocess
    head: Head | None = None  # a classifier that was trained with the model
    template: str = templates.DEFAULT  # prompt template that suits the model; {} is the label

    @functools.cached_property
    def clip(self) -> CLIP:
        """The model's functions; they normalise bytes as the model's preprocessing does."""
        how = self.image_preprocess
        return CLIP(replace(self.config, image_mean=how.mean, image_std=how.std))

    @property
    def tokens(self) -> int | None:
        """Maximum number of patches per image of a NaFlex model; None: fixed resolution."""
        return self.image_preprocess.max_patches

    def with_tokens(self, tokens: int) -> "Model":
        """Return this NaFlex model for images of at most `tokens` patches, with the same weights.

        Raises InputError for a model of fixed resolution.
        """
        fixed = Weights(config=self.config, params=self.params, preprocess=self.image_preprocess)
        other = at_length(fixed, tokens, "this model")
        return replace(self, config=other.config, image_preprocess=other.preprocess)

    def with_dim(self, dim: int) -> "Model":
        """Return this model with only the first `dim` channels of its embeddings.

        Raises InputError if it has fewer, or if its towers do not end in projections.
        """
        complete = Weights(
            config=self.config,
            params=self.params,
            preprocess=self.image_preprocess,
            head=self.head,
            template=self.template,
        )
        return model_of(cut_to(complete, dim, "this model"), self.config.dtype)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return make_tokenizer(self.config.text)

    def tokenize(self, texts: str | Sequence[str], truncate: bool = False) -> Int32[Any, "B L"]:
        """Turn texts into token ids; texts that are too long raise InputError or are truncated."""
        return self.tokenizer(texts, self.config.text.context_length, truncate)

    def preprocess(self, images: ImageLike | Sequence[ImageLike]) -> Images:
        """Turn one or several images of any kind into the model's normalised input."""
        many = images if isinstance(images, list | tuple) else [typing.cast(ImageLike, images)]
        how = self.image_preprocess
        return how.normalize(concatenate([how.batch(image) for image in many]))

    def encode_image(
        self, images: Images, *, normalize: bool = False, batch_size: int = 64
    ) -> Float[Array, "B E"]:
        """Embed images, bytes or the output of `preprocess`, in batches.

        With `normalize`, embeddings have unit length.
        """
        encode = compiled(embed_images, self.clip, self._mesh, normalize=normalize)
        return jnp.asarray(self._in_batches("encode_image", encode, images, batch_size=batch_size))

    def encode_text(
        self, tokens: Int32[Any, "B L"], *, normalize: bool = False, batch_size: int = 256
    ) -> Float[Array, "B E"]:
        """Embed the output of `tokenize`, in batches, with as little padding as all texts need.

        With `normalize`, embeddings have unit length.
        """
        encode = compiled(embed_texts, self.clip, self._mesh, normalize=normalize)
        tokens = self.config.text.shortened(tokens)
        return jnp.asarray(self._in_batches("encode_text", encode, tokens, batch_size=batch_size))

    def similarity(
        self, images: Float[Any, "B E"], texts: Float[Any, "T E"]
    ) -> Float[np.ndarray, "B T"]:
        """Return the cosine similarity of each image and each text, given their embeddings."""
        return unit(images) @ unit(texts).T

    def probabilities(
        self, images: Float[Any, "B E"], texts: Float[Any, "T E"]
    ) -> Float[np.ndarray, "B T"]:
        """Return the probability of each text for each image, given outputs of `encode_image` and
        `encode_text`.

        It is the softmax of scaled cosines (CLIP paper, figure 3) or, for a model with a logit
        bias, the sigmoid for each text by itself (SigLIP paper, 3.2).
        """
        from scipy import special

        logits = self.similarity(images, texts) * float(np.exp(self.params["logit_scale"]))
        if "logit_bias" in self.params:
            return special.expit(logits + float(self.params["logit_bias"]))
        return special.softmax(logits, axis=1)

    def encoder(self, mesh: Mesh, name: str) -> Encoder:
        """Return what evaluators measure; the parameters must be on the mesh."""
        return Encoder(
            self.clip,
            self.params,
            mesh,
            self.image_preprocess,
            lambda texts: self.tokenize(texts, True),
            name,
            self.head,
        )

    def class_probabilities(self, images: Float[Any, "B E"]) -> Float[np.ndarray, "B classes"]:
        """Return the probability of each of `head.classes` for outputs of `encode_image`."""
        if self.head is None:
            raise InputError("the model has no classifier; give labels, or train ClassifierConfig.")
        from scipy import special

        logits = unit(images) @ self.head.kernel.T
        return special.softmax(logits * float(np.exp(self.params["logit_scale"])), axis=1)

    def attention_maps(
        self, images: Images, *, batch_size: int = 64
    ) -> list[Float[np.ndarray, "rows columns"]]:
        """Return for each image how much its embedding attends to each patch.

        It is the attention rollout (arXiv:2005.00928) of a vision transformer. Raises InputError
        for other image towers. Images are bytes or the output of `preprocess`, of any aspect ratio
        for a NaFlex model.
        """
        vision = self.config.vision
        size = max(
            1, min(batch_size, _WEIGHTS // max(vision.num_layers * vision.num_patches**2, 1))
        )
        compute = compiled(attend_to_patches, self.clip, self._mesh)
        shares = self._in_batches("attention_maps", compute, images, batch_size=size)
        side = (vision.grid, vision.grid)
        grids = images.grid if isinstance(images, Patches) else [side] * len(shares)
        return [
            x[: h * w].reshape(h, w) for x, (h, w) in zip(shares, np.asarray(grids), strict=True)
        ]

    def caption(
        self,
        images: Images,
        generation: GenerationConfig = GenerationConfig(),
        *,
        batch_size: int = 64,
        seeds: UInt32[np.ndarray, " B"] | None = None,
    ) -> list[str]:
        """Return a caption for each image, given bytes or the output of `preprocess`, in batches.

        `seeds` replace `generation.seed`: an image's caption is the one of its own seed. Raises
        InputError if the model has no decoder; CoCa, MaMMUT and CapPa have one.
        """
        self.clip.needs_decoder()
        # The seed is an argument, so that another needs no compilation.
        run = compiled(write, self.clip, self._mesh, generation=replace(generation, seed=0))
        if seeds is None:
            run = functools.partial(run, seed=jnp.uint32(generation.seed))
        rows = (images,) if seeds is None else (images, seeds)
        ids = self._in_batches("caption", run, *rows, batch_size=batch_size)
        return read_captions(ids, self.config.text)

    def save(
        self, folder: str | AnyPath, to: Format = "clip-jax", *, overwrite: bool = False
    ) -> None:
        """Write the model in one of the formats of `clip-jax convert`; `load` reads all of them.

        In a multi-process run, all processes call this and one of them writes. Raises InputError if
        the format cannot express the model, or if the folder exists and is not empty, unless
        `overwrite`.
        """
        path, params = files.as_path(folder), self.params
        if not all(x.is_fully_addressable for x in jax.tree.leaves(params)):
            from jax.experimental import multihost_utils

            params = multihost_utils.process_allgather(params, tiled=True)
        weights = Weights(
            config=self.config,
            params=jax.device_get(params),
            preprocess=self.image_preprocess,
            head=self.head,
            template=None if self.template == templates.DEFAULT else self.template,
        )

        def write_once() -> None:
            if processes.is_lead():
                check_free(None, path, overwrite)
                write_weights(weights, path, to)

        processes.together(write_once, InputError)

    @functools.cached_property
    def _mesh(self) -> Mesh:
        """A mesh of all devices of this process."""
        return sharding.make_mesh(sharding.MeshConfig(), jax.local_devices())

    @functools.cached_property
    def _replicated(self) -> Params:
        """The parameters, replicated on all devices."""
        return jax.device_put(self.params, sharding.replicated(self._mesh))

    def _in_batches(self, name: str, function: Any, *rows: Any, batch_size: int) -> np.ndarray:
        return sharding.in_batches(
            function, self._mesh, self._replicated, *rows, batch_size=batch_size, name=name
        )


def unit(features: Any) -> Float[np.ndarray, "B E"]:
    """Scale rows to unit length, on the host."""
    return l2_normalize(np.asarray(features))


def load(
    path: str | AnyPath,
    *,
    dtype: DType = "float32",
    image_size: int | None = None,
    tokens: int | None = None,
    dim: int | None = None,
    activation: Activation | None = None,
    tokenizer: str | None = None,
    base: str | None = None,
) -> Model:
    """Load a model from a run directory, a model folder or weights in another format.

    RUN@20000 is a run's checkpoint of that step, RUN@best its best, RUN its newest. `icons` is the
    model that comes with clip_jax, unless there is a model in a local folder of that name. OpenAI's
    names (`ViT-B/32`) and hf:OWNER/NAME are downloaded by the extra `hub`. `dtype` is that of the
    computation. Another `image_size` than the model's resizes its position embeddings. `tokens` is
    the maximum number of patches per image of a NaFlex model. `dim` is the number of first channels
    of embeddings, for a model trained for it (Matryoshka). `activation` is needed for plain tensor
    files, which do not record it. `tokenizer` is the vocabulary for weights that have none:
    a tokenizer.json or a sentencepiece model. `base` is the weights that PEFT's adapters change, by
    default the local folder that their file names. Files are read as data: nothing in them is
    executed.

        >>> import clip_jax
        >>> model = clip_jax.load("icons")
        >>> model.tokenize(["home icon", "cloud icon"]).shape
        (2, 16)
    """
    weights = read_weights(
        files.as_path(path),
        activation=activation,
        image_size=image_size,
        tokens=tokens,
        dim=dim,
        tokenizer=tokenizer,
        base=base,
    )
    return model_of(weights, dtype)


def model_of(weights: Weights, dtype: DType = "float32") -> Model:
    """Return a model of these weights, on one device."""
    params = jax.tree.map(lambda x: jnp.asarray(cast(np.asarray(x), "float32")), weights.params)
    return _model(weights, params, dtype)


def prompt_head(model: Model, classes: Sequence[str], templates: Sequence[str]) -> Head:
    """Return the zero-shot classifier: for each class the mean of its unit prompt embeddings,
    scaled to unit length (CLIP paper, section 3.1.4)."""
    rows = [[prompts.fill(template, name) for name in classes] for template in templates]
    texts = [unit(model.encode_text(model.tokenize(row, truncate=True))) for row in rows]
    kernel = prompts.ensemble(np.stack(texts)).astype(np.float32)
    return Head(tuple(classes), tuple(templates), kernel)


def load_on_mesh(
    path: str | AnyPath,
    mesh: Mesh,
    *,
    dtype: DType = "float32",
    tokens: int | None = None,
    dim: int | None = None,
) -> Model:
    """Load a model as `load` does, with parameters sharded as in training.

    From a run without adapters, each device reads only its shards of the checkpoint, and from
    files, each process its parts of a parameter. In a multi-process run, all processes call this.
    """
    with WeightFiles() as weight_files:
        weights = at_length(open_alike(weight_files, path), tokens, path)
        return on_mesh(cut_to(weights, dim, path), mesh, dtype)


def open_alike(weight_files: WeightFiles, path: str | AnyPath) -> Weights:
    """Open a model; of a run that goes on, the same checkpoint in all processes, which call this
    together."""
    workdir, which = split_name(files.as_path(path))
    if run.is_run(workdir):
        step = processes.together(lambda: named_step(workdir, which), Unusable)
        _, teacher = of_teacher(which)
        path = f"{workdir}@{processes.gather(step)[0]}" + f":{TEACHER}" * teacher
    return whole_model(weight_files.open(path))


def on_mesh(weights: Weights, mesh: Mesh, dtype: DType = "float32") -> Model:
    """Return a model of these weights, with parameters sharded as in training."""

    def put(x: Any, on: jax.sharding.Sharding) -> Array:
        values = np.asarray(x) if on.is_fully_addressable else x  # else other processes have parts
        return jax.make_array_from_callback(
            x.shape, on, lambda index: cast(np.asarray(values[index]), "float32")
        )

    shardings = sharding.param_shardings(weights.config, weights.params, mesh)
    config = replace(weights.config, dtype=dtype)
    if (restore := weights.read_sharded) is not None:
        shapes = jax.eval_shape(CLIP(config).init, jax.random.key(0))
        params = processes.together(lambda: restore(shapes, shardings), Unusable)
        check_finite(params, weights.path)
    else:
        params = processes.together(
            lambda: jax.tree.map(put, weights.params, shardings), InputError
        )
    return _model(weights, params, dtype)


def _model(weights: Weights, params: Params, dtype: DType) -> Model:
    return Model(
        replace(weights.config, dtype=dtype),
        params,
        weights.preprocess,
        weights.head,
        weights.template or templates.DEFAULT,
    )


def check_finite(params: Params, path: str) -> None:
    """Raise Unusable, which names the run, unless all of its parameters on a mesh are finite."""
    for name, number in jax.device_get(_not_finite(params)).items():
        if number:
            raise Unusable(
                f"{path}: {name} has {number} values that are NaN or infinite, so all "
                "predictions would be NaN; take an earlier checkpoint."
            )


@jax.jit
def _not_finite(params: Params) -> dict[str, Array]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_name(path): (~jnp.isfinite(x)).sum() for path, x in leaves}
