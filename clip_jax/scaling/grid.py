"""Make the runs of a ladder: its points, and the parent runs of cool-down branches."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from clip_jax.checkpoints.resume import branch_point, check_resumable
from clip_jax.checkpoints.retention import steps_in
from clip_jax.checkpoints.run_config import read_run_config
from clip_jax.config import Config
from clip_jax.config_files import complete
from clip_jax.errors import InputError
from clip_jax.losses.objective import fitting
from clip_jax.optim import Constant, CoolDown
from clip_jax.scaling.ladder import BranchesConfig, LadderConfig, SweepConfig
from clip_jax.scaling.run_table import short
from clip_jax.serialize import from_dict, to_dict
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import read_json


class Point(NamedTuple):
    """One run of the ladder: a point, or the parent run of branches."""

    name: str  # w32@16K-seed0, w32-parent-seed0 or, in a sweep, w32@16K-rate0.5-seed0
    model: str  # and its teacher, as in w32+L
    samples: int  # as in the spec; the run sees complete batches
    config: Config
    workdir: AnyPath
    parent: str = ""  # name of the run that it branches from, or that has its initial weights

    @property
    def samples_seen(self) -> int:
        return self.config.samples_after(self.config.steps)

    @property
    def first_step(self) -> int:
        """The step of the parent run from which this run starts; 0 without a parent."""
        return branch_point(self.config.branch_from)[1] if self.config.branch_from else 0

    @property
    def training_flops(self) -> int:
        """FLOPs of the run's own steps, without the parent run's."""
        of_run = self.config.flops_after
        return of_run(self.config.steps) - of_run(self.first_step)

    def is_ready(self) -> bool:
        """Return whether the checkpoint or the weights from which it starts exist."""
        if not self.parent:
            return True
        if not self.config.branch_from:
            return (self.workdir.with_name(self.parent) / "result.json").exists()
        parent, step = branch_point(self.config.branch_from)
        return step in steps_in(files.as_path(parent) / "checkpoints")


def grid(ladder: LadderConfig, root: AnyPath) -> list[Point]:
    """Return every run of the ladder, with run directories under `root`."""
    base = ladder.base
    sweep = ladder.sweep or SweepConfig()
    lengths = _lengths(ladder, sweep)
    shortest = min((steps for _, _, steps in lengths), default=0)
    objectives = ladder.teachers or {"": base.objective}
    points = []
    for (model, architecture), teacher in itertools.product(ladder.models.items(), objectives):
        points_of_model: list[Point] = []
        label = f"{model}+{teacher}" if teacher else model
        for samples, batch_size, steps in lengths:
            schedule_steps = shortest if ladder.branches else steps  # branches share their warm-up
            width = architecture.vision.width
            by_rules = replace(
                base,
                model=architecture,
                steps=steps,
                batch_size=batch_size,
                optim=ladder.rules.apply(base, batch_size, width, schedule_steps),
                objective=fitting(objectives[teacher], architecture),
            )
            for (trial, config), seed in itertools.product(sweep.trials(by_rules), ladder.seeds):
                name = f"{_in_a_path(label)}@{short(samples)}{trial}-seed{seed}"
                config = replace(config, seed=seed, data=replace(config.data, seed=seed))
                points_of_model.append(Point(name, label, samples, config, root / name))
        if ladder.branches:
            points_of_model = _with_parents(points_of_model, ladder.branches)
        points += points_of_model
    points += _others(ladder.runs, root)
    counts = Counter(point.name for point in points)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise InputError(f"points would share the names {twice}; samples are too close.")
    return points


def _others(runs: Mapping[str, Config], root: AnyPath) -> list[Point]:
    """Return the runs that are not of the grid."""
    points = []
    for name, config in runs.items():
        label = name.removesuffix(f"-seed{config.seed}")
        parent = config.init_from if config.init_from in runs else None
        if parent:
            config = replace(config, init_from=str(root / parent))
        samples = config.samples_after(config.steps)
        points.append(Point(name, label, samples, config, root / name, parent or ""))
    return points


def _lengths(ladder: LadderConfig, sweep: SweepConfig) -> list[tuple[int, int, int]]:
    """Return samples, batch size and steps of the points of each model."""
    batch_sizes = ladder.batch_sizes or (ladder.base.batch_size,) * len(ladder.samples)
    lengths = []
    for samples, of_point in zip(ladder.samples, batch_sizes, strict=True):
        for batch_size in sweep.batch_sizes or (of_point,):
            steps = max(round(samples / batch_size), 1)
            lengths.append((samples, batch_size, steps))
    return lengths


def _in_a_path(model: str) -> str:
    return model.replace("/", "-")


def _with_parents(points: Sequence[Point], branches: BranchesConfig) -> list[Point]:
    """Turn a model's points into branches, preceded by the parent run of each seed."""
    runs = []
    for seed in dict.fromkeys(point.config.seed for point in points):
        of_seed = [point for point in points if point.config.seed == seed]
        first = of_seed[0]
        optim = first.config.optim
        workdir = first.workdir.with_name(f"{_in_a_path(first.model)}-parent-seed{seed}")
        cooled = []
        starts = []
        for point in of_seed:
            length = max(round(branches.share * point.config.steps), 1)
            start = point.config.steps - length
            if start < max(optim.warmup_steps, 1):
                raise InputError(
                    f"{point.name} has {point.config.steps} steps: after a warm-up of "
                    f"{optim.warmup_steps}, none is left for the parent run with branches.share="
                    f"{branches.share}; use more samples, or a smaller batch_size or share."
                )
            schedule = CoolDown(steps=length, shape=branches.shape, power=branches.power)
            config = replace(
                point.config,
                optim=replace(optim, schedule=schedule),
                branch_from=f"{workdir}@{start}",
            )
            cooled.append(point._replace(config=config, parent=workdir.name))
            starts.append(start)
        checkpoint = replace(first.config.checkpoint, also=tuple(sorted(set(starts))), best=None)
        parent = replace(
            first.config,
            steps=max(starts),
            optim=replace(optim, schedule=Constant()),
            evals=(),
            checkpoint=checkpoint,
        )
        samples = parent.steps * parent.batch_size
        runs += [Point(workdir.name, first.model, samples, parent, workdir), *cooled]
    return runs


def is_done(point: Point) -> bool:
    """Return whether a point is completely trained. InputError if its directory has another run."""
    workdir = point.workdir
    advice = f"Restore a copy, or delete {workdir} to train the point again."
    result = read_json(workdir / "result.json", advice=advice)
    if not (workdir / "checkpoints").exists() and not result:
        return False  # a config without a checkpoint may be replaced
    before = complete(read_run_config(workdir, recover=True))
    check_resumable(workdir, before, to_dict(point.config), point.config.samples_after)
    step = from_dict(int, result.get("step", 0), f"step in {workdir / 'result.json'}")
    return step >= point.config.end
