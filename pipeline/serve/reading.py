"""From a request to the bytes of an image, no more of them than are allowed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import NamedTuple

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from pipeline.serve.errors import BAD_REQUEST, TOO_LARGE, Refused

MULTIPART = "multipart/form-data"
MAX_FIELDS = 10
MAX_NAME = 255


class Upload(NamedTuple):
    """An image file as it was sent, and the name that the client gave it, if any."""

    data: bytes
    name: str


async def read_upload(request: Request, max_bytes: int) -> Upload:
    """The image of a request: its body, or the one file of a form.

    Raises:
        Refused: the body is empty or larger than `max_bytes`, of which no more is read, or the form
            is damaged or has not one file.
        ClientDisconnect: the client has gone.
    """
    body = await _read_body(request, max_bytes)
    if not request.headers.get("content-type", "").lower().startswith(MULTIPART):
        return Upload(_some(body), "")
    parser = MultiPartParser(request.headers, _once(body), max_files=1, max_fields=MAX_FIELDS)
    parser.spool_max_size = max_bytes  # never to disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refused(BAD_REQUEST, f"form: {error.message}") from None
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    if len(files) != 1:
        raise Refused(BAD_REQUEST, "form: no file; send one, as curl does with -F image=@photo.jpg")
    name = (files[0].filename or "").replace("\\", "/").rpartition("/")[2]
    return Upload(_some(await files[0].read()), name[:MAX_NAME])


async def _read_body(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(announced, max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(f"more than {max_bytes}", max_bytes)
    return bytes(body)


def _too_large(size: str, max_bytes: int) -> Refused:
    return Refused(TOO_LARGE, f"body: {size} bytes; at most {max_bytes} are read")


def _some(data: bytes) -> bytes:
    if not data:
        raise Refused(BAD_REQUEST, "no image: send it as the body, or as the one file of a form")
    return data


async def _once(data: bytes) -> AsyncGenerator[bytes, None]:
    yield data
