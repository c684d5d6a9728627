"""What Orbax and TensorStore are told of s3://. Whether they then save there: tests/contract."""

from unittest import mock

import pytest

from clip_jax.checkpoints import orbax
from clip_jax.errors import InputError


def test_what_tensorstore_needs_to_find_an_object(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    plain = {"driver": "s3", "bucket": "b", "path": "run/state"}
    assert orbax._spec("s3://b/run/state") == plain
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://here")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    elsewhere = {"endpoint": "http://here", "aws_region": "us-east-1"}
    credentials = {"aws_credentials": {"type": "environment"}}
    assert orbax._spec("s3://b/run/state") == plain | elsewhere | credentials


def test_a_version_of_orbax_that_is_built_otherwise_is_named():
    with (
        mock.patch.object(orbax, "_ARRAYS", "json"),
        pytest.raises(InputError, match=r"orbax-checkpoint \S+ does not work with s3:// \(.*json"),
    ):
        orbax.enable.__wrapped__()
