"""Write metrics to a JSONL file, TensorBoard and Weights & Biases."""

import io
import json
import secrets
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_jax.clock import CLOCK, Clock
from clip_jax.errors import InputError
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import Lines, read_json

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
