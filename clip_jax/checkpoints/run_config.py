"""Read `config.json` of a run directory as a plain dict, with the current names of fields."""

from collections.abc import Callable
from typing import Any

from clip_jax import parts, processes
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import read_json, recover_json


def _rename_remat(config: dict[str, Any]) -> None:
    """Call the saved activations `dots` by their other name, `hidden`."""
    model = config.get("model")
    if isinstance(model, dict) and model.get("remat") == "dots":
        model["remat"] = "hidden"


# Renamed fields of a run's `Config`: path in an older version, and current path, in the same group.
# None: the field was removed and changed no result. A path goes through lists: `evals.pool` is a
# field of each evaluator.
RENAMED: dict[str, str | None] = {}

# Structural changes, applied after the table: each edits the dict, unless it is current already.
UPGRADES: list[Callable[[dict[str, Any]], None]] = [_rename_remat]


def upgrade(config: dict[str, Any]) -> dict[str, Any]:
    """Update the dict of a `config.json` to the current names, in place; return it.

    A dict that has them already is unchanged.
    """
    for old, new in RENAMED.items():
        _rename(config, old.split("."), new and new.rpartition(".")[2])
    for change in UPGRADES:
        change(config)
    return config


def _rename(node: Any, path: list[str], new: str | None) -> None:
    """Give a field a new name in its group; without one, remove it."""
    if isinstance(node, list):
        for each in node:
            _rename(each, path, new)
    elif isinstance(node, dict) and path[0] in node:
        if path[1:]:
            _rename(node[path[0]], path[1:], new)
        else:
            value = node.pop(path[0])
            if new:
                node.setdefault(new, value)


def is_renamed(path: str) -> tuple[bool, str | None]:
    """Say whether a field or its group was renamed, and return the current path.

    The path is None if the field was removed.
    """
    for old, new in RENAMED.items():
        if path == old or path.startswith(old + "."):
            return True, new and new + path[len(old) :]
    return False, path


def read_run_config(workdir: AnyPath, *, recover: bool = False) -> dict[str, Any]:
    """Read a run's `config.json`; {} if there is none. Raises InputError if it is damaged, or needs
    users' modules that were not imported.

    With `recover`, a damaged one counts as missing, and a copy of it is kept.
    """
    path = workdir / "config.json"
    config = recover_json(path, saves=processes.is_lead()) if recover else read_json(path)
    parts.check(config, path)
    return upgrade(config) if config else {}
