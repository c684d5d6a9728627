"""Metrics of a run: timing, and reports to files, TensorBoard, wandb and the terminal."""

import contextlib
import io
import json
import secrets
import socket
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from clip_jax import processes
from clip_jax.chips import peak_flops
from clip_jax.clock import CLOCK, Clock
from clip_jax.display import Display, results
from clip_jax.errors import InputError
from clip_jax.serialize import to_dict
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import Lines, read_json, recover_json

# tensorboardX imports these if they are installed, for features that are not used here, and
# importing PyTorch alone takes seconds.
_UNASKED = {"torch", "boto3", "google.cloud.storage"} - sys.modules.keys()
for _name in _UNASKED:
    sys.modules[_name] = None  # ty: ignore[invalid-assignment]
from tensorboardX import summary  # noqa: E402
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402
from tensorboardX.record_writer import RecordWriter  # noqa: E402

for _name in _UNASKED:
    del sys.modules[_name]


class Timers:
    """Seconds spent by activity since the start and since the last `lap`."""

    def __init__(self, clock: Clock = CLOCK) -> None:
        self._clock = clock
        self.total: dict[str, float] = defaultdict(float)
        self._lap: dict[str, float] = defaultdict(float)
        self._start = self._lap_start = self._clock.now()

    @contextlib.contextmanager
    def measure(self, name: str) -> Generator[None]:
        start = self._clock.now()
        try:
            yield
        finally:
            seconds = self._clock.now() - start
            self.total[name] += seconds
            self._lap[name] += seconds

    def elapsed(self) -> float:
        """Return seconds since the start."""
        return self._clock.now() - self._start

    def lap(self) -> tuple[float, dict[str, float]]:
        """Return the seconds since the last lap, in all and by activity, and start a new one."""
        now = self._clock.now()
        wall, parts = now - self._lap_start, dict(self._lap)
        self._lap_start = now
        self._lap.clear()
        return wall, parts


class Goodput:
    """Seconds of a run by activity, over all its starts; goodput is the share spent on steps.

    `lost` is the time of steps that were repeated, since a run that died resumes from its last
    checkpoint. Time between two starts is not counted.
    """

    PARTS = ("init", "restore", "compile", "input", "save", "evaluation")
    NAMES = (*PARTS, "steps", "lost")

    def __init__(self, timers: Timers, earlier: Mapping[str, Any], steps_kept: float) -> None:
        """`earlier` is the result.json of earlier starts, `steps_kept` their `seconds/steps` at the
        checkpoint from which this start resumes."""
        self._timers = timers
        self._earlier = {name: float(earlier.get(f"seconds/{name}", 0.0)) for name in self.NAMES}
        lost = max(self._earlier["steps"] - steps_kept, 0.0)
        self._earlier["steps"] -= lost
        self._earlier["lost"] += lost

    def values(self) -> dict[str, float]:
        """Return seconds by activity, their sum, and the share of steps in it."""
        own = {name: self._timers.total[name] for name in self.PARTS}
        own["steps"] = max(self._timers.elapsed() - sum(own.values()), 0.0)
        seconds = {name: own.get(name, 0.0) + value for name, value in self._earlier.items()}
        total = sum(seconds.values())
        return {f"seconds/{name}": value for name, value in seconds.items()} | {
            "seconds/total": total,
            "goodput": seconds["steps"] / total,
        }

    def describe(self) -> str:
        """Return a summary in one line."""
        values = self.values()
        seconds = ((name, values[f"seconds/{name}"]) for name in self.NAMES)
        parts = [f"{name} {spent:.1f}" for name, spent in seconds if spent > 0.05]
        return f"goodput {values['goodput']:.1%}; seconds: {', '.join(parts)}"


class Writer:
    """Write a JSONL file, TensorBoard and wandb; a resumed run drops rows that it will repeat.

    TensorBoard shows values at most half a minute after they were written, or after `flush`. No
    thread writes them, unlike in tensorboardX's `SummaryWriter`: on a full disk that thread dies,
    and writes to its queue block forever.
    """

    SECONDS = 30

    def __init__(
        self,
        lines: AnyPath,
        board: AnyPath,
        resume_step: int | None,
        clock: Clock = CLOCK,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """`resume_step` is the step that a run resumes from; None keeps all rows (see `Lines`). The
        run's `config` is shown as text, and wandb is used if its `wandb_project` is set."""
        self._wandb: Any = config and config["wandb_project"] and open_wandb(config, lines.parent)
        self._lines = Lines(lines, resume_step)
        self._target, self._clock, self._flushed = board, clock, clock.now()
        self._scratch = tempfile.TemporaryDirectory() if files.is_remote(board) else None
        self._folder = self._scratch.name if self._scratch else str(board)
        files.make_folder(self._folder)
        name = f"events.out.tfevents.{int(clock.unix())}.{socket.gethostname()}"
        with files.writing(self._folder):
            self._records = RecordWriter(f"{self._folder}/{name}")
        self._add(0, file_version="brain.Event:2")
        if resume_step:  # hides later steps that an earlier start wrote
            self._add(resume_step + 1, session_log=SessionLog(status=SessionLog.START))
        if config:
            block = summary.text("config", f"```json\n{json.dumps(config, indent=2)}\n```")
            self._add(resume_step or 0, summary=block)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._lines.write({"step": step, **values})
        self.draw(step, values)

    def draw(self, step: int, values: Mapping[str, Any]) -> None:
        """Write only to TensorBoard and wandb."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._add(step, summary=summary.scalar(name, value))
        if self._wandb:
            self._wandb.log({"step": step, **values})
        if self._clock.now() > self._flushed + self.SECONDS:
            self._flush_board()

    def show(self, step: int, folder: AnyPath) -> None:
        """Add the pictures in a folder to TensorBoard and wandb."""
        for path in (path for path in files.walk(folder) if path.endswith(".png")):
            name = path.removeprefix(f"{folder}/").removesuffix(".png")
            picture = Image.open(io.BytesIO(files.read(path))).convert("RGB")
            self._add(step, summary=summary.image(name, np.asarray(picture), dataformats="HWC"))
            if self._wandb:
                self._wandb.log({"step": step, name: sys.modules["wandb"].Image(picture)})

    def _add(self, step: int, **content: Any) -> None:
        with files.writing(self._folder):
            event = Event(wall_time=self._clock.unix(), step=step, **content)
            self._records.write(event.SerializeToString())

    def _flush_board(self) -> None:
        with files.writing(self._folder):
            self._records.flush()
        self._flushed = self._clock.now()

    def flush(self) -> None:
        """Write everything to the run directory."""
        self._lines.flush()
        self._flush_board()
        if self._scratch:
            files.copy_tree(Path(self._scratch.name), self._target)

    def close(self, *, failed: bool = False) -> None:
        if self._wandb:
            self._wandb.finish(exit_code=int(failed))
        self.flush()
        with files.writing(self._folder):
            self._records.close()
        if self._scratch:
            self._scratch.cleanup()


def open_wandb(config: Mapping[str, Any], workdir: AnyPath) -> Any:
    """Open a run at Weights & Biases: the same one at each start, with the id in `wandb.json`."""
    try:
        import wandb
    except ImportError as error:
        raise InputError("wandb_project needs wandb: pip install 'clip-jax-pods[wandb]'") from error
    path = workdir / "wandb.json"
    run_id = read_json(path, advice="Delete it.").get("id") or secrets.token_hex(4)
    files.write_whole(path, json.dumps({"id": run_id}))
    try:
        run = wandb.init(
            project=config["wandb_project"],
            id=run_id,
            resume="allow",
            name=workdir.name,
            config=dict(config),
            dir=None if files.is_remote(workdir) else str(workdir),
        )
    except wandb.Error as error:
        raise InputError(f"wandb: {error} WANDB_MODE=offline logs without a network.") from error
    run.define_metric("*", step_metric="step")  # a resumed run repeats steps
    return run


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
        if patches := self._kind_at(step - 1).max_patches:
            values["tokens"] = patches
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


class Profiler:
    """Trace the steps `first:last` for xprof and TensorBoard, into `<workdir>/profile`."""

    def __init__(self, steps: str | None, workdir: epath.Path) -> None:
        self._first, self._last = profile_range(steps) if steps else (0, 0)
        self._target = workdir / "profile"
        self._scratch: tempfile.TemporaryDirectory | None = None

    def before(self, step: int) -> None:
        """Start the trace at the first step of the range, or where the run resumes within it."""
        if self._scratch is None and self._first <= step <= self._last:
            self._scratch = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._scratch.name)

    def after(self, step: int, outputs: Any) -> bool:
        """Stop after the last step of the range, once it is computed; return True if so."""
        if self._scratch is None or step < self._last:
            return False
        jax.block_until_ready(outputs)
        self.close()
        self._first = self._last = 0
        return True

    def close(self) -> None:
        """Stop a trace that has begun, and write it."""
        if self._scratch:
            jax.profiler.stop_trace()
            files.copy_tree(Path(self._scratch.name), self._target)
            self._scratch.cleanup()
            self._scratch = None


def profile_range(steps: str) -> tuple[int, int]:
    """Parse `10:15` into the first and the last step. Raises InputError if it is malformed."""
    first, _, last = steps.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise InputError(
            f"profile_steps={steps!r} must be FIRST:LAST with 1 <= FIRST <= LAST, such as 10:15."
        )
    return int(first), int(last)


def peak_memory() -> int | None:
    """Return the largest peak of the local devices in bytes; None where it isn't reported (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks, default=None)
