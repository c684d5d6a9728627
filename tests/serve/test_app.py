"""What the server answers: the model's numbers, or one message with its status."""

import asyncio
import dataclasses
import random
import re
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
import uvicorn
from starlette.datastructures import URL
from starlette.requests import Request
from uvicorn.server import ServerState

from clip_jax.data.images import Preprocess
from clip_jax.evals import prompts
from clip_jax.evals.evaluator import compiled, embed_images
from clip_jax.inference.loading import Model, load, unit
from clip_jax.inference.predict import PredictConfig, predict
from clip_jax.inference.search import Searcher
from clip_jax.serve import app, service
from clip_jax.serve.app import HEADER_SECONDS, Protocol, build
from clip_jax.serve.batcher import Batcher
from tests.clock import HandClock
from tests.conftest import NAFLEX, write_tiny_model
from tests.serve.conftest import Client, encoded, png


@pytest.fixture
def client(start, folder, monkeypatch):
    monkeypatch.setattr(app, "MAX_BODY", 104_858)
    monkeypatch.setattr(service, "MAX_PIXELS", 10_000)
    return start(embeddings=folder / "embeddings")


def test_embeddings_are_the_models(client, model):
    pictures, texts = [png(1), png(2, 31, 17)], ["a cat", "the number seven " * 4_000, ""]
    with mock.patch.object(Model, "tokenize", autospec=True, side_effect=Model.tokenize) as read:
        status, found, _ = client.ask(
            "/embed", {"images": [encoded(x) for x in pictures], "texts": texts}
        )
    assert status == 200
    longest = max(len(call.args[1][0]) for call in read.call_args_list)
    assert longest == 100 * model.config.text.context_length < len(texts[1])
    images = unit(model.encode_image(model.preprocess(pictures)))
    words = unit(model.encode_text(model.tokenize(texts, truncate=True)))
    np.testing.assert_allclose(found["images"], images, atol=1e-6)
    np.testing.assert_allclose(found["texts"], words, atol=1e-6)


def test_labels_are_predicts(client, folder):
    labels = ["a cat", "seven", "red", "seven"]
    images = [folder / "photos/0.png", folder / "photos/3.png"]
    asked = {"images": [encoded(path.read_bytes()) for path in images], "labels": labels}
    for _ in range(2):  # the second time the labels are known
        status, found, _ = client.ask("/label", asked)
        assert status == 200
        config = PredictConfig(model=folder / "model", images=tuple(images), labels=tuple(labels))
        for ours, theirs in zip(predict(config), found["images"], strict=True):
            assert len(ours["labels"]) == 3  # each once
            for a, b in zip(ours["labels"], theirs["labels"], strict=True):
                assert a["label"] == b["label"]
                assert a["probability"] == pytest.approx(b["probability"], abs=1e-6)
    assert client.ask("/label", asked | {"labels": prompts.class_names("imagenet1k")})[0] == 200
    other = client.ask("/label", asked | {"template": "no {} at all"})[1]
    assert other["images"] != found["images"]


def test_search_is_searchs_and_needs_embeddings(start, client, model, folder):
    status, found, _ = start().ask("/search", {"text": "a"})
    assert status == 404
    assert "--embeddings" in found["error"]
    searcher = Searcher(model, folder / "embeddings")
    status, found, _ = client.ask("/search", {"text": "a red bicycle", "top": 3})
    assert status == 200
    expected = searcher.search("a red bicycle", 3)
    assert [x["key"] for x in found["results"]] == [x["key"] for x in expected]
    status, found, _ = client.ask("/search", {"image": encoded(png(4)), "top": 1})
    assert found["results"][0]["key"].endswith("4.png")
    assert found["results"][0]["similarity"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/embed", b"{", 400, "not JSON"),
        ("/embed", b"\xff\xfe\x00", 400, "not JSON"),
        ("/embed", b"[" * 50_000, 400, "not JSON"),
        ("/embed", b"[]", 400, "a JSON object"),
        ("/embed", b"", 400, "not JSON"),
        ("/embed", {}, 400, "give images"),
        ("/embed", {"image": "x"}, 400, "unknown field 'image'; the fields are images, texts"),
        ("/embed", {"texts": "a cat"}, 400, "texts must be a list of strings"),
        ("/embed", {"texts": [1]}, 400, "texts must be a list of strings"),
        ("/embed", b'{"texts": ["\\ud800"]}', 400, "no character"),
        ("/embed", {"images": ["%%%"]}, 400, "images[0] is not base64"),
        ("/embed", {"images": [encoded(b"text")]}, 400, "images[0]: not an image"),
        ("/embed", {"images": [encoded(png(0)[:200])]}, 400, "images[0]: truncated"),
        ("/embed", {"images": [encoded(png(0, 200, 100))]}, 413, "too large: 200 x 100 pixels"),
        ("/embed", {"texts": ["x" * 200_000]}, 413, "longer than 0.1 MiB"),
        ("/embed", {"texts": ["x"] * 5000}, 413, "at most 4096"),
        ("/embed", {"images": ["x"] * 600}, 413, "at most 512"),
        ("/label", {"images": [], "labels": []}, 400, "give at least one label"),
        ("/label", {"images": [], "labels": ["a"], "template": "b"}, 400, "has no {}"),
        ("/label", {"images": [], "labels": ["a"], "template": 1}, 400, "template must be"),
        ("/search", {"text": "a", "image": "b"}, 400, "either text or image"),
        ("/search", {"text": "a", "top": 0}, 400, "from 1 to 1000"),
        ("/search", {"text": 5}, 400, "texts must be a list of strings"),
        ("/embed", b'{"texts": NaN}', 400, "NaN is no number in JSON"),
        ("/embed", b'{"texts": ["a"], "texts": ["b"]}', 400, "a field occurs twice"),
        ("/embed", {"x" * 50_000: 1}, 400, "unknown field 'xxx"),
        ("/label", {"images": [], "labels": ["x" * 50_000, " "]}, 400, "labels=['xxx"),
        ("/label", {"images": [], "labels": ["a"], "template": "x" * 999}, 400, "template='xxx"),
        ("/label", {"images": [], "labels": ["a"], "template": "{}" * 501}, 413, "at most 1000"),
        ("/label", b'{"labels": ["a"], "template": "{}\\ud800"}', 400, "template has an unpaired"),
        ("/nothing", {}, 404, "use /embed, /label, /search"),
        ("/embed/", {}, 404, "use /embed, /label, /search"),
        ("/embed", None, 405, "use POST"),
    ],
)
def test_what_is_wrong_is_one_message(client, path, body, status, says):
    got, found, _ = client.ask(path, body)
    assert (got, list(found)) == (status, ["error"])
    assert says in found["error"]
    assert "Traceback" not in found["error"]
    assert len(found["error"]) < 300
    assert client.service.bytes_waiting == 0


def test_malformed_bodies_get_messages_and_leave_nothing_behind(client):
    """Requests of an image, cut short or with other bytes in a few places."""
    rng, statuses = random.Random(0), set()
    for number in range(200):
        data = bytearray(b'{"images": ["%s"]}' % encoded(png(0)).encode())
        for _ in range(rng.randrange(1, 40)):
            data[rng.randrange(len(data))] = rng.choice(data)
        end = rng.choice([len(data), rng.randrange(len(data))])
        path = ("/embed", "/label", "/search")[number % 3]
        statuses.add(client.ask(path, bytes(data[:end]))[0])
    assert 400 in statuses <= {200, 400, 413}  # changed bytes may still be a picture
    assert client.service.bytes_waiting == 0


def test_what_is_too_much_at_once_is_429(start, monkeypatch):
    monkeypatch.setattr(app, "MAX_WAITING", 1_000)
    client = start(queue=2)
    with mock.patch.object(Batcher, "__len__", return_value=16):  # 8 times as many texts
        status, found, headers = client.ask("/embed", {"texts": ["a"]})
        assert (status, headers["retry-after"]) == (429, "1")
        assert "full" in found["error"]
        assert 'clip_jax_waiting{tower="text"} 16.0' in client.ask("/metrics")[1]
    assert client.ask("/embed", {"texts": ["x" * 2000]})[0] == 429
    wide = '{"texts": ["%s😀"]}' % ("x" * 400)  # four bytes a character in memory
    assert client.ask("/embed", wide.encode())[0] == 429
    assert client.ask("/embed", {"texts": ["x"]})[0] == 200


def test_a_body_that_is_too_long_and_a_client_that_left(client):
    expecting = {"content-length": "163840", "expect": "100-continue"}
    for pieces, headers, unread in ((40, {}, 0), (40, expecting, 40), (2000, {}, 1871)):
        body = [b" " * 4096] * pieces  # read on for a while, or the connection is reset
        assert (asyncio.run(client.call("/embed", body, headers))[0], len(body)) == (413, unread)
    left = {"type": "http.disconnect"}
    assert asyncio.run(client.call("/embed", [b"{"], whole=False, then=left))[0] == 499
    assert client.ask("/embed", {"texts": ["a"]})[0] == 200
    assert client.service.bytes_waiting == 0


def test_a_body_that_stalls_counts_as_pending_until_its_time_is_over(start, monkeypatch):
    """Bodies that never end would fill the memory: those of 60 clients took 1.4 GB."""
    monkeypatch.setattr(app, "MAX_WAITING", 1_000)
    clock = HandClock()
    client = Client(start().service, clock=clock)

    async def both():
        stalled = asyncio.ensure_future(client.call("/embed", [b" " * 900], whole=False))
        while client.service.bytes_waiting < 900:
            await asyncio.sleep(0)
        refused = await client.call("/embed", [b" " * 101])
        clock.advance(app.BODY_SECONDS)
        return refused, await stalled

    (status, found, headers), stalled = asyncio.run(both())
    assert (status, headers["retry-after"]) == (429, "1")
    assert "too many pending" in found["error"]
    assert stalled[0] == 408
    assert client.service.bytes_waiting == 0
    assert client.ask("/embed", {"texts": ["a"]})[0] == 200


@pytest.mark.parametrize(
    ("limit", "path", "body", "says"),
    [
        ((app, "_MOST_VALUES", 50), "/embed", {"images": [{}] * 30}, "more than 50 values"),
        ((service, "MAX_LETTERS", 50), "/embed", {"texts": ["x" * 26] * 2}, "texts have 52"),
        (
            (service, "MAX_LETTERS", 50),
            "/label",
            {"images": [], "labels": ["x" * 11, "y" * 12], "template": "-{}-{}-"},
            "labels have 52",
        ),
        (
            (service, "MAX_ANSWER", 400),
            "/label",
            {"images": ["", "", ""], "labels": ["x" * 80]},
            "3 images and 1 labels",
        ),
    ],
)
def test_a_small_request_for_much_work_is_413(client, monkeypatch, limit, path, body, says):
    """Few bytes may ask for many texts, or for an answer, that the memory does not hold."""
    monkeypatch.setattr(*limit)
    status, found, _ = client.ask(path, body)
    assert status == 413
    assert says in found["error"]


def test_cached_embeddings_of_labels_have_a_limit(client, model, monkeypatch):
    """Or clients that send other labels each time would fill the memory."""
    monkeypatch.setattr(service, "_CACHED", 3 * 4 * model.config.embed_dim)
    for labels in (["a", "b"], ["c"], ["d"], ["e"]):
        assert client.ask("/label", {"images": [], "labels": labels})[0] == 200
    assert [len(x) for x in client.service._classes.values()] == [1, 1, 1]


def test_a_forged_host_runs_no_other_path(client):
    """The URL of a request, unlike its path, also depends on its header `Host`."""
    forged = mock.PropertyMock(return_value=URL("http://x/label?/embed"))
    with mock.patch.object(Request, "url", forged):
        status, found, _ = client.ask("/embed", {"texts": ["a"]}, {"Host": "x/label?"})
    assert (status, len(found["texts"])) == (200, 1)
    assert '{path="/embed",status="200"} 1.0' in (text := client.ask("/metrics")[1])
    assert 'path="/label"' not in text


def test_a_bug_is_counted(client):
    with (
        mock.patch.object(service.Service, "embed", autospec=True, side_effect=KeyError),
        pytest.raises(KeyError),  # Starlette raises it again, for the log
    ):
        client.ask("/embed", {})
    assert '{path="/embed",status="500"} 1.0' in client.ask("/metrics")[1]
    assert client.service.bytes_waiting == 0


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (3e38, "embedding of texts[0] is NaN, infinite or zero"),  # projections overflow
        (1e25, "embedding of texts[0] is NaN, infinite or zero"),  # only their length overflows
    ],
)
def test_an_embedding_that_is_not_finite_is_an_error(folder, model, scale, says):
    """JSON has no NaN, and a zero vector would be equally similar to everything."""
    params = model.params | {"text": model.params["text"] | {}}
    projection = params["text"]["text_projection"]
    params["text"]["text_projection"] = jax.tree.map(lambda x: x * scale, projection)
    config = service.ServeConfig(model=folder / "model")
    client = Client(service.Service(config, dataclasses.replace(model, params=params)))
    status, found, _ = client.ask("/embed", {"texts": ["a"]})
    assert (status, list(found)) == (500, ["error"])
    assert says in found["error"]
    assert '{path="/embed",status="500"} 1.0' in client.ask("/metrics")[1]
    client.service.close()


def test_a_probability_that_is_not_finite_is_an_error(folder, model):
    params = model.params | {"logit_scale": np.float32(100)}  # infinite after exp
    config = service.ServeConfig(model=folder / "model")
    client = Client(service.Service(config, dataclasses.replace(model, params=params)))
    with np.errstate(all="ignore"):
        status, found, _ = client.ask("/label", {"images": [encoded(png(0))], "labels": ["a", "b"]})
    assert status == 500
    assert "NaN or infinite" in found["error"]
    assert '{path="/label",status="500"} 1.0' in client.ask("/metrics")[1]
    client.service.close()


def test_a_connection_whose_headers_come_too_slowly_is_closed():
    loop, transport = mock.MagicMock(), mock.MagicMock(spec=asyncio.Transport)
    connection = Protocol(uvicorn.Config(build), ServerState(), {}, loop)
    connection.connection_made(transport)
    connection.data_received(b"GET /health HTTP/1.1\r\n")
    connection.data_received(b"Host: ")  # each of them no reason to wait longer
    loop.call_later.assert_called_once_with(HEADER_SECONDS, transport.close)
    connection.data_received(b"x\r\n\r\n")
    loop.call_later.return_value.cancel.assert_called_once_with()
    loop.create_task.call_args.args[0].close()  # of the request


def test_a_connection_that_does_not_read_its_answer_is_closed():
    """Its answer would stay in memory."""
    loop, transport = mock.MagicMock(), mock.MagicMock(spec=asyncio.Transport)
    connection = Protocol(uvicorn.Config(build), ServerState(), {}, loop)
    connection.connection_made(transport)
    loop.call_later.reset_mock()
    connection.pause_writing()
    connection.resume_writing()
    connection.pause_writing()  # a little was read: no reason to wait longer
    loop.call_later.assert_called_once_with(app.ANSWER_SECONDS, transport.abort)
    connection.on_response_complete()
    loop.call_later.return_value.cancel.assert_called_once_with()


def test_headers_that_are_too_long_are_an_error():
    loop, transport = mock.MagicMock(), mock.MagicMock(spec=asyncio.Transport)
    transport.is_closing.return_value = False
    connection = Protocol(uvicorn.Config(build), ServerState(), {}, loop)
    connection.connection_made(transport)
    connection.data_received(b"GET /health HTTP/1.1\r\nX: " + b"x" * 70_000)
    assert transport.write.call_args_list[0].args[0].startswith(b"HTTP/1.1 400")
    transport.close.assert_called_once_with()


def test_an_answer_counts_as_pending_until_it_is_read(client, monkeypatch):
    monkeypatch.setattr(app, "_PIECE", 10)
    answer, pending, sent = app._Answered({"a": "x" * 40}, client.service), [], []

    async def send(message):
        pending.append(client.service.bytes_waiting)
        sent.append(message.get("body", b""))

    asyncio.run(answer({}, None, send))
    assert b"".join(sent) == answer.body
    assert max(map(len, sent)) == 10
    assert pending == [len(answer.body)] * 7
    assert client.service.bytes_waiting == 0


def test_the_largest_image_that_is_accepted_can_be_decoded():
    """Else it would wait forever."""
    assert 0 < service.MAX_PIXELS <= service._MOST_DECODED


def test_pixels_that_are_decoded_at_once_have_a_limit(client, monkeypatch):
    """Or as many large images as the machine has cores would be in memory."""
    monkeypatch.setattr(service, "_MOST_DECODED", 639)
    images, pixels, batch = [encoded(png(i)) for i in range(6)], [], Preprocess.batch

    def decoded(preprocess, data):
        pixels.append(client.service._pixels)
        return batch(preprocess, data)

    with mock.patch.object(Preprocess, "batch", autospec=True, side_effect=decoded):
        assert client.ask("/embed", {"images": images})[0] == 200
    assert pixels == [320] * 6


def test_a_token_opens_everything_but_health(start):
    client = start(token="secret")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        for path, body in (("/embed", {"texts": ["a"]}), ("/metrics", None)):
            status, found, answered = client.ask(path, body, headers)
            assert (status, answered["www-authenticate"]) == (401, "Bearer")
            assert "token" in found["error"]
    right = {"Authorization": "Bearer secret"}
    assert client.ask("/embed", {"texts": ["a"]}, right)[0] == 200
    assert client.ask("/metrics", None, right)[0] == 200
    assert client.ask("/health")[0] == 200


def test_metrics_count_requests_and_batches(client):
    client.ask("/embed", {"texts": ["a", "b"]})
    client.ask("/embed", b"{")
    text = client.ask("/metrics")[1]
    for line in (
        r'clip_jax_requests_total\{path="/embed",status="200"\} 1\.0',
        r'clip_jax_requests_total\{path="/embed",status="400"\} 1\.0',
        r'clip_jax_batch_size_sum\{tower="text"\} 2\.0',
        r'clip_jax_request_seconds_count\{path="/embed"\} 2\.0',
    ):
        assert re.search(line, text), line


def test_images_of_mixed_shapes_are_batched_at_one_length(tmp_path):
    """Of a NaFlex model, alone and together; nothing is compiled after the warm-up."""
    write_tiny_model(tmp_path, config=NAFLEX)
    model = load(tmp_path, tokens=30)
    served = service.Service(service.ServeConfig(model=tmp_path, batch_size=4), model)
    client = Client(served)
    served.warm_up()
    shapes = [(20, 60), (60, 20), (90, 30), (7, 7), (1, 40), (64, 48)]
    pictures = [png(i, *shape) for i, shape in enumerate(shapes)]
    encode: Any = compiled(embed_images, model.clip, model._mesh, normalize=False)
    assert (before := encode._cache_size())
    status, found, _ = client.ask("/embed", {"images": [encoded(x) for x in pictures]})
    assert status == 200
    alone = [client.ask("/embed", {"images": [encoded(x)]})[1]["images"][0] for x in pictures]
    assert encode._cache_size() == before
    expected = unit(model.encode_image(model.preprocess(pictures)))
    assert np.abs(expected - expected[0]).max(axis=1)[1:].min() > 1e-3
    np.testing.assert_allclose(found["images"], expected, atol=1e-6)
    np.testing.assert_allclose(alone, expected, atol=1e-6)
    health = {"status": "ok", "model": str(tmp_path), "tokens": 30, "embed_dim": 16}
    assert client.ask("/health")[1] == health
    served.close()


def test_health_names_the_image_size_of_a_fixed_resolution(client, model):
    health = client.ask("/health")[1]
    assert health["image_size"] == model.config.vision.image_size
    assert "tokens" not in health
