"""A Ray cluster of simulated nodes: raylets on this machine, with one core each.

`python tests/nodes.py 2` prints the address and the raylets' processes, adds a node for each line
of its input, and ends with it. It is a process of its own since Ray forks, which JAX minds.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

SIZE = {"num_cpus": 1, "object_store_memory": 1 << 27}


class Nodes:
    """The cluster as a test sees it; ends with its block."""

    def __init__(self, count: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(count)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.address = self._line()
        self.raylets = [int(self._line()) for _ in range(count)]

    def _line(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline().strip()
        assert line, "no cluster"
        return line

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def kill_workers(self) -> int:
        """SIGKILL all that work, or wait for work, on any node; how many there were."""
        found = [pid for raylet in self.raylets for pid in children(raylet)]
        return sum(kill(pid) for pid in found)

    def lose_node(self) -> None:
        """SIGKILL the newest node with all its processes, and have another instead."""
        raylet = self.raylets.pop()
        for pid in (raylet, *children(raylet, of_ray=False)):
            kill(pid)
        assert self._process.stdin
        self._process.stdin.write("one more\n")
        self._process.stdin.flush()
        self.raylets.append(int(self._line()))


def kill(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def children(raylet: int, of_ray: bool = True) -> list[int]:
    """A raylet's processes; of Ray's workers alone, which are called after what they do."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            name = (path.parent / "cmdline").read_bytes()
            works = name.startswith(b"ray::") and b"Agent" not in name  # its raylet dies with one
            if parent == raylet and (works or not of_ray):
                found.append(int(path.parent.name))
    return found


def serve(count: int) -> None:
    from ray.cluster_utils import Cluster

    def told(node: Any) -> None:
        print(node.all_processes["raylet"][0].process.pid, flush=True)

    cluster = Cluster(initialize_head=True, head_node_args=SIZE | {"include_dashboard": False})
    print(cluster.address, flush=True)
    told(cluster.head_node)
    for _ in range(count - 1):
        told(cluster.add_node(**SIZE))
    for _ in sys.stdin:
        told(cluster.add_node(**SIZE))
    cluster.shutdown()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
