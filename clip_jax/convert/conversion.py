"""The conversion of a model from one format to another, with a numerical check."""

from dataclasses import dataclass

from clip_jax.convert import card
from clip_jax.convert.formats import TARGETS, Format, read_weights, verify, write_weights
from clip_jax.convert.verify import Unverifiable, Verification, features_difference
from clip_jax.convert.weights import DType
from clip_jax.errors import InputError, check_ranges
from clip_jax.models.layers import Activation
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to convert, to what, and whether to verify it."""

    source: AnyPath  # a run, a model folder, or a file (.pt, .bin, .safetensors, .npz)
    destination: AnyPath  # folder to write; with --to openai or big-vision a file
    to: Format  # whose format to write
    # load the result with its own library (extra `peers`), compare; exit code 1 above 1e-5
    verify: bool = False
    dtype: DType | None = None  # of the tensors written; by default as they are
    image_size: int | None = None  # pixels; positions are resized to it
    activation: Activation | None = None  # of a bare file of tensors, which does not say it
    # vocabulary of weights that came without theirs: a tokenizer.json or a sentencepiece model
    tokenizer: str | None = None
    # with --to open-clip, where open_clip computes the image tower with another GELU: write all the
    # same, and say how much the features change
    accept_activation: bool = False
    overwrite: bool = False  # replace what is at the destination

    def __post_init__(self) -> None:
        check_ranges(self, image_size="[1, inf)")


@dataclass(frozen=True)
class Conversion:
    """The numbers of a conversion."""

    verification: Verification | None  # None: not verified
    # relative difference of image features between this model's activation and the one that was
    # accepted instead; None: the format has the model's own
    activation_difference: float | None
    unverified: str = ""  # why no reference implementation can build what was written


def convert(config: ConvertConfig) -> Conversion:
    """Write a model in another format; with `verify` compare with the reference implementation.

    Raises InputError when the source cannot be read, the format cannot express the model, or
    something is at the destination already.
    """
    source, destination, target = config.source, config.destination, TARGETS[config.to]
    check_free(source, destination, config.overwrite)
    files.check_destination(destination, f"--to {config.to}", folder=bool(target.names))
    if config.accept_activation and target.as_computed is None:
        raise InputError(
            f"--accept-activation is a choice of --to open-clip; --to {config.to} keeps the "
            "model's."
        )
    weights = read_weights(
        source,
        activation=config.activation,
        image_size=config.image_size,
        tokenizer=config.tokenizer,
    )
    difference = None
    if config.accept_activation and target.as_computed is not None:
        changed = target.as_computed(weights)
        if changed.config != weights.config:
            difference = features_difference(changed, weights)
        weights = changed
    write_weights(weights, destination, config.to, dtype=config.dtype)
    if target.use:
        card.write(destination, source, weights, target.use)
    if not config.verify:
        return Conversion(None, difference)
    try:
        with files.local(destination) as here:
            verification = verify(weights, here, config.to, dtype=config.dtype)
    except Unverifiable as error:
        return Conversion(None, difference, str(error))
    return Conversion(verification, difference)


def check_free(source: AnyPath, destination: AnyPath, overwrite: bool) -> None:
    """Raise InputError if a destination is the source, or holds something that is not to be
    replaced."""
    if source.exists() and destination.exists() and source.resolve() == destination.resolve():
        raise InputError(f"{source} is both source and destination; choose another destination.")
    occupied = any(destination.iterdir()) if destination.is_dir() else destination.exists()
    if occupied and not overwrite:
        raise InputError(f"something is at {destination} already; say --overwrite to replace it.")
