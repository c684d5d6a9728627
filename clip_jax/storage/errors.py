"""Interpret errors of bucket clients: access is denied, or the bucket is unreachable."""

import contextlib
import re
import traceback
from collections.abc import Generator

from clip_jax.errors import InputError

LOGIN = (
    "Credentials come from `gcloud auth application-default login` or the machine for gs://, from "
    "AWS_ACCESS_KEY_ID or ~/.aws for s3://."
)

_CLIENTS = ("obstore", "gcsfs", "s3fs", "botocore", "aiobotocore", "aiohttp", "google", "requests")
_NOT_LET_IN = re.compile("Unauthenticated|PermissionDenied|Credential|RefreshError")
_AWAY = re.compile("Connect|Timeout|Disconnected|Transport|Payload|Proxy")
_REFUSAL = re.compile(r"\b4\d\d [A-Z]")  # a response that a retry would not change
OUT_OF_REACH = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")  # in TensorStore's messages


class Unreachable(Exception):
    """A bucket did not respond to any retry; the run itself is fine and can be resumed."""


def explain(error: BaseException, what: str) -> InputError | Unreachable | None:
    """Return the meaning of an error from a bucket; None for any other error.

    A PermissionError, which clients raise too, counts as one of theirs.
    """
    name, code = type(error).__name__, str(getattr(error, "code", ""))
    if any(word in str(error) for word in OUT_OF_REACH):
        return Unreachable(f"{what}: {summary(error)}")
    if not of_client(error) and not isinstance(error, PermissionError):
        return None
    if "NoSuchBucket" in str(error):
        return InputError(f"{what}: there is no such bucket; correct its name.")
    refused = code in ("401", "403") or str(error).startswith("Forbidden")  # gcsfs' OSError
    if refused or isinstance(error, PermissionError) or _NOT_LET_IN.search(name):
        return InputError(f"{what}: {summary(error)}. {LOGIN}")
    if name == "GenericError" and not _REFUSAL.search(str(error)):
        return Unreachable(f"{what}: no good answer in spite of retries. {summary(error)}")
    if code == "429" or code.startswith("5") or _AWAY.search(name):
        return Unreachable(f"{what}: {summary(error)}")
    return None


@contextlib.contextmanager
def explained() -> Generator[None]:
    """Convert a client's errors in the block to InputError or Unreachable."""
    try:
        yield
    except Exception as error:
        if of_client(error) and (meaning := explain(error, "a bucket cannot be used")):
            raise meaning from error
        raise


def of_client(error: BaseException) -> bool:
    """Return whether an error comes from a bucket's client, by its class or where it was raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1:]
    names = [type(error).__module__, *(frame.f_globals.get("__name__", "") for frame in frames)]
    return any(name.partition(".")[0] in _CLIENTS for name in names)


def summary(error: BaseException) -> str:
    """Return an error's class and the first line of its message."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first:.300}"
