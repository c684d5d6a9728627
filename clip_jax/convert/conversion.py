"""Convert a model from one format to another, with a numerical check."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, cast

from clip_jax.convert import card
from clip_jax.convert.dino import alone
from clip_jax.convert.formats import (
    TARGETS,
    Format,
    read_weights,
    verify,
    verify_again,
    verify_source,
    write_weights,
)
from clip_jax.convert.verify import (
    NotInstalled,
    Unverifiable,
    Verification,
    Verifications,
    features_difference,
)
from clip_jax.convert.weights import DType, Weights, cut_to, with_context, with_input
from clip_jax.errors import InputError, check_ranges
from clip_jax.models.layers import Activation
from clip_jax.models.templates import check_template
from clip_jax.models.vit import ViTConfig
from clip_jax.optim.wrappers import TOWERS, Tower
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Convert weights to another format, optionally with a numerical check."""

    # Run directory, model folder, file (.pt, .bin, .safetensors, .npz), or icons, the bundled
    # model.
    source: AnyPath
    destination: AnyPath  # Folder to write; a file with --to openai or big-vision.
    to: Format  # Format to write.
    # Compare the source and the result with their own libraries (extra `peers`), on photographs
    # and sentences: exit code 1 if a difference is above 1e-5, 2 if neither library is there.
    verify: bool = False
    dtype: DType | None = None  # Data type of the written tensors. None: unchanged.
    # New image size in pixels; positions are resized, and NaFlex becomes fixed. None: keep.
    image_size: int | None = None
    # Patches per image of a NaFlex model (sequence length), also to make one. None: keep.
    tokens: int | None = None
    # New maximum of tokens per text: positions of texts are cut, or stretched as in Long-CLIP.
    # None: keep.
    context_length: int | None = None
    # First positions of texts that stay as they are when the others are stretched. 0: none.
    kept_positions: int = 20
    # Number of first channels of embeddings, for a model trained for it (Matryoshka). None: all.
    dim: int | None = None
    activation: Activation | None = None  # Activation, for a file of tensors without a config.
    # Vocabulary, for weights without one: a tokenizer.json or a sentencepiece model. None: none.
    tokenizer: str | None = None
    # Weights that PEFT's adapters change, or the image tower for dino.txt's files: a path or
    # hf:OWNER/NAME. None: the folder that the adapters' file names, if it is on this machine.
    base: str | None = None
    # With --to clip-jax: prompt template that `predict`, `serve` and `demo` use by default. None:
    # the source's.
    template: str | None = None
    # With --to open-clip: write even if open_clip computes the image tower with another GELU, and
    # report how much that changes the features.
    accept_activation: bool = False
    # With --to hugging-face: write one tower alone, as transformers' class of the image tower
    # (DINOv2, DINOv3), or of a CLIP as CLIPVisionModelWithProjection or
    # CLIPTextModelWithProjection. With --to timm: the image tower. None: the model.
    tower: Tower | None = None
    overwrite: bool = False  # Replace an existing destination.

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("image_size", "tokens", "context_length", "dim"), "[1, inf)")
        check_ranges(self, **sizes, kept_positions="[0, inf)")
        if self.template is not None:
            check_template(self.template, "template")
            if self.to != "clip-jax":
                raise InputError(
                    f"template={self.template!r:.200} needs --to clip-jax; --to {self.to} cannot "
                    "hold it."
                )


@dataclass(frozen=True)
class Conversion:
    """Results of a conversion."""

    verification: Verifications | None  # None: not verified
    # relative difference of image features between the model's activation and the accepted one;
    # None: the format has the model's own
    activation_difference: float | None


def convert(config: ConvertConfig) -> Conversion:
    """Write a model in another format; with `verify`, compare with the formats' own libraries.

    Raises InputError if the source cannot be read, the format cannot express the model, the
    destination exists, or nothing could be compared.
    """
    source, destination, target = config.source, config.destination, TARGETS[config.to]
    check_free(source, destination, config.overwrite)
    files.check_destination(destination, f"--to {config.to}", folder=bool(target.names))
    if config.accept_activation and target.as_computed is None:
        raise InputError(
            f"--accept-activation needs --to open-clip; --to {config.to} keeps the model's "
            "activation."
        )
    weights = read_weights(
        source,
        activation=config.activation,
        tokenizer=config.tokenizer,
        base=config.base,
        one_tower=target.has_single_towers,
    )
    original = weights
    if config.tower is not None:
        if not target.has_single_towers or weights.only_tower not in (None, config.tower):
            raise InputError(
                f"--tower {config.tower} needs --to hugging-face or timm, and a model with that "
                "tower; omit it, or change --to or the source."
            )
        name = TOWERS[config.tower]
        params = {name: weights.params[name]}
        weights = replace(weights, params=params, only_tower=config.tower)
        if config.tower == "image" and weights.config.image_head is not None:
            # The head is no part of the tower, whose embedding is its own.
            tower = alone(cast(ViTConfig, weights.config.vision))
            weights = replace(weights, config=tower)
    if config.template is not None:
        weights = replace(weights, template=config.template)
    weights = with_input(weights, image_size=config.image_size, tokens=config.tokens)
    weights = with_context(weights, config.context_length, config.kept_positions)
    weights = cut_to(weights, config.dim, source)
    difference = None
    if config.accept_activation and target.as_computed is not None:
        changed = target.as_computed(weights)
        if changed.config != weights.config:
            difference = features_difference(changed, weights)
        weights = changed
    write_weights(weights, destination, config.to, dtype=config.dtype)
    if target.use:
        use = target.use + (target.use_naflex if weights.preprocess.max_patches else "")
        if weights.only_tower:
            use = target.use_tower(weights)
        card.write(destination, source, weights, use)
    return Conversion(_verified(config, original, weights) if config.verify else None, difference)


def _verified(config: ConvertConfig, original: Weights, weights: Weights) -> Verifications:
    """Compare the source with `original`, read from it, and the result with `weights`.

    Raises InputError if neither has been compared with another library than clip_jax, unless both
    are clip_jax's own formats.
    """
    made: list[Verification] = []
    notes: list[str] = []

    def attempt(model: Literal["source", "result"], verification: Callable[[], Verification]):
        try:
            made.append(replace(verification(), model=model))
        except (NotInstalled, Unverifiable) as error:
            notes.append(f"{model}: {error}")

    names = ("activation", "tokenizer", "base")
    recorded = {name: getattr(config, name) for name in names}
    attempt("source", lambda: verify_source(original, config.source, **recorded))
    with files.local(config.destination) as here:
        attempt("result", lambda: verify(weights, here, config.to, dtype=config.dtype))
    is_ours = original.format in ("run", "clip-jax") and config.to == "clip-jax"
    if not made and not is_ours:
        raise InputError(
            f"{config.destination} is written, but --verify compared it with no library, because "
            f"{'; '.join(notes)}."
        )
    again = verify_again(weights, config.destination, config.to, dtype=config.dtype)
    made.append(replace(again, model="result"))
    return Verifications(tuple(made), tuple(notes))


def check_free(source: AnyPath | None, destination: AnyPath, overwrite: bool) -> None:
    """Raise InputError if a destination is the source, or exists and must not be replaced."""
    both = source is not None and source.exists() and destination.exists()
    if both and source.resolve() == destination.resolve():
        raise InputError(f"{source} is both source and destination; choose another destination.")
    occupied = any(destination.iterdir()) if destination.is_dir() else destination.exists()
    if occupied and not overwrite:
        how = "use --overwrite (in Python: overwrite=True) to replace it"
        raise InputError(f"{destination} exists; {how}.")
