"""`pipeline serve`: a checkpoint or an ONNX file behind HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.cli.common import Session, finite, names, refuse_with_onnx
from pipeline.cli.stages import NAMES_HELP, CheckpointPath, OnnxPath
from pipeline.errors import PipelineError, install_command

if TYPE_CHECKING:
    from pipeline.serve.options import SegmenterSource

serve_app = typer.Typer()


@serve_app.command()
def serve(
    ctx: typer.Context,
    checkpoint: CheckpointPath = None,
    onnx: OnnxPath = None,
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
            "evaluate.batch_size, with --onnx 1.",
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
        float,
        typer.Option(
            min=0.001, callback=finite, help="Seconds from a request to its answer (503)."
        ),
    ] = 60.0,
) -> None:
    """Answer images by COCO JSON over HTTP: POST /predict, GET /categories, GET /health.

    SIGTERM and Ctrl-C end it once all requests in flight are answered.
    """
    try:
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise PipelineError(
            f"serve needs further packages: {install_command('serve')} ({error})"
        ) from None
    from pipeline.serve.options import Address, Limits
    from pipeline.serve.server import serve as run

    if onnx is not None:
        refuse_with_onnx(checkpoint=checkpoint)
    session: Session = ctx.obj
    source, usual_batch, threads = _network(session, onnx, checkpoint, names(categories))
    run(
        source,
        address=Address(host, port),
        limits=Limits(
            max_bytes=max_bytes,
            max_pixels=max_pixels,
            timeout_s=timeout,
            max_waiting=max_waiting,
            batch_size=batch or usual_batch,
        ),
        workers=workers,
        threads=_cores() if threads == "auto" else threads * workers,
    )


def _network(
    session: Session, onnx: Path | None, checkpoint: Path | None, categories: list[str] | None
) -> tuple[SegmenterSource, int, int | Literal["auto"]]:
    """What is served, images of a batch, and threads of a worker.

    An ONNX file has its own settings: no params are read for it.
    """
    from pipeline.params.base import PredictionSettings
    from pipeline.serve.options import CheckpointSource, Limits, OnnxSource

    if onnx is not None:
        return OnnxSource(onnx, categories), Limits.batch_size, "auto"
    params = session.params
    source = CheckpointSource(
        checkpoint or session.checkpoint,
        categories,
        PredictionSettings.of(params.evaluate),
        device=params.device,
        precision=params.precision,
    )
    return source, params.evaluate.batch_size, params.threads


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
