"""A training run from set-up to end. The mathematics is in step.py, losses/ and models/."""

import contextlib
import functools
import json
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from clip_jax import parts, processes, sharding
from clip_jax.checkpoints.claim import Claim, count_start
from clip_jax.checkpoints.manager import (
    Checkpoints,
    Restored,
    has_locked,
    restore_params,
    restore_step,
    write_locked,
)
from clip_jax.checkpoints.resume import branch_point, check_branch, check_resumable, differences
from clip_jax.checkpoints.retention import Unusable, steps_in
from clip_jax.checkpoints.run_config import read_run_config
from clip_jax.config import Config
from clip_jax.config_files import as_begun, complete, of_run, with_stretch, with_weights
from clip_jax.convert.weight_files import WeightFiles
from clip_jax.convert.weights import Head, default_preprocess
from clip_jax.data.batch_plan import BatchKind
from clip_jax.data.pipeline import Batch, Pipeline, build
from clip_jax.data.tokenizers import make_tokenizer, vocabulary
from clip_jax.display import duration, say
from clip_jax.errors import InputError
from clip_jax.evals.evaluator import Encoder, Evaluations
from clip_jax.inference.loading import Model
from clip_jax.inference.starting import (
    StoredTower,
    frozen_weights,
    initial_params,
    initial_state,
    stored_tower,
)
from clip_jax.losses import ClassifierConfig, Objective
from clip_jax.metrics.profiler import Profiler
from clip_jax.metrics.reports import Reports
from clip_jax.metrics.timers import Timers
from clip_jax.models.clip import Params, count
from clip_jax.models.images import valid_patches
from clip_jax.optim.wrappers import averaged, with_new_norms
from clip_jax.serialize import from_dict, to_dict
from clip_jax.step import LOCKED, FrozenParams, Program, State, locked_of
from clip_jax.storage import files
from clip_jax.storage.json_files import read_json

_DATA = "data.json"  # in the run directory: fingerprints of the training data
_FROZEN = {  # where frozen weights are
    "teachers": "teachers.weights",
    "base": "init_from (RUN@STEP, if that run has trained on)",
    "tower": "init_from (RUN@STEP, if that run has trained on)",
}
MAX_SKIPPED_IN_A_ROW = 50  # updates skipped (optim.skip_norm_ratio) before the run is stopped


class Diverged(Exception):
    """The loss or the gradient is not finite, or too many updates were skipped."""


class LostProcess(Exception):
    """Another process of the run has ended, so that this one cannot continue."""


class Preempted(Exception):
    """The run received SIGTERM and has saved its state."""


def train(config: Config, workdir: epath.PathLike) -> dict[str, Any]:
    """Train to `config.end`, resuming from the newest checkpoint in `workdir` if there is one.

    `workdir`, the run directory, may be in a bucket (`gs://`, `s3://`). All processes of a run call
    this alike. Returns the content of `result.json`. Raises InputError for a config that cannot run
    or does not match the run directory, Diverged for a loss that is not finite, Preempted at
    SIGTERM, LostProcess if another process of the run has ended.
    """
    workdir = epath.Path(workdir if files.is_remote(workdir) else Path(workdir).absolute())
    files.check_destination(workdir, "--workdir")
    with Claim(workdir) as claim:
        with WeightFiles() as weight_files:
            run = set_up(config, workdir, claim, weight_files)
        try:
            loop(run)
        except jax.errors.JaxRuntimeError as error:
            if processes.has_lost_another(error):
                raise LostProcess(_without_another(run.workdir, error)) from error
            raise
        return end(run)


def _without_another(workdir: epath.Path, error: Exception) -> str:
    """Say which process ended and how the run resumes; write the traceback to a file."""
    index, count = jax.process_index(), jax.process_count()
    other = f"process {1 - index}" if count == 2 else f"another of the {count} processes"
    path = workdir / "tracebacks" / f"process-{index}.txt"
    files.write_whole(path, "".join(traceback.format_exception(error)))
    steps = steps_in(workdir / "checkpoints")
    how = f"it resumes from step {steps[-1]}" if steps else "it starts from the beginning"
    return (
        f"{other} ended, and this process cannot continue without it "
        f"({str(error).rpartition(': ')[2]}). Run the same command in all processes again: {how}. "
        f"The traceback is in {path}."
    )


# ------------------------------------------------------------------ set-up


@dataclass
class Run:
    """The parts of a training run and its current state."""

    config: Config
    workdir: epath.Path
    program: Program  # of the config's batch size and image shape
    programs: dict[BatchKind, Program]  # of every kind of batch
    pipeline: Pipeline
    evaluations: Evaluations
    checkpoints: Checkpoints
    reports: Reports
    profiler: Profiler
    watchdog: processes.Watchdog
    timers: Timers
    start: int  # step from which it resumes, 0 for a new run
    state: State
    # Hashes of teachers, of the weights that adapters change, and of a stored tower.
    frozen: dict[str, str]
    tower: Params  # the stored tower, for evaluation

    @property
    def encoder(self) -> Encoder:
        """The model to evaluate, with averaged weights if the optimizer keeps them."""
        config, terms = self.config, {term.name: term for term in self.config.objective}
        params = averaged(self.state.opt_state, self.state.params)
        params = self.program.recipe.complete(self.state, params) | self.tower
        head = None
        if isinstance(term := terms.get(ClassifierConfig.name), ClassifierConfig):
            head = Head(term.classes, term.templates, np.asarray(params[term.name]["kernel"]))
        params = {name: x for name, x in params.items() if name not in terms}
        how = default_preprocess(config.model, config.preprocess)
        return Model(config.model, params, how, head).encoder(self.program.mesh, self.workdir.name)


def set_up(requested: Config, workdir: epath.Path, claim: Claim, weight_files: WeightFiles) -> Run:
    """Build all parts of the run, with its initial or restored state. See `train`."""
    check_patches(requested, workdir)
    timers = Timers()
    processes.keep_compiled(requested.compilation_cache, workdir)
    mesh = sharding.make_mesh(requested.mesh)
    filled = with_weights(requested, weight_files)
    parent = parent_of(filled)
    settled = as_begun(as_begun(filled, parent.workdir) if parent else filled, workdir)
    if not has_begun(settled, workdir):
        settled = with_stretch(settled, weight_files)
    program = Program(settled.recipe, mesh)
    programs = programs_of(settled, program)
    tower = stored_tower(settled, weight_files)
    pipeline = open_data(settled, *sharding.data_part(mesh), tower)
    config = replace(settled, data=replace(settled.data, order=pipeline.order))  # for good
    evaluations = Evaluations(config.evals, config.end)
    check_best(config, evaluations)

    claim.take()
    differs = check_earlier(config, workdir, parent, pipeline)
    if processes.is_lead():
        vocabulary.keep(config.model.text.tokenizer, str(workdir))
    also = sorted({*config.checkpoint.also, *filter(None, config.first_steps)})  # to branch from
    checkpoints = Checkpoints(workdir / "checkpoints", replace(config.checkpoint, also=tuple(also)))
    start = checkpoints.latest_step() or (parent.step if parent else 0)
    agree(config, workdir, pipeline, evaluations, start)
    watchdog = processes.Watchdog(
        config.processes.watchdog_minutes,
        f"Checkpoints in {workdir} are intact: run the same command again to resume.",
    )
    begins = not checkpoints.latest_step()
    params = initial_params(config, weight_files, resumes=start > 0)
    frozen, hashes = frozen_weights(config, mesh, weight_files, params)
    if tower is not None:
        hashes["tower"] = tower.digest
    if not start:
        initial = initial_state(config, program, weight_files, params)
        begun, frozen = Restored(0, initial.saved(), {}), frozen | initial.frozen
        if locked := locked_of(initial):
            write_locked(workdir, locked)
    else:
        with timers.measure("restore"), watchdog:
            if parent and begins:
                begun = branch(config, program, parent, hashes)
                frozen |= restore_locked(program, parent.workdir, begun.step, workdir)
                record_branch(config, workdir, differs)
            else:
                begun = restore(config, checkpoints.restore(program.state.saved()), hashes)
                frozen |= restore_locked(program, workdir, begun.step, workdir)

    earlier_steps = begun.position.get("seconds/steps", math.inf)
    reports = Reports(workdir, timers, config, begun.step, mesh.size, earlier_steps)
    reports.facts["unique_samples"] = pipeline.num_samples
    run = Run(
        config=config,
        workdir=workdir,
        program=program,
        programs=programs,
        pipeline=pipeline,
        evaluations=evaluations,
        checkpoints=checkpoints,
        reports=reports,
        profiler=Profiler(config.profile_steps if processes.is_lead() else None, workdir),
        watchdog=watchdog,
        timers=timers,
        start=begun.step,
        state=program.resume(begun.state, frozen),
        frozen=hashes,
        tower=tower.on_mesh(mesh) if tower and config.evals else {},
    )
    if parent and begins:
        before = of_run(read_run_config(parent.workdir))
        kind = before.batches.at(max(parent.step - 1, 0))
        begin_terms(run, begun.step, before.recipe_of(kind).objective)
    introduce(run, begun.messages)
    return run


class Parent(NamedTuple):
    """A step of another run from which a run branches."""

    workdir: epath.Path
    step: int


def parent_of(config: Config) -> Parent | None:
    """Return the parent run and step of `branch_from`, if it is set."""
    if not config.branch_from:
        return None
    workdir, step = branch_point(config.branch_from)
    return Parent(epath.Path(workdir), step)


def check_earlier(
    config: Config, workdir: epath.Path, parent: Parent | None, pipeline: Pipeline
) -> list[str]:
    """Raise InputError unless the run can resume, or branch, with this config and this data.

    Returns the settings that differ from the parent run's.
    """
    now = to_dict(config)
    before = complete(read_run_config(workdir, recover=True))
    check_resumable(workdir, before, now, config.samples_after)
    check_data(workdir, pipeline)
    if parent is None:
        return []
    before = complete(read_run_config(parent.workdir))
    differs = check_branch(parent.workdir, before, now, config.samples_after(parent.step))
    if config.stages or before.get("stages"):
        check_stages(config, from_dict(Config, before), parent)
    check_data(parent.workdir, pipeline)
    return differs


def check_stages(config: Config, before: Config, parent: Parent) -> None:
    """Raise InputError unless a branch has the stages that its parent run began before it."""
    stages, begun = config.stages_before(parent.step), before.stages_before(parent.step)
    if stages != begun:
        end = config.schedule_step(config.steps)
        shares = [float(f"{config.schedule_step(step) / end:.6g}") for step in begun]
        raise InputError(
            f"stages: a branch at step {parent.step} of {parent.workdir} must have the stages that "
            f"this run began before it, after the steps {list(begun)}, with the same weights and "
            f"lengths; its own begin after {list(stages)}. Of its {config.steps} steps, these are "
            f"the shares {shares} for stages.*.begin."
        )


def introduce(run: Run, messages: Sequence[str]) -> None:
    """Print what a restored checkpoint says, and the run's size, mesh, first and last step."""
    config, mesh, reports = run.config, run.program.mesh, run.reports
    for line in messages:
        reports.line(line)
    axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
    parameters = count(run.state.params | locked_of(run.state)) / 1e6
    reports.line(
        f"{parameters:.2f}M parameters, {run.pipeline.num_samples:,} samples per epoch, "
        f"mesh {axes} ({jax.devices()[0].device_kind}), {jax.process_count()} process(es)\n"
        f"{'resuming' if run.start else 'training'} from step {run.start} to step {config.end} "
        f"in {run.workdir}"
    )
    text = config.model.text
    if text.stretched_from is not None and not run.start:
        reports.line(
            f"text positions are those of {text.stretched_from} tokens, stretched after the first "
            f"{text.kept_positions}"
        )
    if warning := warn_of_loops(config, mesh):
        reports.line(warning)
    if (warmup := config.optim.warmup_steps) >= config.steps:
        reports.line(
            f"the learning rate does not reach its peak: --optim.warmup-steps is {warmup}, but the "
            f"run has {config.steps} steps; lower it, or train longer."
        )


def warn_of_loops(config: Config, mesh: Mesh) -> str | None:
    """Return a warning for several processes of CPUs that divide parameters, if layers are a loop.

    XLA for CPUs (jax 0.10.2 and 0.12) starts a loop's collectives beside those outside of it, in
    an order of each device's own; Gloo then mixes their data, or ends the run. Devices of one
    process, GPUs and TPUs are not affected.
    """
    vision, text = config.model.vision, config.model.text
    depth = max(getattr(vision, "depth", 1), text.depth)
    divided = mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
    is_affected = jax.process_count() > 1 and jax.default_backend() == "cpu" and divided
    if not is_affected or config.model.unroll >= depth:
        return None
    return (
        "several processes of CPUs can mix up the data of a loop over layers: results may be "
        f"wrong, or the run may end. Set --model.unroll {depth}, or --mesh.fsdp 1 --mesh.tensor 1."
    )


def programs_of(config: Config, program: Program) -> dict[BatchKind, Program]:
    """Return the program of every kind of batch; `program` is that of the config's own recipe."""
    programs = [program]  # kinds of several stages may have the same recipe
    by_kind: dict[BatchKind, Program] = {}
    for kind in config.batches.kinds:
        recipe = config.recipe_of(kind)
        same = [each for each in programs if each.recipe == recipe]
        by_kind[kind] = same[0] if same else Program(recipe, program.mesh)
        programs.append(by_kind[kind])
    return by_kind


def has_begun(config: Config, workdir: epath.Path) -> bool:
    """Return whether a run continues from a checkpoint, its own or its parent run's."""
    return bool(config.branch_from or steps_in(workdir / "checkpoints"))


def check_patches(config: Config, workdir: epath.Path) -> None:
    """Raise InputError for a new run whose image size is no multiple of its patch size."""
    size, patch = config.model.vision.image_size, config.model.vision.patch_size
    is_usual = not (rest := size % patch) or (size, patch) == (384, 14)  # SigLIP's SO400M
    if not is_usual and not has_begun(config, workdir):
        raise InputError(
            f"model.vision.image_size={size} is not a multiple of model.vision.patch_size={patch}: "
            f"the last {rest} pixels would be ignored. Set the size to {size - rest + patch}."
        )


def open_data(config: Config, part: int, parts: int, tower: StoredTower | None = None) -> Pipeline:
    """Open this process's shard of the training data, `part` of `parts`, with the embeddings of the
    stored tower, if there is one."""
    of_kinds = {kind: config.recipe_of(kind).reads() for kind in config.batches.kinds}
    inputs = {name: x for of_kind in of_kinds.values() for name, x in of_kind.items()}
    if tower is not None:
        inputs[tower.name] = tower.reads
    return build(
        config.data,
        config.batches,
        tokenizer=make_tokenizer(config.model.text),
        context_length=config.model.text.context_length,
        process=(part, parts),
        inputs=inputs,
        of_kinds=of_kinds,
    )


def check_data(workdir: epath.Path, pipeline: Pipeline) -> None:
    """Raise InputError if the run in `workdir`, if any, was trained on data with other keys or
    another number of samples. A mixture may have gained members."""
    path = workdir / _DATA
    if not steps_in(workdir / "checkpoints"):
        return  # nothing has been trained
    if not path.exists():
        if processes.is_lead():
            say(
                f"{workdir} has no {_DATA}: resuming without a check that data.source is the data "
                "that the run was trained on."
            )
        return
    advice = "Restore a copy, or delete it to resume without a check of the data."
    recorded = read_json(path, "fingerprints", advice=advice)["fingerprints"]
    if pipeline.fingerprints()[: len(from_dict(list[str], recorded, str(path)))] != recorded:
        raise InputError(
            f"The run in {workdir} was trained on other data: the number of samples or the keys of "
            "data.source have changed. Restore the data, or start a new run in another "
            "--workdir. (To add data to a run, append a mixture member with a later phase.)"
        )


def agree(
    config: Config, workdir: epath.Path, pipeline: Pipeline, evaluations: Evaluations, start: int
) -> None:
    """Write the run's config and data fingerprints. Raises InputError if processes differ in them,
    or after too many starts from this step."""
    data = pipeline.fingerprints()
    facts = {
        "config": to_dict(config),
        "code": f"{processes.code_version()}, parts {parts.version()}, jax {jax.__version__}",
        "data": data,
        "vocabulary": vocabulary.digest(config.model.text.tokenizer),
        "data sets of evaluators": evaluations.measured(),
        "resume step": start,
    }
    check_processes_agree(processes.gather(facts))
    begun = 0
    if processes.is_lead():
        files.write_whole(workdir / "config.json", json.dumps(to_dict(config), indent=1))
        files.write_whole(workdir / _DATA, json.dumps({"fingerprints": data}))
        begun = count_start(workdir / "starts.json", start)
    if processes.gather(begun)[0] > (config.processes.max_starts or math.inf):
        raise InputError(
            f"the last {config.processes.max_starts} starts in {workdir} all began at step {start} "
            "and ended without a new checkpoint; their error messages say why. To try again, "
            "delete starts.json there or raise --processes.max-starts."
        )


def check_processes_agree(facts: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError with the differences unless all processes have the same facts.

    `facts` has one mapping for each process: config, code version, data and resume step.
    """
    for index, other in enumerate(facts):
        if differing := differences(dict(facts[0]), dict(other)):
            raise InputError(
                f"processes 0 and {index} were started differently:\n"
                + "\n".join(f"  {name}: {a} in 0, {b} in {index}" for name, a, b in differing)
                + "\nStart all with the same config, code, data and --workdir, which all must see."
            )


def check_best(config: Config, evaluations: Evaluations) -> None:
    """Raise InputError if no evaluator of the run reports the result `checkpoint.best`."""
    if config.checkpoint.best and config.checkpoint.best_of == "run":
        evaluations.check_gives(config.checkpoint.best)


def branch(config: Config, program: Program, parent: Parent, hashes: dict[str, str]) -> Restored:
    """Restore the parent run's state at a step; the parent's training time is not counted."""
    saved = restore_step(parent.workdir, parent.step, program.state.saved())
    return replace(restore(config, saved, hashes), position={"seconds/steps": 0.0})


def restore_locked(
    program: Program, source: epath.Path, step: int, workdir: epath.Path
) -> FrozenParams:
    """Read the locked towers of a run at a step, for the run in `workdir`, which keeps a copy."""
    if not (shapes := program.locked):
        return {}
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    read = functools.partial(restore_params, source, step, shapes, shardings, ema=False)
    params = processes.together(read, Unusable)
    if source != workdir or not has_locked(workdir):
        write_locked(workdir, params)
    return {LOCKED[0]: {LOCKED[1]: params}}


def record_branch(config: Config, workdir: epath.Path, differs: Sequence[str]) -> None:
    """Write from where a run branches, and which settings differ from the parent run's."""
    if processes.is_lead():
        record = {"from": config.branch_from, "differs": differs}
        files.write_whole(workdir / "branch.json", json.dumps(record, indent=1))


def restore(config: Config, begun: Restored, hashes: dict[str, str]) -> Restored:
    """Raise InputError unless a checkpoint's samples match the config's batch sizes, and its
    frozen weights have these hashes."""
    for name, digest in hashes.items():
        if begun.position.get(name, digest) != digest:
            raise InputError(
                f"the checkpoint of step {begun.step} was trained with other frozen weights, or "
                f"they have changed. Restore them at {_FROZEN[name]}, or choose a new --workdir."
            )
    if begun.position["samples"] != config.samples_after(begun.step):
        raise InputError(
            f"the checkpoint of step {begun.step} has seen {begun.position['samples']} samples, "
            f"which batch_size={config.batch_size} (double_batch_at={config.double_batch_at}, "
            f"lengths={config.lengths}) does not give; use the batch sizes it was trained with, or "
            "another --workdir."
        )
    return begun


# ------------------------------------------------------------------ loop


def loop(run: Run) -> None:
    """Run the remaining steps; report, evaluate and save when it is due."""
    config, timers, reports = run.config, run.timers, run.reports
    batches = run.pipeline.batches(run.start)
    health = Health(run)
    kinds = config.batches.counts(run.start, config.end)
    with contextlib.ExitStack() as stack:
        terminated = stack.enter_context(processes.catch_sigterm())
        stack.push(reports.close)
        stack.push(functools.partial(_close, run.checkpoints))
        stack.callback(batches.close)
        stack.callback(run.profiler.close)
        stack.enter_context(run.watchdog)
        reports.begin()
        described = [f"{kind.describe()}: {n:,} steps" for kind, n in kinds.items()]
        with reports.compiling(described if len(kinds) > 1 else ()):
            for program in dict.fromkeys(run.programs[kind] for kind in kinds):
                program.compile()  # before the first step: one that does not fit fails now
                run.watchdog.beat()
            processes.wait_for_all("compiled", config.processes.watchdog_minutes)
        for step in range(run.start + 1, config.end + 1):
            run.profiler.before(step)
            if step - 1 in config.first_steps:
                begin_stage(run, step - 1)
            kind = config.batches.at(step - 1)
            program = run.programs[kind]
            with timers.measure("input"):
                batch = next(batches)
                arrays = program.put(batch.arrays, config.schedule_step(step - 1))
            reports.skip(step, batch.skipped)
            reports.read(vars(batch.reading) | valid_patches(batch.image))
            run.state, metrics = program.step(run.state, arrays)
            health.follow(step, metrics, batch)
            if run.profiler.after(step, metrics):
                reports.line(f"profile of steps {config.profile_steps} in {run.workdir}/profile")

            last = step == config.end
            stop = run.checkpoints.reached_preemption(step) or terminated()
            saving = stop or last or run.checkpoints.should_save(step)
            reporting = last or step % config.report_every == 0
            evaluating = run.evaluations.due(step)
            if saving or reporting or evaluating:
                numbers = health.check()  # before this step is reported or saved
                if reporting:
                    reports.report(step, numbers)
                results = evaluate(run, step) if evaluating else {}
                if saving or run.checkpoints.is_best(results):
                    save(run, step, results, wait=stop or last)  # before result.json records it
                reports.write_down()
                run.watchdog.beat()
            reports.advance(step)
            if stop:
                raise Preempted(
                    f"stopped by SIGTERM at step {step}, which is saved in {run.workdir}; run the "
                    "same command again to resume."
                )


def begin_stage(run: Run, step: int) -> None:
    """Report the stage that begins after `step`, and initialise what depends on its losses."""
    config = run.config
    if not config.stages:
        return
    kind = config.batches.at(step)
    before = config.batches.at(max(step - 1, 0))
    begin_terms(run, step, config.recipe_of(before).objective)
    weights = ", ".join(f"{x.name} {x.weight:g}" for x in config.recipe_of(kind).objective)
    run.reports.line(
        f"stage {kind.stage} of {len(config.first_steps)} begins after step {step}: {weights}"
    )


def begin_terms(run: Run, step: int, before: Objective) -> None:
    """Initialise what depends on the losses after `step`, if these differ from those before."""
    kind = run.config.batches.at(step)
    if before != run.config.recipe_of(kind).objective:
        run.state = run.programs[kind].begin(run.state, before)
        run.state = replace(run.state, opt_state=with_new_norms(run.state.opt_state))


def evaluate(run: Run, step: int) -> dict[str, float]:
    """Run the evaluators that are due, on the run's own mesh; return their results by name.

    One that fails since the model's embeddings are not finite is reported, and has no results.
    """
    results: dict[str, float] = {}
    with run.timers.measure("evaluation"):
        for values in run.evaluations.run(step, run.encoder, run.workdir / "evals"):
            run.watchdog.beat()
            run.reports.evaluated(step, values)
            results |= {name: x for name, x in values.items() if not isinstance(x, str)}
    check_best(run.config, run.evaluations)
    return results


def save(run: Run, step: int, results: dict[str, float], *, wait: bool) -> None:
    """Save state and data position and write all metrics; with `wait`, until the save is done."""
    samples = run.config.samples_after(step)
    position = {"samples": samples, **run.frozen, **run.reports.position()}
    with run.timers.measure("save"):
        run.checkpoints.save(step, run.state.saved(), position, results)
        if wait:
            run.checkpoints.wait()
    run.reports.flush()


class Health:
    """Checks that the loss is finite, one step behind, so that the device never waits."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._last: tuple[int, dict[str, jax.Array], Batch] | None = None

    def follow(self, step: int, metrics: dict[str, jax.Array], batch: Batch) -> None:
        """Register a step's metrics, which are being computed; check those of the step before."""
        if self._last:
            self.check()
            self._run.watchdog.beat()
        self._last = (step, metrics, batch)

    def check(self) -> dict[str, float]:
        """Wait for the newest step's metrics and return them; Diverged if they are not finite."""
        assert self._last
        step, arrays, batch = self._last
        with self._run.timers.measure("device"):  # the host that waits least is the straggler
            metrics = {name: float(value) for name, value in jax.device_get(arrays).items()}
        in_a_row = int(metrics.get("skipped_in_a_row", 0))
        is_finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        if (is_finite and not in_a_row) or 0 < in_a_row <= MAX_SKIPPED_IN_A_ROW:
            return metrics
        saved = self._run.checkpoints.latest_step()
        raise Diverged(
            f"diverged at step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
            + (f", {in_a_row} updates skipped in a row. " if in_a_row else ". ")
            + f"Samples {batch.index[0]} to {batch.index[-1]}: {', '.join(batch.keys[:8])}, … "
            + (f"The checkpoint of step {saved} is intact." if saved else "Nothing was saved yet.")
            + " Lower --optim.learning-rate, set --optim.clip-norm, or inspect these samples."
        )


def _close(checkpoints: Checkpoints, kind: type[BaseException] | None, *_: object) -> None:
    """Finish saving, except after Ctrl-C or if one of several processes fails alone, since the
    others would not take part."""
    if kind is not None and issubclass(kind, KeyboardInterrupt):
        return
    alone = kind is not None and not issubclass(kind, Preempted | Diverged)
    if not alone or jax.process_count() == 1:
        checkpoints.wait()
        checkpoints.close()


# ------------------------------------------------------------------ end


def end(run: Run) -> dict[str, Any]:
    """Print where the results are, and return them."""
    workdir = run.workdir
    run.reports.line(run.reports.goodput.describe())
    run.reports.line(
        f"done in {duration(run.timers.elapsed())}: metrics.jsonl, result.json, evals/ and "
        f"checkpoints/ are in {workdir}\n"
        f"next: clip-jax evaluate {workdir}, or tensorboard --logdir {workdir}/tensorboard"
    )
    return run.reports.result
