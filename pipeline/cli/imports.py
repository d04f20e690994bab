"""`pipeline import`: what others have computed or annotated, in the form that stages read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli.common import (
    PATHS,
    EntryStatsPath,
    MasksPath,
    Session,
    StatsPath,
    names,
    try_outputs,
)
from pipeline.errors import PipelineError

import_app = typer.Typer(help="What others have published, and what people have corrected.")

PrefixOption = Annotated[
    list[str] | None,
    typer.Option("--prefix", help="OLD=NEW: leading folder of their paths, and ours. Repeatable."),
]
SourceOption = Annotated[
    str, typer.Option(help="Name of the source under `index:` that the embeddings are of.")
]
EncoderOption = Annotated[
    str, typer.Option(help="MODEL/PRETRAINED that made them: the `embed.encoder` of the params.")
]
OutOption = Annotated[Path | None, typer.Option(help="Folder of the Parquet shards.")]


@import_app.command()
def archives(
    ctx: typer.Context,
    json_path: Annotated[
        Path, typer.Option("--from", help="JSON file: category -> image paths, best first.")
    ],
    prefix: PrefixOption = None,
    out: Annotated[Path, typer.Option(help="Parquet file of the archives.")] = PATHS["archives"],
    stats: StatsPath = PATHS["stats"] / "retrieve.json",
) -> None:
    """Archives published as JSON (ZUTIS: category_to_p_images), in place of `retrieve`."""
    from pipeline.importers import archives as importer
    from pipeline.importers.images import parse_prefixes

    session: Session = ctx.obj
    try_outputs(out, stats)
    params = session.params
    importer.run(
        json_path=json_path,
        out_path=out,
        categories=session.categories,
        sources=params.index,
        k=params.k,
        overlap=params.retrieve.overlap,
        prefixes=parse_prefixes(prefix or []),
        max_pixels=params.embed.max_pixels,
        workers=params.embed.workers,
        stats_path=stats,
    )


@import_app.command()
def embeddings(
    ctx: typer.Context,
    pickle_path: Annotated[
        Path, typer.Option("--from", help="Pickle file: file name -> tensor. Read safely.")
    ],
    source: SourceOption,
    encoder: EncoderOption,
    prefix: PrefixOption = None,
    out: OutOption = None,
    stats: EntryStatsPath = None,
) -> None:
    """Embeddings published as a pickle of tensors (ZUTIS), in place of `embed` for a source."""
    _import_embeddings(
        ctx.obj,
        pickle_path,
        form="pickle",
        source=source,
        encoder=encoder,
        prefix=prefix,
        out=out,
        stats=stats,
    )


@import_app.command(name="clip-retrieval")
def clip_retrieval(
    ctx: typer.Context,
    folder: Annotated[
        Path, typer.Option("--from", help="Output folder of `clip-retrieval inference`.")
    ],
    source: SourceOption,
    encoder: EncoderOption,
    prefix: PrefixOption = None,
    out: OutOption = None,
    stats: EntryStatsPath = None,
) -> None:
    """Embeddings that clip-retrieval has computed, in place of `embed` for a source."""
    _import_embeddings(
        ctx.obj,
        folder,
        form="clip-retrieval",
        source=source,
        encoder=encoder,
        prefix=prefix,
        out=out,
        stats=stats,
    )


@import_app.command()
def sbd(
    folder: Annotated[
        Path, typer.Option("--from", help="SBD's folder: dataset, or one that it is in.")
    ],
    voc: Annotated[
        Path, typer.Option(help="Folder of VOC 2012, into which label maps and list are written.")
    ] = Path("data/raw/VOCdevkit/VOC2012"),
    stats: StatsPath = PATHS["stats"] / "import-sbd.json",
) -> None:
    """SBD's label maps into VOC 2012's folder: the 10,582 images of `trainaug`."""
    from pipeline.files import given_path
    from pipeline.importers import sbd as importer

    try_outputs(stats)
    importer.run(sbd_dir=given_path(folder), voc_dir=given_path(voc), stats_path=stats)


@import_app.command(name="denseclip-plus")
def denseclip_plus(
    path: Annotated[Path, typer.Option("--from", help="Checkpoint of MaskCLIP+ (.pth).")],
    categories: Annotated[
        str, typer.Option(help="Its names in their order, or a category set's name.")
    ],
    encoder: Annotated[
        str, typer.Option(help="MODEL/TAG of the CLIP that guided it.")
    ] = "RN50-quickgelu/openai",
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = PATHS["plus"]
    / "published",
) -> None:
    """A published DenseCLIP+ as a checkpoint for `predict` and `evaluate`."""
    from pipeline.cli.benches import parse_encoder
    from pipeline.files import given_path
    from pipeline.importers import plus as importer

    try_outputs(folders=[out])
    importer.run(
        path=given_path(path),
        out_dir=out,
        encoder=parse_encoder(encoder),
        categories=names(categories) or [],
        background=["background"],
    )
    print(f"{out}: a checkpoint of DenseCLIP+")


@import_app.command()
def corrections(
    ctx: typer.Context,
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="COCO's JSON, or Label Studio's export as JSON.")
    ],
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of the images that were corrected; without it names tell."),
    ] = None,
    bench: Annotated[
        str | None, typer.Option(help="Write a benchmark of this name, and train on none of it.")
    ] = None,
    masks: MasksPath = PATHS["masks"],
    out: Annotated[
        Path | None,
        typer.Option(
            help=f"Folder of the corrections, by default {PATHS['corrections']}, or of the "
            "benchmark, by default data/raw/NAME."
        ),
    ] = None,
    skip_empty: Annotated[
        bool, typer.Option(help="Leave images without an object out; else they show no category.")
    ] = False,
    force: Annotated[
        bool, typer.Option(help="Replace other corrections of these images, or the benchmark.")
    ] = False,
    stats: StatsPath = PATHS["stats"] / "import-corrections.json",
) -> None:
    """Masks that a person has corrected: truth of archive images to train on, or a benchmark."""
    from pipeline.files import given_path
    from pipeline.importers import corrections as importer
    from pipeline.vocabulary.categories import Names

    session: Session = ctx.obj
    asked = Names(session.categories, session.params.background)
    path, images = given_path(path), images and given_path(images)
    if bench is None:
        out = out or PATHS["corrections"]
        try_outputs(stats, folders=[out])
        importer.run(
            path=path,
            images_dir=images,
            masks_dir=masks,
            out_dir=out,
            names=asked,
            stats_path=stats,
            force=force,
            skip_empty=skip_empty,
        )
        print(f"{out}: commit it; `dvc repro` trains on it")
        return
    out = _bench_folder(session, bench, out, force=force)
    if images is None:
        raise PipelineError("--images: a benchmark needs the images; name their folder")
    try_outputs(stats, folders=[out])
    importer.write_benchmark(
        path=path,
        images_dir=images,
        corrections_dir=PATHS["corrections"],
        out_dir=out,
        names=asked,
        stats_path=stats,
        skip_empty=skip_empty,
    )
    listed = session.params.category_names
    print(f"{out}: for {session.params_path}:")
    print("\n".join(importer.params_lines(bench, out, listed)))


def _bench_folder(session: Session, name: str, out: Path | None, *, force: bool) -> Path:
    """The folder of a new benchmark.

    Raises:
        PipelineError: a name that cannot be an entry's, or something that would be replaced.
    """
    from pipeline.params.base import ENTRY_NAME

    if not ENTRY_NAME.fullmatch(name) or name == "plus":
        raise PipelineError(
            f"--bench: {name!r} cannot be the name of an entry under `benches:`; take letters, "
            "digits, _, - and ., such as mine"
        )
    if name in session.params.benches and not force:
        raise PipelineError(
            f"--bench: {session.params_path} has a benchmark {name!r} already; take another name, "
            "or give --force"
        )
    out = out or Path("data/raw") / name
    if out.exists() and not force:
        raise PipelineError(f"{out}: is there already; give --force, or another --out")
    return out


def _import_embeddings(
    session: Session,
    path: Path,
    *,
    form: Literal["pickle", "clip-retrieval"],
    source: str,
    encoder: str,
    prefix: list[str] | None,
    out: Path | None,
    stats: Path | None,
) -> None:
    from pipeline.importers import embeddings as importer
    from pipeline.importers.images import parse_prefixes

    out = out or PATHS["embeddings"] / source
    stats = stats or PATHS["stats"] / f"embed-{source}.json"
    try_outputs(stats, folders=[out])
    importer.run(
        path=path,
        read=importer.READERS[form],
        name=source,
        source=session.entry("index", source),
        out_dir=out,
        encoder=encoder,
        params=session.params.embed,
        prefixes=parse_prefixes(prefix or []),
        stats_path=stats,
    )
