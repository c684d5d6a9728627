"""The training run, from top to bottom. The math is in step.py, losses/ and models/."""

import functools
import json
import math
import signal
from pathlib import Path
from typing import Any

import jax

from clip_jax import sharding
from clip_jax.checkpoint import Checkpoints
from clip_jax.config import Config, check_resumable
from clip_jax.data.pipeline import Batch, build
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.metrics import Clock, Display, Writer, keep_until, peak_memory, replace_text
from clip_jax.models.clip import CLIP, count
from clip_jax.models.serialize import to_dict
from clip_jax.optim import make_optimizer
from clip_jax.scaling import flops
from clip_jax.scaling.chips import peak_flops
from clip_jax.step import init_state, jit_step, state_shardings


class Diverged(Exception):
    """The loss or the gradient is no longer a number."""


class Preempted(Exception):
    """SIGTERM came; the state is saved."""


def train(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Train to `config.steps`, going on from the newest checkpoint in `workdir` if there is one.

    Returns what `result.json` holds. Raises ValueError for a config that cannot run or does not
    fit the work directory, Diverged for a loss that is not finite, Preempted after SIGTERM.
    """
    clock = Clock()
    workdir = Path(workdir).absolute()

    # ---------------------------------------------------------------- mesh, model, data
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(config.batch_size, mesh)
    model = CLIP(config.model)
    optimizer = make_optimizer(config.optim, config.steps)
    pipeline = build(
        config.data,
        tokenizer=Tokenizer(config.model.text.vocab_size),
        image_size=config.model.vision.image_size,
        context_length=config.model.text.context_length,
        batch_size=config.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    evaluators = [evaluator.make() for evaluator in config.evals]
    shardings = state_shardings(model, optimizer, mesh)

    # ---------------------------------------------------------------- work directory, state
    check_resumable(workdir, config)
    lead = jax.process_index() == 0
    if lead:
        workdir.mkdir(parents=True, exist_ok=True)
        replace_text(workdir / "config.json", json.dumps(to_dict(config), indent=1))
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint)
    start = checkpoints.latest_step() or 0
    init = functools.partial(init_state, model=model, optimizer=optimizer)
    key = jax.random.key(config.seed)
    if start:
        shapes = jax.eval_shape(init, key)
        state, position = checkpoints.restore(shapes, shardings, start)
        if position["samples"] != start * config.batch_size:
            raise ValueError(
                f"the checkpoint of step {start} stands at sample {position['samples']}, which "
                f"batch_size={config.batch_size} does not reach; use the batch size it was "
                "trained with, or another --workdir."
            )
    else:
        state = jax.jit(init, out_shardings=shardings)(key)
    step_fn = jit_step(model, config.optim, config.steps, config.loss, mesh, shardings)

    # ---------------------------------------------------------------- reports
    display = Display(config.steps, start)
    writer = Writer(workdir, start) if lead else None
    skipped_path = workdir / "skipped.jsonl"
    keep_until(skipped_path, start)
    step_flops = flops.training(config.model, config.batch_size).total
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind)
    result = json.loads(text) if (text := _read(workdir / "result.json")) else {}
    display.line(
        f"{count(state.params) / 1e6:.2f}M parameters, {pipeline.num_samples} samples an epoch, "
        f"mesh {dict(mesh.shape)} of {device.device_kind}, "
        + (f"going on from step {start}" if start else "from the beginning")
        + f" to step {config.steps}, in {workdir}"
    )

    def check_finite(step: int, metrics: dict[str, float], batch: Batch) -> None:
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            return
        saved = checkpoints.latest_step()
        raise Diverged(
            f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}. "
            f"Samples {batch.index[0]} to {batch.index[-1]}: {', '.join(batch.keys[:8])}, … "
            + (f"The checkpoint of step {saved} is intact." if saved else "Nothing was saved yet.")
            + " Lower --optim.learning-rate, set --optim.clip-norm, or look at these samples."
        )

    def report(step: int, metrics: dict[str, float], reported: int) -> None:
        wall, parts = clock.lap()
        training = max(wall - parts.get("evaluation", 0) - parts.get("save", 0), 1e-9)
        images = (step - reported) * config.batch_size
        values = {
            "samples_seen": step * config.batch_size,
            **metrics,
            "images_per_second": images / training,
            "images_per_second_per_device": images / training / mesh.size,
            "model_flops_per_step": step_flops,
            "input_wait": parts.get("input", 0) / training,
            "seconds": clock.elapsed(),
        }
        if peak:
            rate = step_flops * (step - reported) / training
            values["mfu"] = rate / (peak * mesh.size)
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
                values = dict(evaluator.run(model, state.params, mesh))
                result.update(values)
                display.line(
                    f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in values.items())
                )
                if writer:
                    writer.write(step, values)

    # ---------------------------------------------------------------- the loop
    terminate = _on_sigterm()
    batches = pipeline.batches(start)
    placed = sharding.batch_sharding(mesh)
    last: tuple[int, Any, Batch] | None = None  # one step behind, so that the device never waits
    metrics: dict[str, float] = {}
    reported = start
    clock.lap()
    try:
        for step in range(start + 1, config.steps + 1):
            with clock.measure("input"):
                batch = next(batches)
                arrays = {
                    name: jax.make_array_from_process_local_data(placed, getattr(batch, name))
                    for name in ("image", "text")
                }
            if batch.skipped:
                _append(skipped_path, [{"step": step, **event} for event in batch.skipped])
            state, device_metrics = step_fn(state, arrays)
            if last:
                check_finite(last[0], _fetch(last[1]), last[2])
            last = (step, device_metrics, batch)

            stop = checkpoints.reached_preemption(step) or terminate()
            saving = stop or checkpoints.should_save(step) or step == config.steps
            reporting = step % config.report_every == 0 or step == config.steps
            evaluating = step == config.steps or any(step % e.every_steps == 0 for e in evaluators)
            if saving or reporting or evaluating:
                metrics = _fetch(device_metrics)
                check_finite(step, metrics, batch)  # before anything of this step is kept
            if reporting:
                report(step, metrics, reported)
                reported = step
            if evaluating:
                evaluate(step)
            if saving:
                with clock.measure("save"):
                    checkpoints.save(step, state, {"samples": step * config.batch_size})
            if (reporting or evaluating) and lead:
                replace_text(workdir / "result.json", json.dumps(result, indent=1))
            display.advance(step)
            if stop:
                checkpoints.wait()
                raise Preempted(f"stopped by SIGTERM at step {step}, which is saved in {workdir}.")
    finally:
        display.close()
        batches.close()
        checkpoints.wait()
        checkpoints.close()
        if writer:
            writer.close()

    # ---------------------------------------------------------------- pictures, last words
    for evaluator in evaluators:
        draw = getattr(evaluator, "draw", None)
        if lead and draw:
            draw(model, state.params, mesh, workdir / "evals")
    minutes = clock.elapsed() / 60
    display.line(
        f"done in {minutes:.1f} min: {workdir} (metrics.jsonl, result.json, evals/, checkpoints/). "
        f"Next: clip-jax evaluate {workdir}, or tensorboard --logdir {workdir}/tensorboard"
    )
    return result


def _fetch(metrics: dict[str, jax.Array]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(metrics).items()}


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def _on_sigterm() -> Any:
    """Catch SIGTERM; the returned function says whether it came.

    Several processes agree through the preemption service instead, which owns the signal there.
    """
    if jax.process_count() > 1:
        return lambda: False
    came = []
    try:
        signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    except ValueError:  # not the main thread: a notebook's or a test's; nobody signals there
        return lambda: False
    return lambda: bool(came)
