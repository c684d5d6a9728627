"""The configuration of a run: composes the parts' dataclasses, nothing else.

A config file is Python with `get_config() -> Config`; flags override its fields by name.
"""

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_jax.checkpoint import CheckpointConfig
from clip_jax.data.pipeline import DataConfig
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.evals.pairs import PairsEvalConfig
from clip_jax.losses import SigmoidConfig, SoftmaxConfig
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.serialize import to_dict
from clip_jax.optim import OptimConfig
from clip_jax.sharding import MeshConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    seed: int = 0  # of the parameters; the data has its own, data.seed
    steps: int = 10_000  # updates in the whole run
    batch_size: int = 1_024  # image-text pairs per step over all devices
    model: CLIPConfig = field(default_factory=CLIPConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: SoftmaxConfig | SigmoidConfig = field(default_factory=SoftmaxConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evals: tuple[DigitsEvalConfig | PairsEvalConfig, ...] = ()
    report_every: int = 100  # steps between reports in metrics.jsonl, TensorBoard and terminal

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "report_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")


# What may change between a run and its resumption: it alters no update.
RESUMABLE = (
    *("mesh", "checkpoint", "evals", "report_every"),
    *("data.workers", "data.threads", "data.prefetch"),
    *("data.source.members", "data.source.phases"),  # of a mixture: see MixtureConfig
)


def load_config(path: str | Path) -> Config:
    """Run a config file's `get_config()`. ValueError says what the file lacks."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no config file at {path}; the ones that ship are in configs/.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file; a config defines get_config() -> Config.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no get_config(); see configs/digits.py for the shape.")
    config = module.get_config()
    if not isinstance(config, Config):
        raise ValueError(f"get_config() of {path} returned {type(config).__name__}, not a Config.")
    return config


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """List the fields in which two configs, as dicts, differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        found = []
        for name in names:
            path = f"{prefix}.{name}" if prefix else name
            found += differences(old.get(name), new.get(name), path)
        return found
    return [] if old == new else [(prefix, old, new)]


def check_resumable(workdir: Path, config: Config) -> None:
    """ValueError unless the run in `workdir` is this config's, up to what alters no update."""
    path = workdir / "config.json"
    if not path.exists():
        return
    found = [
        f"  {name}: {old} in {path}, {new} given"
        for name, old, new in differences(json.loads(path.read_text()), to_dict(config))
        if not any(name == allowed or name.startswith(allowed + ".") for allowed in RESUMABLE)
    ]
    if found:
        raise ValueError(
            f"{workdir} holds a run with another config:\n" + "\n".join(found) + "\n"
            "Give the same values to resume it, or another --workdir to start anew."
        )
