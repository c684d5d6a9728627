"""The configuration of a run: composes the parts' dataclasses, nothing else.

A renamed field gets a row in `RENAMED` of `checkpoints/run_config.py`, so that older runs resume.

A config file is Python with `get_config() -> Config`; flags override its fields by name.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import traceback
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from etils import epath

from clip_jax import flops, processes
from clip_jax.checkpoints.manager import CheckpointConfig
from clip_jax.checkpoints.retention import steps_in
from clip_jax.checkpoints.run_config import read_run_config, upgrade
from clip_jax.data import growth
from clip_jax.data.pipeline import DataConfig
from clip_jax.display import warn
from clip_jax.errors import InputError, check_ranges
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.evals.pairs import PairsEvalConfig
from clip_jax.evals.tasks import SuiteEvalConfig
from clip_jax.losses import SoftmaxConfig, TermConfig
from clip_jax.metrics import profile_range
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.optim import Constant, InverseSqrt, OptimConfig, Tower
from clip_jax.processes import ProcessesConfig
from clip_jax.serialize import from_dict, to_dict
from clip_jax.sharding import MeshConfig
from clip_jax.step import Recipe
from clip_jax.storage.json_files import recover_json


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    seed: int = 0  # of the parameters; the data has its own, data.seed
    steps: int = 10_000  # updates in the whole run
    stop_after: int | None = None  # of them: stop there, saved; without it the run goes on
    batch_size: int = 1_024  # image-text pairs per step over all devices
    # Steps after which the batch is twice as large: 1000 3000 ends with four times batch_size.
    double_batch_at: tuple[int, ...] = ()
    accumulation: int = 1  # chunks in which a batch is encoded, in one's memory (GradCache)
    model: CLIPConfig = field(default_factory=CLIPConfig)
    # RUN@STEP: go on from that run's state and data position, under another schedule or length.
    branch_from: str | None = None
    init_from: str | None = None  # weights to begin with: a run, a model folder, a foreign file
    init_towers: tuple[Tower, ...] = ("image", "text")  # which of its towers are taken
    data: DataConfig = field(default_factory=DataConfig)
    # What is minimised: a weighted sum of terms, such as a contrastive loss and a caption loss.
    objective: tuple[TermConfig, ...] = (SoftmaxConfig(),)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    evals: tuple[DigitsEvalConfig | PairsEvalConfig | SuiteEvalConfig, ...] = ()
    report_every: int = 100  # steps between reports in metrics.jsonl, TensorBoard and terminal
    profile_steps: str | None = None  # FIRST:LAST, such as 10:15: trace these steps for xprof
    compilation_cache: str | None = None  # folder; None: in the work directory (on CPUs: none)

    def __post_init__(self) -> None:
        check_ranges(
            self, seed="[0, 4294967295]", steps="[1, 2147483647]", batch_size="[2, inf)",
            accumulation="[1, inf)", report_every="[1, inf)", double_batch_at="[1, inf)",
            stop_after="[1, inf)",
        )  # fmt: skip
        if any(a >= b for a, b in itertools.pairwise((*self.double_batch_at, self.steps))):
            raise InputError(
                f"double_batch_at={self.double_batch_at} must rise and end before steps="
                f"{self.steps}."
            )
        vision = self.model.vision
        group = vision.batch_norm_group if isinstance(vision, ResNetConfig) else 1
        if self.accumulation > 1 and group is None:
            raise InputError(
                f"accumulation={self.accumulation} needs model.vision.batch_norm_group: with whole "
                "batches, BatchNorm would see the chunks instead."
            )
        if self.batch_size % (self.accumulation * (group or 1)):
            raise InputError(
                f"batch_size={self.batch_size} must be a multiple of accumulation="
                f"{self.accumulation} × {group or 1} (model.vision.batch_norm_group)."
            )
        if self.branch_from is not None:
            _, step = branch_point(self.branch_from)
            if step >= self.steps:
                raise InputError(
                    f"branch_from={self.branch_from} leaves nothing of steps={self.steps}, which "
                    "counts from the beginning of the run branched from."
                )
            if self.init_from:
                raise InputError("branch_from and init_from both give the weights; give one.")
        if self.profile_steps is not None:
            profile_range(self.profile_steps)

    @property
    def end(self) -> int:
        """The step at which the run stops."""
        return min(self.steps, self.stop_after or self.steps)

    def samples_after(self, steps: int) -> int:
        """Count the pairs of the first `steps` updates."""
        return growth.samples_after(self.batch_size, self.double_batch_at, steps)

    def flops_after(self, steps: int) -> int:
        """Count the model FLOPs of the first `steps` updates."""
        phases = growth.phases(self.batch_size, self.double_batch_at, steps)
        return sum(flops.of_step(replace(self.recipe, batch_size=n)).total * k for n, k in phases)

    @property
    def recipe(self) -> Recipe:
        """What of this decides an update, the data and the mesh aside."""
        return Recipe(**{field.name: getattr(self, field.name) for field in fields(Recipe)})


# What may change between a run and its resumption: it alters no update.
RESUMABLE = (
    *("stop_after", "mesh", "accumulation", "checkpoint", "processes", "evals", "report_every"),
    *("profile_steps", "compilation_cache"),
    *("data.workers", "data.threads", "data.prefetch", "data.read_ahead_mib"),
    *("model.attention", "model.remat", "model.unroll", "objective.*.chunk_size"),
)


def load_config(path: str | Path) -> Config:
    """Run a config file's `get_config()`, or read the `config.json` that a run keeps.

    Raises InputError, which says what the file lacks.
    """
    path = Path(path)
    if path.suffix != ".json":
        made = run_file(path, "get_config", Config)
        return from_dict(
            Config, to_dict(made), f"{path}: config"
        )  # types, which Python does not check
    if not path.is_file():
        raise InputError(f"no config at {path}; a run keeps its own in its work directory.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}.") from error
    try:
        return of_run(content, f"{path}: config")
    except InputError as error:  # of a value out of its range, which does not know the file
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from error


def of_run(content: Any, where: str = "config") -> Config:
    """Read the content of a run's `config.json`, which an older version may have written."""
    return from_dict(Config, upgrade(content) if isinstance(content, dict) else content, where)


def run_file(path: Path, function: str, kind: type) -> Any:
    """Run a Python file and return what one of its functions does, which must be a `kind`.

    What goes wrong in the file is refused with its line.
    """
    if not path.is_file():
        raise InputError(f"no config file at {path}; the ones that ship are in configs/.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file; it must define {function}().")
    module = importlib.util.module_from_spec(spec)
    with _blamed_on(path):
        spec.loader.exec_module(module)
        if function not in vars(module):
            raise InputError(
                f"it has no {function}() -> {kind.__name__}; see configs/ for the shape."
            )
        made = vars(module)[function]()
    if not isinstance(made, kind):
        raise InputError(
            f"{function}() of {path} returned {type(made).__name__}, not a {kind.__name__}."
        )
    return made


@contextlib.contextmanager
def _blamed_on(path: Path) -> Generator[None]:
    """Refuse what a person's file raises, with the line; a bug of this package stays one."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames, file = traceback.extract_tb(error.__traceback__), os.path.abspath(path)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        if isinstance(error, SyntaxError) and error.filename == file:
            lines.append(error.lineno)
        last = Path(frames[-1].filename)
        if (
            Path(__file__).parent in last.parents
            and last != Path(__file__)
            and not isinstance(error, InputError)
        ):
            raise
        place = f"{path}:{lines[-1]}" if lines else str(path)
        what = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError(f"{place}: {what}{getattr(error, 'msg', error)}") from error


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """List the fields in which two configs, as dicts, differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        differing = []
        for name in names:
            path = f"{prefix}.{name}" if prefix else name
            differing += differences(old.get(name), new.get(name), path)
        return differing
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [x for i, (a, b) in pairs for x in differences(a, b, f"{prefix}.{i}")]
    return [] if old == new else [(prefix, old, new)]


def check_processes_agree(facts: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError, which names what differs, unless all processes know the same facts.

    `facts` has one mapping for each process: of config, code, data and resume step.
    """
    for index, other in enumerate(facts):
        if differing := differences(dict(facts[0]), dict(other)):
            raise InputError(
                f"processes 0 and {index} do not agree:\n"
                + "\n".join(f"  {name}: {a} in 0, {b} in {index}" for name, a, b in differing)
                + "\nStart all with the same config, code and data, and a --workdir that all see."
            )


# What a branch may have otherwise than the run that it begins in: nothing before it depends on it.
BRANCHABLE = (
    *(*RESUMABLE, "steps", "optim.schedule", "optim.final_learning_rate", "branch_from"),
    "double_batch_at",  # later than the branch: the number of pairs seen there is checked
)


def branch_point(text: str) -> tuple[str, int]:
    """Read RUN@STEP: a work directory and one of its checkpoints."""
    run, at, step = text.rpartition("@")
    if not (at and run and step.isdecimal() and int(step)):
        raise InputError(
            f"branch_from={text!r} must be RUN@STEP, a work directory and the step of one of its "
            "checkpoints, such as runs/trunk@20000."
        )
    return run, int(step)


def with_order(workdir: Path | epath.Path, config: Config) -> Config:
    """Give `data.order=auto` the value that the run in `workdir` began with, if there is one."""
    kept: dict[str, Any] = {}
    with contextlib.suppress(InputError):  # damaged, which check_resumable says
        kept = read_run_config(workdir)
    if config.data.order != "auto" or not kept:
        return config
    order = kept.get("data", {}).get("order", "global")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, order=order))


def check_resumable(workdir: Path | epath.Path, config: Config) -> None:
    """Raise InputError unless the run in `workdir` is this config's, up to what alters no
    update."""
    path = workdir / "config.json"
    before = upgrade(recover_json(path, warn if processes.is_lead() else None))
    allowed = (*RESUMABLE, "steps") if _goes_on(before, config) else RESUMABLE
    stands = max(steps_in(workdir / "checkpoints"), default=0)
    if before and (differing := _others(path, before, config, allowed, stands)):
        raise InputError(
            f"{workdir} holds a run with another config:\n" + "\n".join(differing) + "\n"
            "Give the same values to resume it, or another --workdir to start anew."
        )


def _goes_on(before: dict[str, Any], config: Config) -> bool:
    """Say whether a run is only made longer, under a schedule that does not know its end."""
    has_no_end = isinstance(config.optim.schedule, Constant | InverseSqrt)
    return has_no_end and before.get("steps", math.inf) <= config.steps


def check_branch(trunk: Path | epath.Path, config: Config) -> list[str]:
    """List what a branch has otherwise than its trunk; raises InputError for what it may not
    change."""
    path = trunk / "config.json"
    if not (before := read_run_config(trunk)):
        raise InputError(f"branch_from: there is no run in {trunk} (no config.json).")
    _, stands = branch_point(config.branch_from or "")
    if differing := _others(path, before, config, BRANCHABLE, stands):
        raise InputError(
            f"a branch of {trunk} cannot differ from it in:\n" + "\n".join(differing) + "\n"
            "Give the same values. To begin with its weights alone, use --init-from."
        )
    return [line.strip() for line in _others(path, before, config, RESUMABLE)]


def _others(
    path: Path | epath.Path, before: dict[str, Any], config: Config, allowed: Sequence[str],
    stands: int | None = None,
) -> list[str]:  # fmt: skip
    """List what the config kept in `path` has otherwise than this one, apart from `allowed`, and
    from what a mixture reads after the step at which the run `stands`."""
    data = before.setdefault("data", {})
    data.setdefault("order", "global")  # before there was another
    if "auto" in (data["order"], config.data.order):  # of a ladder's point, before it began
        data["order"] = config.data.order
    with contextlib.suppress(InputError):  # an older file lacks fields that had no effect then
        before = to_dict(from_dict(Config, before))
    now = to_dict(config)
    if stands is not None and _goes_on_reading(before, now, config.samples_after(stands)):
        before["data"]["source"] = now["data"]["source"]
    return [
        f"  {name}: {old} in {path}, {new} given"
        for name, old, new in differences(before, now)
        if not any(fnmatch(name, some) or name.startswith(some + ".") for some in allowed)
    ]


def _goes_on_reading(before: dict[str, Any], now: dict[str, Any], samples: int) -> bool:
    """Say whether two configs have mixtures that give the same first `samples`: members were added
    at the end, not read before a phase that is to come."""
    old, new = before["data"].get("source") or {}, now["data"]["source"]
    if not ("members" in old and "members" in new):
        return False
    known, phases = len(old["members"]), len(old["phases"])
    added = [0.0] * (len(new["members"]) - known)
    padded = [x | {"weights": [*x["weights"], *added]} for x in old["phases"]]
    return (
        new["members"][:known] == old["members"]
        and [x["weight"] for x in new["members"][known:]] == added
        and new["phases"][:phases] == padded
        and all(x["from_sample"] >= samples for x in new["phases"][phases:])
    )
