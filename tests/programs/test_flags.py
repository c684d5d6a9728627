"""Compiler flags that the package sets are known to the compilers, each in a process of its own."""

import os
import subprocess
import sys

import pytest

from clip_jax.processes import CPU_FLAGS, GPU_OPTIONS, TPU_OPTIONS

XLA = "import jax; jax.numpy.zeros(1)"
LIBTPU = (
    "from jax.experimental import topologies; "
    "topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')"
)
NO_TPU = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@pytest.mark.parametrize(
    ("code", "variable", "options", "unknown"),
    [
        (XLA, "XLA_FLAGS", GPU_OPTIONS | CPU_FLAGS, "xla_gpu_no_such_flag"),
        (LIBTPU, "LIBTPU_INIT_ARGS", TPU_OPTIONS, "xla_tpu_no_such_flag"),
    ],
    ids=["GPU and CPU", "TPU"],
)
def test_the_flags_are_known_and_others_are_not(code, variable, options, unknown):
    for flags, is_known in ((options, True), (options | {unknown: "true"}, False)):
        text = " ".join(f"--{name}={value}" for name, value in flags.items())
        environment = os.environ | NO_TPU | {variable: text}
        done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=120)
        assert (done.returncode == 0) == is_known
