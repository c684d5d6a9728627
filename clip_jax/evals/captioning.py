"""Generate captions on the mesh, and compute the likelihood of given ones."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt32

from clip_jax import sharding
from clip_jax.evals import prompts
from clip_jax.evals.caption_scores import bleu, cider
from clip_jax.evals.datasets import Captioned, Labelled, Missing
from clip_jax.evals.evaluator import Encoder
from clip_jax.evals.reader import Outcome, Splits
from clip_jax.evals.zero_shot import classification
from clip_jax.losses import Axes, CaptionConfig, caption_loss
from clip_jax.losses.caption import labels_of
from clip_jax.models.clip import CLIP, Params
from clip_jax.models.decoder import IGNORED
from clip_jax.models.generation import GenerationConfig, generate
from clip_jax.models.images import Images, ImageTokens

_AXES = Axes(sharding.BATCH_AXES, sharding.DIMENSIONS["D"], sharding.DIMENSIONS["V"])


def describe(splits: Splits, generation: GenerationConfig) -> Outcome:
    """Generate a caption for each image and compare it with the reference captions.

    Raises Missing if the images have no captions, and NotFinite.
    """
    if not isinstance(splits.open("test"), Captioned):
        raise Missing("the images have no captions of their own.")
    splits.embedded("test")  # NotFinite: token ids do not show what is not finite
    images = splits.compute("test", write, generation=generation)
    captions = splits.encoder.read(images.features)
    values = {f"bleu{n}": x for n, x in enumerate(bleu(captions, images.answers), 1)}
    values["cider"] = cider(captions, images.answers)
    return Outcome("captioning", values, images.skipped)


def classify_by_likelihood(splits: Splits) -> Outcome:
    """Classify every image by the class whose prompt the decoder finds most likely, given it.

    Prompts use the first template. Raises Missing if the images have no classes.
    """
    data, encoder = splits.open("test"), splits.encoder
    if not isinstance(data, Labelled):
        raise Missing("the images have no classes.")
    tokens = encoder.tokenize([prompts.fill(data.templates[0], name) for name in data.names])
    images = splits.compute("test", log_likelihood, tokens, mesh=encoder.mesh)
    values = classification(images.features, images.labels)
    return Outcome(
        "likelihood_classification",
        {f"likelihood/{name}": x for name, x in values.items()},
        images.skipped,
    )


def captions(encoder: Encoder, images: Images, generation: GenerationConfig) -> list[str]:
    """Generate captions of images, the same ones on every process."""
    return encoder.read(encoder.compute(write, images, generation=generation))


def loss_per_token(encoder: Encoder, images: Images, tokens: Int[np.ndarray, "B L"]) -> float:
    """Return the caption loss per token of pairs, the same ones on every process."""
    rows = encoder.compute(loss_of_text, images, tokens, mesh=encoder.mesh)
    labels = np.asarray(labels_of(encoder.model, jnp.asarray(tokens)))
    return float(rows.sum() / max((labels != IGNORED).sum(), 1))


def write(
    model: CLIP,
    params: Params,
    images: Images,
    seed: UInt32[Array, "*B"] | None = None,
    *,
    generation: GenerationConfig,
) -> Int[Array, "B L"]:
    """Generate a caption for each image, as token ids; a `seed` here, or one for each image,
    avoids recompilation."""
    _, image_tokens = model.encode_image_and_tokens(params, model.normalize(images))
    return generate(model, params, image_tokens, generation, seed)


def loss_of_text(
    model: CLIP, params: Params, images: Images, tokens: Int[Array, "B L"], *, mesh: Mesh
) -> Float[Array, " B"]:
    """Return the caption loss of each image's text, summed over its tokens."""
    _, image_tokens = model.encode_image_and_tokens(params, model.normalize(images))
    return _loss(model, mesh, params, image_tokens, tokens)


def log_likelihood(
    model: CLIP, params: Params, images: Images, tokens: Int[Array, "T L"], *, mesh: Mesh
) -> Float[Array, "B T"]:
    """Return log p(text | image) for every image and every text."""
    features, image_tokens = model.encode_image_and_tokens(params, model.normalize(images))

    def likelihood_of(text: Int[Array, " L"]) -> Float[Array, " B"]:
        rows = model.layout.constrain(jnp.broadcast_to(text, (len(features), len(text))))
        return -_loss(model, mesh, params, image_tokens, rows)

    return jax.lax.map(likelihood_of, tokens).T


def _loss(
    model: CLIP, mesh: Mesh, params: Params, image_tokens: ImageTokens, tokens: Int[Array, "B L"]
) -> Float[Array, " B"]:
    _, states = model.encode_text_and_write(params, tokens, image_tokens)
    return caption_loss(
        model.layout.constrain(states),
        params["decoder"]["vocab_projection"],
        labels_of(model, tokens),
        bias=params["decoder"].get("vocab_bias"),
        pad_id=IGNORED,
        chunk_size=CaptionConfig().chunk_size,
        mesh=mesh,
        axes=_AXES,
    )
