"""Shards: which one contains a row, and what to report if some cannot be read."""

import functools
import logging
from collections.abc import Iterable
from typing import Literal

import numpy as np

from clip_jax.errors import InputError

BadShards = Literal["error", "skip"]

_SHOWN = 5

_log = logging.getLogger(__name__)
warn_once = functools.cache(_log.warning)  # logs the same message once in a process


class Places:
    """Finds the rows of a source, which are those of its shards, one shard after the other."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self._ends = np.cumsum(list(sizes), dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def find(self, index: int) -> tuple[int, int]:
        """Return the number of the shard, and of the row in it."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)


def listed(names: Iterable[str]) -> str:
    """Join the first few of many names for a message."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def settle(pattern: str, shards: list[str], what: str, bad_shards: BadShards) -> None:
    """Raise InputError, or warn, that shards (with the reason, if any) cannot be read."""
    if not shards:
        return
    message = f"{len(shards)} shards of {pattern} are {what}: {listed(shards)}"
    if bad_shards == "error":
        raise InputError(f"{message}. Repair them, or leave them out with bad_shards=skip")
    _log.warning("%s; skipped", message)
