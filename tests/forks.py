"""`clip-jax` as children of one process that has imported what they import, which takes seconds.

`python forks.py SOCKET` serves until it is ended; `python forks.py SOCKET ARGUMENT ...` stands for
`clip-jax ARGUMENT ...`: working directory, standard streams and exit code are the child's.

One child remains, and runs those of IN_TURN one after another: what JAX has traced and compiled for
one command serves the next, which halves the time. While it is busy, commands have children of
their own.
"""

import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

MODULES = (
    *("cli.commands", "train", "inference.evaluate", "inference.predict", "convert.conversion"),
    *("prepare.writer", "bench"),
    *("scaling.climb", "scaling.fit", "scaling.plots"),
)
OTHERS = ("sklearn.datasets", "matplotlib.pyplot", "tensorboardX")
IN_TURN = ("train", "evaluate", "predict", "convert", "average", "export", "embed", "search")


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
        self._process = subprocess.Popen(
            [sys.executable, __file__, self.path], env=values, start_new_session=True
        )
        while not os.path.exists(self.path):
            assert self._process.poll() is None
            time.sleep(0.01)

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
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


def serve(path: str) -> None:
    """Answer each request by a process of its own: it starts the command, and says how it ended."""
    os.environ["GLIBC_TUNABLES"] = ""  # or the command starts itself again, to set it
    from clip_jax.__main__ import main

    others = (*OTHERS, *os.environ["FORKS_MODULES"].split())
    for name in (*(f"clip_jax.{name}" for name in MODULES), *others):
        importlib.import_module(name)
    gc.freeze()  # as in conftest.py: passing over the modules took a tenth of a command's time
    gc.set_threshold(100_000, 50, 50)
    listener, in_turn = _listen(path), _listen(f"{path}.in_turn")
    if not os.fork():
        run_in_turn(in_turn)
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
            _begin(request, streams)
            sys.exit(main())
        connection.send(str(child).encode())
        _, status = os.waitpid(child, 0)
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)


def run_in_turn(listener: socket.socket) -> None:
    """Run one command after another in this process."""
    from clip_jax.__main__ import main

    environment, null = dict(os.environ), os.open(os.devnull, os.O_RDWR)
    while True:
        connection, _ = listener.accept()
        request, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        _begin(request, streams)
        connection.send(str(os.getpid()).encode())
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()  # as Python does, when one ends it
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        for number, stream in enumerate(streams):
            os.dup2(null, number)  # or its reader waits for more
            os.close(stream)
        os.environ.clear()
        os.environ.update(environment)
        for name, module in [*sys.modules.items()]:  # which may know files by relative paths
            if name.startswith(("clip_jax.data", "clip_jax.storage", "clip_jax.inference")):
                for value in vars(module).values():
                    if isinstance(value, functools._lru_cache_wrapper):
                        value.cache_clear()
        connection.send(str(code).encode())
        connection.close()


def _begin(request: bytes, streams: list[int]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    folder, *arguments = json.loads(request)
    os.chdir(folder)
    sys.argv = ["clip-jax", *arguments]


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{path}.new")
    listener.listen()
    os.rename(f"{path}.new", path)  # who sees it can connect
    return listener


def _command(path: str, arguments: list[str]) -> int:
    with open(f"{path}.lock", "w") as lock:
        if arguments[0] in IN_TURN:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path += ".in_turn"
        return Child(path, arguments, [0, 1, 2]).wait()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(_command(sys.argv[1], sys.argv[2:]))
    serve(sys.argv[1])
