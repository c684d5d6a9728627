"""Read and write weights in every format."""

import contextlib
import functools
import json
import os
from collections.abc import Generator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import safetensors

from clip_jax.checkpoints.manager import digest_of
from clip_jax.checkpoints.resume import differences
from clip_jax.checkpoints.retention import split_name
from clip_jax.convert import (
    big_vision,
    hub,
    hugging_face,
    model_folder,
    open_clip,
    open_clip_config,
    openai,
    peft,
    perception_models,
    run,
    tokenizer_files,
)
from clip_jax.convert.settings import read_json
from clip_jax.convert.state_dict import check_floating, flatten, param_shapes
from clip_jax.convert.target import Inexpressible, Target
from clip_jax.convert.tensor_files import read_tensors, write_safetensors
from clip_jax.convert.verify import Verification, our_outputs, random_inputs, relative_difference
from clip_jax.convert.weights import Adapters, DType, Head, Weights, with_input, with_vocabulary
from clip_jax.data.images import Preprocess
from clip_jax.data.tokenizers import make_tokenizer, vocabulary
from clip_jax.data.tokenizers.vocabulary import check_same
from clip_jax.display import say
from clip_jax.errors import InputError
from clip_jax.models import lora
from clip_jax.models.clip import CLIPConfig, Params
from clip_jax.models.layers import Activation
from clip_jax.optim import Tower
from clip_jax.serialize import to_dict
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
_OPEN: ContextVar[tuple[str, ...]] = ContextVar("weights that are being read", default=())
HEAD_NAME = "classifier.safetensors"  # beside the model, in a folder of any format
# Files by which a format and its inputs are recognised; those of another format would mislead.
_KNOWN = {
    HEAD_NAME,
    *(name for target in TARGETS.values() for name in target.names),
    *(tokenizer_files.CONFIG_NAME, tokenizer_files.SIGLIP_NAME, *vocabulary.NAMES),
}


def read_weights(
    path: AnyPath,
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
    path, which = split_name(path)
    if not path.exists():
        path = hub.fetch(os.fspath(path))
    if base is not None and not _is_adapters(path):
        raise InputError(
            f"{path} has no adapters of PEFT's, so it has no base {base}; omit --base."
        )
    if not run.is_run(path) and which:
        raise InputError(
            f"{path} is not a run directory, so it has no checkpoint @{which}; leave that out."
        )
    with _opened(path):
        if run.is_run(path):
            weights = run.read(path, which, ema)
            if weights.adapters is not None:
                weights = merged(weights, weights.adapters, path)
        else:
            with files.local(path) as here:
                weights = _relocated(path, here, _read(here, activation, base))
                weights = replace(weights, head=_read_head(here, weights.config.embed_dim))
    _check_finite(weights, path)
    if (only := weights.only_tower) and not one_tower:
        raise InputError(
            f"{path} holds the {only} tower of a model alone. Give a whole model, start one by "
            f"--init-from and --init-towers {only}, or convert it by --to hugging-face."
        )
    own = weights.config.text.activation
    if activation not in (None, own):
        raise InputError(
            f"{path} records that its activation is {own}, not {activation}; omit --activation."
        )
    if tokenizer is not None:
        if file := weights.config.text.tokenizer.file:
            raise InputError(f"{path} has its own tokenizer, {file}; omit --tokenizer.")
        weights = replace(weights, config=with_vocabulary(weights.config, tokenizer))
        make_tokenizer(weights.config.text)  # raises InputError if it is damaged
    if image_size is not None:
        return with_input(weights, image_size=image_size, tokens=tokens)
    return at_length(weights, tokens, path)


def at_length(weights: Weights, tokens: int | None, path: str | AnyPath) -> Weights:
    """Return a NaFlex model for images of at most `tokens` patches; None: its own number.

    Raises InputError, which names `path`, for a model of fixed resolution.
    """
    if tokens is not None and weights.preprocess.max_patches is None:
        raise InputError(
            f"tokens={tokens} is for NaFlex models, and {path} has a fixed resolution of "
            f"{weights.config.vision.image_size} pixels. Omit it, or make a NaFlex model: "
            f"clip-jax convert {path} NEW --to clip-jax --tokens {tokens}."
        )
    return with_input(weights, tokens=tokens)


def _relocated(path: AnyPath, copy: Path, weights: Weights) -> Weights:
    """Replace the path of a vocabulary in the temporary `copy` of a bucket by its URL."""
    file = weights.config.text.tokenizer.file
    if copy == path or not file.startswith(f"{copy}/"):
        return weights
    file = os.fspath(path / file.removeprefix(f"{copy}/"))
    return replace(weights, config=with_vocabulary(weights.config, file))


def _check_finite(weights: Weights, path: AnyPath) -> None:
    """Raise InputError unless all weights are finite."""
    for name, array in flatten(weights.params).items():
        if not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).sum())
            raise InputError(
                f"{path}: {name} has {bad} values of {array.size} that are NaN or infinite, so "
                "all predictions would be NaN; use an earlier checkpoint, or get the file again."
            )


@contextlib.contextmanager
def _opened(path: AnyPath) -> Generator[None]:
    """Raise InputError if adapters are read as their own base, directly or through others."""
    name = os.fspath(path.resolve())
    if name in _OPEN.get():
        raise InputError(
            f"{path} has low-rank adapters that are their own base; correct "
            f"base_model_name_or_path in {peft.CONFIG_NAME}, or a run's init_from."
        )
    token = _OPEN.set((*_OPEN.get(), name))
    try:
        yield
    finally:
        _OPEN.reset(token)


def _is_adapters(path: AnyPath) -> bool:
    return (path / peft.CONFIG_NAME).is_file() and not (path / "config.json").exists()


def _read(path: Path, activation: Activation | None, base: str | None) -> Weights:
    config_path = (path if path.is_dir() else path.parent) / open_clip_config.CONFIG_NAME
    if path.is_dir():
        if (path / model_folder.MANIFEST_NAME).is_file():
            return model_folder.read(path)
        if _is_adapters(path):
            return peft.read(path, functools.partial(_read_base, base))
        if _is_hugging_face(path):
            return hugging_face.read(path)
        path = open_clip.find_weights(path)
    tensors = read_tensors(path)
    if any(name.startswith(("img/", "params/img/")) for name in tensors):
        return big_vision.read(tensors, str(path))
    if any(name.startswith("text_model.") for name in tensors):
        return hugging_face.read(path.parent)
    config = config_path if config_path.exists() else None
    if config is None and perception_models.PROBE in tensors:
        return perception_models.read(tensors, str(path))
    return open_clip.read(tensors, str(path), config, activation=activation)


def _read_base(base: str | None, named: str) -> Weights:
    """Read `base`, or else what a file names, which only a person may let contact a server."""
    is_local = os.path.exists(os.path.expanduser(named))
    if base is None and (files.is_remote(named) or not is_local):
        raise InputError(
            f"the base of the adapters, {named!r:.200}, is nothing on this machine. Set --base to "
            "its path, or to hf:OWNER/NAME to download it: "
            "clip-jax convert ADAPTERS NEW --to clip-jax --base hf:OWNER/NAME."
        )
    return read_weights(files.as_path(named if base is None else base))


def _read_head(folder: Path, width: int) -> Head | None:
    path = folder / HEAD_NAME
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "numpy") as file:
            kernel, texts = file.get_tensor("kernel"), file.metadata() or {}
        classes, templates = (tuple(json.loads(texts[name])) for name in Head._fields[:2])
        check_floating({"kernel": kernel}, str(path))
        if kernel.shape != (len(classes), width) or not np.isfinite(kernel).all():
            raise ValueError(f"kernel {kernel.shape}")
        return Head(classes, templates, kernel)
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        advice = f"write it again for embeddings of width {width}, or remove it."
        raise InputError(f"{path} is damaged ({error!r}); {advice}") from error


def _is_hugging_face(path: Path) -> bool:
    """Return whether to read a folder as Hugging Face's: not if it has open_clip's files, too."""
    config = path / "config.json"
    open_clips = (path / open_clip_config.CONFIG_NAME).exists() and any(
        (path / name).exists() for name in open_clip.WEIGHTS_NAMES if name.startswith("open_clip")
    )
    return config.exists() and not open_clips and "model_type" in read_json(config)


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
        written = {file.name for file in partial.iterdir()} if target.names else _KNOWN
    if not target.names and weights.head is not None:
        say(f"{path} is a single file without the classifier; formats of folders keep it.")
    for name in _KNOWN - written:
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
        return "; one tower alone can start a run, by --init-from and --init-towers."
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


# Settings of towers that no weights fix: sizes to which positions are adapted, those of training,
# a ratio that shapes show, and the tokenizer, which `check_same` compares.
_ADAPTED = (
    *("image_size", "max_patches", "context_length", "patch_dropout", "batch_norm_group"),
    *("layer_scale", "mlp_ratio", "tokenizer"),
)


def starting_params(
    path: str | AnyPath,
    config: CLIPConfig,
    towers: Sequence[Tower] = ("image", "text"),
    *,
    preprocess: Preprocess | None = None,
    allowed: Sequence[str] = (),
) -> Params:
    """Return float32 weights from which a model of architecture `config` can start training.

    Position embeddings are adapted: the image tower's resized to its image size, the text tower's
    cut to its context length. With one tower, neither the other nor the logit scale is returned.
    Raises InputError, which names the first parameter of another shape, or the settings, except
    those `allowed`, with which the model and its `preprocess` compute something else.
    """
    size = config.vision.image_size
    weights = read_weights(files.as_path(path), image_size=size, one_tower=len(set(towers)) < 2)
    if weights.only_tower not in (None, *towers):
        raise InputError(f"{path} holds the {weights.only_tower} tower alone; set --init-towers.")
    own, where = weights.config.text, f"init_from={str(path)!r}"
    length = config.text.context_length
    if "text" in towers:
        check_same(config.text.tokenizer, own.tokenizer, where)
        if own.pool == "last" and length != own.context_length:
            raise InputError(
                f"model.text.context_length={length} does not fit {where}, whose text tower pools "
                f"the last of {own.context_length} positions and knows no other length: set "
                f"--model.text.context-length {own.context_length}."
            )
    params, text = weights.params, weights.params.get("text", {})
    if "positional_embedding" in text:
        positions = text["positional_embedding"]
        if own.has_class_token and config.text.has_class_token:  # the last is the class token's
            positions = np.concatenate([positions[:length], positions[-1:]])
        positions = positions[: config.text.num_positions]
        params = params | {"text": text | {"positional_embedding": positions}}
    if len(set(towers)) < 2:
        tower_of = {"visual": "image", "batch_stats": "image", "text": "text"}
        params = {name: x for name, x in params.items() if tower_of.get(name) in towers}
    if config.init_logit_bias is None and params.pop("logit_bias", None) is not None:
        say(
            f"{where}: its logit bias is left out, since the model has none. A softmax loss "
            "ignores it; for a sigmoid loss set --model.init-logit-bias."
        )
    advice = "set --model to the same architecture, or initialise one tower by --init-towers"
    check_shapes(params, config, where, advice)
    advice = (
        "set --init-architecture to take them from the weights, set the fields of --model to the "
        "same values, or allow the differences by --init-differences with these names"
    )
    check_settings(weights, config, where, advice, towers, preprocess, allowed)
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


def merged(weights: Weights, own: Adapters, workdir: AnyPath) -> Weights:
    """Return the weights of a run's base with the change by its adapters. Raises InputError if the
    base is not the one that the run began with."""
    problem = "have changed"
    try:
        base = starting_params(own.base, weights.config, allowed=("*",))  # the digest is checked
        if digest_of(base) == own.digest:
            params = lora.merge(base, own.params, weights.config, own.lora)
            return replace(weights, params=params, adapters=own._replace(weights=base))
    except (InputError, OSError) as error:
        problem = f"cannot be read ({error})"
    raise InputError(
        f"{workdir} has low-rank adapters of the weights in {own.base}, which {problem}. Restore "
        f"them there, or set init_from in {workdir / 'config.json'} to where they are."
    )


def check_shapes(params: Params, config: CLIPConfig, where: str, advice: str) -> None:
    """Raise InputError unless these subtrees of a model's parameters are those of `config`."""
    shapes = param_shapes(config).items()
    needs = {name: x for name, x in shapes if name.split("/")[0] in params}
    has = {name: x.shape for name, x in sorted(flatten(params).items())}
    for name, got, needed in differences(has, needs)[:1]:
        got, needed = ("none" if x is None else x for x in (got, needed))
        raise InputError(f"{where} has {name} {got}, and the model needs {needed}; {advice}.")


def check_settings(
    weights: Weights,
    config: CLIPConfig,
    where: str,
    advice: str,
    towers: Sequence[Tower] = ("image", "text"),
    preprocess: Preprocess | None = None,
    allowed: Sequence[str] = (),
) -> None:
    """Raise InputError if a model of architecture `config` computes something else than these
    weights were trained for, though all shapes are the same; `allowed` are patterns of settings."""
    pixels = weights.preprocess
    own = replace(weights.config, image_mean=pixels.mean, image_std=pixels.std)
    is_square = preprocess is not None and preprocess.max_patches is None  # else NaFlex's own
    has = _settings(own, towers, pixels if is_square else None)
    needs = _settings(config, towers, preprocess if is_square else None)
    problems = [
        f"{name} is {before!r} in the weights and {now!r} in the model"
        for name, before, now in differences(has, needs)
        if not any(fnmatchcase(name, pattern) for pattern in allowed)
    ]
    if problems:
        raise InputError(f"{where}: {', '.join(problems)}; {advice}.")


def _settings(
    config: CLIPConfig, towers: Sequence[Tower], preprocess: Preprocess | None
) -> dict[str, Any]:
    """Return the settings that change what weights compute, and no shape, as a nested dict; those
    of a decoder all change shapes."""

    def of_tower(tower: Any) -> dict[str, Any]:
        return {name: x for name, x in to_dict(tower).items() if name not in _ADAPTED}

    settings: dict[str, Any] = {}
    if "image" in towers:
        settings["vision"] = of_tower(config.vision)
        settings |= {"image_mean": config.image_mean, "image_std": config.image_std}
        if preprocess is not None:
            names = ("resize_mode", "interpolation")
            settings["preprocess"] = {name: getattr(preprocess, name) for name in names}
    if "text" in towers:
        settings["text"] = of_tower(config.text)
    return settings
