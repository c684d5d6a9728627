"""Compiler flags that the package sets are known to the compilers, each in a process of its own."""

import os
import subprocess
import sys

from clip_jax.processes import CPU_FLAGS, GPU_OPTIONS, TPU_OPTIONS
from tests.conftest import ROOT


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
