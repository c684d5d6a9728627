"""Open runs, and model files and folders of any format, which are recognised by their content.

Configuration, preprocessing, classifier, and the names and shapes of all parameters are known at
once. Values are read on demand.
"""

import contextlib
import functools
import json
import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import jax
import numpy as np
import safetensors

from clip_jax.checkpoints.checksums import digest_of
from clip_jax.checkpoints.retention import split_name
from clip_jax.convert import (
    big_vision,
    dinotxt,
    hub,
    hugging_face,
    model_folder,
    open_clip,
    open_clip_config,
    openai,
    peft,
    perception_models,
    run,
    timm_folder,
)
from clip_jax.convert.fitting import starting_params
from clip_jax.convert.on_demand import checked, loaded, read_together
from clip_jax.convert.settings import read_json
from clip_jax.convert.state_dict import check_floating, param_shapes, unflatten
from clip_jax.convert.tensor_files import Tensors, read_tensors
from clip_jax.convert.weights import (
    Adapters,
    Head,
    Stored,
    Weights,
    whole_model,
    with_vocabulary,
)
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.errors import InputError
from clip_jax.models import lora
from clip_jax.models.clip import Params
from clip_jax.models.layers import Activation
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

HEAD_NAME = "classifier.safetensors"  # beside the model, in a folder of any format


class WeightFiles:
    """Weights that are open: each is opened, and downloaded from a bucket, at most once.

    It is a context manager, at whose end copies of files in buckets are deleted.
    """

    def __init__(self) -> None:
        self._copies = contextlib.ExitStack()
        self._open: dict[tuple[str | None, ...], Weights] = {}
        self._opening: list[str] = []  # adapters whose bases are being opened

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.clear()
        self._copies.close()

    def open(
        self,
        path: str | AnyPath,
        *,
        activation: Activation | None = None,
        tokenizer: str | None = None,
        base: str | None = None,
        ema: bool = True,
    ) -> Weights:
        """Open weights; see `formats.read_weights`. What is open already is returned again."""
        key = (os.fspath(path), activation, tokenizer, base, str(ema))
        if key not in self._open:
            weights = self._opened(files.as_path(path), activation, base, ema)
            weights = replace(weights, path=os.fspath(path))
            self._open[key] = _with_tokenizer(weights, tokenizer)
        return self._open[key]

    def _opened(
        self, path: AnyPath, activation: Activation | None, base: str | None, ema: bool
    ) -> Weights:
        path, which = split_name(path)
        path = located(path)
        if not run.is_run(path) and which:
            raise InputError(
                f"{path} is not a run directory, so it has no checkpoint @{which}; leave that out."
            )
        name = os.fspath(path.resolve())
        if name in self._opening:
            raise InputError(
                f"{path} has low-rank adapters that are their own base; correct "
                f"base_model_name_or_path in {peft.CONFIG_NAME}, or a run's init_from."
            )
        self._opening.append(name)
        try:
            if run.is_run(path):
                weights = replace(self._open_run(path, which, ema), format="run")
            else:
                weights = self._open_files(path, activation, base)
        finally:
            self._opening.remove(name)
        if base is not None and weights.format not in ("peft", "dinotxt"):
            raise InputError(
                f"{path} has no adapters of PEFT's and no head of dino.txt's, so it has no base "
                f"{base}; omit --base."
            )
        recorded = weights.config.text.activation
        if activation not in (None, recorded):
            raise InputError(
                f"{path} records that its activation is {recorded}, not {activation}; omit "
                "--activation."
            )
        check = functools.partial(_check_finite, path)
        return replace(weights, params=checked(weights.params, check))

    def _open_run(self, workdir: AnyPath, which: str, ema: bool) -> Weights:
        weights = run.read(workdir, which, ema)
        needed = weights.adapters or weights.stored
        if needed is None:
            return weights
        try:
            path = needed.base if isinstance(needed, Adapters) else needed.weights
            base = self.open(path)
        except (InputError, OSError) as error:
            raise _unusable(workdir, needed, f"cannot be read ({error})") from error
        if isinstance(needed, Adapters):
            return merged(weights, needed, base, workdir)
        return joined(weights, needed, base, workdir)

    def _open_files(
        self, path: AnyPath, activation: Activation | None, base: str | None
    ) -> Weights:
        copy = self._copies.enter_context(files.local(path))
        weights = _relocated(path, copy, self._open_format(copy, activation, base))
        return replace(weights, head=_read_head(copy, weights.config.embed_dim))

    def _open_format(self, path: Path, activation: Activation | None, base: str | None) -> Weights:
        config_path = (path if path.is_dir() else path.parent) / open_clip_config.CONFIG_NAME
        if path.is_dir():
            if (path / model_folder.MANIFEST_NAME).is_file():
                return replace(model_folder.read(path), format="clip-jax")
            if _is_adapters(path):
                adapters = peft.read(path, functools.partial(self._open_base, base))
                return replace(adapters, format="peft")
            if not _is_open_clips(path) and _is_hugging_face(path):
                return replace(hugging_face.read(path), format="hugging-face")
            if not _is_open_clips(path) and timm_folder.is_folder(path):
                return replace(timm_folder.read(path), format="timm")
            if dinotxt.has_files(path):
                return self._open_dinotxt(dinotxt.read_files(path), path, base)
            path = open_clip.find_weights(path)
        tensors = read_tensors(path)
        if any(name.startswith(("img/", "params/img/")) for name in tensors):
            return replace(big_vision.read(tensors, str(path)), format="big-vision")
        if dinotxt.PROBE in tensors:
            return self._open_dinotxt(tensors, path, base)
        if any(name.startswith("text_model.") for name in tensors):
            return replace(hugging_face.read(path.parent), format="hugging-face")
        config = config_path if config_path.exists() else None
        if config is None and perception_models.PROBE in tensors:
            weights = perception_models.read(tensors, str(path))
            return replace(weights, format="perception-models")
        weights = open_clip.read(tensors, str(path), config, activation=activation)
        is_openais = config is None and all(name in tensors for name in openai.SIZES)
        return replace(weights, format="openai" if is_openais else "open-clip")

    def _open_dinotxt(self, tensors: Tensors, path: Path, base: str | None) -> Weights:
        tower = None if base is None else self.open(base)
        return replace(dinotxt.read(tensors, str(path), tower), format="dinotxt")

    def _open_base(self, base: str | None, named: str) -> Weights:
        """Open `base`, or else what a file names, which only a person may let contact a server."""
        is_local = named in hub.BUNDLED_NAMES or os.path.exists(os.path.expanduser(named))
        if base is None and (files.is_remote(named) or not is_local):
            raise InputError(
                f"the base of the adapters, {named!r:.200}, is nothing on this machine. Set --base "
                "to its path, or to hf:OWNER/NAME to download it: "
                "clip-jax convert ADAPTERS NEW --to clip-jax --base hf:OWNER/NAME."
            )
        return whole_model(self.open(named if base is None else base))


def located(path: AnyPath) -> AnyPath:
    """Return an existing path, or where the weights of that name are.

    A folder of other things, such as the study's data, does not hide the bundled model.
    """
    name = os.fspath(path)
    is_here = _has_model(path) if name in hub.BUNDLED_NAMES else path.exists()
    return path if is_here else hub.fetch(name)


def _has_model(path: AnyPath) -> bool:
    if not path.is_dir():
        return path.exists()
    return run.is_run(path) or any(x.suffix in open_clip.SUFFIXES for x in path.iterdir())


def _with_tokenizer(weights: Weights, tokenizer: str | None) -> Weights:
    """Return weights that have no vocabulary with that of `tokenizer`."""
    if tokenizer is None:
        return weights
    if file := weights.config.text.tokenizer.file:
        raise InputError(f"{weights.path} has its own tokenizer, {file}; omit --tokenizer.")
    weights = replace(weights, config=with_vocabulary(weights.config, tokenizer))
    make_tokenizer(weights.config.text)  # raises InputError if it is damaged
    return weights


def merged(weights: Weights, adapters: Adapters, base: Weights, workdir: AnyPath) -> Weights:
    """Return the weights of a run's base with the change by its adapters, read on demand.

    Reading raises InputError if the base is not the one that the run began with.
    """

    @functools.cache
    def read_base() -> Params:
        try:
            params = starting_params(base, weights.config, allowed=("*",))
        except (InputError, OSError) as error:
            raise _unusable(workdir, adapters, f"cannot be read ({error})") from error
        if digest_of(params) != adapters.digest:  # which makes a check of settings needless
            raise _unusable(workdir, adapters, "have changed")
        return params

    def merge() -> Params:
        changes = loaded(adapters.params)
        return lora.merge(read_base(), changes, weights.config, adapters.lora)

    sizes = param_shapes(weights.config).items()
    shapes = unflatten({name: jax.ShapeDtypeStruct(x, np.float32) for name, x in sizes})
    adapters = adapters._replace(weights=read_together(shapes, read_base))
    return replace(weights, params=read_together(shapes, merge), adapters=adapters)


def joined(weights: Weights, stored: Stored, base: Weights, workdir: AnyPath) -> Weights:
    """Return the weights of a run with those of the tower that was stored, read on demand.

    Reading raises InputError if the tower is not the one that the run began with.
    """

    def read_tower() -> Params:
        try:
            params = starting_params(base, weights.config, (stored.tower,), allowed=("*",))
        except (InputError, OSError) as error:
            raise _unusable(workdir, stored, f"cannot be read ({error})") from error
        if digest_of(params) != stored.digest:
            raise _unusable(workdir, stored, "have changed")
        return params

    sizes = param_shapes(weights.config).items()
    shapes = unflatten({name: jax.ShapeDtypeStruct(x, np.float32) for name, x in sizes})
    missing = {name: x for name, x in shapes.items() if name not in weights.params}
    params = weights.params | read_together(missing, read_tower)
    return replace(weights, params=params, stored=None)


def _unusable(workdir: AnyPath, needed: Adapters | Stored, problem: str) -> InputError:
    if isinstance(needed, Adapters):
        what = f"has low-rank adapters of the weights in {needed.base}"
    else:
        what = f"has the {needed.tower} tower of the weights in {needed.weights}"
    return InputError(
        f"{workdir} {what}, which {problem}. "
        f"Restore them there, or set init_from in {workdir / 'config.json'} to where they are."
    )


def _relocated(path: AnyPath, copy: Path, weights: Weights) -> Weights:
    """Replace the path of a vocabulary in the temporary `copy` of a bucket by its URL."""
    file = weights.config.text.tokenizer.file
    if copy == path or not file.startswith(f"{copy}/"):
        return weights
    file = os.fspath(path / file.removeprefix(f"{copy}/"))
    return replace(weights, config=with_vocabulary(weights.config, file))


def _check_finite(path: AnyPath, name: str, array: np.ndarray) -> None:
    """Raise InputError unless all values of a parameter are finite."""
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise InputError(
            f"{path}: {name} has {bad} values of {array.size} that are NaN or infinite, so "
            "all predictions would be NaN; use an earlier checkpoint, or get the file again."
        )


def _is_adapters(path: AnyPath) -> bool:
    return (path / peft.CONFIG_NAME).is_file() and not (path / "config.json").exists()


def _is_open_clips(path: Path) -> bool:
    """Return whether a folder has open_clip's files, which count before others."""
    return (path / open_clip_config.CONFIG_NAME).exists() and any(
        (path / name).exists() for name in open_clip.WEIGHTS_NAMES if name.startswith("open_clip")
    )


def _is_hugging_face(path: Path) -> bool:
    """Return whether a folder is Hugging Face's."""
    config = path / "config.json"
    return config.exists() and "model_type" in read_json(config)


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
