"""Read a model from a run directory: configuration, and the weights of a checkpoint."""

from dataclasses import replace

import jax
import numpy as np

from clip_jax.checkpoints.manager import restore_params
from clip_jax.checkpoints.retention import named_step
from clip_jax.checkpoints.run_config import read_run_config
from clip_jax.convert.weights import Weights, default_preprocess, with_vocabulary
from clip_jax.data.tokenizers import vocabulary
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.serialize import from_dict
from clip_jax.storage.files import AnyPath


def is_run(path: AnyPath) -> bool:
    """Return whether a path is a run directory."""
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()


def read(workdir: AnyPath, which: str = "") -> Weights:
    """Read the weights, not the optimizer state, of the newest checkpoint or of `which`."""
    config = read_config(workdir)
    params = restore_params(workdir, named_step(workdir, which), CLIP(config))
    params = jax.tree.map(np.asarray, params)
    return Weights(config=config, params=params, preprocess=default_preprocess(config))


def read_config(workdir: AnyPath) -> CLIPConfig:
    """Read the architecture of a run's model, with the path of its vocabulary."""
    content = read_run_config(workdir)
    config = from_dict(CLIPConfig, content.get("model"), f"{workdir / 'config.json'}: model")
    for name in vocabulary.NAMES:  # the run's copy, since the original file may be gone
        if (workdir / name).is_file():
            config = with_vocabulary(config, str(workdir / name))
    # Settings of training are not part of the model, and no other format has them.
    rest = {name: getattr(CLIPConfig, name) for name in ("dtype", "remat", "unroll", "attention")}
    return replace(config, **rest)
