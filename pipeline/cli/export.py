"""`pipeline export`: results in the files of other tools, and students for other machines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli.common import Session, check_known, names, try_outputs
from pipeline.cli.stages import NAMES_HELP, CheckpointPath
from pipeline.errors import PipelineError

export_app = typer.Typer()


@export_app.command()
def export(
    ctx: typer.Context,
    to: Annotated[Literal["onnx"], typer.Option(help="`onnx`: a student, to run without torch.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    checkpoint: CheckpointPath = None,
    categories: Annotated[
        str | None, typer.Option(help=f"{NAMES_HELP}; default: the trained ones.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="Take images of this size alone; default: any."),
    ] = None,
    text_input: Annotated[
        bool, typer.Option("--text-input", help="Let text embeddings be an input.")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Weights of linear layers in 8 bits.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a student as one ONNX file, compared with torch before it is kept."""
    del to
    _export_onnx(
        ctx.obj,
        out,
        checkpoint=checkpoint,
        categories=categories,
        size=size,
        text_input=text_input,
        int8=int8,
        force=force,
    )


def _export_onnx(
    session: Session,
    out: Path,
    *,
    checkpoint: Path | None,
    categories: str | None,
    size: str | None,
    text_input: bool,
    int8: bool,
    force: bool,
) -> None:
    if out.exists() and not force:
        raise PipelineError(f"--out {out}: exists; choose another file, or replace it with --force")
    try_outputs(out)
    shape = _parse_size(size)
    asked = names(categories)
    params = session.params
    checkpoint = checkpoint or session.checkpoint
    from pipeline.exporters.onnx import export_onnx
    from pipeline.models.weights.checkpoint import read_checkpoint_config
    from pipeline.models.weights.zoo import resolve_weights
    from pipeline.params.base import PredictionSettings

    cache_dir = session.runtime.cache_dir
    if asked:
        encoder = read_checkpoint_config(resolve_weights(checkpoint, cache_dir)).encoder
        check_known(asked, encoder, field="--categories")
    comparison = export_onnx(
        checkpoint,
        out,
        settings=PredictionSettings.of(params.evaluate),
        cache_dir=cache_dir,
        categories=asked,
        size=shape,
        text_input=text_input,
        int8=int8,
    )
    print(f"{out} written; {comparison.describe()}")
    print(f"without torch: pipeline predict PHOTO... --onnx {out} --out DIR")


def _parse_size(text: str | None) -> tuple[int, int] | None:
    """Height and width of HEIGHTxWIDTH.

    Raises:
        PipelineError: it is not of that form.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise PipelineError(f"--size: {text!r}; expected HEIGHTxWIDTH, such as 384x512")
    return int(match[1]), int(match[2])
