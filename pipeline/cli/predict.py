"""`pipeline predict`: photos or videos, by a checkpoint, a dense labeller or an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.benches import alone, baseline
from pipeline.cli.common import (
    Session,
    check_known,
    finite,
    given_options,
    names,
    refuse_with_onnx,
    try_outputs,
)
from pipeline.cli.stages import NAMES_HELP, CheckpointPath, Encoder, Model, OnnxPath
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.params.sections import EvaluateParams

predict_app = typer.Typer()

Photos = Annotated[list[Path], typer.Argument(help="Image files or folders of images; or videos.")]
OutDir = Annotated[Path, typer.Option(help="Folder of overlays and predictions.json.")]
Categories = Annotated[
    str | None,
    typer.Option(
        help=f"{NAMES_HELP}: any words, but for an encoder that knows only the names of its "
        "list (`pipeline weights names photo_clip`); or a category set, such as "
        "concepts_sports; default: the trained ones, without a checkpoint those of the params."
    ),
]
Context = Annotated[
    str | None,
    typer.Option(
        help="More names, asked for likewise but drawn black: person,car. To have them in no "
        "output, list them under `evaluate.others`."
    ),
]
Confidence = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Draw the probability of this name at each pixel: black 0, white 1. Repeatable.",
    ),
]
MinScore = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        callback=finite,
        help="Leave out objects of a lower score; for all names, in place of "
        "`evaluate.min_score` and `evaluate.min_scores`.",
    ),
]
AsVideo = Annotated[bool, typer.Option("--video", help="Folders hold the frames of a video each.")]
Every = Annotated[int, typer.Option(min=1, help="Of a video, every Nth frame.")]
FramesASecond = Annotated[
    float,
    typer.Option(min=0.001, max=1000, callback=finite, help="Frames a second of a --video folder."),
]


@predict_app.command()
def predict(
    ctx: typer.Context,
    photos: Photos,
    out: OutDir,
    categories: Categories = None,
    checkpoint: CheckpointPath = None,
    model: Model = None,
    encoder: Encoder = None,
    context: Context = None,
    confidence: Confidence = None,
    min_score: MinScore = None,
    onnx: OnnxPath = None,
    video: AsVideo = False,
    every: Every = 1,
    fps: FramesASecond = 25,
) -> None:
    """Segment images: one overlay and one label map each, and one COCO JSON.

    Names of `evaluate.others` compete with those asked for, and their pixels become background;
    scores of `evaluate.min_scores` are those that objects of a category have at least
    (docs/categories.md). Of a video (CLIP.mp4, or a folder with --video) objects are followed: see
    docs/video.md.
    """
    from pipeline.formats.video import is_video

    session: Session = ctx.obj
    try_outputs(folders=[out])
    is_of_video = video or any(map(is_video, photos))
    if is_of_video:
        _refuse_for_video(
            model=model, encoder=encoder, context=context, confidence=confidence, onnx=onnx
        )
    if onnx is not None:
        refuse_with_onnx(checkpoint=checkpoint, model=model, encoder=encoder)
        _predict_onnx(
            onnx,
            photos,
            out,
            names(categories),
            context=names(context, "--context") or [],
            confidence=confidence or [],
            min_score=min_score,
        )
        return
    evaluate = session.params.evaluate
    if min_score is not None:
        evaluate = evaluate.model_copy(update={"min_score": min_score, "min_scores": {}})
    if is_of_video:
        _predict_video(
            session,
            photos,
            out,
            names(categories),
            checkpoint=checkpoint,
            evaluate=evaluate,
            every=every,
            fps=fps,
        )
        return
    _predict_photos(
        session,
        photos,
        out,
        names(categories),
        checkpoint=checkpoint,
        model=model,
        encoder=encoder,
        context=names(context, "--context") or [],
        confidence=confidence or [],
        evaluate=evaluate,
    )


def _predict_photos(
    session: Session,
    photos: list[Path],
    out: Path,
    categories: list[str] | None,
    *,
    checkpoint: Path | None,
    model: str | None,
    encoder: str | None,
    context: list[str],
    confidence: list[str],
    evaluate: EvaluateParams,
) -> None:
    """By a checkpoint, or with `model` by a dense labeller alone."""
    from pipeline.models.weights.checkpoint import read_checkpoint_config
    from pipeline.models.weights.zoo import resolve_weights
    from pipeline.stages import predict as stage
    from pipeline.vocabulary.categories import all_texts, texts_for

    params, runtime = session.params, session.runtime
    checkpoint = checkpoint or session.checkpoint
    labeller = baseline(params, alone(model), encoder)
    texts: Mapping[str, Sequence[str]] = params.texts
    if alone(model):
        categories = session.categories if categories is None else categories
        own = labeller.encoder
    elif categories or context:
        config = read_checkpoint_config(resolve_weights(checkpoint, runtime.cache_dir))
        own, texts = config.encoder, config.texts
    for option, listed in (("--categories", categories), ("--context", context)):
        if listed:
            check_known(all_texts(listed, texts_for(listed, texts)), own, field=option)
    stage.run(
        inputs=photos,
        categories=categories,
        checkpoint_dir=None if alone(model) else checkpoint,
        out_dir=out,
        params=evaluate,
        runtime=runtime,
        labeller=labeller,
        background=params.background,
        texts=params.texts,
        context=context,
        confidence=confidence,
    )


def _predict_onnx(
    onnx: Path,
    photos: list[Path],
    out: Path,
    categories: list[str] | None,
    *,
    context: list[str],
    confidence: list[str],
    min_score: float | None,
) -> None:
    """Without torch, and without params: the file has its own."""
    from pipeline.params.sections import EvaluateParams
    from pipeline.stages import predict as stage

    stage.run(
        inputs=photos,
        categories=categories,
        checkpoint_dir=None,
        out_dir=out,
        params=EvaluateParams(min_score=min_score),
        runtime=None,
        context=context,
        confidence=confidence,
        onnx_path=onnx,
    )


def _refuse_for_video(**options: object) -> None:
    if given := given_options(options):
        raise PipelineError(f"{given[0]}: is for images; leave it out for a video")


def _predict_video(
    session: Session,
    clips: list[Path],
    out: Path,
    categories: list[str] | None,
    *,
    checkpoint: Path | None,
    evaluate: EvaluateParams,
    every: int,
    fps: float,
) -> None:
    from pipeline.models.weights.checkpoint import read_checkpoint_config
    from pipeline.models.weights.zoo import resolve_weights
    from pipeline.stages import predict_video as stage

    folder = resolve_weights(checkpoint or session.checkpoint, session.runtime.cache_dir)
    if categories:
        check_known(categories, read_checkpoint_config(folder).encoder, field="--categories")
    stage.run(
        inputs=clips,
        categories=categories,
        checkpoint_dir=folder,
        out_dir=out,
        params=evaluate,
        runtime=session.runtime,
        every=every,
        rate=fps,
    )
