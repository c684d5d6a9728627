"""What the TPU's compiler makes of attention, by a script of benchmarks/ in a process of its own:
one that has seen one platform's devices compiles for no other."""

import os
import subprocess
import sys

from tests.conftest import ROOT


def printed(*arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "benchmarks/short_attention.py", *arguments], cwd=ROOT, text=True,
        capture_output=True, env=os.environ | {"TPU_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
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
