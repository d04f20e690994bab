"""`pipeline export`: results in the files that other tools read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.benches import find_bench
from pipeline.cli.common import PATHS, MasksPath, Session, check_known, finite, given_options, names
from pipeline.cli.stages import NAMES_HELP, BenchRoot, CheckpointPath
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.exporters.sources import Source

export_app = typer.Typer()
ONNX = "onnx"


Predictions = Annotated[
    Path | None,
    typer.Argument(help="What `predict --out` wrote; with --bench, what `predict_bench` wrote."),
]
Format = Annotated[str, typer.Option(help="A format: docs/export.md, or `--to list`.")]
OutPath = Annotated[Path | None, typer.Option(help="What is written: a folder, of onnx a file.")]
Bench = Annotated[
    str | None, typer.Option(help="Predictions of this benchmark: data/predictions/BENCH.")
]
Archives = Annotated[bool, typer.Option(help="The archives' images with pseudo-masks.")]
LabelsOfArchives = Annotated[
    Path | None, typer.Option(help="With --archives: dense labels as label maps: data/labels.")
]
MinScore = Annotated[
    float,
    typer.Option(min=0, max=1, callback=finite, help="Leave out objects that score less."),
]
Split = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        callback=finite,
        help="Share of the images for validation, chosen by content; default: 0.1 of "
        "yolo-seg, none of others.",
    ),
]
Categories = Annotated[
    str | None, typer.Option(help=f"Of onnx: {NAMES_HELP}; default: the trained ones.")
]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="HEIGHTxWIDTH", help="Of onnx: take images of this size alone; default: any."
    ),
]
TextInput = Annotated[
    bool, typer.Option("--text-input", help="Of onnx: let text embeddings be an input.")
]
Int8 = Annotated[bool, typer.Option("--int8", help="Of onnx: weights of linear layers in 8 bits.")]
Force = Annotated[bool, typer.Option(help="Replace an earlier export.")]


@export_app.command()
def export(
    ctx: typer.Context,
    predictions: Predictions = None,
    *,
    to: Format,
    out: OutPath = None,
    bench: Bench = None,
    root: BenchRoot = None,
    archives: Archives = False,
    masks: MasksPath = PATHS["masks"],
    labels: LabelsOfArchives = None,
    min_score: MinScore = 0.0,
    split: Split = None,
    checkpoint: CheckpointPath = None,
    categories: Categories = None,
    size: Size = None,
    text_input: TextInput = False,
    int8: Int8 = False,
    force: Force = False,
) -> None:
    """Predictions or pseudo-labels as COCO, YOLO, VOC and others; a checkpoint as ONNX.

    `pipeline export PREDICTIONS --to coco --out DIR`, `--bench voc` or `--archives` in place of
    PREDICTIONS. The folder is written whole or not at all, and its manifest.json says what was
    exported from what.
    """
    if to == "list":
        _list_formats()
        return
    if out is None:
        raise PipelineError("--out: missing; name the folder to write")
    session: Session = ctx.obj
    if to == ONNX:
        _refuse_for_onnx(
            predictions,
            bench=bench,
            root=root,
            archives=archives,
            labels=labels,
            min_score=min_score,
            split=split,
        )
        _export_onnx(
            session,
            out,
            checkpoint=checkpoint,
            categories=names(categories),
            size=_parse_size(size),
            text_input=text_input,
            int8=int8,
            force=force,
        )
        return
    _refuse_but_for_onnx(
        checkpoint=checkpoint, categories=categories, size=size, text_input=text_input, int8=int8
    )
    _check_sources(predictions, bench, archives, labels, root)
    _check_folder(to, out, force=force)
    from pipeline.exporters import export as exporter

    exporter.run(
        source=_archives(session, masks, labels)
        if archives
        else _predictions(session, predictions, bench, root),
        format_name=to,
        out_dir=out,
        min_score=min_score,
        val_share=split,
    )


def _list_formats() -> None:
    from pipeline.exporters.registry import FORMATS

    for name, known in FORMATS.items():
        print(f"{name:14} {known.summary}")


def _check_folder(format_name: str, out: Path, *, force: bool) -> None:
    """Refuse now, before anything is read, a format that is none or a folder that is taken."""
    from pipeline.exporters.outputs import check_folder
    from pipeline.exporters.registry import find_format

    find_format(format_name)
    check_folder(out, force=force)


def _check_sources(
    predictions: Path | None,
    bench: str | None,
    archives: bool,
    labels: Path | None,
    root: Path | None,
) -> None:
    """Refuse no source, two, and options of another one."""
    if archives == (predictions is not None or bench is not None):
        raise PipelineError(
            "export: name one source: the folder that `predict --out` wrote, --bench NAME, or "
            "--archives"
        )
    if labels is not None and not archives:
        raise PipelineError("--labels: has a meaning with --archives only; leave it out")
    if root is not None and bench is None:
        raise PipelineError("--root: has a meaning with --bench only; leave it out")


def _predictions(
    session: Session, folder: Path | None, bench: str | None, root: Path | None
) -> Source:
    from pipeline.exporters.sources import BenchPredictions, PhotoPredictions
    from pipeline.files import given_path

    if bench is None:
        assert folder is not None  # `_check_sources`
        return PhotoPredictions(given_path(folder))
    from pipeline.benchmarks.opening import open_benchmark

    params = session.params
    entry = find_bench(params.benches, bench, params_path=session.params_path, root=root)
    return BenchPredictions(
        given_path(folder) if folder else PATHS["predictions"] / bench,
        open_benchmark(bench, entry, params.background),
        name=bench,
        truth="instance" in entry.metrics,
    )


def _archives(session: Session, masks: Path, labels: Path | None) -> Source:
    from pipeline.exporters.sources import ArchiveMasks

    return ArchiveMasks(masks, session.categories, labels_dir=labels)


def _refuse_for_onnx(predictions: Path | None, **options: object) -> None:
    """A network is made of a checkpoint alone."""
    if given := [*(["PREDICTIONS"] if predictions else []), *given_options(options)]:
        raise PipelineError(
            f"{given[0]}: has no meaning with --to onnx, which writes a network; leave it out"
        )


def _refuse_but_for_onnx(**options: object) -> None:
    if given := given_options(options):
        raise PipelineError(f"{given[0]}: has a meaning with --to onnx only; leave it out")


def _export_onnx(
    session: Session,
    out: Path,
    *,
    checkpoint: Path | None,
    categories: list[str] | None,
    size: tuple[int, int] | None,
    text_input: bool,
    int8: bool,
    force: bool,
) -> None:
    """A checkpoint as an ONNX file."""
    from pipeline.exporters.outputs import check_file

    check_file(out, force=force)
    params = session.params
    checkpoint = checkpoint or session.checkpoint
    from pipeline.exporters.onnx import export_onnx
    from pipeline.models.weights.checkpoint import read_checkpoint_config
    from pipeline.models.weights.zoo import resolve_weights
    from pipeline.params.base import PredictionSettings

    cache_dir = session.runtime.cache_dir
    if categories:
        encoder = read_checkpoint_config(resolve_weights(checkpoint, cache_dir)).encoder
        check_known(categories, encoder, field="--categories")
    comparison = export_onnx(
        checkpoint,
        out,
        settings=PredictionSettings.of(params.evaluate),
        cache_dir=cache_dir,
        categories=categories,
        size=size,
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
