"""Settings that may change when a run resumes or when another run branches from it.

Runs are compared by their configs as dicts: `before` is the earlier run's, with every field of
today, and `now` the new one's.
"""

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import Any

from clip_jax.checkpoints.retention import steps_in
from clip_jax.errors import InputError
from clip_jax.storage.files import AnyPath

SamplesAfter = Callable[[int], int]  # number of pairs that a run sees in its first steps

# Settings that may change when a run resumes: they alter no update.
RESUMABLE = (
    *("stop_after", "mesh", "accumulation", "checkpoint", "processes", "evals", "report_every"),
    "text_lengths",
    *("profile_steps", "compilation_cache", "wandb_project"),
    *("data.workers", "data.threads", "data.prefetch", "data.read_ahead_mib"),
    *("model.attention", "model.remat", "model.unroll", "objective.*.chunk_size"),
    *("model.text.kept_positions", "model.text.stretched_from"),  # what was done before step 1
    "objective.*.teachers.*.weights",  # a checkpoint has the hash of the weights themselves
    "*.import",  # what `--import` was passed for a user's part: a file may have moved
)
# Settings that a branch may change, too: no earlier update depends on them.
BRANCHABLE = (
    *("steps", "optim.schedule", "optim.final_learning_rate", "branch_from"),
    "double_batch_at",  # later than the branch: the number of pairs seen there is checked
    *("lengths", "stages", "objective.*.weight"),
)
_ENDLESS = ("Constant", "InverseSqrt")  # schedules that do not depend on the run's last step


def check_resumable(
    workdir: AnyPath, before: dict[str, Any], now: dict[str, Any], samples_after: SamplesAfter
) -> None:
    """Raise InputError unless the run in `workdir` may resume with the config `now`.

    Without a run there, `before` is empty. A run may become longer if its schedule has no end, and
    no stage that begins at a share of it.
    """
    is_longer = before.get("steps", math.inf) <= now["steps"]
    is_endless = now["optim"]["schedule"]["type"] in _ENDLESS and not now["stages"]
    allowed = (*RESUMABLE, "steps") if is_longer and is_endless else RESUMABLE
    if now.get("lora") or now.get("stored"):
        allowed += ("init_from",)  # checkpoints have the weights' hash
    samples = samples_after(max(steps_in(workdir / "checkpoints"), default=0))
    if before and (lines := _differing(workdir, before, now, allowed, samples)):
        raise InputError(
            f"{workdir} holds a run with another config:\n" + "\n".join(lines) + "\n"
            "Use the same values to resume it, or another --workdir to start a new run."
        )


def branch_point(text: str) -> tuple[str, int]:
    """Parse RUN@STEP: a run directory and the step of one of its checkpoints."""
    run, at, step = text.rpartition("@")
    if not (at and run and step.isdecimal() and int(step)):
        raise InputError(
            f"branch_from={text!r} must be RUN@STEP, a run directory and the step of one of its "
            "checkpoints, such as runs/parent@20000."
        )
    return run, int(step)


def check_branch(
    parent: AnyPath, before: dict[str, Any], now: dict[str, Any], samples: int
) -> list[str]:
    """List the settings of a branch that differ from its parent run, which had seen `samples`.

    Raises InputError for those that may not differ.
    """
    if not before:
        raise InputError(f"branch_from: {parent} is no run directory, as it has no config.json.")
    if lines := _differing(parent, before, now, RESUMABLE + BRANCHABLE, samples):
        raise InputError(
            f"a branch of {parent} cannot differ from it in:\n" + "\n".join(lines) + "\n"
            "Use the same values. To begin with its weights alone, use --init-from."
        )
    return [line.strip() for line in _differing(parent, before, now, RESUMABLE)]


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """List the fields in which two configs, as dicts, differ, with both values."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = ({str(i): x for i, x in enumerate(values)} for values in (old, new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [(prefix, old, new)]
    return [
        each
        for name in dict.fromkeys([*old, *new])
        for each in differences(
            old.get(name), new.get(name), f"{prefix}.{name}" if prefix else name
        )
    ]


def _differing(
    workdir: AnyPath,
    before: dict[str, Any],
    now: dict[str, Any],
    allowed: Sequence[str],
    samples: int | None = None,
) -> list[str]:
    """List the settings that differ, except for those allowed and for members of a mixture that
    are read after the first `samples`."""
    data = dict(before.get("data", {}))
    if "auto" in (data.get("order"), now["data"]["order"]):  # a ladder's run that never began
        data["order"] = now["data"]["order"]
    if samples is not None and _begin_alike(data.get("source"), now["data"]["source"], samples):
        data["source"] = now["data"]["source"]
    return [
        f"  {name}: {old} in {workdir / 'config.json'}, {new} given"
        for name, old, new in differences(before | {"data": data}, now)
        if not any(fnmatch(name, some) or name.startswith(some + ".") for some in allowed)
    ]


def _begin_alike(old: Any, new: Any, samples: int) -> bool:
    """Say whether two sources are mixtures with the same first `samples`: members were added at the
    end, and are first read in a later phase."""
    if not (old and "members" in old and "members" in new):
        return False
    members, phases = len(old["members"]), len(old["phases"])
    added = [0.0] * (len(new["members"]) - members)
    padded = [x | {"weights": [*x["weights"], *added]} for x in old["phases"]]
    return (
        new["members"][:members] == old["members"]
        and [x["weight"] for x in new["members"][members:]] == added
        and new["phases"][:phases] == padded
        and all(x["from_sample"] >= samples for x in new["phases"][phases:])
    )
