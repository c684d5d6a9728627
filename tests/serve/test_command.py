"""`clip-jax serve` as a process: under load, killed, ended, and refusing what cannot be.

The slow ones: `pytest -n 0 -m slow tests/serve`.
"""

import random
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from clip_jax.cli import main
from clip_jax.predict import unit
from tests.serve.conftest import encoded, png


def ask_many(client, count, clients, images):
    """Send each of `count` requests once; return statuses and what came back, by number."""

    def ask(i):
        asked = {"images": [encoded(png(i % images))], "texts": [f"number {i}"]}
        return client.ask("/embed", asked, seconds=120)[:2]

    with ThreadPoolExecutor(clients) as threads:
        return list(threads.map(ask, range(count)))


def assert_right(model, answers, images):
    """Every answer is the one to its own question."""
    pictures = unit(model.encode_image(model.preprocess([png(i) for i in range(images)])))
    tokens = model.tokenize([f"number {i}" for i in range(len(answers))], truncate=True)
    texts = unit(model.encode_text(tokens))
    assert [status for status, _ in answers] == [200] * len(answers)
    found = [[content[name][0] for _, content in answers] for name in ("images", "texts")]
    expected = pictures[np.arange(len(answers)) % images]
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    np.testing.assert_allclose(found[1], texts, atol=1e-5)


@pytest.mark.long
def test_a_process_serves_to_this_machine_alone_and_ends_when_asked(run, model, capsys, folder):
    server = run("--batch-size", "4")  # compiles three sizes
    assert_right(model, ask_many(server.client, 60, 8, 10), 10)
    port = server.client.port
    with pytest.raises(ConnectionRefusedError):  # another of this machine's addresses
        socket.create_connection(("127.0.0.2", port), timeout=2)
    assert main(["serve", str(folder / "model"), "--port", str(port)]) == 2
    assert f"cannot serve at 127.0.0.1:{port}" in capsys.readouterr().err
    assert server.end() == 0


def test_without_the_extra_one_message_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "nowhere"]) == 2
    assert "pip install 'clip-jax-pods[serve]'" in capsys.readouterr().err


def test_a_token_file_without_a_token_is_refused(tmp_path, capsys):
    (tmp_path / "token").write_text("\n")
    assert main(["serve", "nowhere", "--token-file", str(tmp_path / "token")]) == 2
    assert "holds no token" in capsys.readouterr().err
    assert main(["serve", "nowhere", "--token-file", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_a_thousand_requests_from_32_clients_are_answered_each_with_its_own(run, model):
    server = run()
    assert_right(model, ask_many(server.client, 1000, 32, 100), 100)
    text = server.client.ask("/metrics")[1]
    assert 'clip_jax_requests_total{path="/embed",status="200"} 1000.0' in text
    assert server.end() == 0


def malformed(rng):
    """Something that is no request, or nearly one."""
    whole = b'{"images": ["%s"], "texts": ["a"]}' % encoded(png(rng.randrange(50))).encode()
    kind = rng.randrange(7)
    if kind == 0:
        return rng.randbytes(rng.randrange(3000))
    if kind == 1:
        return whole[: rng.randrange(len(whole))]
    if kind == 2:
        return b"[" * rng.randrange(1, 200_000)
    if kind == 3:  # an image with wrong bytes
        data = bytearray(png(0))
        for _ in range(rng.randrange(1, 40)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return b'{"images": ["%s"]}' % encoded(bytes(data)).encode()
    if kind == 4:
        return b'{"texts": %s}' % rng.choice([b"1", b"{}", b"null", b"[null]", b"[[]]", b"1e999"])
    if kind == 5:
        return b'{"%s": 1}' % str(rng.random()).encode()
    return b'{"texts": ["' + b"\\u0000\\ud800" * rng.randrange(1, 50) + b'"]}'


@pytest.mark.slow
def test_ten_thousand_malformed_bodies_neither_crash_nor_leak(run, model):
    server = run()

    def ask(seed):
        rng = random.Random(seed)
        path = rng.choice(["/embed", "/label", "/search"])
        return server.client.ask(path, malformed(rng))[0]

    def send(seeds):
        with ThreadPoolExecutor(8) as threads:
            return set(threads.map(ask, seeds))

    statuses = send(range(2000))  # pools and caches fill
    before = server.memory()
    statuses |= send(range(2000, 12_000))
    assert statuses <= {200, 400, 404, 413}  # damaged bytes may still be a picture
    assert server.memory() - before < 32 << 20
    assert_right(model, ask_many(server.client, 20, 4, 10), 10)
    assert server.end() == 0


@pytest.mark.slow
def test_killed_and_started_again_under_load_it_answers_all_who_ask_again(run, model):
    server = run()
    port, ended = server.client.port, threading.Event()
    answers = {}

    def keep_asking(name):
        i = 0
        while not ended.is_set():
            try:
                status, found, _ = server.client.ask("/embed", {"texts": [f"{name} {i}"]})
            except OSError:  # it is not there
                time.sleep(0.05)
                continue
            assert status == 200
            answers[name, i] = found["texts"][0]
            i += 1

    with ThreadPoolExecutor(8) as threads:
        asking = [threads.submit(keep_asking, name) for name in range(8)]
        try:
            for number in (signal.SIGKILL, signal.SIGTERM):
                time.sleep(2)
                before = len(answers)
                code = server.end(number)
                assert code == (0 if number == signal.SIGTERM else -number)
                server = run(port=port)
                time.sleep(2)
                assert len(answers) > before + 8
        finally:
            ended.set()
        for future in asking:
            future.result()
    texts = [f"{name} {i}" for name, i in answers]
    expected = unit(model.encode_text(model.tokenize(texts, truncate=True)))
    np.testing.assert_allclose(list(answers.values()), expected, atol=1e-5)
    assert server.end() == 0


@pytest.mark.slow
def test_what_was_asked_before_sigterm_is_answered(run):
    server = run()
    with ThreadPoolExecutor(16) as threads:
        texts = [f"{i}" for i in range(256)]
        asked = [threads.submit(server.client.ask, "/embed", {"texts": texts}) for _ in range(2)]
        time.sleep(0.2)
        assert server.end() == 0
        assert [future.result()[0] for future in asked] == [200] * 2
