"""A run that two processes evaluate, and a server of it."""

import base64
import json
import signal
import socket

import numpy as np
import pytest

import clip_jax
from clip_jax.cli.commands import main
from clip_jax.inference.loading import unit
from tests.conftest import ROOT
from tests.data.conftest import make_pairs

CLIP_JAX = ("-m", "clip_jax")


def test_a_run_is_evaluated_by_two_processes(one, start):
    launcher = (ROOT / "launch/local.py", "--processes", 2, "--devices", 4)
    two = start(*launcher, "evaluate", one, "--mesh.fsdp", 2, "--json")
    expected = json.loads((one / "result.json").read_text())
    (line,) = [line for line in two.end() if line.startswith("[0] {")]
    found = json.loads(line.removeprefix("[0] "))
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-6)
    assert found.keys() >= {"zero_shot/seen/top1", "zero_shot/seen/top5", "zero_shot/unseen/top1"}


def test_a_server_answers_finishes_what_is_pending_at_sigterm_and_exits(one, start, capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = start(*CLIP_JAX, "serve", one, "--port", port, "--batch-size", 2)
    server.until(f"at http://127.0.0.1:{port}")
    with pytest.raises(ConnectionRefusedError):  # another of this machine's addresses
        socket.create_connection(("127.0.0.2", port))
    assert main(["serve", str(one), "--port", str(port)]) == 2
    assert f"cannot serve at 127.0.0.1:{port}" in capsys.readouterr().err

    _, image, _ = make_pairs(1)[0]
    body = json.dumps({"images": [base64.b64encode(image).decode()]}).encode()
    with (
        socket.create_connection(("127.0.0.1", port)) as idle,
        socket.create_connection(("127.0.0.1", port)) as pending,
    ):
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(4096).startswith(b"HTTP/1.1 200")
        pending.sendall(
            b"POST /embed HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)
        )
        assert pending.recv(4096).startswith(b"HTTP/1.1 100")  # it is read from here on
        server.signal(signal.SIGTERM)
        while idle.recv(4096):  # until the server, which is ending, closes it
            pass
        pending.sendall(body)
        answer = b"".join(iter(lambda: pending.recv(4096), b""))
    server.end()
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    model = clip_jax.load(one)
    expected = unit(model.encode_image(model.preprocess([image])))
    np.testing.assert_allclose(json.loads(content)["images"], expected, atol=1e-5)
