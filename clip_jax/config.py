"""The configuration of a run: composes the parts' dataclasses, nothing else.

A config file is Python with `get_config() -> Config`; flags override its fields by name.
"""

import contextlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etils import epath

from clip_jax.checkpoint import CheckpointConfig
from clip_jax.data.pipeline import DataConfig
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.evals.pairs import PairsEvalConfig
from clip_jax.losses import SigmoidConfig, SoftmaxConfig
from clip_jax.metrics import profile_range
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.serialize import from_dict, to_dict
from clip_jax.optim import OptimConfig, Tower
from clip_jax.processes import ProcessesConfig
from clip_jax.sharding import MeshConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    seed: int = 0  # of the parameters; the data has its own, data.seed
    steps: int = 10_000  # updates in the whole run
    batch_size: int = 1_024  # image-text pairs per step over all devices
    accumulation: int = 1  # chunks in which a batch is encoded, in one's memory (GradCache)
    model: CLIPConfig = field(default_factory=CLIPConfig)
    init_from: str | None = None  # weights to begin with: a run, a model folder, a foreign file
    init_towers: tuple[Tower, ...] = ("image", "text")  # which of its towers are taken
    data: DataConfig = field(default_factory=DataConfig)
    loss: SoftmaxConfig | SigmoidConfig = field(default_factory=SoftmaxConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    evals: tuple[DigitsEvalConfig | PairsEvalConfig, ...] = ()
    report_every: int = 100  # steps between reports in metrics.jsonl, TensorBoard and terminal
    profile_steps: str | None = None  # FIRST:LAST, such as 10:15: trace these steps for xprof
    compilation_cache: str | None = None  # folder; None: in the work directory (on CPUs: none)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "report_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        vision = self.model.vision
        group = vision.batch_norm_group if isinstance(vision, ResNetConfig) else 1
        if self.accumulation > 1 and group is None:
            raise ValueError(
                f"accumulation={self.accumulation} needs model.vision.batch_norm_group: with whole "
                "batches, BatchNorm would see the chunks instead."
            )
        if self.batch_size % (self.accumulation * (group or 1)):
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of accumulation="
                f"{self.accumulation} × {group or 1} (model.vision.batch_norm_group)."
            )
        if self.profile_steps is not None:
            profile_range(self.profile_steps)


# What may change between a run and its resumption: it alters no update.
RESUMABLE = (
    *("mesh", "accumulation", "checkpoint", "processes", "evals", "report_every"),
    *("profile_steps", "compilation_cache"),
    *("data.workers", "data.threads", "data.prefetch"),
    *("data.source.members", "data.source.phases"),  # of a mixture: see MixtureConfig
)


def load_config(path: str | Path) -> Config:
    """Run a config file's `get_config()`, or read the `config.json` that a run keeps.

    ValueError says what the file lacks.
    """
    path = Path(path)
    if path.suffix != ".json":
        return run_file(path, "get_config", Config)
    if not path.is_file():
        raise ValueError(f"no config at {path}; a run keeps its own in its work directory.")
    try:
        return from_dict(Config, json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def run_file(path: Path, function: str, kind: type) -> Any:
    """Run a Python file and return what one of its functions does, which must be a `kind`."""
    if not path.is_file():
        raise ValueError(f"no config file at {path}; the ones that ship are in configs/.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file; it must define {function}().")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ValueError(
            f"{path} has no {function}() -> {kind.__name__}; see configs/ for the shape."
        )
    made = getattr(module, function)()
    if not isinstance(made, kind):
        raise ValueError(
            f"{function}() of {path} returned {type(made).__name__}, not a {kind.__name__}."
        )
    return made


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


def check_processes_agree(facts: Sequence[Mapping[str, Any]]) -> None:
    """ValueError that names what differs, unless all processes know the same facts.

    `facts` has one mapping for each process: of config, code, data and resume step.
    """
    for index, other in enumerate(facts):
        if found := differences(dict(facts[0]), dict(other)):
            raise ValueError(
                f"processes 0 and {index} do not agree:\n"
                + "\n".join(f"  {name}: {a} in 0, {b} in {index}" for name, a, b in found)
                + "\nStart all with the same config, code and data, and a --workdir that all see."
            )


def check_resumable(workdir: Path | epath.Path, config: Config) -> None:
    """ValueError unless the run in `workdir` is this config's, up to what alters no update."""
    path = workdir / "config.json"
    if not path.exists():
        return
    before = json.loads(path.read_text())
    with contextlib.suppress(ValueError):  # an older file lacks fields that had no effect then
        before = to_dict(from_dict(Config, before))
    found = [
        f"  {name}: {old} in {path}, {new} given"
        for name, old, new in differences(before, to_dict(config))
        if not any(name == allowed or name.startswith(allowed + ".") for allowed in RESUMABLE)
    ]
    if found:
        raise ValueError(
            f"{workdir} holds a run with another config:\n" + "\n".join(found) + "\n"
            "Give the same values to resume it, or another --workdir to start anew."
        )
