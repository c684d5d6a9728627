"""The model behind all requests: threads prepare inputs, batches are shared by requests."""

import asyncio
import base64
import binascii
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int32

from clip_jax.data.images import ImageError, size_of
from clip_jax.errors import check_ranges
from clip_jax.inference.loading import Model, unit
from clip_jax.inference.predict import check_labels, prompts, ranked
from clip_jax.inference.search import Searcher
from clip_jax.models.images import Images, concatenate, zeros
from clip_jax.models.layers import DType
from clip_jax.serve.batcher import Batcher, Full
from clip_jax.storage.files import AnyPath

MAX_PIXELS = 50_000_000  # pixels of an image; status 413 above
_LABEL_SETS = 64  # sets of labels whose embeddings are cached
_MOST_RESULTS = 1000  # results of a search
_TEXTS = 8  # pending texts per pending image: their rows are small, and labels are many
_LETTERS = 1000  # characters of a text read per token of the context; later ones cannot matter


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve a model over HTTP until SIGTERM or an interrupt."""

    model: AnyPath  # Run directory, RUN@STEP, RUN@best, model folder, or weights in another format.
    embeddings: AnyPath | None = None  # Folder of `clip-jax embed`; adds /search. None: no search.
    host: str = "127.0.0.1"  # Address to serve at; 0.0.0.0 admits other machines.
    port: int = 8000  # Port to serve at.
    # File with a token in its first line, required as Authorization: Bearer TOKEN. None: no token.
    token_file: AnyPath | None = None
    batch_size: int = 64  # Maximum number of rows computed at once; powers of two are compiled.
    queue: int = 512  # Pending images, and 8 × as many texts; status 413 or 429 above.
    dtype: DType = "float32"  # Data type of the computation.
    # Patches per image of a NaFlex model (sequence length). None: as embedded, or the model's own.
    tokens: int | None = None

    def __post_init__(self) -> None:
        check_ranges(
            self, port="[1, 65535]", batch_size="[1, inf)", queue="[1, inf)", tokens="[1, inf)"
        )


class Answer(Exception):
    """An HTTP error: a status and one message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Service:
    """A model and everything that its requests share."""

    def __init__(self, config: ServeConfig, model: Model) -> None:
        self.config, self.model = config, model
        self.searcher = Searcher(model, config.embeddings) if config.embeddings else None
        self.metrics = Metrics(self)
        self.images, self.texts = (
            Batcher(
                self._encoder(name), config.batch_size, capacity,
                self.metrics.batch_size.labels(name).observe,
            )
            for name, capacity in (("image", config.queue), ("text", _TEXTS * config.queue))
        )  # fmt: skip
        self.threads = ThreadPoolExecutor(os.cpu_count(), "prepare")
        self.bytes_waiting = 0
        self._classes: OrderedDict[tuple, Float[np.ndarray, "classes E"]] = OrderedDict()

    def _encoder(self, tower: str) -> Callable[[list[Any]], Float[np.ndarray, "B E"]]:
        encode = getattr(self.model, f"encode_{tower}")
        return lambda rows: unit(encode(concatenate(rows), batch_size=self.config.batch_size))

    def warm_up(self) -> None:
        """Compile all shapes that requests need, so that none waits for a compilation."""
        image = zeros(self.model.image_preprocess.image_spec, 1)
        text = np.zeros((1, self.model.config.text.context_length), np.int32)
        most = self.config.batch_size
        for count in sorted({min(1 << i, most) for i in range(most.bit_length() + 1)}):
            self._encoder("image")([image] * count)
            self._encoder("text")([text] * count)

    def close(self) -> None:
        """Finish pending rows, then end the threads."""
        self.images.close()
        self.texts.close()
        self.threads.shutdown()

    # ------------------------------------------------------------ requests

    async def embed(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return normalised embeddings of `images` and `texts`."""
        values = _only(request, images=[], texts=[])
        if not values["images"] and not values["texts"]:
            raise Answer(400, "give images, a list of base64 strings, or texts, a list of strings.")
        images, texts = await asyncio.gather(
            self.embed_images(values["images"]), self.embed_texts(values["texts"])
        )
        return {"images": images.tolist(), "texts": texts.tolist()}

    async def label(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return for each of `images` all `labels` with probabilities, best first."""
        values = _only(request, images=None, labels=None, template="a photo of a {}.")
        labels, template = _strings(values["labels"], "labels"), values["template"]
        if not isinstance(template, str):
            raise Answer(400, "template must be a string with {} where the label goes.")
        labels = check_labels(labels, template)
        classes, images = await asyncio.gather(
            self._embed_labels(labels, template), self.embed_images(values["images"])
        )
        shares = self.model.probabilities(images, classes)
        return {"images": [{"labels": ranked(labels, row)} for row in shares]}

    async def search(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the embedded images nearest to `text` or `image`."""
        if self.searcher is None:
            raise Answer(404, "this server has no embeddings; start it with --embeddings FOLDER.")
        values = _only(request, text="", image="", top=10)
        text, image, top = values["text"], values["image"], values["top"]
        if type(top) is not int or not 1 <= top <= _MOST_RESULTS:
            raise Answer(400, f"top must be an integer from 1 to {_MOST_RESULTS}.")
        if bool(text) == bool(image):
            raise Answer(400, "search needs either text or image.")
        query = await (self.embed_texts([text]) if text else self.embed_images([image]))
        results = await asyncio.get_running_loop().run_in_executor(
            self.threads, self.searcher.closest, query[0], top
        )
        return {"results": results}

    async def embed_images(self, images: Any) -> Float[np.ndarray, "B E"]:
        """Return normalised embeddings of base64 strings of encoded images."""
        encoded = _strings(images, "images")
        return await self._compute(self.images, self._image, encoded)

    async def embed_texts(self, texts: Any) -> Float[np.ndarray, "B E"]:
        """Return normalised embeddings of texts; texts that are too long are truncated."""
        return await self._compute(self.texts, self._tokens, _strings(texts, "texts"))

    async def _embed_labels(
        self, labels: Sequence[str], template: str
    ) -> Float[np.ndarray, "classes E"]:
        key = (tuple(labels), template)
        if key not in self._classes:
            self._classes[key] = await self.embed_texts(prompts(labels, template))
            while len(self._classes) > _LABEL_SETS:
                self._classes.popitem(last=False)
        self._classes.move_to_end(key)
        return self._classes[key]

    async def _compute(
        self, batcher: Batcher, prepare: Callable[[int, str], Any], items: list[str]
    ) -> Float[np.ndarray, "B E"]:
        if not items:
            return np.empty((0, self.model.config.embed_dim), np.float32)
        if len(items) > batcher.capacity:
            raise Answer(
                413, f"{len(items)} inputs in one request; send at most {batcher.capacity}."
            )
        if len(batcher) + len(items) > batcher.capacity:
            raise Full("the queue is full; retry later.")
        loop = asyncio.get_running_loop()
        work = [loop.run_in_executor(self.threads, prepare, *item) for item in enumerate(items)]
        try:
            rows = await asyncio.gather(*work)
        finally:
            for future in work:
                future.cancel()
        return np.stack(await asyncio.gather(*map(asyncio.wrap_future, batcher.submit(rows))))

    def _image(self, index: int, encoded: str) -> Images:
        try:
            data = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise Answer(400, f"images[{index}] is not base64: {error}.") from error
        try:
            width, height = size_of(data)
            if width * height > MAX_PIXELS:
                raise ImageError("too large", f"{width} x {height} pixels")
            return self.model.image_preprocess.batch(data)
        except ImageError as error:
            status = 413 if error.reason == "too large" else 400
            raise Answer(status, f"images[{index}]: {error}.") from error

    def _tokens(self, index: int, text: str) -> Int32[np.ndarray, "1 L"]:
        most = _LETTERS * self.model.config.text.context_length
        return self.model.tokenize([text[:most]], truncate=True)


def _only(request: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """Return the fields of a request; unknown ones are an error."""
    if unknown := sorted(request.keys() - defaults):
        known = ", ".join(defaults)
        raise Answer(400, f"unknown field {unknown[0]!r:.99}; the fields are {known}.")
    return defaults | request


def _strings(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        raise Answer(400, f"{name} must be a list of strings.")
    try:
        "".join(value).encode()
    except UnicodeEncodeError as error:
        message = f"{name} has an unpaired surrogate, which is no character; remove it."
        raise Answer(400, message) from error
    return value


class Metrics:
    """Prometheus metrics."""

    def __init__(self, service: Service) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "clip_jax_requests", "requests answered", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "clip_jax_request_seconds", "request latency", ["path"],
            buckets=[0.005 * 2**i for i in range(14)], registry=registry,
        )  # fmt: skip
        self.batch_size = Histogram(
            "clip_jax_batch_size", "rows per batch", ["tower"],
            buckets=[2**i for i in range(11)], registry=registry,
        )  # fmt: skip
        waiting = Gauge("clip_jax_waiting", "pending rows", ["tower"], registry=registry)
        waiting.labels("image").set_function(lambda: len(service.images))
        waiting.labels("text").set_function(lambda: len(service.texts))
