"""Read a model from a run directory: configuration, and the weights of a checkpoint."""

import functools
from dataclasses import replace

import jax
import numpy as np

from clip_jax.checkpoints.retention import named_step, of_teacher
from clip_jax.checkpoints.run_config import read_run_config
from clip_jax.convert.on_demand import read_together
from clip_jax.convert.weights import (
    Adapters,
    Head,
    Stored,
    Weights,
    default_preprocess,
    with_vocabulary,
)
from clip_jax.data.images import Preprocess
from clip_jax.data.tokenizers import vocabulary
from clip_jax.losses import ClassifierConfig
from clip_jax.losses import objective as terms
from clip_jax.models import lora
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.lora import LoRAConfig
from clip_jax.serialize import from_dict
from clip_jax.step import without
from clip_jax.storage.files import AnyPath


def is_run(path: AnyPath) -> bool:
    """Return whether a path is a run directory."""
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()


def read(workdir: AnyPath, which: str = "", ema: bool = True) -> Weights:
    """Open the weights, not the optimizer state, of the newest checkpoint or of `which`.

    Without `ema` they are not their average, if the run keeps one. Of a run that trains adapters,
    `params` are only these: see `weight_files.merged`. A run with a stored tower has no parameters
    of it: see `weight_files.joined`. `which` may name the teacher (`retention.of_teacher`).
    """
    from clip_jax.checkpoints.manager import position_of, restore_params  # imports Orbax

    config, step, key = read_config(workdir), named_step(workdir, which), jax.random.key(0)
    lora_config, heads, how = extras(workdir)
    teacher = ("carried", terms.AVERAGE) if of_teacher(which)[1] else ()
    restore = functools.partial(restore_params, workdir, step, ema=ema, teacher=teacher)
    content = read_run_config(workdir)
    head = adapters = stored = None
    for term in heads:
        kernels = restore(jax.eval_shape(lambda: terms.draw(heads, config, key)))
        head = Head(term.classes, term.templates, np.asarray(kernels[term.name]["kernel"]))
    draw = CLIP(config).init
    if lora_config is not None:
        draw = functools.partial(lora.draw, config, lora_config)
    tower = content.get("stored")
    shapes = without(tower, jax.eval_shape(draw, key))
    params = read_together(shapes, lambda: restore(shapes))
    if lora_config is not None:
        base, digest = content["init_from"], position_of(workdir, step)["base"]
        adapters = Adapters(lora_config, params, base, digest, {})
    if tower is not None:
        stored = Stored(tower, content["init_from"], position_of(workdir, step)["tower"])
    return Weights(
        config=config,
        params=params,
        preprocess=default_preprocess(config, how),
        head=head,
        adapters=adapters,
        stored=stored,
        read_sharded=restore if adapters is None and stored is None else None,
    )


def extras(
    workdir: AnyPath,
) -> tuple[LoRAConfig | None, tuple[ClassifierConfig, ...], Preprocess | None]:
    """Return the settings of a run's adapters, of its classifier, one at most, and of images."""
    content, kind = read_run_config(workdir), ClassifierConfig.__name__
    terms = [term for term in content.get("objective", ()) if term.pop("type", "") == kind]
    heads = tuple(from_dict(ClassifierConfig, x, f"{workdir}: objective") for x in terms)
    adapters, how = content.get("lora"), content.get("preprocess")
    how = how and from_dict(Preprocess, how, f"{workdir}: preprocess")
    return adapters and from_dict(LoRAConfig, adapters, f"{workdir}: lora"), heads, how


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
