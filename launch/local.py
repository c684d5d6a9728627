"""Rehearse a pod on this machine: run one command in n processes with m simulated devices each.

    python launch/local.py --processes 2 --devices 4 train digits --workdir runs/two

Everything after the options is a clip-jax command line. Each line of output begins with the number
of its process. When a process fails, the others have `--grace` seconds to end, then they are
killed. The last line names the cause: the process that failed first, unless it only lost another
that failed, too. The exit code is that of the cause (128 + the signal's number if a signal killed
it). SIGTERM and Ctrl-C are forwarded to all processes.
`--restarts N` starts all processes again, at most N times, except after exit code 0 (done), 2
(wrong use or input), 3 (SIGTERM) or 130 (Ctrl-C).
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading

from clip_jax.clock import CLOCK, Clock

ABORTED = "JAX distributed service detected fatal errors"  # since another process ended
LOST = "cannot continue without it"  # what training says then
CONSEQUENCE = (
    "JAX ended this process, because another one ended. The same command resumes from the newest "
    "checkpoint."
)
DONE, WRONG_USE, PREEMPTED, INTERRUPTED = 0, 2, 3, 130


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="number of processes (2)")
    parser.add_argument("--devices", type=int, default=4, help="simulated devices per process (4)")
    parser.add_argument(
        "--grace", type=float, default=20, help="seconds for the others to end after a failure (20)"
    )
    parser.add_argument("--restarts", type=int, default=0, help="number of restarts (0)")
    parser.add_argument("--module", default="clip_jax", help="Python module of the command")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if not options.command or min(options.processes, options.devices) < 1:
        parser.error("needs at least one process, one device and a clip-jax command")
    for attempt in range(options.restarts + 1):
        code, cause = run(options)
        if code in (DONE, WRONG_USE, PREEMPTED, INTERRUPTED) or attempt == options.restarts:
            break
        print(f"launch: {cause}; starting again ({attempt + 1} of {options.restarts})", flush=True)
    if code:
        print(f"launch: {cause}", file=sys.stderr, flush=True)
    return code


def run(options: argparse.Namespace, clock: Clock = CLOCK) -> tuple[int, str]:
    """Run all processes to their end; return the exit code and, unless it is 0, the cause."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes, last_words = [], [""] * options.processes
    for index in range(options.processes):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(options.devices),
            "CLIP_JAX_COORDINATOR": f"localhost:{port}",
            "CLIP_JAX_PROCESS_COUNT": str(options.processes),
            "CLIP_JAX_PROCESS_INDEX": str(index),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", options.module, *options.command],
                env=environment,
                start_new_session=True,  # Ctrl-C reaches only this process, which forwards it
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        )
        print(f"launch: process {index} is pid {processes[-1].pid}", flush=True)

    def copy(index: int) -> None:
        is_aborted = False
        for line in processes[index].stdout:
            if is_aborted:
                continue  # a stack of C++
            is_aborted = ABORTED in line
            words = CONSEQUENCE if is_aborted else line.rstrip()
            # One write per line, since several threads write. The last line may lack its end.
            print(f"[{index}] {words}\n", end="", flush=True)
            last_words[index] = words.strip() or last_words[index]

    copies = [threading.Thread(target=copy, args=(i,)) for i in range(options.processes)]
    for thread in copies:
        thread.start()

    def forward(number: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    ended: list[int] = []  # that failed, in the order in which this was seen
    deadline = float("inf")

    def failures() -> list[int]:
        return [i for i, process in enumerate(processes) if process.poll() and i not in ended]

    while any(process.poll() is None for process in processes):
        if clock.now() <= deadline:  # later ones were killed below
            ended += failures()
        elif processes[ended[0]].returncode != PREEMPTED:
            for process in processes:
                if process.poll() is None:
                    process.kill()
        if ended:
            deadline = min(deadline, clock.now() + options.grace)
        clock.sleep(0.05)
    if clock.now() <= deadline:
        ended += failures()
    for thread in copies:
        thread.join()
    codes = [process.returncode for process in processes]
    if not ended:
        return DONE, ""

    def is_consequence(index: int) -> bool:
        """Say whether JAX aborted it because another died, or its collective lost the other."""
        words = last_words[index]
        return codes[index] == -signal.SIGABRT or "by peer" in words or LOST in words

    failed = min(ended, key=is_consequence)
    code = codes[failed]
    if code < 0:
        return 128 - code, f"process {failed} was killed by {signal.Signals(-code).name}"
    return code, f"process {failed} ended first, with exit code {code}: {last_words[failed]}"


if __name__ == "__main__":
    sys.exit(main())
