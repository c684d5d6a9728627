"""The index of tars, built before a run needs it, by as many machines as one likes."""

from typing import Any

from clip_jax.data.sources.shards import BadShards
from clip_jax.data.sources.tar_index import open_index
from clip_jax.errors import InputError, read_part


def index(source: str, part: str, bad_shards: BadShards) -> dict[str, Any]:
    """Read the headers of this part's shards, kept beside them; what is there is not read again.

    Returns the number of shards and samples, 0 as long as other parts are missing.
    """
    if not source.endswith(".tar"):
        raise InputError(f"{source} needs no index: only tars (data/*.tar) have one")
    shards = open_index(source, "", bad_shards, read_part(part), wait=False)
    if shards is None:
        return {"shards": 0, "samples": 0}
    return {"shards": len(shards.paths), "samples": len(shards.places)}


def describe(result: dict[str, Any]) -> str:
    """Say it in words."""
    if not result["shards"]:
        return "this part is indexed; others are missing still"
    return f"{result['samples']:,} samples in {result['shards']:,} shards are indexed"
