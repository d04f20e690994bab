"""The app as one ASGI application, and the server around it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from pipeline.app.archives_view import ArchivesView
from pipeline.app.guard import READING, Guard, allowed_hosts
from pipeline.app.labels_view import LabelsView
from pipeline.app.predictions_view import PredictionsView
from pipeline.app.site import STATIC_DIR, Site
from pipeline.app.try_view import TryView
from pipeline.app.workspace import Workspace
from pipeline.pictures.report import category_colour


def create_app(workspace: Workspace, *, host: str = "127.0.0.1") -> Starlette:
    """The application.

    Args:
        workspace: what is looked at.
        host: the address that it is to be reached at.
    """
    site = Site(workspace.name, workspace.categories)
    views = [view(site, workspace) for view in (ArchivesView, LabelsView, PredictionsView, TryView)]
    return Starlette(
        routes=[
            Route("/", _home),
            Route("/colours.css", _colours(workspace.categories)),
            *(route for view in views for route in view.routes()),
            Mount("/static", StaticFiles(directory=STATIC_DIR)),
        ],
        middleware=[Middleware(Guard, token=site.token, hosts=allowed_hosts(host))],
        exception_handlers={HTTPException: _Explained(site), Exception: _Explained(site)},
    )


def serve(workspace: Workspace, *, host: str, listening: socket.socket) -> None:
    """Serve the app until it is interrupted.

    Args:
        workspace: what is looked at.
        host: the address that it is to be reached at.
        listening: from `pipeline.sockets.listen`.
    """
    import uvicorn

    config = uvicorn.Config(create_app(workspace, host=host), log_level="warning")
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def _home(request: Request) -> Response:
    del request
    return RedirectResponse("/archives")


def _colours(categories: Sequence[str]) -> Callable[[Request], Response]:
    """The colours of the categories as a style sheet: `.colour-K` sets `--colour`."""
    rules = [
        f".colour-{label_id} {{ --colour: {category_colour(label_id)}; }}"
        for label_id in range(1, len(categories) + 1)
    ]
    text = "\n".join(rules)

    def answer(request: Request) -> Response:
        del request
        headers = {"Cache-Control": "private, max-age=86400"}
        return Response(text, media_type="text/css", headers=headers)

    return answer


class _Explained:
    """Pages, or answers to scripts, for what no view answers."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def __call__(self, request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 404:
            message = f"{request.url.path}: no such page; choose a view above"
            return self._answer(request, message, 404)
        if isinstance(error, HTTPException):
            return self._answer(request, error.detail, error.status_code)
        message = f"{type(error).__name__}: {error}; this is a bug, the terminal has more"
        return self._answer(request, message, 500)

    def _answer(self, request: Request, message: str, status: int) -> Response:
        """A page; to a script, which posts, what it shows."""
        if request.method not in READING:
            return JSONResponse({"error": message}, status)
        return self._site.error(message, status=status)
