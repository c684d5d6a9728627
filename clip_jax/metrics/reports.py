"""Reports of a run: speed, MFU, memory and waiting, and what is written of its steps."""

import contextlib
import json
import socket
import statistics
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from clip_jax import processes
from clip_jax.chips import peak_flops
from clip_jax.display import Display, results
from clip_jax.metrics.timers import Goodput, Timers
from clip_jax.metrics.tracking import Writer
from clip_jax.serialize import to_dict
from clip_jax.storage import files
from clip_jax.storage.json_files import Lines, recover_json


class Reports:
    """Reports of a run: in its run directory, to TensorBoard and wandb, on the terminal.

    The first of several processes writes what it gathers from all; all processes must call
    `report` and `write_down`.
    """

    def __init__(
        self,
        workdir: epath.Path,
        timers: Timers,
        config: Any,
        start: int,
        devices: int,
        steps_kept: float,
    ) -> None:
        """`config` is the run's Config, `steps_kept` the seconds spent on steps until `start`."""
        lead = processes.is_lead()
        self._workdir, self._timers, self._devices = workdir, timers, devices
        self._start, self._end, self._reported = start, config.end, start
        self._samples, self._flops = config.samples_after, config.flops_after
        self._kind_at = config.batches.at
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._writer = self._skipped = None
        if lead:
            rows, board = workdir / "metrics.jsonl", workdir / "tensorboard"
            self._writer = Writer(rows, board, start, config=to_dict(config))
            self._skipped = Lines(workdir / "skipped.jsonl", start)
        self._display = Display("train", config.end, start, quiet=not lead)
        self.line, self.advance = self._display.line, self._display.advance
        self._skipped_here: list[dict[str, Any]] = []  # since the last `write_down`
        self._read: Counter[str] = Counter()  # from buckets, since the last report
        self.result = recover_json(workdir / "result.json") if lead else {}
        self.facts: dict[str, Any] = {}  # that hold for every step, for result.json
        self._result_step = start
        self.goodput = Goodput(timers, self.result, steps_kept)

    def begin(self) -> None:
        """Mark the end of set-up: from now on, time counts as time of steps."""
        self._timers.total["init"] = self._timers.elapsed() - self._timers.total["restore"]
        self._timers.lap()

    @contextlib.contextmanager
    def compiling(self, kinds: Sequence[str] = ()) -> Generator[None]:
        """Show that the step is compiled, for several `kinds` of batches, and measure how long."""
        steps = f"{len(kinds)} training steps" if kinds else "the training step"
        self.line(f"compiling {steps} …")
        for kind in kinds:
            self.line(f"  for {kind}")
        with self._timers.measure("compile"):
            yield
        self.line(f"compiled in {self._timers.total['compile']:.1f} s")

    def skip(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Record samples of a step that this process could not read, each with the reason."""
        self._skipped_here += [{"step": step, **sample} for sample in samples]

    def read(self, counts: Mapping[str, float]) -> None:
        """Add up a batch's reads from buckets (requests, bytes, seconds that threads waited), and
        its patches with and without padding."""
        self._read.update(counts)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a step's metrics with speed, MFU, memory and waiting since the last report."""
        wall, seconds = self._timers.lap()
        elsewhere = sum(seconds.get(name, 0) for name in ("evaluation", "save", "compile"))
        training = max(wall - elsewhere, 1e-9)
        steps = step - self._reported
        images, work = (
            after(step) - after(self._reported) for after in (self._samples, self._flops)
        )
        self._reported = step
        read = sum(map(Counter, processes.gather(dict(self._read))), Counter())
        self._read.clear()
        values = {
            "samples_seen": self._samples(step),
            **metrics,
            "images_per_second": images / training,
            "images_per_second_per_device": images / training / self._devices,
            "model_flops_per_step": self._flops(step) - self._flops(step - 1),
            "seconds": self._timers.elapsed(),
            **self.goodput.values(),
            **_hosts(training, steps, seconds),
            **bucket_rates(read, training),
        }
        values |= self._kind_at(step - 1).metrics()
        if read["patches"]:
            values["valid_share"] = read["valid_patches"] / read["patches"]
        if self._peak:
            values["mfu"] = work / training / (self._peak * self._devices)
            if read["patches"]:
                values["mfu_valid"] = values["mfu"] * values["valid_share"]
        if (bytes_ := peak_memory()) is not None:
            values["peak_memory_bytes"] = bytes_
        unseen = self._timers.total["evaluation"] + self._timers.total["save"]
        per_step = training / steps + unseen / (step - self._start) if steps else 0.0
        self._display.report(step, values, per_step * (self._end - step))
        self._record(step, {"loss": metrics["loss"]})
        if self._writer:
            self._writer.write(step, values)

    def evaluated(self, step: int, values: Mapping[str, float | str]) -> None:
        """Write the results of an evaluator, or why it `failed`."""
        self._record(step, values)
        self.line(results(step, values))
        if self._writer:
            self._writer.write(step, dict(values))

    def _record(self, step: int, values: Mapping[str, float | str]) -> None:
        """Add a step's values to `result.json`, and remove those of an earlier step."""
        if step != self._result_step:
            self._result_step = step
            self.result = {"step": step, "samples_seen": self._samples(step)}
        self.result.update(values)

    def position(self) -> dict[str, float]:
        """Return the timing that a checkpoint saves."""
        return {"seconds/steps": self.goodput.values()["seconds/steps"]}

    def write_down(self) -> None:
        """Write skipped samples and `result.json` to the run directory."""
        rows = [row for rows in processes.gather(self._skipped_here) for row in rows]
        self._skipped_here.clear()
        if self._skipped:
            if rows:
                rows.sort(key=lambda row: (row["step"], row["position"]))
                self._skipped.write(*rows)
            self.result.update(self.facts, **self.goodput.values())
            files.write_whole(self._workdir / "result.json", json.dumps(self.result, indent=1))

    def flush(self) -> None:
        """Write every line to the run directory."""
        for file in filter(None, (self._writer, self._skipped)):
            file.flush()

    def close(self, kind: type[BaseException] | None, *_: object) -> None:
        self._display.close()
        if self._writer and self._skipped:
            self._skipped.flush()
            if kind is None:
                self._writer.show(self._end, self._workdir / "evals")
            self._writer.close(failed=kind is not None)


def _hosts(training: float, steps: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Compare how the processes spent `training` seconds; the slowest delays all others."""
    hosts = processes.gather(
        {
            "host": socket.gethostname(),
            "busy": training - seconds.get("device", 0),
            "input": seconds.get("input", 0),
        }
    )
    values = {"input_wait": max(host["input"] for host in hosts) / training}
    if len(hosts) == 1:
        return values
    busy = [host["busy"] for host in hosts]
    slowest = busy.index(max(busy))
    return values | {
        "slowest_process": slowest,
        "slowest_host": hosts[slowest]["host"],
        "slowest_input_wait": hosts[slowest]["input"] / training,
        "busy_seconds_per_step": max(busy) / max(steps, 1),  # the slowest's own work
        "median_busy_seconds_per_step": statistics.median(busy) / max(steps, 1),
    }


def bucket_rates(counts: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Return rates of reading from buckets, over all processes; {} if nothing was read.

    `bucket_wait` is the mean number of threads that were waiting for a bucket.
    """
    if not counts.get("requests"):
        return {}
    rates = {
        "bucket_requests_per_second": counts["requests"] / seconds,
        "bucket_bytes_per_second": counts["bytes_read"] / seconds,
    }
    if counts.get("bytes_used"):  # not counted if samples are read one by one
        rates["bytes_read_per_byte_used"] = counts["bytes_read"] / counts["bytes_used"]
        rates["bucket_wait"] = counts["seconds_waited"] / seconds
    return rates


def peak_memory() -> int | None:
    """Return the largest peak of the local devices in bytes; None where it isn't reported (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks, default=None)
