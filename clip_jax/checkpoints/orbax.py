"""Orbax on `s3://`: what it knows to do on `gs://` alone, it does there too.

A bucket has no renames, so on `gs://` Orbax writes a step where it will stay, and last of all a
file that says that it is whole; arrays go through TensorStore's client. TensorStore has one for S3
as well, and the file is a file; only Orbax's own questions are whether a path begins with `gs://`.
Its answers are replaced here, in the one place that has to follow Orbax's versions.
"""

import functools
import importlib
import os
from typing import Any

import orbax.checkpoint as ocp

from clip_jax.errors import InputError

_PREFIX = "s3://"
_PATHS = "orbax.checkpoint._src.path.gcs_utils"
_ARRAYS = "orbax.checkpoint._src.serialization.tensorstore_utils"


@functools.cache
def enable() -> None:
    """Let Orbax save on s3:// and read there. Raises InputError for a version that is built
    otherwise."""
    try:
        paths, arrays = map(importlib.import_module, (_PATHS, _ARRAYS))
        _extend(paths, arrays)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"orbax-checkpoint {ocp.__version__} cannot be led to s3:// ({error}); install the "
            "version that pyproject.toml names, or give a --workdir on gs:// or a disk."
        ) from error


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
    """What TensorStore needs to find an object; of AWS itself it asks for the bucket's region."""
    name, _, path = url.removeprefix(_PREFIX).partition("/")
    spec: dict[str, Any] = {"driver": "s3", "bucket": name, "path": path}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec["endpoint"] = endpoint
        spec["aws_region"] = os.environ.get("AWS_REGION") or "us-east-1"
    if "AWS_ACCESS_KEY_ID" in os.environ:  # else it complains of files that need not be there
        spec["aws_credentials"] = {"type": "environment"}
    return spec
