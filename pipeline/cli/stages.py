"""One command a stage: paths and params in, stage called."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipeline.cli.benches import (
    alone,
    baseline,
    differences,
    find_bench,
    result_name,
    shipped_bench,
)
from pipeline.cli.common import (
    PARAMS,
    PATHS,
    CorrectionsPath,
    EntryStatsPath,
    LabelReviewPath,
    MasksPath,
    Session,
    StatsPath,
    location,
    preset_names,
    try_outputs,
)
from pipeline.cli.dry_run import DryRunOption, start
from pipeline.files import read_json
from pipeline.presets import OWN_IMAGES, bench_text, list_benches, list_presets, write_preset

NAMES_HELP = """Category names between commas, quoted as in CSV: '"hammer, claw",saw'"""
Resume = Literal["auto", "never"]
OnnxPath = Annotated[
    Path | None,
    typer.Option(
        "--onnx",
        help="A file of `pipeline export --to onnx` in place of a checkpoint; needs no torch.",
    ),
]
ArchivesPath = Annotated[Path, typer.Option(help="Parquet file of the archives.")]
LabelsPath = Annotated[Path, typer.Option(help="Folder of the label shards.")]
CheckpointPath = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the checkpoint, or name of published weights; default: that of the last "
        "of `rounds:`, or models/zutis."
    ),
]
ReportsPath = Annotated[Path, typer.Option(help="Folder of metrics, plots and overlays.")]
PredictionsPath = Annotated[Path | None, typer.Option(help="Folder of the prediction shards.")]
BenchName = Annotated[
    str, typer.Option(help="Name of a benchmark, under `benches:` or of `pipeline benches`.")
]
BenchRoot = Annotated[
    Path | None, typer.Option(help="Folder of the benchmark's data, where not its own.")
]
Model = Annotated[
    str | None,
    typer.Option(help="A dense labeller, such as `denseclip`: it alone, without a checkpoint."),
]
Encoder = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL/TAG", help="Encoder of the dense labeller (with --model), for the params'."
    ),
]
OpenVocabulary = Annotated[
    bool, typer.Option(help="Score categories that the checkpoint was not trained with.")
]
Corruption = Annotated[
    str | None, typer.Option(help="Disturb the images: NAME:LEVEL, level 1 to 5.")
]

OWN_PRESETS = ", ".join(f"`{name}`" for name in OWN_IMAGES)

stages_app = typer.Typer()


@stages_app.command()
def init(
    ctx: typer.Context,
    preset: Annotated[str, typer.Option(help="Name of a preset; `--preset list` lists them.")],
    images: Annotated[
        Path | None,
        typer.Option(help=f"Folder of unlabelled images (presets {OWN_PRESETS})."),
    ] = None,
    categories: Annotated[
        str | None, typer.Option(help=f"{NAMES_HELP} (presets {OWN_PRESETS}).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Params file to write; default: that of `--params`.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Overwrite an existing file.")] = False,
) -> None:
    """Write params.yaml from a preset: `demo`, one for own photos or one of the papers'."""
    if preset == "list":
        for name, summary in list_presets():
            print(f"{name:28} {summary}")
        return
    session: Session = ctx.obj
    path = out or session.params_path
    listed = preset_names(categories, preset)
    write_preset(preset, path, images=images, categories=listed, force=force)
    first = "" if path == PARAMS else f"make it {PARAMS}, which DVC reads, then "
    print(f"{path} written from preset {preset}; now {first}run: dvc repro")


@stages_app.command()
def embed(
    ctx: typer.Context,
    source: Annotated[str, typer.Option(help="Name of a source under `index:` in the params.")],
    out: Annotated[Any, location("Folder of the Parquet shards, replaced whole.")] = None,
    stats: EntryStatsPath = None,
    dry_run: DryRunOption = False,
) -> None:
    """Stage 1: embed the images of one source with CLIP, into Parquet shards."""
    from pipeline.engine.remote import publishing
    from pipeline.stages import embed as stage

    session: Session = ctx.obj
    out = out or PATHS["embeddings"] / source
    stats = stats or PATHS["stats"] / f"embed-{source}.json"
    dry = None
    if dry_run:
        dry = start("embed", reads={}, writes=[out], stats=stats)
    else:
        try_outputs(stats, folders=[out])
    session.categories  # noqa: B018 - names that cannot be used, before the work
    params, runtime = session.params, session.runtime
    with publishing(out, runtime.cache_dir) as out_dir:
        stage.run(
            name=source,
            source=session.entry("index", source),
            out_dir=out_dir,
            params=params.embed,
            runtime=runtime,
            stats_path=stats,
            executor=dry or session.executor(),
        )


@stages_app.command()
def retrieve(
    ctx: typer.Context,
    embeddings: Annotated[Any, location("Folder of the embeddings.")] = PATHS["embeddings"],
    review: Annotated[
        Path, typer.Option(help="CSV file of the images dropped from archives (`pipeline app`).")
    ] = PATHS["review_archives"],
    out: Annotated[Any, location("Parquet file of the archives.")] = PATHS["archives"],
    stats: StatsPath = PATHS["stats"] / "retrieve.json",
    dry_run: DryRunOption = False,
) -> None:
    """Stage 2: retrieve the top-k images of every category: its archive."""
    from pipeline.engine.remote import fetch, publishing
    from pipeline.stages import retrieve as stage

    session: Session = ctx.obj
    dry = None
    if dry_run:
        dry = start("retrieve", reads={"embed": embeddings}, writes=[out], stats=stats)
    else:
        try_outputs(stats, out)
    params, runtime = session.params, session.runtime
    if dry is not None:
        stage.dry_run(
            dry,
            embeddings_dir=embeddings,
            sources=list(params.index),
            categories=session.categories,
            k=params.k,
        )
        return
    with publishing(out, runtime.cache_dir) as out_path:
        stage.run(
            embeddings_dir=fetch(embeddings, runtime.cache_dir),
            sources=list(params.index),
            out_path=out_path,
            categories=session.categories,
            texts=params.texts,
            background=params.background,
            k=params.k,
            params=params.retrieve,
            encoder=params.embed.encoder,
            runtime=runtime,
            stats_path=stats,
            review_path=review,
            executor=session.executor(),
        )


@stages_app.command()
def mask(
    ctx: typer.Context,
    archives: Annotated[Any, location("Parquet file of the archives.")] = PATHS["archives"],
    out: Annotated[Any, location("Folder of the mask shards, replaced whole.")] = PATHS["masks"],
    stats: StatsPath = PATHS["stats"] / "mask.json",
    dry_run: DryRunOption = False,
) -> None:
    """Stage 3: make a pseudo-mask for every archive image, into WebDataset shards."""
    from pipeline.engine.remote import fetch, publishing
    from pipeline.stages import mask as stage

    session: Session = ctx.obj
    dry = None
    if dry_run:
        dry = start("mask", reads={"retrieve": archives}, writes=[out], stats=stats)
    else:
        try_outputs(stats, folders=[out])
    params, runtime = session.params, session.runtime
    with publishing(out, runtime.cache_dir) as out_dir:
        stage.run(
            archives_path=fetch(archives, runtime.cache_dir),
            out_dir=out_dir,
            params=params.mask,
            runtime=runtime,
            stats_path=stats,
            executor=dry or session.executor(),
        )


@stages_app.command()
def bank(
    ctx: typer.Context,
    embeddings: Annotated[Any, location("Folder of the embeddings.")] = PATHS["embeddings"],
    masks: Annotated[Any, location("Folder of the mask shards.")] = PATHS["masks"],
    out: Annotated[Any, location("Folder of the region bank, replaced whole.")] = PATHS["bank"],
    stats: StatsPath = PATHS["stats"] / "bank.json",
    dry_run: DryRunOption = False,
) -> None:
    """Keep what regions of one's own images look like and mean, for pseudo_label (section `bank`).

    With `bank: null` the bank is empty, and no image is looked at.
    """
    from pipeline.engine.remote import fetch, publishing
    from pipeline.stages import bank as stage
    from pipeline.stages.mask import MaskMaker

    session: Session = ctx.obj
    dry = None
    if dry_run:
        dry = start("bank", reads={"mask": masks, "embed": embeddings}, writes=[out], stats=stats)
    else:
        try_outputs(stats, folders=[out])
    params, runtime = session.params, session.runtime
    with publishing(out, runtime.cache_dir) as out_dir:
        if params.bank is None and dry is not None:
            print("  items    none: `bank` is null")
            return
        if params.bank is None:
            stage.write_empty(out_dir=out_dir, stats_path=stats)
            return
        stage.run(
            masks_dir=fetch(masks, runtime.cache_dir),
            embeddings_dir=fetch(embeddings, runtime.cache_dir),
            sources=list(params.index),
            out_dir=out_dir,
            categories=session.categories,
            texts=params.texts,
            background=params.background,
            benches={
                **{f"benches.{name}": bench for name, bench in params.benches.items()},
                **{f"plus.{name}.bench": entry.bench for name, entry in params.plus.items()},
            },
            load_masks=partial(MaskMaker, params.mask),
            params=params.bank,
            labeller=params.pseudo_label,
            runtime=runtime,
            stats_path=stats,
            executor=dry or session.executor(),
        )


@stages_app.command(name="pseudo_label")
def pseudo_label(
    ctx: typer.Context,
    masks: Annotated[Any, location("Folder of the mask shards.")] = PATHS["masks"],
    bank: Annotated[Any, location("Folder of the region bank, where it is on.")] = PATHS["bank"],
    out: Annotated[Any, location("Folder of the label shards, replaced whole.")] = PATHS["labels"],
    stats: StatsPath = PATHS["stats"] / "pseudo_label.json",
    dry_run: DryRunOption = False,
) -> None:
    """Stage 4: label every pixel of the archive images by names, training-free."""
    from pipeline.engine.remote import fetch, publishing
    from pipeline.stages import pseudo_label as stage

    session: Session = ctx.obj
    dry = None
    if dry_run:
        dry = start(
            "pseudo_label",
            reads={"mask": masks, **({"bank": bank} if session.params.bank else {})},
            writes=[out],
            stats=stats,
        )
    else:
        try_outputs(stats, folders=[out])
    params, runtime = session.params, session.runtime
    with publishing(out, runtime.cache_dir) as out_dir:
        stage.run(
            mask_dir=fetch(masks, runtime.cache_dir),
            out_dir=out_dir,
            categories=session.categories,
            texts=params.texts,
            background=params.background,
            params=params.pseudo_label,
            bank_dir=fetch(bank, runtime.cache_dir) if params.bank else None,
            bank=params.bank,
            runtime=runtime,
            stats_path=stats,
            executor=dry or session.executor(),
        )


@stages_app.command()
def train(
    ctx: typer.Context,
    masks: Annotated[Any, location("Folder of the mask shards.")] = PATHS["masks"],
    labels: Annotated[Any, location("Folder of the label shards; default: train.labels.")] = None,
    corrections: CorrectionsPath = PATHS["corrections"],
    review: LabelReviewPath = PATHS["review_labels"],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = PATHS["checkpoint"],
    live: Annotated[Path, typer.Option(help="Folder of the loss curves.")] = PATHS["live"],
    resume: Annotated[
        Resume,
        typer.Option(help="`auto`: continue a run of the same settings that was cut off."),
    ] = "auto",
    stats: StatsPath = PATHS["stats"] / "train.json",
    dry_run: DryRunOption = False,
) -> None:
    """Stage 5: train a student on the pseudo-labels, ZUTIS by default.

    Dense labels are read only where `train.target` is made of them. Under torchrun, its processes
    share every batch.
    """
    from pipeline.engine.distributed import process_group
    from pipeline.engine.remote import fetch
    from pipeline.stages import train as stage

    session: Session = ctx.obj
    if not dry_run:
        try_outputs(stats, folders=[out, live])
    params, runtime = session.params, session.runtime
    labels = labels or params.train.labels
    reads_labels = params.train.needs_labels and labels is not None
    if dry_run:
        reads = {"mask": masks, **({"pseudo_label": labels} if reads_labels else {})}
        dry = start("train", reads=reads, writes=[out, live], stats=stats)
        stage.dry_run(dry, params=params.train, cache_dir=runtime.cache_dir)
        return
    with process_group(runtime.device) as group:
        stage.run(
            masks_dir=fetch(masks, runtime.cache_dir),
            labels_dir=fetch(labels, runtime.cache_dir) if reads_labels else None,
            corrections_dir=corrections,
            review_path=review,
            out_dir=out,
            live_dir=live,
            categories=session.categories,
            texts=params.texts,
            background=params.background,
            params=params.train,
            runtime=runtime,
            stats_path=stats,
            resume=resume == "auto",
            group=group,
        )


@stages_app.command(name="predict_bench")
def predict_bench(
    ctx: typer.Context,
    bench: BenchName,
    checkpoint: CheckpointPath = None,
    out: PredictionsPath = None,
    root: BenchRoot = None,
    model: Model = None,
    encoder: Encoder = None,
    onnx: OnnxPath = None,
    open_vocabulary: OpenVocabulary = False,
    corruption: Corruption = None,
    stats: EntryStatsPath = None,
    dry_run: DryRunOption = False,
) -> None:
    """Stage 6a: predict on a benchmark, into shards that `score` reads."""
    from pipeline.models.weights.zoo import resolve_weights
    from pipeline.stages import predict_bench as stage

    session: Session = ctx.obj
    if not dry_run:
        try_outputs(*([stats] if stats else []), folders=[out] if out else [])
    others = differences(
        session,
        bench,
        checkpoint,
        model=model,
        encoder=encoder,
        open_vocabulary=open_vocabulary,
        onnx=onnx,
    )
    name = result_name(bench, alone(model), corruption, others=others)
    out = out or PATHS["predictions"] / name
    stats = stats or PATHS["stats"] / f"predict_bench-{name}.json"
    params, runtime = session.params, session.runtime
    chosen = None if alone(model) or onnx else checkpoint or session.checkpoint
    dry = None
    if dry_run:
        reads = {"train": resolve_weights(chosen, runtime.cache_dir)} if chosen else {}
        dry = start("predict_bench", reads=reads, writes=[out], stats=stats)
    else:
        try_outputs(stats, folders=[out])
    stage.run(
        bench_name=bench,
        bench=find_bench(
            params.benches, bench, params_path=session.params_path, root=root, corruption=corruption
        ),
        checkpoint_dir=chosen,
        out_dir=out,
        params=params.evaluate,
        baseline=baseline(params, alone(model), encoder),
        background=params.background,
        texts=params.texts if alone(model) else {},
        runtime=runtime,
        stats_path=stats,
        open_vocabulary=open_vocabulary,
        executor=dry or session.executor(),
        onnx_path=onnx,
    )


@stages_app.command()
def score(
    ctx: typer.Context,
    bench: BenchName,
    checkpoint: CheckpointPath = None,
    predictions: PredictionsPath = None,
    out: ReportsPath = PATHS["reports"],
    root: BenchRoot = None,
    model: Model = None,
    encoder: Encoder = None,
    onnx: OnnxPath = None,
    open_vocabulary: OpenVocabulary = False,
    corruption: Corruption = None,
    stats: EntryStatsPath = None,
    dry_run: DryRunOption = False,
) -> None:
    """Stage 6b: score predictions on a benchmark: mIoU and mask AP; no network is run.

    Checkpoint, model and encoder only say whose predictions they are, and so what they are called.
    """
    from pipeline.stages import score as stage

    session: Session = ctx.obj
    others = differences(
        session,
        bench,
        checkpoint,
        model=model,
        encoder=encoder,
        open_vocabulary=open_vocabulary,
        onnx=onnx,
    )
    name = result_name(bench, alone(model), corruption, others=others)
    stats = stats or out / "stats" / f"score-{name}.json"
    predictions = predictions or PATHS["predictions"] / name
    if dry_run:
        reads = {f"predict_bench --bench {bench}": predictions}
        metrics = out / "metrics" / f"{name}.json"
        dry = start("score", reads=reads, writes=[metrics], stats=stats)
        stage.dry_run(dry, predictions_dir=predictions)
        return
    try_outputs(stats, folders=[out])
    params = session.params
    stage.run(
        bench_name=bench,
        bench=find_bench(
            params.benches, bench, params_path=session.params_path, root=root, corruption=corruption
        ),
        predictions_dir=predictions,
        out_dir=out,
        background=params.background,
        overlays=params.evaluate.overlays,
        seed=params.seed,
        stats_path=stats,
        result_name=name,
    )


@stages_app.command()
def evaluate(
    ctx: typer.Context,
    bench: BenchName,
    checkpoint: CheckpointPath = None,
    out: ReportsPath = PATHS["reports"],
    predictions: PredictionsPath = None,
    root: BenchRoot = None,
    model: Model = None,
    encoder: Encoder = None,
    onnx: OnnxPath = None,
    open_vocabulary: OpenVocabulary = False,
    corruption: Corruption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Stage 6: predict on a benchmark and score: mIoU and mask AP, beside the baseline.

    It is `predict_bench`, then `score`. What the run itself has trained is scored as BENCH.json;
    what differs from it is in the name of a result (docs/results.md).
    """
    others = differences(
        ctx.obj,
        bench,
        checkpoint,
        model=model,
        encoder=encoder,
        open_vocabulary=open_vocabulary,
        onnx=onnx,
    )
    name = result_name(bench, alone(model), corruption, others=others)
    if not dry_run:
        try_outputs(folders=[out])
    predict_bench(
        ctx,
        bench,
        checkpoint=checkpoint,
        out=predictions,
        root=root,
        model=model,
        encoder=encoder,
        onnx=onnx,
        open_vocabulary=open_vocabulary,
        corruption=corruption,
        stats=out / "stats" / f"predict_bench-{name}.json",
        dry_run=dry_run,
    )
    if dry_run:
        print("then `score`, which runs no network")
        return
    score(
        ctx,
        bench,
        checkpoint=checkpoint,
        predictions=predictions,
        out=out,
        root=root,
        model=model,
        encoder=encoder,
        onnx=onnx,
        open_vocabulary=open_vocabulary,
        corruption=corruption,
    )


@stages_app.command()
def benches(
    name: Annotated[str | None, typer.Argument(help="Show this one in full.")] = None,
) -> None:
    """List the shipped benchmarks; `pipeline evaluate --bench NAME` scores on one."""
    if name is not None:
        print(bench_text(name), end="")
        return
    for known, summary in list_benches():
        state = "found" if shipped_bench(known).root.is_dir() else "no data"
        print(f"{known:20} {state:8} {summary}")


@stages_app.command()
def audit(
    ctx: typer.Context,
    name: Annotated[str, typer.Option(help="Name of an entry under `audits:`.")],
    archives: ArchivesPath = PATHS["archives"],
    masks: MasksPath = PATHS["masks"],
    labels: LabelsPath = PATHS["labels"],
    out: Annotated[Path | None, typer.Option(help="Metrics file to write.")] = None,
    stats: EntryStatsPath = None,
    dry_run: DryRunOption = False,
) -> None:
    """Score archives, pseudo-masks and pseudo-labels where the index has true masks."""
    from pipeline.stages import audit as stage

    session: Session = ctx.obj
    out = out or PATHS["reports"] / "metrics" / f"audit_{name}.json"
    stats = stats or PATHS["stats"] / f"audit-{name}.json"
    if dry_run:
        reads = {"retrieve": archives, "mask": masks, "pseudo_label": labels}
        dry = start("audit", reads=reads, writes=[out], stats=stats)
        stage.dry_run(
            dry,
            name=name,
            audit=session.entry("audits", name),
            archives_path=archives,
            masks_dir=masks,
            labels_dir=labels,
        )
        return
    try_outputs(out, stats)
    entry = session.entry("audits", name)
    params, runtime = session.params, session.runtime
    stage.run(
        name=name,
        audit=entry,
        archives_path=archives,
        masks_dir=masks,
        labels_dir=labels,
        metrics_path=out,
        params=params.train.targets,
        runtime=runtime,
        stats_path=stats,
    )


@stages_app.command()
def report(
    ctx: typer.Context,
    archives: ArchivesPath = PATHS["archives"],
    masks: MasksPath = PATHS["masks"],
    labels: LabelsPath = PATHS["labels"],
    live: Annotated[Path, typer.Option(help="Folder of the loss curves.")] = PATHS["live"],
    reports: ReportsPath = PATHS["reports"],
    out: Annotated[Path, typer.Option(help="HTML file.")] = PATHS["reports"] / "index.html",
    stats: StatsPath = PATHS["reports"] / "report.json",
    dry_run: DryRunOption = False,
) -> None:
    """Stage 7: write one self-contained HTML page about the whole run."""
    from pipeline.stages import report as stage

    session: Session = ctx.obj
    dry = None
    if dry_run:
        shown = [archives, masks, labels, live, reports]
        dry = start("report", reads={}, may_lack=shown, writes=[out], stats=stats)
    else:
        try_outputs(out, stats)
    stage.run(
        reports_dir=reports,
        archives_path=archives,
        masks_dir=masks,
        labels_dir=labels,
        live_dir=live,
        params_path=session.params_path,
        out_path=out,
        stats_path=stats,
        dry=dry,
    )


@stages_app.command()
def metrics(
    ctx: typer.Context,
    reports: ReportsPath = PATHS["reports"],
) -> None:
    """Print the metrics files as one narrow table; says which are of no entry of the params."""
    session: Session = ctx.obj
    known = None
    if session.params_path.is_file():
        params = session.params
        known = {*params.benches, *(f"audit_{name}" for name in params.audits), "plus"}
    for path in sorted((reports / "metrics").glob("*.json")):
        is_foreign = known is not None and path.stem not in known
        print(f"{path} (of no bench or audit in {session.params_path})" if is_foreign else path)
        for name, value in _numbers(read_json(path)):
            print(f"  {name:28} {'-' if value is None else value:>8}")


@stages_app.command()
def times(
    reports: ReportsPath = PATHS["reports"],
) -> None:
    """Print how long each stage took when it last ran, longest first."""
    folder = reports / "times"
    seconds = {
        path.relative_to(folder).with_suffix("").as_posix(): read_json(path)["seconds"]
        for path in folder.rglob("*.json")
    }
    for name, value in sorted(seconds.items(), key=lambda pair: -pair[1]):
        print(f"{name:28} {value:8.1f} s")
    print(f"{'all':28} {sum(seconds.values()):8.1f} s")


def _numbers(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers of nested metrics, named as DVC names them."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, int | float):
            yield f"{prefix}{key}", value
