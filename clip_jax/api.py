"""Functions of `from clip_jax import ...` that join several parts of the package."""

from dataclasses import replace
from typing import Any, TypeVar

import jax
from etils import epath
from jax.sharding import Mesh

from clip_jax import processes, sharding, train
from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.convert.conversion import Conversion, ConvertConfig, convert
from clip_jax.convert.formats import Format
from clip_jax.convert.verify import Verification
from clip_jax.convert.weights import default_preprocess
from clip_jax.data.images import Preprocess
from clip_jax.data.pipeline import Pipeline
from clip_jax.errors import InputError
from clip_jax.export import ExportConfig, export
from clip_jax.inference.evaluate import EvaluateConfig, evaluate
from clip_jax.inference.loading import Model
from clip_jax.models import zoo
from clip_jax.models.clip import CLIP, CLIPConfig, Params
from clip_jax.models.initial_key import initial_key
from clip_jax.processes import ProcessesConfig
from clip_jax.serialize import from_dict, to_dict
from clip_jax.storage.files import AnyPath

Settings = TypeVar("Settings")


def create_model(
    config: str | CLIPConfig,
    params: Params | None = None,
    *,
    preprocess: Preprocess | None = None,
    seed: int = 0,
) -> Model:
    """Return a model of an architecture, with random parameters unless there are `params`.

    `config` may be a name that `available_models` lists. `params` are, for example, those of a
    training state. `preprocess` says how images are resized, by default as by OpenAI. Raises
    InputError for an unknown name.

        >>> import clip_jax
        >>> architecture = clip_jax.load_config("digits").model
        >>> model = clip_jax.create_model(architecture, seed=1)
        >>> model.params["visual"]["proj"].shape
        (96, 64)
    """
    architecture = zoo.get(config) if isinstance(config, str) else config
    if params is None:
        params = jax.jit(CLIP(architecture).init)(initial_key(seed))
    return Model(architecture, params, default_preprocess(architecture, preprocess))


def start_processes(config: ProcessesConfig = ProcessesConfig()) -> None:
    """Connect to the other processes of a run, if there are any, before any computation.

    Does nothing if they are connected already. See `clip_jax.processes.start` for what is detected.
    """
    if not jax.distributed.is_initialized():
        processes.start(config)


def train_model(
    config: str | Config, workdir: str | epath.PathLike, **changes: Any
) -> dict[str, Any]:
    """Train as `clip-jax train` does: resume the run in `workdir`, or begin a new one.

    `config` may be the name of a bundled config or the path of a config file. `changes` are fields
    of Config with other values, such as `steps=100`. Returns the content of `result.json`; raises
    what `clip_jax.train.train` does. With several processes, all call this alike, before any other
    computation.
    """
    chosen = load_config(config) if isinstance(config, str) else config
    chosen = replace(chosen, **changes)
    start_processes(chosen.processes)
    return train.train(chosen, workdir)


def open_data(config: Config, mesh: Mesh | None = None) -> Pipeline:
    """Open this process's part of a config's training data.

    `Pipeline.batches(step)` is an iterator over the batches after `step` steps. Without a mesh, all
    rows of each batch are read here. Raises InputError for data that cannot be read.

        >>> import clip_jax
        >>> batches = clip_jax.open_data(clip_jax.load_config("digits")).batches()
        >>> batch = next(batches)
        >>> batches.close()
        >>> batch.image.shape, batch.image.dtype, batch.text.shape
        ((128, 16, 16, 3), dtype('uint8'), (128, 16))
    """
    part, parts = (0, 1) if mesh is None else sharding.data_part(mesh)
    return train.open_data(config, part, parts)


def evaluate_model(model: str | AnyPath, **options: Any) -> dict[str, float | int]:
    """Evaluate as `clip-jax evaluate` does and return metrics by name.

    `options` are fields of EvaluateConfig, such as `dataset=["cifar10"], data_dir="data"`.
    """
    return evaluate(_settings(EvaluateConfig, model=model, **options))


def convert_model(
    source: str | AnyPath, destination: str | AnyPath, to: Format, **options: Any
) -> Conversion:
    """Write a model in another format, as `clip-jax convert` does.

    `options` are fields of ConvertConfig, such as `verify=True`. Raises InputError if the
    verification fails.
    """
    settings = _settings(ConvertConfig, source=source, destination=destination, to=to, **options)
    done = convert(settings)
    if done.verification is not None and not done.verification.passed:
        raise InputError(f"{destination} is written, but differs:\n{done.verification.describe()}")
    return done


def export_model(
    model: str | AnyPath, output: str | AnyPath, format: str, **options: Any
) -> Verification | None:
    """Export a model to "onnx" or "stablehlo", as `clip-jax export` does.

    `options` are fields of ExportConfig, such as `verify=True`.
    """
    return export(_settings(ExportConfig, model=model, output=output, format=format, **options))


def _settings(kind: type[Settings], **values: Any) -> Settings:
    """Check values as those of a file are, with their names in the message of an error."""
    return from_dict(kind, {name: to_dict(x) for name, x in values.items()}, kind.__name__)
