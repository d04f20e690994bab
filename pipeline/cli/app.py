"""`pipeline app`: look at the workspace in the browser, and decide what is left out."""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path
from threading import Timer
from typing import Annotated

import typer

from pipeline.cli.common import PATHS, Session
from pipeline.errors import PipelineError, install_command

view_app = typer.Typer()
OPEN_AFTER = 1.0


@view_app.command()
def app(
    ctx: typer.Context,
    host: Annotated[
        str, typer.Option(help="Address to listen at; only this machine reaches the default.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at.")] = 7861,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = False,
) -> None:
    """Look at archives, pseudo-labels and predictions in the browser; try photos; drop, reject.

    Decisions are written to data/review/, which `retrieve` and what trains read (docs/app.md).
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise PipelineError(f"pipeline app: {error}; {install_command('app')}") from None
    from pipeline.app.guard import is_loopback
    from pipeline.app.web import serve
    from pipeline.app.workspace import Workspace
    from pipeline.sockets import listen

    session: Session = ctx.obj
    workspace = Workspace(
        name=Path.cwd().name,
        params=session.params,
        categories=session.categories,
        paths=PATHS,
        checkpoint=session.checkpoint,
        runtime=lambda: session.runtime,
    )
    if not is_loopback(host):
        print(
            f"app: warning: --host {host}: everyone who reaches this machine sees its images and "
            "can change data/review; there is no password",
            file=sys.stderr,
            flush=True,
        )
    listening = listen(host, port)
    port = listening.getsockname()[1]
    address = f"http://{'localhost' if is_loopback(host) else host}:{port}"
    print(f"app: {address} (Ctrl+C ends it)", flush=True)
    if browser:
        Timer(OPEN_AFTER, webbrowser.open, [address]).start()
    serve(workspace, host=host, listening=listening)
