"""Servers for buckets, started once, and an empty bucket for each test."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from clip_jax.storage import bucket as bucket_client
from clip_jax.storage import files
from tests.clock import HandClock
from tests.conftest import ROOT
from tests.contract.servers import Server
from tests.data.conftest import make_pairs

PAIRS = str(ROOT / "configs/pairs.py")
FEW = [  # flags with which training on PAIRS takes seconds
    "--batch-size", "8", "--report-every", "1", "--checkpoint.every-steps", "2",
    "--data.threads", "2", "--optim.warmup-steps", "1", "--model.embed-dim", "16",
    "--model.dtype", "float32", "--model.vision.image-size", "16",
    "--model.vision.patch-size", "8", "--model.vision.width", "16",
    "--model.vision.num-heads", "2", "--model.vision.depth", "1", "--model.text.width", "16",
    "--model.text.num-heads", "2", "--model.text.depth", "1", "--model.text.vocab-size", "600",
]  # fmt: skip


def write_pictures(folder: str, count: int) -> str:
    """Write pictures and their table; return the path of the table."""
    table = "image,caption\n"
    for name, image, _ in make_pairs(count):
        files.write_whole(f"{folder}/{name}", image)
        table += f"{folder}/{name},picture {name}\n"
    files.write_whole(f"{folder}.csv", table)
    return f"{folder}.csv"


@dataclass(frozen=True)
class Bucket:
    """An empty bucket on a server that logs requests, and that tests can make slow or faulty."""

    url: str
    server: Server


@pytest.fixture(scope="session")
def servers() -> Iterator[Callable[[str], Server]]:
    """Return a function that starts the server of a scheme once for all tests of this process."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda scheme: stack.enter_context(Server(scheme)))


_numbers = itertools.count(1)


def _bucket(request: pytest.FixtureRequest, scheme: str) -> Iterator[Bucket]:
    server = request.getfixturevalue("servers")(scheme)
    for name, value in server.environment().items():
        request.getfixturevalue("monkeypatch").setenv(name, value)
    server.behave()
    url = server.make_bucket(f"test-{next(_numbers)}")
    server.requests()
    with mock.patch.object(bucket_client, "CLOCK", HandClock()):  # no answer is ever late
        yield Bucket(url, server)


@pytest.fixture(params=["gs", "s3"])
def bucket(request: pytest.FixtureRequest) -> Iterator[Bucket]:
    """Return an empty bucket; the test runs with each kind of server."""
    yield from _bucket(request, request.param)


@pytest.fixture
def gs(request: pytest.FixtureRequest) -> Iterator[Bucket]:
    """Return an empty bucket on fake-gcs-server."""
    yield from _bucket(request, "gs")


@pytest.fixture
def s3(request: pytest.FixtureRequest) -> Iterator[Bucket]:
    """Return an empty bucket on moto's server."""
    yield from _bucket(request, "s3")


@pytest.fixture(params=["disk", "gs", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the path of a new folder; the test runs with a disk and each kind of bucket."""
    where = tmp_path if request.param == "disk" else request.getfixturevalue(request.param).url
    return f"{where}/some/folder"
