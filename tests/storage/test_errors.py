"""Buckets that let nobody in, and those that go away: what a command says, and how it ends."""

from unittest import mock

import pytest

from clip_jax.cli import commands
from clip_jax.errors import InputError
from clip_jax.storage.errors import Unreachable, explain


class HttpError(Exception):
    __module__ = "gcsfs.retry"

    def __init__(self, code):
        super().__init__(f"code {code}")
        self.code = code


def of_client(name, module, base=Exception):
    return type(name, (base,), {"__module__": module})


NoCredentialsError = of_client("NoCredentialsError", "botocore.exceptions")
ClientConnectorError = of_client("ClientConnectorError", "aiohttp.client_exceptions", OSError)
GenericError = of_client("GenericError", "obstore.exceptions")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (HttpError(401), InputError),
        (HttpError(403), InputError),
        (HttpError(404), None),
        (HttpError(429), Unreachable),
        (HttpError(503), Unreachable),
        (NoCredentialsError("none"), InputError),
        (PermissionError("Access Denied"), InputError),
        (ClientConnectorError("no route"), Unreachable),
        (GenericError("error sending request"), Unreachable),
        (GenericError("server returned 416 Range Not Satisfiable"), None),
        (ValueError("UNAVAILABLE: Error writing"), Unreachable),
        (ValueError("a bug"), None),
        (OSError("a disk"), None),
    ],
)
def test_what_an_error_means(error, kind):
    said = explain(error, "gs://b/x cannot be written")
    assert type(said) is (type(None) if kind is None else kind)
    assert said is None or str(said).startswith("gs://b/x cannot be written: ")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (Unreachable("gs://b/x: no"), 75, "gs://b/x: no. Saved files are intact."),
        (InputError("gs://b/x: no"), 2, "gs://b/x: no"),
        (HttpError(503), 75, "a bucket cannot be used: HttpError: code 503. Saved files"),
    ],
)
def test_how_a_command_ends(error, code, line, capsys):
    with mock.patch.object(commands, "_run", autospec=True, side_effect=error):
        assert commands.main(["train"]) == code
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"clip-jax: {line}")
