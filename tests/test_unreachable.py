"""Buckets that let nobody in, and those that go away: what a command says, and how it ends."""

import io
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from clip_jax import bucket, cli, files, loading
from clip_jax.refused import Refused
from clip_jax.unreachable import Unreachable, explain
from tests.conftest import ROOT

TINY = (
    "--batch-size 8 --report-every 1 --optim.warmup-steps 1 --model.embed-dim 16 "
    "--model.dtype float32 --model.vision.image-size 16 --model.vision.patch-size 8 "
    "--model.vision.width 16 --model.vision.num-heads 2 --model.vision.depth 1 "
    "--model.text.width 16 --model.text.num-heads 2 --model.text.depth 1 "
    "--model.text.vocab-size 600"
)


def png(number):
    """A picture, another for each number."""
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


class HttpError(Exception):
    __module__ = "gcsfs.retry"

    def __init__(self, code):
        super().__init__(f"code {code}")
        self.code = code


class NoCredentialsError(Exception):
    __module__ = "botocore.exceptions"


class ClientConnectorError(OSError):
    __module__ = "aiohttp.client_exceptions"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (HttpError(401), Refused),
        (HttpError(403), Refused),
        (HttpError(404), None),
        (HttpError(429), Unreachable),
        (HttpError(503), Unreachable),
        (NoCredentialsError("none"), Refused),
        (PermissionError("Access Denied"), Refused),
        (ClientConnectorError("no route"), Unreachable),
        (ValueError("UNAVAILABLE: Error writing"), Unreachable),
        (ValueError("a bug"), None),
        (OSError("a disk"), None),
    ],
)
def test_what_an_error_means(error, kind):
    said = explain(error, "gs://b/x cannot be written")
    assert type(said) is (type(None) if kind is None else kind)
    assert said is None or str(said).startswith("gs://b/x cannot be written: ")


@pytest.fixture
def nobody(bucket, tmp_path, monkeypatch):
    """A bucket, and no credentials on this machine."""
    import gcsfs
    import s3fs

    given = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOOGLE_AUTH_TOKEN_FOR_TESTING")
    for name in (*given, *(["STORAGE_EMULATOR_HOST"] if bucket.server.scheme == "gs" else [])):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    forget(gcsfs, s3fs)
    yield bucket.url
    forget(gcsfs, s3fs)


def forget(gcsfs, s3fs):
    """Clients and credentials that this process remembers."""
    bucket._bucket.cache_clear()
    bucket._may_write.cache_clear()
    gcsfs.GCSFileSystem.clear_instance_cache()
    s3fs.S3FileSystem.clear_instance_cache()


def test_without_credentials_one_line_is_said_at_once(nobody, tmp_path, capsys):
    (tmp_path / "pairs.csv").write_text("image,caption\nx.png,x\n")
    start = time.monotonic()
    assert cli.main(["prepare", str(tmp_path / "pairs.csv"), f"{nobody}/out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"clip-jax: {nobody}/out cannot be written: no credentials. Credential")
    assert time.monotonic() - start < 20


def test_whoever_is_not_let_in_is_told_at_once(bucket, capsys):
    bucket.server.behave(faults={"403": 1.0})
    start = time.monotonic()
    assert cli.main(["evaluate", f"{bucket.url}/run"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("clip-jax: ")
    assert "Credentials come from" in line
    assert time.monotonic() - start < 20


@pytest.mark.slow
def test_a_run_whose_data_go_away_ends_with_75_and_its_checkpoint_is_whole(
    gs, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(bucket, "RETRY_SECONDS", 1)
    bucket._bucket.cache_clear()
    table = "image,caption\n" + "".join(f"{gs.url}/{i}.png,picture {i}\n" for i in range(16))
    files.write_whole(f"{gs.url}/pairs.csv", table)
    for i in range(16):
        files.write_whole(f"{gs.url}/{i}.png", png(i))

    def go_away():
        while not (tmp_path / "checkpoints/2").exists():
            time.sleep(0.02)
        gs.server.behave(faults={"503": 1.0})

    thread = threading.Thread(target=go_away, daemon=True)
    thread.start()
    arguments = (
        f"{ROOT}/configs/pairs.py --workdir {tmp_path} --data.source.path {gs.url}/pairs.csv"
    )
    steps = "--steps 1000000 --checkpoint.every-steps 2 --data.threads 1"
    assert cli.main(["train", *arguments.split(), *steps.split(), *TINY.split()]) == 75
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"clip-jax: {gs.url}/")
    assert "cannot be read: no good answer, however often it was asked" in line
    assert line.endswith("The newest checkpoint is intact.")
    thread.join()
    gs.server.behave()
    params = loading.load(tmp_path).params
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
