"""The training run, from top to bottom. The math is in step.py, losses/ and models/."""

import contextlib
import functools
import json
import math
import signal
import socket
import statistics
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from clip_jax import processes, sharding
from clip_jax.checkpoint import Checkpoints, count_start
from clip_jax.config import Config, check_processes_agree, check_resumable
from clip_jax.data.pipeline import Batch, build
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.load import starting_params
from clip_jax.metrics import (
    Clock,
    Display,
    Goodput,
    Lines,
    Profiler,
    Writer,
    copy_tree,
    is_local,
    peak_memory,
    replace_text,
)
from clip_jax.models.clip import CLIP, count
from clip_jax.models.serialize import to_dict
from clip_jax.optim import averaged, make_optimizer
from clip_jax.scaling import flops
from clip_jax.scaling.chips import peak_flops
from clip_jax.step import init_state, jit_step, state_shardings

MAX_SKIPPED_IN_A_ROW = 50  # updates skipped (optim.skip_norm_ratio) before the run counts as lost


class Diverged(Exception):
    """The loss or the gradient is no longer a number."""


class Preempted(Exception):
    """SIGTERM came; the state is saved."""


def train(config: Config, workdir: epath.PathLike) -> dict[str, Any]:
    """Train to `config.steps`, going on from the newest checkpoint in `workdir` if there is one.

    `workdir` may be in a bucket (`gs://`). Where there are several processes, all call this alike.
    Returns what `result.json` holds. Raises ValueError for a config that cannot run or does not
    fit the work directory, Diverged for a loss that is not finite, Preempted after SIGTERM.
    """
    clock = Clock()
    workdir = epath.Path(workdir if not is_local(workdir) else Path(workdir).absolute())
    lead = jax.process_index() == 0  # the one process that writes
    processes.keep_compiled(config.compilation_cache, workdir)

    # ---------------------------------------------------------------- mesh, model, data
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(config.batch_size, mesh)
    part, parts = sharding.data_part(mesh)
    model = CLIP(config.model)
    optimizer = make_optimizer(config.optim, config.steps)
    pipeline = build(
        config.data,
        tokenizer=Tokenizer(config.model.text.vocab_size),
        image_size=config.model.vision.image_size,
        context_length=config.model.text.context_length,
        batch_size=config.batch_size,
        process_index=part,
        process_count=parts,
    )
    evaluators = [evaluator.make() for evaluator in config.evals]
    shardings = state_shardings(model, optimizer, mesh)

    # ---------------------------------------------------------------- work directory, agreement
    check_resumable(workdir, config)
    if lead:
        workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint)
    start = checkpoints.latest_step() or 0
    facts = {
        "config": to_dict(config),
        "code": f"{processes.code_version()}, jax {jax.__version__}",
        "data": pipeline.fingerprint(),
        "resume step": start,
    }
    check_processes_agree(processes.gather(facts))
    if lead:
        replace_text(workdir / "config.json", json.dumps(to_dict(config), indent=1))
    begun = count_start(workdir / "starts.json", start) if lead else 0
    if processes.gather(begun)[0] > (config.processes.max_starts or math.inf):
        raise ValueError(
            f"the last {config.processes.max_starts} starts in {workdir} all began at step {start} "
            "and ended without a new checkpoint; their last words say why. To try again, delete "
            "starts.json there or raise --processes.max-starts."
        )

    # ---------------------------------------------------------------- state
    display = Display(config.steps, start, quiet=not lead)
    watchdog = processes.Watchdog(
        config.processes.watchdog_minutes,
        f"The newest checkpoint in {workdir} is intact: the same command goes on from it.",
    )
    init = functools.partial(init_state, model=model, optimizer=optimizer)
    key = jax.random.key(config.seed)
    steps_kept = math.inf  # seconds spent on steps until the checkpoint
    if start:
        with clock.measure("restore"), watchdog:
            shapes = jax.eval_shape(init, key)
            state, position = checkpoints.restore(shapes, shardings, start)
        if position["samples"] != start * config.batch_size:
            raise ValueError(
                f"the checkpoint of step {start} stands at sample {position['samples']}, which "
                f"batch_size={config.batch_size} does not reach; use the batch size it was "
                "trained with, or another --workdir."
            )
        steps_kept = position.get("seconds/steps", math.inf)
    else:
        given = {}
        if config.init_from:
            given = starting_params(config.init_from, config.model, config.init_towers)
        state = jax.jit(init, out_shardings=shardings)(key, given=given)
    step_fn = jit_step(
        model, config.optim, config.steps, config.loss, mesh, shardings,
        accumulation=config.accumulation, seed=config.seed,
    )  # fmt: skip

    # ---------------------------------------------------------------- reports
    writer = Writer(workdir, start) if lead else None
    skipped = Lines(workdir / "skipped.jsonl", start) if lead else None
    skipped_here: list[dict[str, Any]] = []  # since the last report
    profiler = Profiler(config.profile_steps if lead else None, workdir)
    step_flops = flops.training(
        config.model,
        config.batch_size,
        patch_dropout=getattr(config.model.vision, "patch_dropout", 0.0),
        locked=config.optim.locked,
    ).total
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind)
    result = json.loads(text) if (text := _read(workdir / "result.json")) else {}
    goodput = Goodput(clock, result, steps_kept)
    display.line(
        f"{count(state.params) / 1e6:.2f}M parameters, {pipeline.num_samples} samples an epoch, "
        f"mesh {dict(mesh.shape)} of {device.device_kind} on {jax.process_count()} processes, "
        + (f"going on from step {start}" if start else "from the beginning")
        + f" to step {config.steps}, in {workdir}"
    )

    def check_finite(step: int, metrics: dict[str, float], batch: Batch) -> None:
        in_a_row = int(metrics.get("skipped_in_a_row", 0))
        finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        if (finite and not in_a_row) or 0 < in_a_row <= MAX_SKIPPED_IN_A_ROW:
            return
        saved = checkpoints.latest_step()
        raise Diverged(
            f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
            + (f", {in_a_row} updates skipped in a row. " if in_a_row else ". ")
            + f"Samples {batch.index[0]} to {batch.index[-1]}: {', '.join(batch.keys[:8])}, … "
            + (f"The checkpoint of step {saved} is intact." if saved else "Nothing was saved yet.")
            + " Lower --optim.learning-rate, set --optim.clip-norm, or look at these samples."
        )

    def fetch(metrics: dict[str, jax.Array]) -> dict[str, float]:
        with clock.measure("device"):  # waiting for it; a host that never waits holds all back
            return {name: float(value) for name, value in jax.device_get(metrics).items()}

    def report(step: int, metrics: dict[str, float], reported: int) -> None:
        wall, seconds = clock.lap()
        elsewhere = sum(seconds.get(name, 0) for name in ("evaluation", "save", "compile"))
        training = max(wall - elsewhere, 1e-9)
        steps = step - reported - ("compile" in seconds)  # the first step is in "compile"
        images = steps * config.batch_size
        hosts = processes.gather(
            {
                "host": socket.gethostname(),
                "busy": training - seconds.get("device", 0),
                "input": seconds.get("input", 0),
            }
        )
        busy = [host["busy"] for host in hosts]
        values = {
            "samples_seen": step * config.batch_size,
            **metrics,
            "images_per_second": images / training,
            "images_per_second_per_device": images / training / mesh.size,
            "model_flops_per_step": step_flops,
            "input_wait": max(host["input"] for host in hosts) / training,
            "seconds": clock.elapsed(),
            **goodput.values(),
        }
        if len(hosts) > 1:
            slowest = busy.index(max(busy))
            values |= {
                "slowest_process": slowest,
                "slowest_host": hosts[slowest]["host"],
                "slowest_input_wait": hosts[slowest]["input"] / training,
                "busy_seconds_per_step": max(busy) / max(steps, 1),  # the slowest's own work
                "median_busy_seconds_per_step": statistics.median(busy) / max(steps, 1),
            }
        if peak:
            values["mfu"] = step_flops * steps / training / (peak * mesh.size)
        if (bytes_ := peak_memory()) is not None:
            values["peak_memory_bytes"] = bytes_
        display.report(step, values)
        result.update(step=step, samples_seen=values["samples_seen"], loss=metrics["loss"])
        if writer:
            writer.write(step, values)

    def evaluate(step: int) -> None:
        with clock.measure("evaluation"):
            for evaluator in evaluators:
                if step % evaluator.every_steps and step != config.steps:
                    continue
                params = averaged(state.opt_state, state.params)
                values = dict(evaluator.run(model, params, mesh))
                watchdog.beat()
                result.update(values)
                display.line(
                    f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in values.items())
                )
                if writer:
                    writer.write(step, values)

    def save(step: int) -> None:
        with clock.measure("save"):
            kept = {"seconds/steps": goodput.values()["seconds/steps"]}
            checkpoints.save(step, state, {"samples": step * config.batch_size, **kept})

    def write_down() -> None:
        """Bring what was reported to the work directory; all processes at once."""
        rows = [row for rows in processes.gather(skipped_here) for row in rows]
        skipped_here.clear()
        if skipped and rows:
            skipped.write(*sorted(rows, key=lambda row: (row["step"], row["position"])))
        if lead:
            result.update(goodput.values())
            replace_text(workdir / "result.json", json.dumps(result, indent=1))

    # ---------------------------------------------------------------- the loop
    batches = pipeline.batches(start)
    placed = sharding.batch_sharding(mesh)
    last: tuple[int, Any, Batch] | None = None  # one step behind, so that the device never waits
    metrics: dict[str, float] = {}
    reported = start
    clock.total["init"] = clock.elapsed() - clock.total["restore"]
    clock.lap()
    with contextlib.ExitStack() as stack:
        terminated = stack.enter_context(_sigterm())
        if writer and skipped:
            stack.callback(writer.close)
            stack.callback(skipped.flush)
        stack.push(functools.partial(_close, checkpoints))
        stack.callback(batches.close)
        stack.callback(profiler.close)
        stack.callback(display.close)
        stack.enter_context(watchdog)
        for step in range(start + 1, config.steps + 1):
            profiler.before(step)
            with clock.measure("input"):
                batch = next(batches)
                arrays = {
                    name: jax.make_array_from_process_local_data(placed, getattr(batch, name))
                    for name in ("image", "text")
                }
            skipped_here += [{"step": step, **event} for event in batch.skipped]
            if step == start + 1:
                with clock.measure("compile"):
                    state, device_metrics = jax.block_until_ready(step_fn(state, arrays))
            else:
                state, device_metrics = step_fn(state, arrays)
            if last:
                check_finite(last[0], fetch(last[1]), last[2])
                watchdog.beat()
            last = (step, device_metrics, batch)
            if profiler.after(step, device_metrics):
                display.line(f"profile of steps {config.profile_steps} in {workdir}/profile")

            stop = checkpoints.reached_preemption(step) or terminated()
            saving = stop or checkpoints.should_save(step) or step == config.steps
            reporting = step % config.report_every == 0 or step == config.steps
            evaluating = step == config.steps or any(step % e.every_steps == 0 for e in evaluators)
            if saving or reporting or evaluating:
                metrics = fetch(device_metrics)
                check_finite(step, metrics, batch)  # before anything of this step is kept
            if reporting:
                report(step, metrics, reported)
                reported = step
            if evaluating:
                evaluate(step)
            if saving:
                save(step)
                if writer and skipped:  # a checkpoint's numbers are there before it counts
                    writer.flush()
                    skipped.flush()
            if saving or reporting or evaluating:
                write_down()
                watchdog.beat()
            display.advance(step)
            if stop:
                checkpoints.wait()
                raise Preempted(f"stopped by SIGTERM at step {step}, which is saved in {workdir}.")

    # ---------------------------------------------------------------- pictures, last words
    with tempfile.TemporaryDirectory() as scratch:
        for evaluator in evaluators:
            if draw := getattr(evaluator, "draw", None):
                params = averaged(state.opt_state, state.params)
                draw(model, params, mesh, Path(scratch))  # all compute, one keeps
        if lead:
            copy_tree(Path(scratch), workdir / "evals")
    minutes = clock.elapsed() / 60
    display.line(goodput.describe())
    display.line(
        f"done in {minutes:.1f} min: {workdir} (metrics.jsonl, result.json, evals/, checkpoints/). "
        f"Next: clip-jax evaluate {workdir}, or tensorboard --logdir {workdir}/tensorboard"
    )
    return result


def _close(checkpoints: Checkpoints, kind: type[BaseException] | None, *_: object) -> None:
    """Finish writing, except where one of several processes fails alone: the others wait for it."""
    alone = kind is not None and not issubclass(kind, Preempted | Diverged)
    if not alone or jax.process_count() == 1:
        checkpoints.wait()
        checkpoints.close()


def _read(path: epath.Path) -> str | None:
    return path.read_text() if path.exists() else None


@contextlib.contextmanager
def _sigterm() -> Generator[Callable[[], bool]]:
    """Catch SIGTERM for a while; the function given says whether it came.

    Several processes agree through the preemption service instead, which owns the signal there.
    """
    came: list[bool] = []
    if jax.process_count() > 1:
        yield lambda: False
        return
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    except ValueError:  # not the main thread: a notebook's or a test's; nobody signals there
        yield lambda: False
        return
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
