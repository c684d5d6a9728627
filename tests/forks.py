"""`clip-jax` as children of one process that has imported what they import, which takes seconds.

`python forks.py SOCKET` serves until it is ended; `python forks.py SOCKET ARGUMENT ...` stands for
`clip-jax ARGUMENT ...`: working directory, standard streams and exit code are the child's.
"""

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

MODULES = (
    *("cli.commands", "train", "inference.evaluate", "inference.predict", "convert.conversion"),
    *("prepare.writer", "bench"),
    *("scaling.ladder", "scaling.fit", "scaling.plots"),
)
OTHERS = ("sklearn.datasets", "matplotlib.pyplot", "tensorboardX")


class Child:
    """One command that runs."""

    def __init__(self, path: str, arguments: list[str], streams: list[int]) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(path)
        request = json.dumps([os.getcwd(), *arguments]).encode()
        socket.send_fds(self._connection, [request], streams)
        self._pid = int(self._connection.recv(16))

    def wait(self) -> int:
        with self._connection:
            return int(self._connection.recv(16))

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)


class Forks:
    """The process and its commands; ends with its block."""

    def __init__(self, folder: Path, *modules: str, **environment: str) -> None:
        """`modules` are imported beside the commands' own."""
        self.path = str(folder / "socket")
        root = Path(__file__).parent.parent
        values = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)} | environment
        values["FORKS_MODULES"] = " ".join(modules)
        self._process = subprocess.Popen([sys.executable, __file__, self.path], env=values)
        while not os.path.exists(self.path):
            assert self._process.poll() is None
            time.sleep(0.01)

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def start(self, *arguments: object) -> Child:
        """Begin a command; what it says goes nowhere."""
        with open(os.devnull, "r+b") as null:
            return Child(self.path, list(map(str, arguments)), [null.fileno()] * 3)

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a command that ends well."""
        command = [sys.executable, "-IS", __file__, self.path, *map(str, arguments)]
        done = subprocess.run(command, input="", capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done


def serve(listener: socket.socket) -> None:
    """Answer each request by a process of its own: it starts the command, and says how it ended."""
    os.environ["GLIBC_TUNABLES"] = ""  # or the command starts itself again, to set it
    from clip_jax.__main__ import main

    others = (*OTHERS, *os.environ["FORKS_MODULES"].split())
    for name in (*(f"clip_jax.{name}" for name in MODULES), *others):
        importlib.import_module(name)
    gc.freeze()  # as in conftest.py: passing over the modules took a tenth of a command's time
    gc.set_threshold(100_000, 50, 50)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those processes are nobody's concern
    while True:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        request, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        child = os.fork()
        if not child:
            connection.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            folder, *arguments = json.loads(request)
            os.chdir(folder)
            sys.argv = ["clip-jax", *arguments]
            sys.exit(main())
        connection.send(str(child).encode())
        _, status = os.waitpid(child, 0)
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(Child(sys.argv[1], sys.argv[2:], [0, 1, 2]).wait())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{sys.argv[1]}.new")
        listener.listen()
        os.rename(f"{sys.argv[1]}.new", sys.argv[1])  # who sees it can connect
        serve(listener)
