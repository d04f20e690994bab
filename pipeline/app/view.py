"""What every view of the app begins with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from pipeline.app.site import Site
from pipeline.app.workspace import Workspace

Handler = Callable[[Request], Response]
Action = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class View:
    """One view: pages with their pictures, and perhaps actions.

    Args:
        site: what the views share.
        workspace: what is looked at.

    Attributes:
        name: its key in `VIEWS`.
    """

    name: ClassVar[str]

    def __init__(self, site: Site, workspace: Workspace) -> None:
        self._site = site
        self._workspace = workspace

    def routes(self) -> list[Route]:
        """All addresses of the view."""
        raise NotImplementedError

    def _page(self, template: str, **values: Any) -> HTMLResponse:
        """A page of this view."""
        return self._site.page(template, view=self.name, **values)

    def _reading(self, handlers: Mapping[str, Handler]) -> list[Route]:
        """Routes of what is looked at by path; mistakes of the user are pages of this view."""
        return [
            Route(path, self._site.reading(self.name, handler), methods=["GET"])
            for path, handler in handlers.items()
        ]

    def _posting(self, handlers: Mapping[str, Action]) -> list[Route]:
        """Routes of actions by path, see `Site.posting`."""
        return [
            Route(path, self._site.posting(handler), methods=["POST"])
            for path, handler in handlers.items()
        ]
