"""Finding each other, agreeing, sharing data, flags, endings: what needs no second process."""

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from clip_jax import processes, sharding
from clip_jax.config import check_processes_agree
from clip_jax.processes import CPU_FLAGS, GPU_OPTIONS, TPU_OPTIONS, ProcessesConfig
from clip_jax.sharding import MeshConfig, data_part, make_mesh
from clip_jax.train import train
from tests.conftest import ROOT, tiny_digits


def facts(**changes):
    known = {"config": {"seed": 0}, "code": "abc", "data": "def", "resume step": 300}
    return known | changes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"config": {"seed": 1}}, r"config\.seed: 0 in 0, 1 in 2"),
        ({"code": "xyz"}, "code: abc in 0, xyz in 2"),
        ({"data": "xyz"}, "data: def in 0, xyz in 2"),
        ({"resume step": 0}, "resume step: 300 in 0, 0 in 2"),
    ],
)
def test_what_processes_do_not_agree_on_is_named(changes, says):
    check_processes_agree([facts(), facts()])
    with pytest.raises(ValueError, match=says):
        check_processes_agree([facts(), facts(), facts(**changes)])


def test_another_data_set_has_another_fingerprint():
    from clip_jax.data.digits import DigitsConfig
    from clip_jax.data.pipeline import DataConfig, build

    def fingerprint(**changes):
        config = DataConfig(source=DigitsConfig(**changes))
        return build(
            config, tokenizer=lambda *_: None, image_size=16, context_length=8, batch_size=4
        ).fingerprint()

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(digits=1), fingerprint(split="test")}) == 3


def test_half_an_address_is_refused(monkeypatch):
    monkeypatch.setenv("CLIP_JAX_COORDINATOR", "host0:8476")
    monkeypatch.setenv("CLIP_JAX_PROCESS_COUNT", "2")
    monkeypatch.setattr(processes, "_set_flags", lambda: None)
    with pytest.raises(ValueError, match="without CLIP_JAX_PROCESS_INDEX"):
        processes.start(ProcessesConfig())


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "16"}, True),
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


def mesh_of(owners, data, fsdp, tensor):
    array = np.array([Chip(i, owner) for i, owner in enumerate(owners)], object)
    return Mesh(array.reshape(data, fsdp, tensor), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize(
    ("owners", "shape", "parts"),
    [
        ([0, 0, 0, 0, 1, 1, 1, 1], (8, 1, 1), {0: (0, 2), 1: (1, 2)}),
        ([0, 0, 1, 1, 2, 2, 3, 3], (2, 2, 2), {0: (0, 4), 3: (3, 4)}),
        # A row's heads on two processes: both read it.
        ([0, 0, 1, 1, 2, 2, 3, 3], (2, 1, 4), {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),
    ],
)
def test_each_process_reads_its_rows_and_those_that_share_rows_the_same(
    owners, shape, parts, monkeypatch
):
    mesh = mesh_of(owners, *shape)
    for process, expected in parts.items():
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert data_part(mesh) == expected


def test_rows_that_lie_crosswise_are_refused():
    with pytest.raises(ValueError, match=r"unequal parts of a batch"):
        data_part(mesh_of([0, 0, 0, 1, 1, 1, 2, 2], 4, 1, 2))


def test_slices_lie_along_data_alone(monkeypatch):
    chips = [Chip(i, i // 4, slice_index=i // 8) for i in range(16)]
    seen = {}

    def hybrid(shape, between, devices, **_):
        seen.update(shape=shape, between=between)
        return np.array(devices, object).reshape(4, 4, 1)

    monkeypatch.setattr(sharding.mesh_utils, "create_hybrid_device_mesh", hybrid)
    mesh = make_mesh.__wrapped__(MeshConfig(fsdp=4), chips)
    assert mesh.shape == {"data": 4, "fsdp": 4, "tensor": 1}
    for row in mesh.devices[:, :, 0]:  # what fsdp gathers stays in a slice
        assert len({chip.slice_index for chip in row}) == 1
    assert seen == {"shape": (2, 4, 1), "between": (2, 1, 1)}
    with pytest.raises(ValueError, match="data=1 must be a multiple of the 2 slices"):
        make_mesh.__wrapped__(MeshConfig(fsdp=16), chips)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_the_gpu_and_cpu_flags_are_known_to_xla():
    flags = " ".join(f"--{name}={value}" for name, value in (GPU_OPTIONS | CPU_FLAGS).items())
    code = "import jax; jax.numpy.zeros(1)"
    assert run(code, XLA_FLAGS=flags, JAX_PLATFORMS="cpu").returncode == 0
    unknown = run(code, XLA_FLAGS=flags + " --xla_gpu_no_such_flag=true", JAX_PLATFORMS="cpu")
    assert unknown.returncode != 0


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jax[tpu]")
def test_the_tpu_flags_are_known_to_libtpu():
    code = (
        "from jax.experimental import topologies; "
        "topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')"
    )
    environment = {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"
    }  # fmt: skip
    flags = " ".join(f"--{name}={value}" for name, value in TPU_OPTIONS.items())
    known = run(code, LIBTPU_INIT_ARGS=flags, **environment)
    assert known.returncode == 0, known.stderr
    unknown = run(code, LIBTPU_INIT_ARGS=flags + " --xla_tpu_no_such_flag=true", **environment)
    assert unknown.returncode != 0


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


def test_the_watchdog_shows_where_a_hanging_process_stands():
    code = (
        "import time\n"
        "from clip_jax.processes import Watchdog\n"
        "def stuck():\n"
        "    time.sleep(60)\n"
        "with Watchdog(0.075, 'ADVICE.') as watchdog:\n"
        "    for _ in range(4):\n"
        "        time.sleep(1.2)\n"
        "        watchdog.beat()\n"
        "    print('alive', flush=True)\n"
        "    stuck()\n"
    )
    done = run(code, JAX_PLATFORMS="cpu")
    assert done.returncode == 1
    assert done.stdout == "alive\n"
    assert "in stuck" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "nothing finished in 0.075 minutes" in last
    assert "ADVICE." in last


@pytest.mark.long
def test_starts_without_progress_are_counted_and_refused(tmp_path):
    """A run that dies before its first checkpoint, again and again."""
    config = tiny_digits(
        steps=3, evals=(), processes=ProcessesConfig(max_starts=2),
        data=dataclasses.replace(tiny_digits().data, max_bad_share=0.05),
    )  # fmt: skip
    from clip_jax.data.pipeline import Pipeline

    def broken(*_):
        raise RuntimeError("no such luck")
        yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "batches", broken)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no such luck"):
                train(config, tmp_path)
        with pytest.raises(ValueError, match=r"the last 2 starts in .* began at step 0"):
            train(config, tmp_path)
    more = dataclasses.replace(config, processes=ProcessesConfig(max_starts=10))
    train(more, tmp_path)  # goes on, since nothing of the updates is changed


def interrupt(grace, again):
    """Press Ctrl-C while a run stands in something long; return seconds, exit code, last words."""
    code = (
        "import time; from multiprocessing.shared_memory import SharedMemory\n"
        "from clip_jax.processes import interrupt\n"
        "with interrupt:\n"
        f"    interrupt._grace = {grace}\n"
        "    shared = SharedMemory(create=True, size=8)  # as workers have it\n"
        "    print(shared.name, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    shared = Path("/dev/shm", process.stdout.readline().strip())
    assert shared.is_file()
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    while again and process.poll() is None:
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert not shared.exists()
    return time.monotonic() - begun, process.returncode, said


@pytest.mark.long
def test_ctrl_c_ends_what_is_long_within_seconds_and_a_second_one_at_once():
    for grace, again in ((1, False), (60, True)):
        took, code, said = interrupt(grace, again)
        assert took < 30
        assert took >= grace or again
        assert code == 130
        assert said.startswith("clip-jax: interrupted; ")
        assert said.count("\n") == 1
