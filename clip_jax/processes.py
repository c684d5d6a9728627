"""Several processes as one run: how they find each other, agree, notice a dead one, and end."""

import faulthandler
import hashlib
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# What the compiler is asked for beyond its defaults. A flag of the environment wins.
TPU_FLAGS = {  # through LIBTPU_INIT_ARGS
    # Under `fsdp` the parameters of the next layer are gathered while this one computes: the
    # gathers become asynchronous and are fused with the matmuls beside them.
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    # The tensor core goes on while a collective is under way.
    "xla_tpu_overlap_compute_collective_tc": "true",
    # Under `data`, also between slices, gradients of one layer are summed while the backward pass
    # of the next runs, whatever their sizes.
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
GPU_FLAGS = {  # through XLA_FLAGS, and only where there is a GPU: a name it doesn't know is fatal
    # Schedules collectives early and waits for them late. Off by default.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    # In the scan over layers, the next layer's gather may run beside this layer.
    "xla_gpu_enable_while_loop_double_buffering": "true",
}
CPU_FLAGS = {  # through XLA_FLAGS, for simulated devices and processes
    # One order for the collectives of a step. Otherwise (jax 0.10, not 0.12) each device starts
    # them as they become ready, and on a busy machine the devices of a 2 × 2 × 2 mesh soon wait
    # for each other in a circle.
    "xla_cpu_enable_concurrency_optimized_scheduler": "false",
}

_EXPLICIT = ("CLIP_JAX_COORDINATOR", "CLIP_JAX_PROCESS_COUNT", "CLIP_JAX_PROCESS_INDEX")


@dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """What ends a run that cannot go on. Which processes there are, the environment says."""

    heartbeat_seconds: int = 40  # silence of one process after which the others end too
    watchdog_minutes: float = 30.0  # without a step; then all stacks are printed, exit code 1
    max_starts: int | None = None  # in a row without a new checkpoint; then exit code 2

    def __post_init__(self) -> None:
        if self.heartbeat_seconds < 5:
            raise ValueError(
                f"processes.heartbeat_seconds={self.heartbeat_seconds} must be at least 5."
            )
        if self.watchdog_minutes <= 0:
            raise ValueError(
                f"processes.watchdog_minutes={self.watchdog_minutes} must be more than 0."
            )
        if self.max_starts is not None and self.max_starts < 1:
            raise ValueError(f"processes.max_starts={self.max_starts} must be at least 1.")


def start(config: ProcessesConfig) -> None:
    """Join the other processes if the environment says that there are any. Before any computation.

    Cloud TPU, GKE and Slurm (in a step of several tasks) are recognised. Elsewhere the variables
    CLIP_JAX_COORDINATOR (host:port of process 0), CLIP_JAX_PROCESS_COUNT and
    CLIP_JAX_PROCESS_INDEX say it, as `launch/local.py` does. ValueError if one of the three lacks.
    """
    _set_flags()
    explicit = {name: os.environ.get(name, "") for name in _EXPLICIT}
    timeouts: dict[str, Any] = {
        "heartbeat_timeout_seconds": config.heartbeat_seconds,
        "shutdown_timeout_seconds": 60,
    }
    if any(explicit.values()):
        if missing := [name for name, value in explicit.items() if not value]:
            given = ", ".join(f"{k}={v}" for k, v in explicit.items() if v)
            raise ValueError(f"the environment has {given} without {' and '.join(missing)}.")
        address, count, index = explicit.values()
        jax.distributed.initialize(
            address, int(count), int(index), cluster_detection_method="deactivate", **timeouts
        )
    elif _surrounded():
        jax.distributed.initialize(**timeouts)


def _set_flags() -> None:
    """Add our flags to the environment, before JAX reads it."""
    chosen = [("LIBTPU_INIT_ARGS", TPU_FLAGS)]  # which only a TPU's runtime reads
    platforms = os.environ.get("JAX_PLATFORMS", "cuda")
    if Path("/dev/nvidiactl").exists() and ("cuda" in platforms or "gpu" in platforms):
        chosen.append(("XLA_FLAGS", GPU_FLAGS))
    several = (
        int(os.environ.get("JAX_NUM_CPU_DEVICES") or 1) > 1
        or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
        or os.environ.get(_EXPLICIT[0])
    )
    if several and os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
        chosen.append(("XLA_FLAGS", CPU_FLAGS))
    for variable, flags in chosen:
        given = os.environ.get(variable, "")
        ours = [f"--{name}={value}" for name, value in flags.items() if name not in given]
        os.environ[variable] = " ".join([*ours, given]).strip()


def _surrounded() -> bool:
    """Say whether this process is one of several of a cluster that JAX can ask for the others."""
    environment = os.environ
    if int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return True
    if "cpu" in environment.get("JAX_PLATFORMS", ""):
        return False
    if environment.get("TPU_WORKER_HOSTNAMES") or environment.get("TPU_PROCESS_ADDRESSES"):
        return True  # GKE
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and "TPU_SKIP_MDS_QUERY" not in environment  # a Cloud TPU VM


def is_alone() -> bool:
    """Say whether this process is the only one of its run."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def leave(code: int) -> int:
    """Return the exit code where this process is alone; else end it without waiting for others.

    Others that come here too, within seconds, end with their own codes. Those that cannot, because
    they wait for this process in a computation, are ended by JAX once it is gone.
    """
    if is_alone():
        return code
    goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    goodbye.start()
    goodbye.join(timeout=10)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def gather(value: Any) -> list[Any]:
    """Collect one JSON value from every process, in their order; all must call it at once."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def keep_compiled(folder: str | None, workdir: os.PathLike) -> None:
    """Keep compiled programs in `folder`, or by default in the work directory, for later starts.

    By default not on a CPU, whose programs fit the very machine that compiled them. Whoever has
    set JAX's own variable (JAX_COMPILATION_CACHE_DIR) keeps it. Before anything is compiled.
    """
    if jax.config.values["jax_compilation_cache_dir"] or (
        folder is None and jax.default_backend() == "cpu"
    ):
        return
    folder = folder or f"{os.fspath(workdir)}/compilation_cache"
    jax.config.update("jax_compilation_cache_dir", folder)


def code_version() -> str:
    """Hash the package's own source, so that hosts with different checkouts notice."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class Watchdog:
    """Ends a process that hangs: no `beat` for `minutes` prints every thread's stack and exits 1.

    A hung collective blocks the main thread in C++, where no exception reaches it; so a thread
    watches while the context is entered, and leaves by `os._exit`.
    """

    def __init__(self, minutes: float, advice: str) -> None:
        self._seconds, self._advice = 60 * minutes, advice

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._left = threading.Event()
        threading.Thread(target=self._watch, args=(self._left,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def beat(self) -> None:
        """Say that something was finished."""
        self._last = time.monotonic()

    def _watch(self, left: threading.Event) -> None:
        while (seconds := self._last + self._seconds - time.monotonic()) > 0:
            if left.wait(seconds):
                return
        stream = sys.__stderr__ or sys.stderr
        faulthandler.dump_traceback(stream, all_threads=True)
        print(
            f"clip-jax: nothing finished in {self._seconds / 60:g} minutes; above, where every "
            f"thread stands. {self._advice} If this is no hang but slow work, raise "
            "--processes.watchdog-minutes.",
            file=stream, flush=True,
        )  # fmt: skip
        os._exit(1)
