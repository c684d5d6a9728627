"""What the TPU's compiler makes of attention, and of a single chip, in a process of its own:
one that has seen one platform's devices compiles for no other."""

import os
import subprocess
import sys

from tests.conftest import ROOT


def printed(*arguments: str, script: str = "benchmarks/short_attention.py") -> list[str]:
    done = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=os.environ | {"TPU_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_the_short_kernel_compiles():
    """Forward and backward: eight rows at a time, heads that fill no register, a long sequence."""
    shapes = "77,8,64,1", "257,16,80,0", "400,16,64,0"
    assert printed("short", "v5e:2x2", *shapes) == [f"{x} 2" for x in shapes]


def test_a_tpu_rounds_the_gradient_of_scores_in_xlas_attention():
    """Both products of [L, L] in float32 are of default precision: `exact_attention.xla_of_tpu`."""
    shape = "197,12,64,0"
    assert printed("xla", "v5e:2x2", shape) == [f"{shape} 0 default default"]


def test_a_single_chip_is_a_topology(tmp_path):
    (script := tmp_path / "devices.py").write_text(
        "from clip_jax.pods.compile import Topology, _devices\n"
        "print([len(_devices(Topology.parse(x))) for x in ('v5e:1x1', 'v4:1x1x1', 'v5e:2x4')])\n"
    )
    assert printed(script=str(script)) == ["[1, 1, 8]"]
