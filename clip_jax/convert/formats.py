"""Read and write weights in every format."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np

from clip_jax.convert import (
    big_vision,
    hugging_face,
    model_folder,
    open_clip,
    openai,
    peft,
    timm_folder,
    tokenizer_files,
)
from clip_jax.convert.target import Inexpressible, Target
from clip_jax.convert.tensor_files import write_safetensors
from clip_jax.convert.verify import (
    Reference,
    Unverifiable,
    Verification,
    compare,
    our_outputs,
    relative_difference,
    tokenizer_of,
)
from clip_jax.convert.weight_files import HEAD_NAME, WeightFiles, located
from clip_jax.convert.weights import (
    DType,
    Head,
    Weights,
    at_length,
    cut_to,
    read_all,
    whole_model,
    with_input,
)
from clip_jax.data.tokenizers import vocabulary
from clip_jax.display import say
from clip_jax.errors import InputError
from clip_jax.models.clip import Params
from clip_jax.models.layers import Activation
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

Format = Literal["openai", "open-clip", "hugging-face", "timm", "big-vision", "clip-jax", "peft"]
TARGETS: dict[Format, Target] = {
    "openai": openai.TARGET,
    "open-clip": open_clip.TARGET,
    "hugging-face": hugging_face.TARGET,
    "timm": timm_folder.TARGET,
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
    dim: int | None = None,
    tokenizer: str | None = None,
    base: str | None = None,
    ema: bool = True,
    one_tower: bool = False,
) -> Weights:
    """Read a run, or a model file or folder of any supported format, recognised by its content.

    RUN@20000 is a run's checkpoint of that step, RUN@best its best, RUN its newest. `icons` is the
    bundled model, unless a folder of that name has a model (see `weight_files.located`). `ViT-B/32`
    and hf:OWNER/NAME are downloaded (see `hub.fetch`).

    `activation` is needed for plain tensor files, which do not record it; InputError if the format
    records another. Another `image_size` than the model's resizes its position embeddings;
    `tokens` is the number of patches of an image of a NaFlex model (see `with_input`), and `dim`
    the number of first channels of embeddings (see `cut_to`).
    `tokenizer` is the vocabulary for weights that have none. `base` is the weights that PEFT's
    adapters change, by default the local folder that their file names, or the image tower for
    dino.txt's files. `ema` takes the average that
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
        return read_all(cut_to(weights, dim, path))


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
    """Load the model at `path` by the library of its format and compare it with ours.

    If that library or `dtype` rounds weights, the reference for the comparison is our model with
    the rounded weights, and the effect of rounding is reported separately. Raises NotInstalled
    without the library, and Unverifiable if it has no such model or is clip_jax itself.
    """
    target = TARGETS[to]
    if target.load is None:
        message = "clip_jax alone reads its own format"
        raise Unverifiable(message)
    return compared(weights, target.rounded(weights, dtype), target.load(weights, path))


def verify_source(weights: Weights, source: AnyPath, **recorded: Any) -> Verification:
    """Load `source` by the library of its format and compare it with `weights`, read from it.

    `recorded` are the `activation`, `tokenizer` and `base` with which it was read. Raises what
    `verify` does.
    """
    reasons = {
        "run": "clip_jax alone reads a run",
        "clip-jax": "clip_jax alone reads its own format",
        "perception-models": "no library on PyPI reads PE core's own files",
        "dinotxt": "no library on PyPI reads dino.txt's own files",
    }
    if reason := reasons.get(weights.format):
        raise Unverifiable(reason)
    target = TARGETS[cast("Format", weights.format)]
    params = weights.params if weights.format == "peft" else target.rounded(weights, None)
    with WeightFiles() as weight_files, files.local(located(source)) as here:
        # What the library is not told by the file comes from here, and not from `weights`.
        settings = weight_files.open(here, **recorded)
        if weights.format == "peft":
            base = files.as_path(recorded.get("base") or peft.base_of(here))
            with files.local(located(base)) as folder:
                if not (folder / "config.json").exists():
                    message = "the base of the adapters is no folder of Hugging Face"
                    raise Unverifiable(message)
                return compared(weights, params, peft.load_upon(settings, here, folder))
        if weights.format == "hugging-face" and here.is_file():
            here = here.parent
        if weights.format in ("openai", "big-vision") and here.is_dir():
            here = open_clip.find_weights(here)
        if target.load is None:
            raise AssertionError(weights.format)
        return compared(weights, params, target.load(settings, here))


def verify_again(
    weights: Weights, path: AnyPath, to: Format, *, dtype: DType | None = None
) -> Verification:
    """Read the model at `path`, which was written from `weights`, again, and compare both."""
    base = weights.adapters.base if to == "peft" and weights.adapters is not None else None
    result = read_weights(path, base=base, one_tower=TARGETS[to].has_single_towers)
    params = weights.params
    if to == "peft":
        params = TARGETS[to].rounded(weights, dtype)
    else:
        stored = jax.tree.map(lambda x, y: np.asarray(x).astype(y.dtype), params, result.params)
        dtypes = [[x.dtype for x in jax.tree.leaves(tree)] for tree in (params, stored)]
        params = params if dtypes[0] == dtypes[1] else stored
    pixels = replace(result.preprocess, rules=weights.preprocess.rules)  # a format may fix them
    has_tokenizer = bool(result.config.text.tokenizer.file) and weights.only_tower != "image"
    reference = Reference(
        name="clip_jax",
        outputs=lambda inputs: our_outputs(result.config, result.params, *inputs),
        # A big_vision file stores no preprocessing: what is read is that of the released models.
        preprocess=None if to == "big-vision" else lambda x: pixels.normalize(pixels.batch(x)),
        tokenize=tokenizer_of(result.config.text) if has_tokenizer else None,
    )
    return compared(weights, params, reference)


def compared(weights: Weights, params: Params, reference: Reference) -> Verification:
    """Compare a reference with our model of parameters that may be rounded."""
    verification, ours, inputs = compare(reference, weights, params)
    if params is weights.params:
        return verification
    exact = our_outputs(weights.config, weights.params, *inputs)
    loss = max(relative_difference(ours[name], exact[name]) for name in exact)
    return replace(verification, rounding_loss=loss)
