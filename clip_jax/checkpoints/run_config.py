"""Read `config.json` of a run directory as a plain dict, with the current names of fields."""

from collections.abc import Callable
from typing import Any

from clip_jax import parts, processes
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import check_version, read_json, recover_json


def _rename_remat(config: dict[str, Any]) -> None:
    """Call the saved activations `dots` by their other name, `hidden`."""
    model = config.get("model")
    if isinstance(model, dict) and model.get("remat") == "dots":
        model["remat"] = "hidden"


VERSION = 1  # of the format of a run directory; see `check_version`
# Changes of field names and values since older versions: each edits the dict of a run's `Config`,
# unless it is current already.
UPGRADES: list[Callable[[dict[str, Any]], None]] = [_rename_remat]


def upgrade(config: dict[str, Any]) -> dict[str, Any]:
    """Update the dict of a `config.json` to the current names, in place; return it.

    A dict that has them already is unchanged.
    """
    config.pop("version", None)
    for change in UPGRADES:
        change(config)
    return config


def read_run_config(workdir: AnyPath, *, recover: bool = False) -> dict[str, Any]:
    """Read a run's `config.json`; {} if there is none. Raises InputError if it is damaged, is of
    a newer format, or needs users' modules that were not imported.

    With `recover`, a damaged one counts as missing, and a copy of it is kept.
    """
    path = workdir / "config.json"
    config = recover_json(path, saves=processes.is_lead()) if recover else read_json(path)
    check_version(config, VERSION, path)
    parts.check(config, path)
    return upgrade(config) if config else {}
