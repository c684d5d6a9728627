"""Read and write weights in every format."""

import contextlib
import json
from pathlib import Path
from typing import Any, Literal

from clip_jax.convert import (
    big_vision,
    hugging_face,
    model_folder,
    open_clip,
    openai,
    peft,
    tokenizer_files,
)
from clip_jax.convert.target import Inexpressible, Target
from clip_jax.convert.tensor_files import write_safetensors
from clip_jax.convert.verify import Verification, our_outputs, random_inputs, relative_difference
from clip_jax.convert.weight_files import HEAD_NAME, WeightFiles
from clip_jax.convert.weights import (
    DType,
    Head,
    Weights,
    at_length,
    read_all,
    whole_model,
    with_input,
)
from clip_jax.data.tokenizers import vocabulary
from clip_jax.display import say
from clip_jax.errors import InputError
from clip_jax.models.layers import Activation
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

Format = Literal["openai", "open-clip", "hugging-face", "big-vision", "clip-jax", "peft"]
TARGETS: dict[Format, Target] = {
    "openai": openai.TARGET,
    "open-clip": open_clip.TARGET,
    "hugging-face": hugging_face.TARGET,
    "big-vision": big_vision.TARGET,
    "clip-jax": model_folder.TARGET,
    "peft": peft.TARGET,
}
# Files by which a format and its inputs are recognised; those of another format would mislead.
_RECOGNISED = {
    HEAD_NAME,
    *(name for target in TARGETS.values() for name in target.names),
    *(tokenizer_files.CONFIG_NAME, tokenizer_files.SIGLIP_NAME, *vocabulary.NAMES),
}


def read_weights(
    path: str | AnyPath,
    *,
    activation: Activation | None = None,
    image_size: int | None = None,
    tokens: int | None = None,
    tokenizer: str | None = None,
    base: str | None = None,
    ema: bool = True,
    one_tower: bool = False,
) -> Weights:
    """Read a run, or a model file or folder of any supported format, recognised by its content.

    RUN@20000 is a run's checkpoint of that step, RUN@best its best, RUN its newest. `ViT-B/32` and
    hf:OWNER/NAME are downloaded (see `hub.fetch`).

    `activation` is needed for plain tensor files, which do not record it; InputError if the format
    records another. Another `image_size` than the model's resizes its position embeddings;
    `tokens` is the number of patches of an image of a NaFlex model (see `with_input`).
    `tokenizer` is the vocabulary for weights that have none. `base` is the weights that PEFT's
    adapters change, by default the local folder that their file names. `ema` takes the average that
    a run with optim.ema_decay keeps, instead of its last weights. With `one_tower` the folder may
    hold a single tower.
    """
    recorded = {"activation": activation, "tokenizer": tokenizer, "base": base}
    with WeightFiles() as weight_files:
        weights = weight_files.open(path, ema=ema, **recorded)
        if not one_tower:
            whole_model(weights)
        if image_size is None:
            weights = at_length(weights, tokens, path)
        else:
            weights = with_input(weights, image_size=image_size, tokens=tokens)
        return read_all(weights)


def write_weights(
    weights: Weights, path: AnyPath, to: Format, *, dtype: DType | None = None
) -> None:
    """Write a model in one of the formats. Raises InputError if the format cannot express it.

    Files by which another format in the folder is recognised are removed.
    """
    target = TARGETS[to]
    with files.written_whole(path) as partial:
        try:
            target.write(weights, partial, dtype=dtype)
        except Inexpressible as error:
            raise InputError(f"{error}{_advice(weights, bool(error.remedy))}") from error
        if target.names and weights.head is not None:
            texts = {name: json.dumps(getattr(weights.head, name)) for name in Head._fields[:2]}
            write_safetensors(partial / HEAD_NAME, {"kernel": weights.head.kernel}, texts)
        written = {file.name for file in partial.iterdir()} if target.names else _RECOGNISED
    if not target.names and weights.head is not None:
        say(f"{path} is a single file without the classifier; formats of folders keep it.")
    for name in _RECOGNISED - written:
        files.remove(path / name)


def able_formats(weights: Weights) -> list[Format]:
    """Return the formats that can express a model, without writing it."""
    able: list[Format] = []
    for name, target in TARGETS.items():
        if weights.only_tower is None or target.has_single_towers:
            with contextlib.suppress(InputError):
                target.check(weights)
                able.append(name)
    return able


def _advice(weights: Weights, has_remedy: bool) -> str:
    """Return the end of an error about a format that cannot express a model: what can be done."""
    able = able_formats(weights)
    if not able:
        return "; one tower alone can start a run, too, by --init-from and --init-towers."
    if able == ["clip-jax"] and not has_remedy:
        return "; no other library's format can express it, so choose --to clip-jax."
    *names, last = able
    choice = f"{', '.join(names)} or {last}" if names else last
    return f"{', or' if has_remedy else ';'} choose --to {choice}."


def verify(weights: Weights, path: Path, to: Format, *, dtype: DType | None = None) -> Verification:
    """Load the written model at `path` by the reference implementation and compare the outputs.

    If that library or `dtype` rounds weights, the reference for the comparison is our model with
    the rounded weights, and the effect of rounding is reported separately. Raises InputError if
    the library is not installed, Unverifiable if it has no such model.
    """
    target = TARGETS[to]
    inputs = random_inputs(weights.config)
    params = target.rounded(weights, dtype)
    ours = our_outputs(weights.config, params, *inputs)
    theirs = target.outputs(weights, path, inputs)
    loss = None
    if params is not weights.params:
        exact = our_outputs(weights.config, weights.params, *inputs)
        loss = max(relative_difference(ours[name], exact[name]) for name in exact)
    differences: dict[str, Any] = {x: relative_difference(ours[x], theirs[x]) for x in ours}
    return Verification(reference=target.reference, rounding_loss=loss, **differences)
