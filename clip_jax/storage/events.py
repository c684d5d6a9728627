"""A log of events that processes on any machines share, in a folder on a disk or in a bucket."""

import json
import secrets
from typing import Any

from clip_jax.storage import files
from clip_jax.storage.json_files import parse

Event = dict[str, Any]  # has a `subject`, a `group` or both; the log adds `number` and `id`


def read(path: str) -> dict[str, Any] | None:
    """Read a JSON object that others write: None if there is no file, {} if it is damaged."""
    try:
        return parse(files.read(path)) or {}
    except (FileNotFoundError, NotADirectoryError):
        return None


class Events:
    """The events in a folder, in the order in which all processes see them.

    Each is a numbered file. Of several processes that create a number, one succeeds.
    """

    def __init__(self, folder: str) -> None:
        self._folder, self.length = folder, 0
        self.newest: dict[str, Event] = {}  # the last event of each subject and group
        self.refresh()

    def refresh(self) -> bool:
        """Read the new events; return whether there were any."""
        before = self.length
        while (event := read(self._path())) is not None:
            self._add(event)
        return self.length > before

    def append(self, event: Event) -> bool:
        """Add an event; False if another process has added one since `refresh`."""
        event = {**event, "number": self.length + 1, "id": secrets.token_hex(8)}
        made = files.create(self._path(), json.dumps(event).encode())
        # A creation whose response was lost was repeated, and met itself.
        if made := made or (read(self._path()) or {}).get("id") == event["id"]:
            self._add(event)
        return made

    def _add(self, event: Event) -> None:
        self.length += 1
        for key in ("subject", "group"):
            if event.get(key):
                self.newest[event[key]] = event

    def _path(self) -> str:
        return f"{self._folder}/{self.length + 1:08d}"
