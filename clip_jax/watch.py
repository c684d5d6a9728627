"""`clip-jax evaluate RUN --watch`: each checkpoint of a run is evaluated as it is finished.

It runs beside the training, whose files it leaves alone: what it finds is in `evals/watch.jsonl`
of the work directory and in `tensorboard/watch/`, at the end also in `result.json`.
"""

import contextlib
import json
import time
from collections.abc import Generator
from dataclasses import replace

from etils import epath

from clip_jax import files, processes
from clip_jax.config import Config
from clip_jax.evals.tasks import say
from clip_jax.evaluate import EvaluateConfig, Measures, open_encoder, run_of
from clip_jax.files import Place
from clip_jax.metrics import Writer
from clip_jax.refused import Refused
from clip_jax.retention import WATCH, WATCHED, reading, split_name, steps_in
from clip_jax.workdir import LEASE_SECONDS, Claim, read_json, read_rows

POLL_SECONDS = 2.0  # between looking for new checkpoints

Results = dict[str, float]  # of a step; none, where it is left out
Found = dict[int, Results]


def watch(config: EvaluateConfig) -> dict[str, float]:
    """Evaluate a run's checkpoints, the oldest first, until it has ended; return the last numbers.

    What was found before a kill stays and is not measured again. A checkpoint that is damaged, or
    deleted before its turn, is named and left out. Refused where another watches this run. Where
    there are several processes, all call this alike.
    """
    workdir, run = config.model, run_of(config.model)
    if run is None or split_name(workdir)[1]:
        raise Refused(f"--watch needs a run's work directory, with its config.json; got {workdir}.")
    measures = Measures(config, run)
    with Claim(epath.Path(workdir) / WATCH, "watching") as claim:
        claim.take()
        rows = processes.gather(read_rows(workdir / WATCHED))[0]
        found: Found = {row.pop("step"): row for row in rows}
        writer = _writer(workdir, found) if processes.is_lead() else None
        ended = float("inf")
        while True:
            is_over, steps = processes.gather(_left(workdir, run, found))[0]
            if is_over and not steps:
                break
            if is_over:  # but for what it deletes after its last step
                ended = min(ended, time.monotonic())
            for step in steps:
                with _held(workdir, step, time.monotonic() > ended + LEASE_SECONDS) as held:
                    if held:
                        found[step] = _evaluate(config, run, measures, step)
                        if writer and found[step]:  # before the run may delete it
                            writer.write(step, found[step])
                            writer.flush()
                        break
            else:
                time.sleep(POLL_SECONDS)
        if writer:
            writer.close()
    last = found.get(run.steps, {})
    if processes.is_lead():  # the run has written all of its own
        result = read_json(workdir / "result.json") | last
        files.write_whole(workdir / "result.json", json.dumps(result, indent=1))
    return last


def _writer(workdir: Place, found: Found) -> Writer:
    writer = Writer(workdir / WATCHED, workdir / "tensorboard" / "watch", None, say)
    for step, values in found.items():  # of which a kill may have lost some
        writer.draw(step, values)
    return writer


def _left(workdir: Place, run: Config, found: Found) -> tuple[bool, list[int]]:
    """Say whether the run has saved its last step, and which steps are to be evaluated."""
    steps = steps_in(workdir / "checkpoints")
    return run.steps in steps, [step for step in steps if step not in found]


@contextlib.contextmanager
def _held(workdir: Place, step: int, is_over: bool) -> Generator[bool]:
    """Keep the run from deleting a step; False where it is about to, or has."""
    with contextlib.ExitStack() as stack:
        held = False
        if processes.is_lead():
            held = stack.enter_context(reading(workdir, step, over=is_over))
        yield processes.gather(held)[0]


def _evaluate(config: EvaluateConfig, run: Config, measures: Measures, step: int) -> Results:
    """Return what is found of a step; nothing, if its checkpoint cannot be read."""
    workdir, encoder, why = config.model, None, ""
    try:
        encoder = open_encoder(replace(config, model=files.place(f"{workdir}@{step}")), run)
    except Refused as error:
        why = str(error)
    if why := next(filter(None, processes.gather(why)), ""):
        is_gone = step not in steps_in(workdir / "checkpoints")
        say(f"step {step} is left out: {'it was deleted before its turn.' if is_gone else why}")
        return {}
    assert encoder
    output = config.output / str(step) if config.output else None
    values = measures.of(encoder, output)
    say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
    return values
