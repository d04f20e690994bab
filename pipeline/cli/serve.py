"""`pipeline serve`: a checkpoint behind HTTP."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pipeline.cli.common import Session, names
from pipeline.cli.stages import NAMES_HELP, CheckpointPath
from pipeline.errors import PipelineError, install_command

serve_app = typer.Typer()


@serve_app.command()
def serve(
    ctx: typer.Context,
    checkpoint: CheckpointPath = None,
    categories: Annotated[
        str | None, typer.Option(help=f"{NAMES_HELP}; default: the trained ones.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is a free one.")] = 8000,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes, each with a network of its own.")
    ] = 1,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Waiting images that share a forward pass; default: the params' "
            "evaluate.batch_size.",
        ),
    ] = None,
    max_bytes: Annotated[
        int, typer.Option(min=1, help="Largest body; a larger one is not read (413).")
    ] = 20_000_000,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Largest image; a larger one is not decoded (413).")
    ] = 25_000_000,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Requests of a worker at a time; more are sent away (503).")
    ] = 64,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds from a request to its answer (503).")
    ] = 60.0,
) -> None:
    """Answer images by COCO JSON over HTTP: POST /predict, GET /categories, GET /health.

    SIGTERM and Ctrl-C end it once all requests in flight are answered.
    """
    try:
        import multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise PipelineError(
            f"serve needs further packages: {install_command('serve')} ({error})"
        ) from None
    from pipeline.params.base import PredictionSettings
    from pipeline.serve.options import Address, CheckpointSource, Limits
    from pipeline.serve.server import serve as run

    session: Session = ctx.obj
    params = session.params
    run(
        CheckpointSource(
            checkpoint or session.checkpoint,
            names(categories),
            PredictionSettings.of(params.evaluate),
            device=params.device,
            precision=params.precision,
        ),
        address=Address(host, port),
        limits=Limits(
            max_bytes=max_bytes,
            max_pixels=max_pixels,
            timeout_s=timeout,
            max_waiting=max_waiting,
            batch_size=batch or params.evaluate.batch_size,
        ),
        workers=workers,
        threads=_cores() if params.threads == "auto" else params.threads * workers,
    )


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
