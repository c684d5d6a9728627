"""`clip-jax evaluate RUN --watch`: each checkpoint of a run is evaluated as it is finished.

It runs beside the training, whose files it leaves alone: what it finds is in `evals/watch.jsonl`
of the work directory and in `tensorboard/watch/`, at the end also in `result.json`.
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
from clip_jax.errors import InputError
from clip_jax.evals.evaluator import say
from clip_jax.inference.evaluate import EvaluateConfig, Evaluators, config_of_run, open_encoder
from clip_jax.metrics import Writer
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import read_json, read_rows

POLL_SECONDS = 2.0  # between looking for new checkpoints

Row = dict[str, Any]  # of a step: numbers by name, or why it was `skipped`


def watch(config: EvaluateConfig, clock: Clock = CLOCK) -> dict[str, float]:
    """Evaluate a run's checkpoints, the oldest first, to its last step, or to that of its
    `stop_after`; return the last numbers.

    Every step gets a row in `evals/watch.jsonl` and is not read again after a kill. The row of a
    checkpoint that is damaged, or was deleted before its turn, says why it was skipped; should one
    be there at the next start, or come back, it gets another row, and the last one counts. Raises
    InputError where another watches this run, or its directory is gone. Where there are several
    processes, all call this alike.
    """
    workdir, run = config.model, config_of_run(config.model)
    if run is None or split_name(workdir)[1]:
        raise InputError(
            f"--watch needs a run's work directory, with its config.json; got {workdir}."
        )
    evaluators = Evaluators(config, run)
    with Claim(epath.Path(workdir) / WATCH, "watching") as claim, contextlib.ExitStack() as stack:
        claim.take()
        rows = processes.gather(read_rows(workdir / WATCHED))[0]
        finished = {row.pop("step"): row for row in rows if "skipped" not in row}
        writer = None
        if processes.is_lead():
            writer = Writer(workdir / WATCHED, workdir / "tensorboard" / "watch", None, say)
            stack.callback(writer.close)
            for step, values in finished.items():  # of which a kill may have lost some
                writer.draw(step, values)
        while True:
            end, is_over, steps = processes.gather(_left(workdir, finished))[0]
            if end is None:
                raise InputError(
                    f"{workdir} is gone, or its config.json is: there is no run to watch."
                )
            if steps:
                step = steps[0]
                finished[step] = _evaluate(config, run, evaluators, step)
                if writer:  # the run may delete it from here on
                    writer.write(step, finished[step])
                    writer.flush()
            elif is_over:
                break
            else:
                clock.sleep(POLL_SECONDS)
    last = {name: x for name, x in finished.get(end, {}).items() if name != "skipped"}
    if processes.is_lead():  # the run has written all of its own
        result = read_json(workdir / "result.json") | last
        files.write_whole(workdir / "result.json", json.dumps(result, indent=1))
    return last


def _left(workdir: AnyPath, finished: dict[int, Row]) -> tuple[int | None, bool, list[int]]:
    """Return the step at which the run stops (None: it is gone), whether it has saved that, and the
    steps to be evaluated."""
    run = config_of_run(workdir)  # anew: resumed, it may stop at another step
    steps = steps_in(workdir / "checkpoints")
    for step in [step for step, row in finished.items() if "skipped" in row and step not in steps]:
        del finished[step]  # the run put it aside or deleted it, and may save it anew
    end = run.end if run else None
    is_over = end is not None and max(steps, default=0) >= end
    return end, is_over, [step for step in steps if step not in finished]


def _evaluate(config: EvaluateConfig, run: Config, evaluators: Evaluators, step: int) -> Row:
    """Return a step's numbers, or why it is skipped if its checkpoint cannot be read."""
    workdir = config.model
    try:
        encoder = open_encoder(replace(config, model=files.as_path(f"{workdir}@{step}")), run)
    except Unusable as error:
        is_there = step in steps_in(workdir / "checkpoints")
        why = str(error) if is_there else "it was deleted before its turn."
        say(f"step {step} is skipped: {why}")
        return {"skipped": why}
    output = config.output / str(step) if config.output else None
    values = evaluators.run(encoder, output)
    say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
    return values
