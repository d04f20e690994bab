"""The routes of the service.

POST /predict    an image, as the body or as the one file of a form -> COCO JSON; `?labels=png` the
                 label map in its place, `?categories=NAMES` by other names
GET /categories  the names, ids from 1
GET /health      that the network is loaded, and how many requests wait
Any mistake is answered by {"error": REASON}.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.errors import PipelineError
from pipeline.formats.images import ImageError, load_image
from pipeline.inference.coco import category_entries, encode_label_map, object_annotation
from pipeline.inference.photos import PhotoSegmenter
from pipeline.inference.prediction import Prediction
from pipeline.serve.errors import BAD_REQUEST, BUSY, TOO_SLOW, Refused, refused_image
from pipeline.serve.lingering import Lingering
from pipeline.serve.options import Limits, SegmenterSource
from pipeline.serve.queue import Names, PredictionQueue
from pipeline.serve.reading import Upload, read_upload
from pipeline.vocabulary.categories import load_category_set, split_names

PARAMETERS = ("categories", "labels")
MAX_NAMES = 200  # of a request
# Images in memory of requests that wait: those of a batch under way, and of the next one. Of those
# that were given up it is one batch at most, the one under way.
DECODED_BATCHES = 2
RETRY = {"Retry-After": "1"}
CLIENT_GONE = 499
Result = TypeVar("Result")


class Asked(NamedTuple):
    """What a request's query asks for: names, None for the network's own, and the label map."""

    names: Names | None
    as_labels: bool


def make_app(segmenter: PhotoSegmenter, source: SegmenterSource, limits: Limits) -> Starlette:
    """The ASGI application of a worker.

    Args:
        segmenter: what `source` loaded.
        source: gives it other names.
        limits: what it takes on.
    """
    service = Service(segmenter, source, limits)
    return Starlette(
        routes=[
            Route("/predict", service.predict, methods=["POST"]),
            Route("/categories", service.categories, methods=["GET"]),
            Route("/health", service.health, methods=["GET"]),
        ],
        middleware=[Middleware(Lingering)],
        exception_handlers={
            HTTPException: _http_error,
            Refused: _refused,
            ClientDisconnect: _gone,
            Exception: _internal_error,
        },
    )


class Service:
    """The handlers, and the network that they share."""

    def __init__(self, segmenter: PhotoSegmenter, source: SegmenterSource, limits: Limits) -> None:
        self._queue = PredictionQueue(segmenter, source, batch_size=limits.batch_size)
        self._limits = limits
        self._decoded = asyncio.Semaphore(DECODED_BATCHES * limits.batch_size)
        self._waiting = 0

    async def health(self, request: Request) -> Response:
        """200 as soon as the network is loaded."""
        del request
        return JSONResponse({"status": "ok", "waiting": self._waiting})

    async def categories(self, request: Request) -> Response:
        """The names that are asked for where a request has none."""
        del request
        return JSONResponse({"categories": category_entries(self._queue.segmenter.categories)})

    async def predict(self, request: Request) -> Response:
        """The objects or the label map of an image."""
        asked = _asked(request)
        limits = self._limits
        deadline = asyncio.get_running_loop().time() + limits.timeout_s
        with self._admitted():
            upload = await _before(
                deadline,
                read_upload(request, limits.max_bytes),
                Refused(TOO_SLOW, f"body: not received within {limits.timeout_s:g} s"),
            )
            return await _before(
                deadline,
                self._answer(request, upload, asked),
                Refused(BUSY, f"no answer within {limits.timeout_s:g} s"),
            )

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """Count a request as waiting, unless there are too many."""
        if self._waiting >= self._limits.max_waiting:
            raise Refused(BUSY, f"{self._waiting} requests wait already")
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    async def _answer(self, request: Request, upload: Upload, asked: Asked) -> Response:
        async with self._decoded:
            if await request.is_disconnected():
                raise ClientDisconnect
            image = await asyncio.to_thread(self._decode, upload.data)
            prediction = await self._queue.predict(image, asked.names)
        if asked.as_labels:
            data = await asyncio.to_thread(encode_label_map, prediction)
            return Response(data, media_type="image/png")
        return await asyncio.to_thread(_coco, image, prediction, upload.name)

    def _decode(self, data: bytes) -> Image.Image:
        try:
            return load_image(data, max_pixels=self._limits.max_pixels)
        except ImageError as error:
            raise refused_image(error) from None


async def _before(deadline: float, work: Awaitable[Result], otherwise: Refused) -> Result:
    """What some work gives, by a time of the loop's clock."""
    try:
        async with asyncio.timeout_at(deadline):
            return await work
    except TimeoutError:
        raise otherwise from None


def _asked(request: Request) -> Asked:
    """What the query asks for.

    Raises:
        Refused: an unknown parameter, or a value that is none; it is named.
    """
    for name in request.query_params:
        if name not in PARAMETERS:
            raise Refused(BAD_REQUEST, f"?{name}: unknown; there are {', '.join(PARAMETERS)}")
    labels = request.query_params.get("labels")
    if labels not in (None, "png"):
        raise Refused(BAD_REQUEST, f"?labels={labels}: expected png")
    return Asked(_names(request.query_params.get("categories")), labels == "png")


def _names(text: str | None) -> Names | None:
    if text is None:
        return None
    try:
        names = load_category_set(split_names(text, "?categories"), field="?categories")
    except PipelineError as error:
        raise Refused(BAD_REQUEST, str(error)) from None
    if len(names) > MAX_NAMES:
        raise Refused(BAD_REQUEST, f"?categories: {len(names)} names; at most {MAX_NAMES}")
    return tuple(names)


def _coco(image: Image.Image, prediction: Prediction, name: str) -> Response:
    """COCO JSON of one image."""
    entry = {"id": 1, "file_name": name, "width": image.width, "height": image.height}
    annotations = [
        object_annotation(instance, annotation_id=number, image_id=1)
        for number, instance in enumerate(prediction.instances, start=1)
    ]
    categories = category_entries(prediction.categories)
    return JSONResponse({"images": [entry], "annotations": annotations, "categories": categories})


def _error(status: int, reason: str, headers: Any = None) -> Response:
    return JSONResponse({"error": reason}, status_code=status, headers=headers)


def _refused(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, Refused)
    return _error(error.status, error.reason, RETRY if error.status == BUSY else None)


def _http_error(request: Request, error: Exception) -> Response:
    """Another path (404) or method (405)."""
    assert isinstance(error, HTTPException)
    reason = f"{request.method} {request.url.path}: {error.detail}"
    return _error(error.status_code, reason, error.headers)


def _gone(request: Request, error: Exception) -> Response:
    """The client does not wait for an answer; nobody reads this one."""
    del request, error
    return Response(status_code=CLIENT_GONE)


def _internal_error(request: Request, error: Exception) -> Response:
    """A bug; the server's log has its traceback, the client is not shown it."""
    del request, error
    return _error(500, "internal error")
