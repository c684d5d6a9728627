"""Run many tasks of one kind in threads of this process or on a Ray cluster.

Work is a function of a task and of a wrapper for its indices that counts them. It reads and writes
files; each is written atomically and depends on the task alone. So a task may run twice, because
its node was thought dead or after a restart. Work returns a line to print, or None.
"""

import contextlib
import functools
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Literal

from clip_jax.display import Display, say
from clip_jax.errors import InputError, needing
from clip_jax.storage.errors import Unreachable

On = Literal["here", "ray"]
Counted = Callable[[Iterable[int]], Iterator[int]]
Work = Callable[[Any, Counted], str | None]

_STEP = 64  # samples between movements of the progress bar
_RETRIES = 20  # after the death of a worker or node; limited, since the task may be the cause
_AHEAD = 10_000  # tasks submitted to Ray at once


class _Stopped(Exception):
    """Another thread failed, or Ctrl-C was pressed."""


class Here:
    """Threads of this process; only one if the work has a model, which uses all devices."""

    def __init__(self, threads: int = 0) -> None:
        """0 threads: one per core."""
        self._threads = threads or os.cpu_count()

    def run(
        self, name: str, work: Work, tasks: Sequence[tuple[Any, int]], *, model: bool = False
    ) -> None:
        """Run all tasks, each with its number of samples.

        `model` says that the work keeps a model on an accelerator between tasks. An error or
        Ctrl-C stops all tasks at their next sample.
        """
        if not tasks:
            return
        stop = threading.Event()
        display = Display(name, sum(size for _, size in tasks))

        def counted(indices: Iterable[int]) -> Iterator[int]:
            done = 0
            for index in indices:
                if stop.is_set():
                    raise _Stopped
                yield index
                done += 1
                if done % _STEP == 0:
                    display.add(_STEP)
            display.add(done % _STEP)

        def stopping(task: Any) -> str | None:
            # Stops the others here: the thread may begin its next task before `run` sees the error.
            if stop.is_set():
                raise _Stopped
            try:
                return work(task, counted)
            except BaseException:
                stop.set()
                raise

        with display, ThreadPoolExecutor(1 if model else self._threads) as threads:
            futures = [threads.submit(stopping, task) for task, _ in tasks]
            try:
                for future in as_completed(futures):
                    with contextlib.suppress(_Stopped):  # the error itself is in another future
                        _show(future.result())
            except BaseException:
                stop.set()
                threads.shutdown(cancel_futures=True)
                raise


class OnRay:
    """Ray's nodes: of RAY_ADDRESS, of a cluster that `ray start` began here, or a new local one.

    A task takes one core. Work with a model gets an actor for each GPU and each TPU host, or for
    each node if there are neither. Tasks of workers and nodes that die are rerun elsewhere.
    """

    def __init__(self, ray: Any) -> None:
        """`ray` is the module, already connected."""
        self._ray = ray

    def run(
        self, name: str, work: Work, tasks: Sequence[tuple[Any, int]], *, model: bool = False
    ) -> None:
        """See `Here.run`. An error cancels the tasks that have not begun."""
        if not tasks:
            return
        ray, work = self._ray, self._ray.put(functools.partial(_in_folder, os.getcwd(), work))
        actors = self._actors() if model else []
        call = ray.remote(num_cpus=1, max_retries=_RETRIES)(_call)
        free = deque([actor.call for actor in actors] or [call] * _AHEAD)
        waiting, left = deque(range(len(tasks))), dict.fromkeys(range(len(tasks)))
        running, begun = {}, Counter()

        def following() -> int | None:
            if waiting:
                return waiting.popleft()
            # An actor may be lost or slow: idle actors start the remaining tasks a second time
            # (backup tasks as in MapReduce, OSDI 2004, section 3.6).
            return next((task for task in left if begun[task] == 1), None) if actors else None

        with Display(name, sum(size for _, size in tasks)) as display:
            try:
                while left:
                    while free and (task := following()) is not None:
                        at = free.popleft()
                        running[at.remote(work, tasks[task][0])] = task, at
                        begun[task] += 1
                    (done,), _ = ray.wait(list(running), num_returns=1)
                    task, at = running.pop(done)
                    free.append(at)
                    if task in left:
                        _show(ray.get(done))
                        del left[task]
                        display.add(tasks[task][1])
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, InputError | Unreachable):
                    raise error.cause from error
                raise
            finally:
                for reference in running if not actors else ():
                    ray.cancel(reference)
                for actor in actors:
                    ray.kill(actor)

    def _actors(self) -> list[Any]:
        """Start an actor for each accelerator, or for each node if there are none."""
        kind = self._ray.remote(max_restarts=-1, max_task_retries=_RETRIES)(_Holder)
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        requests: list[dict[str, Any]] = [
            {"num_gpus": 1} for node in nodes for _ in range(int(node.get("GPU", 0)))
        ]
        requests += [{"resources": {"TPU": node["TPU"]}} for node in nodes if node.get("TPU")]
        requests = requests or [
            {"scheduling_strategy": "SPREAD"} for node in nodes if node.get("CPU")
        ]
        return [kind.options(num_cpus=1, **options).remote() for options in requests]


def _in_folder(folder: str, work: Work, task: Any) -> str | None:
    """Do a task in the caller's folder, if the node has it, so that relative paths are valid."""
    with contextlib.suppress(OSError):
        os.chdir(folder)
    return work(task, iter)


def _call(work: Callable[[Any], str | None], task: Any) -> str | None:
    return work(task)


class _Holder:
    """An actor: a process that keeps what the work caches, such as a model."""

    def call(self, work: Callable[[Any], str | None], task: Any) -> str | None:
        return work(task)


def _show(line: str | None) -> None:
    if line:
        say(line)


Runner = Here | OnRay


@contextlib.contextmanager
def runner(on: On, threads: int = 0) -> Generator[Runner]:
    """Yield a runner of tasks in this process or on Ray; release its workers at the end."""
    if on == "here":
        yield Here(threads)
        return
    with needing("--on ray needs Ray: pip install 'clip-jax-pods[ray]'"):
        import ray
    with contextlib.ExitStack() as stack:
        # Ray reports failures on standard output, which is reserved for the result.
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if not ray.is_initialized():
            try:
                ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False)
            except ConnectionError as error:
                where = os.environ.get("RAY_ADDRESS") or "the cluster of `ray start`"
                raise InputError(
                    f"no Ray at {where}: {error}. Start it there, or change or unset RAY_ADDRESS."
                ) from error
            stack.callback(ray.shutdown)
        yield OnRay(ray)
