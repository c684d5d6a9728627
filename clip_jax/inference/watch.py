"""`clip-jax evaluate RUN --watch`: evaluate each checkpoint of a run as soon as it is saved.

It runs beside training and changes none of its files: metrics go to `evals/watch.jsonl` of the run
directory and to `tensorboard/watch/`, at the end also to `result.json`.
"""

import contextlib
import json
from dataclasses import replace
from typing import Any

from etils import epath

from clip_jax import processes
from clip_jax.checkpoints.claim import Claim
from clip_jax.checkpoints.retention import WATCH, WATCHED, Unusable, split_name, steps_in
from clip_jax.clock import CLOCK, Clock
from clip_jax.config import Config
from clip_jax.display import results
from clip_jax.errors import InputError
from clip_jax.evals.ranks import NotFinite
from clip_jax.inference.evaluate import EvaluateConfig, Evaluators, config_of_run, open_encoder
from clip_jax.metrics.tracking import Writer
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import read_json, read_rows

POLL_SECONDS = 2.0  # interval of looking for new checkpoints

Row = dict[str, Any]  # metrics of a step by name, or why it was `skipped` or `failed`


def watch(config: EvaluateConfig, clock: Clock = CLOCK) -> dict[str, float | int]:
    """Evaluate a run's checkpoints, oldest first, up to its last step or `stop_after`.

    Returns the last metrics. Every step gets a row in `evals/watch.jsonl` and is not evaluated
    again after a restart. The row of a damaged or deleted checkpoint says why it was skipped; if
    one is there at the next start or reappears, it gets another row, and the last row counts. The
    row of a model whose embeddings are not finite says why it failed.
    Raises InputError if another process watches the run, or its directory is gone. In a
    multi-process run, all processes call this.
    """
    workdir, run = config.model, config_of_run(config.model)
    if run is None or split_name(workdir)[1]:
        raise InputError(
            f"--watch needs a run directory with a readable config.json, got {workdir}."
        )
    evaluators = Evaluators(config, run)
    with Claim(epath.Path(workdir) / WATCH, "watching") as claim, contextlib.ExitStack() as stack:
        claim.take()
        rows = processes.gather(read_rows(workdir / WATCHED))[0]
        finished = {row.pop("step"): row for row in rows if "skipped" not in row}
        writer = None
        if processes.is_lead():
            writer = Writer(workdir / WATCHED, workdir / "tensorboard" / "watch", None)
            stack.callback(writer.close)
            for step, values in finished.items():  # a kill may have lost some
                writer.draw(step, values)
        while True:
            end, is_over, steps = processes.gather(_left(workdir, finished))[0]
            if end is None:
                raise InputError(
                    f"{workdir} or its config.json is gone; bring it back to watch the run."
                )
            if steps:
                step = steps[0]
                finished[step] = _evaluate(config, run, evaluators, step)
                if writer:  # then the run may delete the checkpoint
                    writer.write(step, finished[step])
                    writer.flush()
            elif is_over:
                break
            else:
                clock.sleep(POLL_SECONDS)
    last = finished.get(end, {})
    last = {name: x for name, x in last.items() if name not in ("skipped", "failed")}
    if processes.is_lead():  # the run has written its own metrics
        result = {"step": end, "samples_seen": run.samples_after(end)}
        result |= read_json(workdir / "result.json")
        if result["step"] == end:
            files.write_whole(workdir / "result.json", json.dumps(result | last, indent=1))
        else:
            processes.say_once(
                f"result.json is of step {result['step']}, so only {WATCHED} has step {end}."
            )
    return last


def _left(workdir: AnyPath, finished: dict[int, Row]) -> tuple[int | None, bool, list[int]]:
    """Return the run's last step (None: it is gone), whether it is saved, and steps to evaluate."""
    run = config_of_run(workdir)  # read again: a resumed run may stop at another step
    steps = steps_in(workdir / "checkpoints")
    for step in [step for step, row in finished.items() if "skipped" in row and step not in steps]:
        del finished[step]  # the run moved or deleted it, and may save it again
    end = run.end if run else None
    is_over = end is not None and max(steps, default=0) >= end
    return end, is_over, [step for step in steps if step not in finished]


def _evaluate(config: EvaluateConfig, run: Config, evaluators: Evaluators, step: int) -> Row:
    """Return a step's metrics, or why it is skipped if its checkpoint cannot be read, or why it
    failed if its embeddings are not finite."""
    workdir = config.model
    try:
        encoder = open_encoder(replace(config, model=files.as_path(f"{workdir}@{step}")), run)
    except Unusable as error:
        is_there = step in steps_in(workdir / "checkpoints")
        why = str(error) if is_there else "it was deleted before its turn."
        processes.say_once(f"step {step} is skipped: {why}")
        return {"skipped": why}
    output = config.output / str(step) if config.output else None
    try:
        values: Row = evaluators.run(encoder, output)
    except NotFinite as error:
        values = {"failed": str(error)}
    processes.say_once(results(step, values))
    return values
