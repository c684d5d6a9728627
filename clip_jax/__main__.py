"""`python -m clip_jax` is the console script `clip-jax`."""

import importlib.util
import os
import sys
from pathlib import Path

# Device files of TPUs (two kinds), of NVIDIA's and AMD's GPUs, and of Windows' under WSL.
_ACCELERATORS = ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd", "dxg")


def main() -> int:
    """Run the command, in a process whose `malloc` asks for huge pages.

    XLA's CPU backend takes its work space anew at every step; on pages of 4 KiB the faults cost a
    small model up to a fifth of its time (BENCHMARKS.md). glibc reads its tunables before Python
    begins, so the process starts itself again, once; whoever sets GLIBC_TUNABLES keeps theirs.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if plans_only(Path("/dev")):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from clip_jax.cli.commands import main as run

    return run()


def plans_only(devices: Path) -> bool:
    """Say whether libtpu is here to plan with, on a machine without any accelerator.

    Asked for its TPUs, as JAX does at the first computation, it would print six lines of its own.
    """
    return (
        importlib.util.find_spec("libtpu") is not None
        and not any(name.startswith("TPU_") for name in os.environ)
        and not any(any(devices.glob(pattern)) for pattern in _ACCELERATORS)
    )


if __name__ == "__main__":
    sys.exit(main())
