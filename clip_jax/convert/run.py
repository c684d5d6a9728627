"""Read a model from a run directory: configuration, and the weights of a checkpoint."""

import functools
from dataclasses import replace

import jax
import numpy as np

from clip_jax.checkpoints.manager import position_of, restore_params
from clip_jax.checkpoints.retention import named_step
from clip_jax.checkpoints.run_config import read_run_config
from clip_jax.convert.weights import Head, Weights, default_preprocess, with_vocabulary
from clip_jax.data.tokenizers import vocabulary
from clip_jax.losses import ClassifierConfig
from clip_jax.losses import objective as terms
from clip_jax.models import lora
from clip_jax.models.clip import CLIP, CLIPConfig, Params
from clip_jax.models.lora import LoRAConfig
from clip_jax.serialize import from_dict
from clip_jax.storage.files import AnyPath


def is_run(path: AnyPath) -> bool:
    """Return whether a path is a run directory."""
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()


def read(workdir: AnyPath, which: str = "") -> Weights:
    """Read the weights, not the optimizer state, of the newest checkpoint or of `which`."""
    config = read_config(workdir)
    params = restore_params(workdir, named_step(workdir, which), shapes(workdir, config))
    params, head = split_head(workdir, jax.tree.map(np.asarray, params))
    return Weights(config=config, params=params, preprocess=default_preprocess(config), head=head)


def shapes(workdir: AnyPath, config: CLIPConfig) -> Params:
    """Return the shapes of what a run trains: the weights or adapters, and its classifier."""
    own, heads = lora_of(workdir), heads_of(workdir)
    model = CLIP(config).init if own is None else functools.partial(lora.draw, config, own)
    return jax.eval_shape(
        lambda key: model(key) | terms.draw(heads, config, key), jax.random.key(0)
    )


def split_head(workdir: AnyPath, params: Params) -> tuple[Params, Head | None]:
    """Split what a run trains into the model's parameters and the classifier, if any."""
    for term in heads_of(workdir):
        model = {name: x for name, x in params.items() if name != term.name}
        return model, Head(term.classes, term.templates, np.asarray(params[term.name]["kernel"]))
    return params, None


def heads_of(workdir: AnyPath) -> tuple[ClassifierConfig, ...]:
    """Return the settings of the classifier that a run trains, one at most."""
    return tuple(
        from_dict(ClassifierConfig, term, f"{workdir}: objective")
        for term in read_run_config(workdir).get("objective", ())
        if term.pop("type", "") == ClassifierConfig.__name__
    )


def lora_of(workdir: AnyPath) -> LoRAConfig | None:
    """Return the adapters' settings of a run that trains them instead of the model's weights."""
    content = read_run_config(workdir).get("lora")
    return None if content is None else from_dict(LoRAConfig, content, f"{workdir}: lora")


def base_of(workdir: AnyPath, which: str = "") -> tuple[str, str]:
    """Return the path and the hash of the weights that a run's adapters change."""
    position = position_of(workdir, named_step(workdir, which))
    return read_run_config(workdir)["init_from"], position["base"]


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
