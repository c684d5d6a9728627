"""Support for `s3://` in Orbax, which supports only `gs://` buckets by itself.

A bucket has no renames, so on `gs://` Orbax writes a step in its final location and, last of all, a
file that marks it as complete; arrays go through TensorStore, which supports S3 as well. Only
Orbax's checks for the prefix `gs://` prevent the same on S3. This module replaces these checks, and
is the only one that depends on Orbax's version. It also limits the programs that Orbax compiles.
"""

import functools
import importlib
import os
from typing import Any

import jax
import orbax.checkpoint as ocp

from clip_jax.errors import InputError

_LEAST_PART = 2**20  # bytes that a replica writes of an array
_PREFIX = "s3://"
_PATHS = "orbax.checkpoint._src.path.gcs_utils"
_ARRAYS = "orbax.checkpoint._src.serialization.tensorstore_utils"


@functools.cache
def enable() -> None:
    """Let Orbax save to and read from s3://. Raises InputError if its version does not allow it."""
    try:
        paths, arrays = map(importlib.import_module, (_PATHS, _ARRAYS))
        _extend(paths, arrays)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"orbax-checkpoint {ocp.__version__} does not work with s3:// ({error}); install the "
            "version that pyproject.toml names, or use a --workdir on gs:// or a disk."
        ) from error


@functools.cache
def write_small_arrays_once() -> None:
    """Let replicas share the writing of large arrays alone.

    Orbax compiles a program for each slice that a replica writes, which takes seconds for a small
    model. A version without this setting lets replicas share the writing of all arrays.
    """
    handler: Any = ocp.type_handlers.get_type_handler(jax.Array)
    handler._min_slice_bytes_for_replica_parallel = _LEAST_PART


def wait_for_cleanup(manager: ocp.CheckpointManager) -> None:
    """Wait until the folders of unfinished saves are deleted, which Orbax does in the background.

    Its `close` does not wait. The thread of a manager that has saved nothing could then delete the
    folder to which the next manager of the same directory is writing. A version without this method
    deletes them before it returns the manager.
    """
    wait = getattr(manager, "_maybe_await_cleanup_tmp_directory", None)
    if wait:
        wait()


def _extend(paths: Any, arrays: Any) -> None:
    spec_of_gs, normal = paths.get_kvstore_for_gcs, arrays._normalize_path
    prefixes, _ = (*paths._GCS_PATH_PREFIX, _PREFIX), arrays._use_gcs_driver  # it has both

    def spec_of(path: str) -> dict[str, Any]:
        return _spec(path) if path.startswith(_PREFIX) else spec_of_gs(path)

    def normalize(path: str) -> str:
        if path.startswith(_PREFIX):
            return _PREFIX + os.path.normpath(path.removeprefix(_PREFIX))
        return normal(path)

    paths._GCS_PATH_PREFIX, paths.get_kvstore_for_gcs = prefixes, spec_of
    arrays._use_gcs_driver, arrays._normalize_path = lambda x: x.startswith(prefixes), normalize


def _spec(url: str) -> dict[str, Any]:
    """Return TensorStore's spec of an object; on AWS, it looks up the bucket's region itself."""
    name, _, path = url.removeprefix(_PREFIX).partition("/")
    spec: dict[str, Any] = {"driver": "s3", "bucket": name, "path": path}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec["endpoint"] = endpoint
        spec["aws_region"] = os.environ.get("AWS_REGION") or "us-east-1"
    if "AWS_ACCESS_KEY_ID" in os.environ:  # else it complains about missing credential files
        spec["aws_credentials"] = {"type": "environment"}
    return spec
