"""What the views share: templates, errors as pages, answers to the scripts."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jinja2
from markupsafe import Markup, escape
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from pipeline.app.opened import MissingError
from pipeline.app.pictures import PictureCache
from pipeline.errors import PipelineError
from pipeline.files import digest, disk_fault
from pipeline.report.inputs import to_float

FOLDER = Path(__file__).resolve().parent
STATIC_DIR = FOLDER / "static"
MAX_BODY_BYTES = 2**20
CANNOT = "This cannot be shown"
VIEWS = {
    "archives": "Archives",
    "labels": "Masks and labels",
    "predictions": "Predictions",
    "try": "Try",
}


class Site:
    """Renders pages and wraps what scripts post.

    Args:
        name: of the workspace.
        categories: names by label id from 1.

    Attributes:
        token: the secret that posts must bring.
        pictures: pictures made so far.
        categories: as given.
    """

    def __init__(self, name: str, categories: Sequence[str]) -> None:
        self.token = secrets.token_urlsafe(24)
        self.pictures = PictureCache()
        self.categories = list(categories)
        self._environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(FOLDER / "templates"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        self._environment.filters["code"] = with_code
        self._environment.globals.update(
            token=self.token,
            workspace=name,
            views=VIEWS,
            static=static_version(),
            colours=digest(self.categories)[:12],
            colour_of={name: number for number, name in enumerate(self.categories, start=1)},
        )

    def page(self, template: str, *, view: str, status: int = 200, **values: Any) -> HTMLResponse:
        """A page of a view."""
        text = self._environment.get_template(f"{template}.html.j2").render(view=view, **values)
        return HTMLResponse(text, status)

    def reading(self, view: str, handler: Callable[[Request], Response]) -> Any:
        """An endpoint whose mistakes of the user are pages."""

        def endpoint(request: Request) -> Response:
            try:
                with disk_faults_named():
                    return handler(request)
            except PipelineError as error:
                title = "Nothing here yet" if isinstance(error, MissingError) else CANNOT
                return self.error(str(error), view=view, status=status_of(error), title=title)

        return endpoint

    def posting(self, handler: Callable[[Mapping[str, Any]], Any]) -> Any:
        """An endpoint that takes a JSON object and answers with one; mistakes are `error` in it."""

        async def endpoint(request: Request) -> Response:
            try:
                body = await read_body(request, MAX_BODY_BYTES)
                with disk_faults_named():
                    return JSONResponse(await run_in_threadpool(handler, _parsed(body)))
            except PipelineError as error:
                return JSONResponse({"error": str(error)}, status_of(error))

        return endpoint

    def error(
        self, message: str, *, status: int, view: str = "", title: str = CANNOT
    ) -> HTMLResponse:
        """A page that says what is wrong and what to do."""
        return self.page("error", view=view, status=status, title=title, message=message)


def with_code(message: str) -> Markup:
    """Text in which what stands between backticks is code."""
    parts = [escape(part) for part in message.split("`")]
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else part
        for number, part in enumerate(parts)
    )


def static_version() -> str:
    """A short text that differs with the scripts and styles."""
    return digest([path.stat().st_mtime_ns for path in sorted(STATIC_DIR.iterdir())])[:12]


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of a request, in memory.

    Raises:
        PipelineError: it is larger than that, or was cut off.
    """
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > max_bytes:
                raise TooLargeError(
                    f"larger than {max_bytes // 2**20} MiB; make it smaller and try again"
                )
    except ClientDisconnect:
        raise PipelineError("the upload was cut off; try again") from None
    return bytes(body)


class TooLargeError(PipelineError):
    """What was sent is larger than allowed."""


class DiskError(PipelineError):
    """The disk does not take or give what a view needs."""


@contextmanager
def disk_faults_named() -> Iterator[None]:
    """Turn an error about the disk into one that names the file and what to do.

    Raises:
        DiskError: in place of it.
    """
    try:
        yield
    except OSError as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        raise DiskError(f"{': '.join(fault)}, then try again") from error


def number(
    values: Mapping[str, str], name: str, default: int, *, least: int = 0, most: int = 2**31
) -> int:
    """A whole number of a query, kept within bounds; the default where it is none."""
    text = values.get(name, "")
    if not (text.isascii() and text.isdigit()):
        return default
    return int(min(max(float(text), least), most))  # of any number of digits


def choice(values: Mapping[str, str], name: str, allowed: Sequence[str]) -> str:
    """A word of a query; the first one allowed where it is none of them."""
    return values.get(name, "") if values.get(name, "") in allowed else allowed[0]


def threshold_of(values: Mapping[str, str]) -> float:
    """The score `threshold` of a query in steps of 0.05, 0 where there is none."""
    value = to_float(values.get("threshold"))
    return 0.0 if math.isnan(value) else round(min(max(value, 0.0), 1.0) * 20) / 20


class Pages:
    """One page of a long list.

    Args:
        total: items of the list.
        size: items of a page.
        page: number from 1; beyond the last one, the last one.
        query: the other values of the address.
    """

    def __init__(self, total: int, size: int, page: int, query: Mapping[str, Any]) -> None:
        self.total = total
        self.count = max(1, -(-total // size))
        self.page = min(max(page, 1), self.count)
        self.start = (self.page - 1) * size
        self.end = min(total, self.start + size)
        self._query = {name: value for name, value in query.items() if value not in ("", None)}

    def link(self, page: int) -> str:
        """The address of another page, relative to this one."""
        return "?" + urlencode({**self._query, "page": page})


def _parsed(body: bytes) -> Mapping[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise PipelineError("the request is no JSON; load the page again") from None
    if not isinstance(content, dict):
        raise PipelineError("the request is no JSON object; load the page again")
    return content


def status_of(error: PipelineError) -> int:
    """The status of an answer that tells an error."""
    if isinstance(error, MissingError):
        return 404
    if isinstance(error, DiskError):
        return 500
    return 413 if isinstance(error, TooLargeError) else 400
