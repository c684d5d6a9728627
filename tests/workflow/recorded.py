"""The command line, noting which samples each process trains on.

TROUBLE=1:5:raise makes process 1 fail when it has read the batch of step 5. It may also `hang`
there, until its watchdog comes after that of process 0, or say so and wait: to be killed (`kill`,
when the checkpoint that is being saved is complete), for an `interrupt`, or until JAX has shown it
the `notice` that a process will be preempted.
"""

import functools
import json
import os
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax._src import distributed

from clip_jax import processes
from clip_jax.checkpoints.manager import Checkpoints
from clip_jax.cli.commands import main
from clip_jax.data.pipeline import Batch, Pipeline
from tests.clock import HandClock


def recorded(self: Pipeline, start_step: int = 0, *others: Any) -> Generator[Batch]:
    process, step, what = os.environ.get("TROUBLE", "-1:0:").split(":")
    index, workdir = jax.process_index(), Path(sys.argv[sys.argv.index("--workdir") + 1])
    with (workdir / f"samples-{index}.jsonl").open("a") as file:
        for number, batch in enumerate(PLAIN(self, start_step, *others), start=start_step + 1):
            if number == int(step) and what == "hang" and index == 0:
                CLOCK.advance(HOURS)  # this process notices first
                coordinator().blocking_key_value_get(KEYS["hang"], 600_000)
            elif number == int(step) and index == int(process):
                trouble(what)
            row = {"step": number, "processes": jax.process_count(), "keys": batch.keys}
            print(json.dumps(row | {"index": batch.index.tolist()}), file=file, flush=True)
            yield batch


def trouble(what: str) -> None:
    if what == "kill":
        MANAGERS[-1].wait()
    print(f"trouble: {what}", flush=True)
    if what == "raise":
        raise RuntimeError("the disk of this host is on fire")
    if what in KEYS:
        coordinator().blocking_key_value_get(KEYS[what], 600_000)
    if what in ("hang", "kill", "interrupt"):
        CLOCK.advance(HOURS if what == "hang" else 0)
        threading.Event().wait()


def saving(self: Checkpoints, *args: Any) -> None:
    MANAGERS.append(self)
    SAVE(self, *args)


def leaving(code: int, seconds: float = 10) -> int:
    """Tell the others that this process has said all, and leave."""
    if processes.is_lead():
        coordinator().key_value_set(KEYS["hang"], "")
    return LEAVE(code, seconds)


def coordinator() -> Any:
    return distributed.global_state.client


PLAIN, SAVE, LEAVE = Pipeline.batches, Checkpoints.save, processes.leave
MANAGERS: list[Checkpoints] = []  # that have saved
CLOCK, HOURS = HandClock(), 36_000
# Keys of JAX's coordination service that are waited for; the first is its own.
KEYS = {"notice": "RECEIVED_PREEMPTION_NOTICE", "hang": "the first process leaves"}

if __name__ == "__main__":
    with (
        mock.patch.object(Pipeline, "batches", autospec=True, side_effect=recorded),
        mock.patch.object(Checkpoints, "save", autospec=True, side_effect=saving),
        mock.patch.object(processes, "leave", autospec=True, side_effect=leaving),
        mock.patch.object(
            processes, "Watchdog", functools.partial(processes.Watchdog, clock=CLOCK)
        ),
    ):
        sys.exit(main())
