"""Finding each other, agreeing, sharing data, flags, endings: what needs no second process."""

import dataclasses
import inspect
import multiprocessing.process
import os
import queue
import signal
import threading
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_jax import processes, sharding
from clip_jax.data.digits import DigitsConfig
from clip_jax.data.pipeline import DataConfig
from clip_jax.errors import InputError
from clip_jax.processes import (
    CPU_FLAGS,
    GPU_OPTIONS,
    TPU_OPTIONS,
    ProcessesConfig,
    Watchdog,
)
from clip_jax.sharding import MeshConfig, make_mesh
from tests.clock import HandClock
from tests.data.conftest import open_pipeline


def test_another_data_set_has_another_fingerprint():
    sources = [DigitsConfig(), DigitsConfig(digits=1), DigitsConfig(split="test"), DigitsConfig()]
    first, *others, same = (open_pipeline(DataConfig(source=x)).fingerprints()[0] for x in sources)
    assert first == same
    assert len({first, *others}) == 3


def test_half_an_address_is_refused(monkeypatch):
    monkeypatch.setenv("CLIP_JAX_COORDINATOR", "host0:8476")
    monkeypatch.setenv("CLIP_JAX_PROCESS_COUNT", "2")
    with (
        mock.patch.object(processes, "_set_flags", autospec=True),
        pytest.raises(ValueError, match="without CLIP_JAX_PROCESS_INDEX"),
    ):
        processes.start(ProcessesConfig())


ADDRESS = {
    "CLIP_JAX_COORDINATOR": "host0:8476",
    "CLIP_JAX_PROCESS_COUNT": "2",
    "CLIP_JAX_PROCESS_INDEX": "1",
}


@pytest.mark.parametrize(
    ("environment", "address", "method"),
    [
        (ADDRESS, ("host0:8476", 2, 1), {"cluster_detection_method": "deactivate"}),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "tpu"}, (), {}),
        ({}, None, {}),
    ],
)
@given(seconds=st.integers(5, 86_400))
def test_processes_connect_where_there_are_several(environment, address, method, seconds):
    """With the timeouts of the config, by which a lost process is noticed."""
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(processes, "_set_flags", autospec=True),
        mock.patch.object(jax.distributed, "initialize", autospec=True) as initialize,
    ):
        processes.start(ProcessesConfig(heartbeat_seconds=seconds))
    timeouts = {"heartbeat_timeout_seconds": seconds, "shutdown_timeout_seconds": 60}
    expected = [] if address is None else [mock.call(*address, **method, **timeouts)]
    assert initialize.mock_calls == expected


def test_computation_before_processes_are_connected_is_one_message():
    says = "jax.distributed.initialize() must be called before any JAX calls that"
    error = RuntimeError(says)
    with (
        mock.patch.dict(os.environ, ADDRESS),
        mock.patch.object(processes, "_set_flags", autospec=True),
        mock.patch.object(jax.distributed, "initialize", autospec=True, side_effect=error),
        pytest.raises(InputError, match=r"JAX has computed before .* Leave out computation"),
    ):
        processes.start(ProcessesConfig())


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, False),
    ],
)
def test_clusters_are_recognised(environment, expected, monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes._surrounded() == expected


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a pod that isn't there."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "fake"


def test_slices_lie_along_data_alone():
    chips = [Chip(i, i // 4, slice_index=i // 8) for i in range(16)]
    with mock.patch.object(
        sharding.mesh_utils,
        "create_hybrid_device_mesh",
        autospec=True,
        return_value=np.array(chips, object).reshape(4, 4, 1),
    ) as hybrid:
        mesh = inspect.unwrap(make_mesh)(MeshConfig(fsdp=4), chips)
    assert mesh.shape == {"data": 4, "fsdp": 4, "tensor": 1}
    for row in mesh.devices[:, :, 0]:  # what fsdp gathers stays in a slice
        assert len({chip.slice_index for chip in row}) == 1
    assert hybrid.call_args.args[:2] == ((2, 4, 1), (2, 1, 1))
    with pytest.raises(ValueError, match="data=1 must be a multiple of the 2 slices"):
        inspect.unwrap(make_mesh)(MeshConfig(fsdp=16), chips)


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({"JAX_NUM_CPU_DEVICES": "1"}, False),
        ({"JAX_NUM_CPU_DEVICES": "8"}, True),
        ({"CLIP_JAX_COORDINATOR": "localhost:1"}, True),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, True),
        ({"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "tpu"}, False),
    ],
)
def test_simulated_devices_take_their_collectives_in_one_order(environment, several, monkeypatch):
    for name in ("XLA_FLAGS", "CLIP_JAX_COORDINATOR", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes._set_flags()
    assert all((name in os.environ["XLA_FLAGS"]) == several for name in CPU_FLAGS)


def test_flags_of_the_environment_win(monkeypatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    assert processes.compiler_options("tpu") == TPU_OPTIONS
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_enable_async_all_gather=false")
    ours = TPU_OPTIONS.keys() - {"xla_enable_async_all_gather"}
    assert processes.compiler_options("tpu").keys() == ours
    assert processes.compiler_options("gpu") == processes.compiler_options("cuda") == GPU_OPTIONS
    assert processes.compiler_options("cpu") == {}


@pytest.fixture
def ended():
    """Exit codes, and when, instead of the end of this process."""
    exits: queue.SimpleQueue[int] = queue.SimpleQueue()
    with mock.patch.object(os, "_exit", autospec=True, side_effect=exits.put):
        yield exits


def stuck(go: threading.Event) -> None:
    go.wait()


def test_the_watchdog_shows_where_every_thread_of_a_hanging_process_stands(ended, capfd):
    """Also the main one of more than a hundred, of which faulthandler shows the newest; and it
    leaves as one of several does: the one that hangs may be the last to show its stacks."""
    clock, go, waits = HandClock(), threading.Event(), queue.SimpleQueue[float]()
    plain = clock.wait
    others = [threading.Thread(target=stuck, args=(go,)) for _ in range(110)]
    for thread in others:
        thread.start()
    with (
        mock.patch.object(processes, "leave", autospec=True, return_value=1) as leave,
        mock.patch.object(clock, "wait", lambda event, x: waits.put(x) or plain(event, x)),
        Watchdog(0.5, "ADVICE.", clock) as watchdog,
    ):
        assert waits.get() == 30
        clock.until_waiting()
        clock.advance(29)
        watchdog.beat()
        clock.advance(2)
        assert waits.get() == 28
        assert ended.empty()
        clock.until_waiting()
        clock.advance(28)
        assert ended.get() == 1
    go.set()
    for thread in others:
        thread.join()
    leave.assert_called_once_with(1, seconds=30)
    errors = capfd.readouterr().err
    assert "in stuck" in errors
    assert "in test_the_watchdog_shows" in errors
    last = errors.splitlines()[-1]
    assert "nothing finished in 0.5 minutes" in last
    assert "ADVICE." in last


def test_one_of_several_processes_leaves_at_once_with_its_code():
    assert processes.leave(7) == 7  # alone
    with (
        mock.patch.object(processes, "is_alone", autospec=True, return_value=False),
        mock.patch.object(jax.distributed, "shutdown", autospec=True) as shutdown,
        mock.patch.object(os, "_exit", autospec=True, side_effect=SystemExit) as leaves,
        pytest.raises(SystemExit),
    ):
        processes.leave(7)
    leaves.assert_called_once_with(7)
    shutdown.assert_called_once_with()


def test_a_watchdog_that_is_left_ends_nothing(ended):
    before = {*threading.enumerate()}
    with Watchdog(0.5, "", HandClock()):
        (watching,) = {*threading.enumerate()} - before
    watching.join()
    assert ended.empty()


def test_ctrl_c_ends_the_process_and_its_children_at_once(ended, capfd):
    before = signal.getsignal(signal.SIGINT)
    child = mock.create_autospec(multiprocessing.process.BaseProcess, instance=True)
    with (
        mock.patch.object(multiprocessing, "active_children", autospec=True, return_value=[child]),
        processes.interruptible(),
    ):
        signal.raise_signal(signal.SIGINT)
        assert ended.get() == 130
    child.kill.assert_called_once_with()
    assert signal.getsignal(signal.SIGINT) is before
    errors = capfd.readouterr().err
    assert errors.startswith("clip-jax: interrupted; the same command resumes")
    assert "or starts from the beginning if none was saved" in errors
    assert errors.count("\n") == 1


def test_sigterm_is_caught_for_a_while():
    before = signal.getsignal(signal.SIGTERM)
    with processes.catch_sigterm() as came:
        assert not came()
        signal.raise_signal(signal.SIGTERM)
        assert came()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("", 0, 1)),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, ("", 0, 1)),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, ("7", 3, 4)),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}, ("t0", 1, 2)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, ("", 0, 1)),
        (
            {
                "TPU_WORKER_HOSTNAMES": "t0,t1",
                "TPU_WORKER_ID": "1",
                "MEGASCALE_SLICE_ID": "2",
                "MEGASCALE_NUM_SLICES": "3",
                "MEGASCALE_COORDINATOR_ADDRESS": "first",
            },
            ("first", 5, 6),
        ),
        (dict(zip(processes._EXPLICIT, ("h:1", "2", "0"), strict=True)), ("h:1", 0, 2)),
    ],
)
def test_the_position_of_a_process_is_known_before_it_connects(environment, expected):
    assert processes.position(environment) == expected


@pytest.mark.parametrize(
    ("message", "count", "expected"),
    [
        ("UNKNOWN: Gloo AllGather failed: Read error: Connection reset by peer", 2, True),
        ("INTERNAL: NCCL operation failed: remote process exited", 2, True),
        ("UNAVAILABLE: The following tasks are unhealthy", 2, True),
        ("RESOURCE_EXHAUSTED: Out of memory", 2, False),
        ("Connection reset by peer", 1, False),  # of something else
    ],
)
def test_errors_of_collectives_mean_that_another_process_has_ended(message, count, expected):
    error = jax.errors.JaxRuntimeError(message)
    with mock.patch.object(processes, "is_alone", autospec=True, return_value=count == 1):
        assert processes.has_lost_another(error) is expected


def test_compiled_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    folder, size = "jax_compilation_cache_dir", "jax_compilation_cache_max_size"
    names = (folder, size, "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update(folder, None)
    try:
        processes.keep_compiled(workdir=tmp_path / "run")  # on a CPU
        assert jax.config.values[folder] == f"{tmp_path}/clip_jax/compiled"
        assert jax.config.values[size] == 2**30
        processes.keep_compiled(str(tmp_path / "other"))  # JAX has a folder already
        assert jax.config.values[folder] == f"{tmp_path}/clip_jax/compiled"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
