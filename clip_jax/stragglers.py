"""What Orbax's reads and writes say to nobody, when they go on although one beside them failed.

The error that counts is raised where it can be handled. The others' tracebacks come later, from
other threads, from tasks that are collected or from an event loop that is closed.
"""

import contextlib
import functools
import gc
import logging
import sys
import time
import traceback
from collections.abc import Callable, Generator
from typing import Any

from clip_jax import files

_SECONDS = 0.5  # for the reads beside one that has failed


def drop() -> None:
    """Drop what reads and writes beside one that has failed say to nobody, whenever they end."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)
    if getattr(sys.unraisablehook, "func", None) is not _report:
        sys.unraisablehook = functools.partial(_report, sys.unraisablehook)


@contextlib.contextmanager
def only_the_first_error() -> Generator[None]:
    """Keep tracebacks off the terminal of reads that go on when one beside them has failed."""
    log, level = logging.getLogger("asyncio"), logging.getLogger("asyncio").level
    hooks = sys.excepthook, sys.unraisablehook
    log.setLevel(logging.CRITICAL + 1)
    sys.excepthook = sys.unraisablehook = lambda *_: None
    try:
        yield
    except Exception:
        time.sleep(_SECONDS)
        gc.collect()  # a task that nobody has asked complains when it is collected
        raise
    finally:
        log.setLevel(level)
        sys.excepthook, sys.unraisablehook = hooks


def _report(tell: Callable[[Any], object], unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        tell(unraisable)


def _is_news(record: logging.LogRecord) -> bool:
    """Drop Orbax's and asyncio's own tracebacks: of a full disk, which is said in one line, and of
    a read that nobody waits for, since one beside it has failed."""
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, Exception):
        return True
    of_orbax = any(
        "orbax" in x.f_code.co_filename for x, _ in traceback.walk_tb(error.__traceback__)
    )
    return not (files.is_full(error) or (of_orbax and "never retrieved" in record.getMessage()))
