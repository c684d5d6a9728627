"""Runs of several processes: how they connect, agree, detect a dead process, and exit."""

import contextlib
import faulthandler
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from clip_jax.clock import CLOCK, Clock
from clip_jax.display import say
from clip_jax.errors import InputError, check_ranges
from clip_jax.storage import files

# Compiler options beyond the defaults. Flags in the environment take precedence.
TPU_OPTIONS = {
    # Under `fsdp` the parameters of the next layer are gathered while this one computes: the
    # gathers become asynchronous and are fused with the matmuls beside them.
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    # Gather a weight before its matmul. With 32 shards, XLA would divide the matmul into one for
    # each shard, whose few rows leave half of the matrix unit idle.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    # The tensor core goes on while a collective is under way.
    "xla_tpu_overlap_compute_collective_tc": "true",
    # Meant to sum the gradients of one layer, whatever their sizes, while the backward pass of the
    # next runs. In steps compiled for v5e (libtpu 0.0.42), all-reduces and reduce-scatters stop the
    # compute: `fsdp` shortens them. The options for asynchronous all-reduces need those of a layer
    # to stay apart (xla_jf_crs_combiner_threshold_in_bytes), and exceed the VMEM of a v4.
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    # A 7x may keep 16 rows of bfloat16 in a tile; blocks of the short attention kernel have eight.
    "xla_tpu_control_large_2nd_minor_layout_for_x16": "false",
}
GPU_OPTIONS = {  # booleans, where the TPU's options take strings
    # Schedules collectives early and waits for them late. Off by default.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # In the scan over layers, the next layer's gather may run beside this layer.
    "xla_gpu_enable_while_loop_double_buffering": True,
}
CPU_FLAGS = {  # set in XLA_FLAGS for simulated devices and for several processes
    # One order for the collectives of a step. Otherwise (jax 0.10, not 0.12) each device starts
    # them as they become ready, and on a busy machine the devices of a 2 × 2 × 2 mesh soon
    # deadlock.
    "xla_cpu_enable_concurrency_optimized_scheduler": "false",
}

# What the collectives of CPUs (Gloo) and GPUs (NCCL), and JAX's barriers, say without a process.
_LOST = re.compile("by peer|Broken pipe|remote process exited|Socket closed|unhealthy")

_EXPLICIT = ("CLIP_JAX_COORDINATOR", "CLIP_JAX_PROCESS_COUNT", "CLIP_JAX_PROCESS_INDEX")


@dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """When to end a run that cannot continue. The environment defines its processes."""

    heartbeat_seconds: int = 40  # Seconds without a sign of life from one process before all exit.
    # Minutes without progress before the run prints every thread's stack and exits with code 1.
    watchdog_minutes: float = 30.0
    # Starts in a row without a new checkpoint before exit code 2; None: no limit.
    max_starts: int | None = None

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "processes.",
            heartbeat_seconds="[5, 86400]",
            watchdog_minutes="(0, 525600]",
            max_starts="[1, inf)",
        )


def start(config: ProcessesConfig) -> None:
    """Connect to the run's other processes, if there are any. Call it before any computation.

    Cloud TPU, GKE and Slurm (in a step of several tasks) are detected. Elsewhere set the variables
    CLIP_JAX_COORDINATOR (host:port of process 0), CLIP_JAX_PROCESS_COUNT, CLIP_JAX_PROCESS_INDEX,
    as `launch/local.py` does. Raises InputError if only some of the three are set, or if JAX has
    computed already.
    """
    _set_flags()
    explicit = {name: os.environ.get(name, "") for name in _EXPLICIT}
    timeouts: dict[str, Any] = {
        "heartbeat_timeout_seconds": config.heartbeat_seconds,
        "shutdown_timeout_seconds": 60,
    }
    if any(explicit.values()):
        if missing := [name for name, value in explicit.items() if not value]:
            variables = ", ".join(f"{k}={v}" for k, v in explicit.items() if v)
            raise InputError(
                f"the environment has {variables} without {' and '.join(missing)}; set all or none."
            )
        address, count, index = explicit.values()
        _connect(address, int(count), int(index), cluster_detection_method="deactivate", **timeouts)
    elif _surrounded():
        _connect(**timeouts)


def _connect(*args: Any, **options: Any) -> None:
    try:
        jax.distributed.initialize(*args, **options)
    except RuntimeError as error:
        if "before any JAX calls" not in str(error):
            raise
        raise InputError(
            "JAX has computed before the run's processes are connected. Leave out computation from "
            "the config file and from modules of --import, such as clip_jax.load; "
            "--init-architecture takes the architecture of trained weights."
        ) from error


def compiler_options(platform: str) -> dict[str, str | bool]:
    """Return the compiler options of training steps and evaluations on a platform, for jax.jit."""
    options = {"tpu": TPU_OPTIONS, "gpu": GPU_OPTIONS, "cuda": GPU_OPTIONS}.get(platform, {})
    flags = os.environ.get("LIBTPU_INIT_ARGS", "") + os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in flags}


def _set_flags() -> None:
    """Add our flags to the environment, before JAX reads it."""
    several = (
        int(os.environ.get("JAX_NUM_CPU_DEVICES") or 1) > 1
        or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
        or os.environ.get(_EXPLICIT[0])
    )
    if several and os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        ours = [f"--{name}={value}" for name, value in CPU_FLAGS.items() if name not in flags]
        os.environ["XLA_FLAGS"] = " ".join([*ours, flags]).strip()


def _surrounded() -> bool:
    """Say whether this process runs on a cluster on which JAX can discover the others."""
    environment = os.environ
    if int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return True
    if "cpu" in environment.get("JAX_PLATFORMS", ""):
        return False
    if environment.get("TPU_WORKER_HOSTNAMES") or environment.get("TPU_PROCESS_ADDRESSES"):
        return True  # GKE
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and "TPU_SKIP_MDS_QUERY" not in environment  # a Cloud TPU VM


class Position(NamedTuple):
    """Which of the processes that work together this one is."""

    name: str = ""  # of all of them together
    index: int = 0
    count: int = 1


def position(environment: Mapping[str, str] = os.environ) -> Position:
    """Return a name of this process's run, its index and the number of processes, before `start`.

    Position() without a cluster in the environment, as on Cloud TPU VMs, where JAX asks a server.
    """

    def number(name: str, default: int) -> int:
        return int(environment.get(name) or default)

    if environment.get("CLIP_JAX_COORDINATOR"):
        name, index = environment["CLIP_JAX_COORDINATOR"], number("CLIP_JAX_PROCESS_INDEX", 0)
        count = number("CLIP_JAX_PROCESS_COUNT", 1)
    elif (count := number("SLURM_STEP_NUM_TASKS", 1)) > 1:
        name, index = environment.get("SLURM_JOB_ID", ""), number("SLURM_PROCID", 0)
    else:  # GKE, with one or several slices
        hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
        name = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
        count = number("MEGASCALE_NUM_SLICES", 1) * len(hosts)
        index = number("MEGASCALE_SLICE_ID", 0) * len(hosts) + number("TPU_WORKER_ID", 0)
    return Position(name.replace("/", "-"), index, count) if count > 1 else Position()


def has_lost_another(error: Exception) -> bool:
    """Say whether an error of a collective means that another process of the run has ended."""
    return not is_alone() and bool(_LOST.search(str(error)))


def is_alone() -> bool:
    """Say whether this process is the only one of its run."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def is_lead() -> bool:
    """Say whether this process is the one that writes."""
    return jax.process_index() == 0


def say_once(line: str) -> None:
    """Print a message to standard error, once for all processes."""
    if is_lead():
        say(line)


def leave(code: int, seconds: float = 10) -> int:
    """Return the exit code if this process is alone; else exit without waiting for the others.

    Others that call this within `seconds` exit with their own codes. Those that cannot, because
    they wait for this process in a collective, are ended by JAX once it has exited.
    """
    if is_alone():
        return code
    goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    goodbye.start()
    goodbye.join(timeout=seconds)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def gather(value: Any) -> list[Any]:
    """Collect one JSON value from every process, in process order; all processes must call it."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def together(function: Callable[[], Any], kind: type[Exception]) -> Any:
    """Call a function in every process; if it raises `kind` in one, raise that in all."""
    value, why = None, ""
    try:
        value = function()
    except kind as error:
        why = str(error)
    if why := next(filter(None, gather(why)), ""):
        raise kind(why)
    return value


def wait_for_all(what: str, minutes: float) -> None:
    """Wait until all processes call this, before a collective that would give up sooner.

    `what` names the event; on CPUs, the first collective waits for 30 seconds only.
    """
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key=what, timeout_ms=round(minutes * 60_000))


def keep_compiled(folder: str | None = None, workdir: os.PathLike | None = None) -> None:
    """Cache compiled programs in `folder`, for later starts, which then compile nothing.

    By default a run on TPUs or GPUs keeps its programs in the run directory, with which another
    slice continues, and everything else in the user's cache, of which it uses at most 1 GiB. JAX
    compiles anew for other versions, flags or instructions of a CPU. Its own variable
    JAX_COMPILATION_CACHE_DIR takes precedence. Call it before anything is compiled.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    if folder is None and workdir is not None and jax.default_backend() != "cpu":
        folder = f"{os.fspath(workdir)}/compilation_cache"
    if folder is None:
        folder = os.fspath(files.user_cache("compiled"))
        jax.config.update("jax_compilation_cache_max_size", 2**30)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_compilation_cache_dir", folder)


def code_version() -> str:
    """Return a hash of the package's source, so that different checkouts can be detected."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def catch_sigterm() -> Generator[Callable[[], bool]]:
    """Catch SIGTERM within the context; yield a function that says whether it has arrived.

    It never has for several processes: JAX's preemption service handles the signal then, and
    `Checkpoints.reached_preemption` says at which step all of them stop.
    """
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield lambda: False  # handlers need the main thread; notebooks and tests use others
        return
    came: list[bool] = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def interruptible() -> Generator[None]:
    """Let Ctrl-C end the process at once, with exit code 130 and one line.

    An exception during a save could deadlock its threads, and half-written files are ignored
    anyway. A thread reads the signal, so that Ctrl-C also ends a compilation, during which the main
    thread is in C++ and runs no handler.
    """
    if threading.current_thread() is not threading.main_thread():  # a notebook's, or a test's
        yield
        return
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    before = signal.signal(signal.SIGINT, lambda *_: None)
    wakes = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_interrupt, args=(reads,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakes)
        signal.signal(signal.SIGINT, before)
        os.close(writes)


def _end_at_interrupt(reads: int) -> None:
    while number := os.read(reads, 1):
        if number[0] == signal.SIGINT:
            for child in multiprocessing.active_children():
                child.kill()
            say(
                "interrupted; the same command resumes from the newest checkpoint, or starts from "
                "the beginning if none was saved."
            )
            os._exit(130)
    os.close(reads)


class Watchdog:
    """Ends a process that hangs: no `beat` for `minutes` prints every thread's stack and exits 1.

    A hung collective blocks the main thread in C++, where no exception reaches it. So a thread
    watches it within the context, and calls `os._exit`.
    """

    def __init__(self, minutes: float, advice: str, clock: Clock = CLOCK) -> None:
        self._seconds, self._advice, self._clock = 60 * minutes, advice, clock

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._left = threading.Event()
        threading.Thread(target=self._watch, args=(self._left,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def beat(self) -> None:
        """Record progress."""
        self._last = self._clock.now()

    def _watch(self, left: threading.Event) -> None:
        while (seconds := self._last + self._seconds - self._clock.now()) > 0:
            if self._clock.wait(left, seconds):
                return
        stream = sys.__stderr__ or sys.stderr
        faulthandler.dump_traceback(stream, all_threads=True)  # of the newest hundred
        print("Main thread:", file=stream)
        traceback.print_stack(
            sys._current_frames().get(threading.main_thread().ident or 0), file=stream
        )
        say(
            f"nothing finished in {self._seconds / 60:g} minutes; the stacks of all threads are "
            f"above. {self._advice} If the work is slow rather than stuck, raise "
            "--processes.watchdog-minutes."
        )
        # JAX aborts the other processes when the first one exits; so each waits until all have had
        # time to print their stacks.
        os._exit(leave(1, seconds=30))
