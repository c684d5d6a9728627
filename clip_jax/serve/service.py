"""The model behind all requests: threads prepare inputs, batches are shared by requests."""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int32

from clip_jax.data.images import ImageError, size_of
from clip_jax.errors import check_ranges, shown
from clip_jax.inference.loading import Model, unit
from clip_jax.inference.predict import check_labels, letters_read, ranked
from clip_jax.inference.search import Method, Searcher
from clip_jax.inference.stored import Store
from clip_jax.models.images import Images, concatenate, zeros
from clip_jax.models.layers import DType
from clip_jax.models.templates import PLACEHOLDER, fill
from clip_jax.serve.batcher import Batcher, Full
from clip_jax.storage.files import AnyPath

MAX_PIXELS = 50_000_000  # pixels of an image; status 413 above
_MOST_DECODED = 2 * MAX_PIXELS  # pixels of all images that are decoded at once
MAX_LETTERS = 4 << 20  # characters of all texts of a request that are read; status 413 above
MAX_ANSWER = 128 << 20  # bytes of an answer, estimated; status 413 above
_CACHED = 64 << 20  # bytes of cached embeddings of labels
_MOST_RESULTS = 1000  # results of a search
_TEXTS = 8  # pending texts per pending image: their rows are small, and labels are many
_BYTES_PER_LABEL = 60  # of an answer, beside the label: names of fields and a probability
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve a model over HTTP until SIGTERM or an interrupt."""

    # Run directory, RUN@STEP, RUN@best, model folder, weights in another format, or icons, the
    # bundled model.
    model: AnyPath
    embeddings: AnyPath | None = None  # Folder of `clip-jax embed`; adds /search. None: no search.
    # Type of the stored embeddings that a search compares; int8 and binary take less memory. None:
    # as embedded.
    store: Store | None = None
    index: Method = "exact"  # Search method. exact: all embeddings; usearch: approximate.
    host: str = "127.0.0.1"  # Address to serve at; 0.0.0.0 admits other machines.
    port: int = 8000  # Port to serve at.
    # File with a token in its first line, required as Authorization: Bearer TOKEN. None: no token.
    token_file: AnyPath | None = None
    batch_size: int = 64  # Maximum number of rows computed at once; powers of two are compiled.
    queue: int = 512  # Pending images, and 8 × as many texts; status 413 or 429 above.
    dtype: DType = "float32"  # Data type of the computation.
    # Patches per image of a NaFlex model (sequence length). None: as embedded, or the model's own.
    tokens: int | None = None
    # Number of first channels of embeddings (Matryoshka). None: as embedded, or all.
    dim: int | None = None

    def __post_init__(self) -> None:
        check_ranges(
            self,
            port="[1, 65535]",
            batch_size="[1, inf)",
            queue="[1, inf)",
            tokens="[1, inf)",
            dim="[1, inf)",
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
        self.searcher = None
        if config.embeddings:
            self.searcher = Searcher(model, config.embeddings, config.store, config.index)
        self.metrics = Metrics(self)
        self.images, self.texts = (
            Batcher(
                self._encoder(name),
                config.batch_size,
                capacity,
                self.metrics.batch_size.labels(name).observe,
            )
            for name, capacity in (("image", config.queue), ("text", _TEXTS * config.queue))
        )
        self.threads = ThreadPoolExecutor(os.cpu_count(), "prepare")
        # One body at a time: while it is parsed, it takes many times its size.
        self.parser = ThreadPoolExecutor(1, "parse")
        self.bytes_waiting = 0
        self._pixels, self._decoded = 0, threading.Condition()
        self._classes: OrderedDict[bytes, Float[np.ndarray, "classes E"]] = OrderedDict()

    def _encoder(self, tower: str) -> Callable[[list[Any]], Float[np.ndarray, "B E"]]:
        encode = getattr(self.model, f"encode_{tower}")

        @np.errstate(over="ignore", invalid="ignore")  # `_compute` checks each row
        def compute(rows: list[Any]) -> Float[np.ndarray, "B E"]:
            return unit(encode(concatenate(rows), batch_size=self.config.batch_size))

        return compute

    def warm_up(self) -> None:
        """Compile all shapes that requests need, so that none waits for a compilation."""
        image = zeros(self.model.image_preprocess.image_spec, 1)
        tower = self.model.config.text
        lengths, pad_id = tower.inference_lengths, tower.tokenizer.pad_id
        texts = np.full((len(lengths), tower.context_length), pad_id, np.int32)
        for row, length in zip(texts, lengths, strict=True):
            row[length - 1] = tower.end_of_text_id
        most = self.config.batch_size
        for count in sorted({min(1 << i, most) for i in range(most.bit_length() + 1)}):
            self._encoder("image")([image] * count)
            for text in texts:
                self._encoder("text")([text[None]] * count)

    def close(self) -> None:
        """Finish pending rows, then end the threads."""
        self.images.close()
        self.texts.close()
        self.threads.shutdown()
        self.parser.shutdown()

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
        values = _only(request, images=None, labels=None, template=self.model.template)
        labels, template = _strings(values["labels"], "labels"), values["template"]
        if not isinstance(template, str):
            raise Answer(400, "template must be a string with {} where the label goes.")
        [template] = _strings([template], "template")
        if len(template) > (most := letters_read(self.model)):
            raise Answer(
                413, f"template has {len(template)} characters; the model reads at most {most}."
            )
        labels, encoded = check_labels(labels, template), _strings(values["images"], "images")
        size = len(encoded) * sum(len(label) + _BYTES_PER_LABEL for label in labels)
        if size > MAX_ANSWER:
            raise Answer(
                413,
                f"the answer for {len(encoded)} images and {len(labels)} labels would have "
                f"{size / 2**20:.0f} MiB, more than {MAX_ANSWER / 2**20:g}; send fewer of them.",
            )
        classes, images = await asyncio.gather(
            self._embed_labels(labels, template), self.embed_images(encoded)
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
        return await self._compute(self.images, "images", self._image, encoded)

    async def embed_texts(
        self, texts: Any, template: str = "{}", name: str = "texts"
    ) -> Float[np.ndarray, "B E"]:
        """Return normalised embeddings of texts, each in the template; long ones are truncated."""
        texts, most = _strings(texts, name), letters_read(self.model)
        holes, plain = len(PLACEHOLDER.findall(template)), len(fill(template, ""))
        letters = sum(min(plain + holes * len(text), most) for text in texts)
        if letters > MAX_LETTERS:
            raise Answer(
                413, f"{name} have {letters} characters; send at most {MAX_LETTERS} at once."
            )

        def tokens(_: int, text: str) -> Int32[np.ndarray, "1 L"]:
            return self.model.tokenize([fill(template, text, most)], truncate=True)

        return await self._compute(self.texts, name, tokens, texts)

    async def _embed_labels(
        self, labels: Sequence[str], template: str
    ) -> Float[np.ndarray, "classes E"]:
        key = hashlib.sha256(json.dumps([template, *labels]).encode()).digest()
        classes = self._classes.pop(key, None)
        if classes is None:
            classes = await self.embed_texts(labels, template, "labels")
        self._classes[key] = classes
        while sum(x.nbytes for x in self._classes.values()) > _CACHED:
            self._classes.popitem(last=False)
        return classes

    async def _compute(
        self, batcher: Batcher, name: str, prepare: Callable[[int, str], Any], items: list[str]
    ) -> Float[np.ndarray, "B E"]:
        if not items:
            return np.empty((0, self.model.config.embed_dim), np.float32)
        if len(items) > batcher.capacity:
            raise Answer(
                413, f"{len(items)} {name} in one request; send at most {batcher.capacity}."
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
        futures = map(asyncio.wrap_future, batcher.submit(rows))
        features = np.stack(await asyncio.gather(*futures))
        is_unit = np.linalg.norm(features, axis=1) > 0.5  # NaN is not
        if not is_unit.all():
            raise Answer(
                500,
                f"the model's embedding of {name}[{is_unit.argmin()}] is NaN, infinite or zero, so "
                "nothing can be compared with it; check the weights with clip-jax evaluate.",
            )
        return features

    def _image(self, index: int, encoded: str) -> Images:
        try:
            data = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise Answer(400, f"images[{index}] is not base64: {error}.") from error
        try:
            width, height = size_of(data)
            if width * height > MAX_PIXELS:
                raise ImageError("too large", f"{width} x {height} pixels")
            with self._decoding(width * height):
                return self.model.image_preprocess.batch(data)
        except ImageError as error:
            status = 413 if error.reason == "too large" else 400
            raise Answer(status, f"images[{index}]: {error!s:.200}.") from error

    @contextlib.contextmanager
    def _decoding(self, pixels: int) -> Generator[None]:
        """Wait until so many pixels may be decoded: each takes up to 15 bytes meanwhile."""
        with self._decoded:
            self._decoded.wait_for(lambda: self._pixels + pixels <= _MOST_DECODED)
            self._pixels += pixels
        try:
            yield
        finally:
            with self._decoded:
                self._pixels -= pixels
                self._decoded.notify_all()


def _only(request: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """Return the fields of a request; unknown ones are an error."""
    if unknown := sorted(request.keys() - defaults):
        fields = ", ".join(defaults)
        raise Answer(400, f"unknown field {shown(unknown[0])}; the fields are {fields}.")
    return defaults | request


def _strings(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        raise Answer(400, f"{name} must be a list of strings.")
    if any(map(_SURROGATE.search, value)):
        raise Answer(400, f"{name} has an unpaired surrogate, which is no character; remove it.")
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
            "clip_jax_request_seconds",
            "request latency",
            ["path"],
            buckets=[0.005 * 2**i for i in range(14)],
            registry=registry,
        )
        self.batch_size = Histogram(
            "clip_jax_batch_size",
            "rows per batch",
            ["tower"],
            buckets=[2**i for i in range(11)],
            registry=registry,
        )
        waiting = Gauge("clip_jax_waiting", "pending rows", ["tower"], registry=registry)
        waiting.labels("image").set_function(lambda: len(service.images))
        waiting.labels("text").set_function(lambda: len(service.texts))
