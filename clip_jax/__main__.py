"""`python -m clip_jax` is the console script `clip-jax`."""

import os
import sys


def main() -> int:
    """Run the command, in a process whose `malloc` uses huge pages.

    XLA's CPU backend allocates its work space anew at every step; with pages of 4 KiB, page faults
    cost a small model up to a fifth of its time (BENCHMARKS.md). glibc reads its tunables before
    Python starts, so the process re-executes itself once. A GLIBC_TUNABLES that is set is kept.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    from clip_jax.cli.commands import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
