"""The console script `pipeline`: one command a stage; paths and params in, stage called."""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pipeline import __version__
from pipeline.errors import PipelineError
from pipeline.files import OUT_OF_SPACE, read_json
from pipeline.params import Params, read_params

if TYPE_CHECKING:  # importing torch takes seconds that `--help` and mistakes need not wait for
    from pipeline.runtime import Runtime

app = typer.Typer(
    name="pipeline",
    help="Name some categories, point at unlabelled images, get a segmenter.\n\n"
    "Each stage below is also a stage of dvc.yaml: `dvc repro` runs those that are out of date. "
    "By hand, every stage reads params.yaml and takes its paths as options.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
demo_app = typer.Typer(help="The embedded default: its drawn world and its tiny networks.")
app.add_typer(demo_app, name="demo", no_args_is_help=True)

ParamsPath = Annotated[Path, typer.Option("--params", help="Params file.")]
StatsPath = Annotated[Path, typer.Option("--stats", help="Where the counts are written (JSON).")]

PARAMS = Path("params.yaml")
EMBEDDINGS = Path("data/embeddings")
ARCHIVES = Path("data/archives.parquet")
MASKS = Path("data/masks")
LABELS = Path("data/labels")
CHECKPOINT = Path("models/zutis")
REPORTS = Path("reports")
LIVE = REPORTS / "live"
STATS = REPORTS / "stats"
DEMO_MODELS = Path("models/demo")

Entry = TypeVar("Entry")

BAD_PATH = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
BAD_PATH_CODES = (errno.EROFS, errno.ENAMETOOLONG)
INTERRUPTED = 130  # what Typer makes of Ctrl-C


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit status 1."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # stages count and list unreadable images
    try:
        app()
    except PipelineError as error:
        sys.exit(f"error: {error}")
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            print("interrupted; the same command continues", file=sys.stderr)
        raise
    except OSError as error:
        sys.exit(_explain(error))


def _explain(error: OSError) -> str:
    """One line for a failed file operation; re-raises what is not about the user's disk."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in OUT_OF_SPACE:
        return (
            f"error: no space left on the disk{where}: free some and run the same command again; "
            "nothing half-written was kept and finished work is reused"
        )
    if isinstance(error, BAD_PATH) or error.errno in BAD_PATH_CODES:
        return f"error: {error.strerror}{where}: make it writable or choose another path"
    raise error


def _start(params_path: Path) -> tuple[Params, Runtime]:
    from pipeline.runtime import make_runtime, seed_generators

    params = read_params(params_path)
    seed_generators(params.seed)
    return params, make_runtime(device=params.device, seed=params.seed)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pipeline {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


def _lookup(table: dict[str, Entry], name: str, *, section: str, params_path: Path) -> Entry:
    if name not in table:
        known = ", ".join(sorted(table)) or "none"
        raise PipelineError(
            f"{params_path}: {name!r} is not under `{section}:`; there are: {known}"
        )
    return table[name]


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    from pipeline.data.categories import load_category_set

    return load_category_set([name.strip() for name in text.split(",")])


@app.command()
def init(
    preset: Annotated[str, typer.Option(help="Name of a preset; `--preset list` lists them.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of unlabelled images (preset `folder`).")
    ] = None,
    categories: Annotated[
        str | None, typer.Option(help="Comma-separated category names (preset `folder`).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Params file to write.")] = PARAMS,
    force: Annotated[bool, typer.Option(help="Overwrite an existing file.")] = False,
) -> None:
    """Write params.yaml from a preset: `demo`, `folder` or one of the papers' settings."""
    from pipeline.presets import list_presets, write_preset

    if preset == "list":
        for name, summary in list_presets():
            print(f"{name:18} {summary}")
        return
    write_preset(preset, out, images=images, categories=_names(categories), force=force)
    print(f"{out} written from preset {preset}; now run: dvc repro")


@app.command()
def embed(
    source: Annotated[str, typer.Option(help="Name of a source under `index:` in the params.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the Parquet shards.")] = None,
    params_path: ParamsPath = PARAMS,
    stats: Annotated[Path | None, typer.Option(help="Where the counts are written.")] = None,
) -> None:
    """1. Embed the images of one source with CLIP, into Parquet shards."""
    from pipeline.stages import embed as stage

    params, runtime = _start(params_path)
    stage.run(
        name=source,
        source=_lookup(params.index, source, section="index", params_path=params_path),
        out_dir=out or EMBEDDINGS / source,
        params=params.embed,
        runtime=runtime,
        stats_path=stats or STATS / f"embed-{source}.json",
    )


@app.command()
def retrieve(
    embeddings: Annotated[Path, typer.Option(help="Folder of the embeddings.")] = EMBEDDINGS,
    out: Annotated[Path, typer.Option(help="Parquet file of the archives.")] = ARCHIVES,
    params_path: ParamsPath = PARAMS,
    stats: StatsPath = STATS / "retrieve.json",
) -> None:
    """2. Retrieve the top-k images of every category: its archive."""
    from pipeline.data.categories import load_category_set
    from pipeline.stages import retrieve as stage

    params, runtime = _start(params_path)
    stage.run(
        embeddings_dir=embeddings,
        sources=list(params.index),
        out_path=out,
        categories=load_category_set(params.categories, background=params.background),
        background=params.background,
        k=params.k,
        params=params.retrieve,
        encoder=params.embed.encoder,
        runtime=runtime,
        stats_path=stats,
    )


@app.command()
def mask(
    archives: Annotated[Path, typer.Option(help="Parquet file of the archives.")] = ARCHIVES,
    out: Annotated[Path, typer.Option(help="Folder of the mask shards.")] = MASKS,
    params_path: ParamsPath = PARAMS,
    stats: StatsPath = STATS / "mask.json",
) -> None:
    """3. Make a pseudo-mask for every archive image, into WebDataset shards."""
    from pipeline.stages import mask as stage

    params, runtime = _start(params_path)
    stage.run(
        archives_path=archives,
        out_dir=out,
        params=params.mask,
        runtime=runtime,
        stats_path=stats,
    )


@app.command(name="pseudo_label")
def pseudo_label(
    masks: Annotated[Path, typer.Option(help="Folder of the mask shards.")] = MASKS,
    out: Annotated[Path, typer.Option(help="Folder of the label shards.")] = LABELS,
    params_path: ParamsPath = PARAMS,
    stats: StatsPath = STATS / "pseudo_label.json",
) -> None:
    """4. Label every pixel of the archive images with DenseCLIP, training-free."""
    from pipeline.data.categories import load_category_set
    from pipeline.stages import pseudo_label as stage

    params, runtime = _start(params_path)
    stage.run(
        mask_dir=masks,
        out_dir=out,
        categories=load_category_set(params.categories, background=params.background),
        background=params.background,
        params=params.pseudo_label,
        runtime=runtime,
        stats_path=stats,
    )


@app.command()
def train(
    labels: Annotated[Path, typer.Option(help="Folder of the label shards.")] = LABELS,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = CHECKPOINT,
    live: Annotated[Path, typer.Option(help="Folder of the loss curves (DVCLive).")] = LIVE,
    params_path: ParamsPath = PARAMS,
    stats: StatsPath = STATS / "train.json",
) -> None:
    """5. Train ZUTIS on the pseudo-labels: semantic and instance masks by one network."""
    from pipeline.data.categories import load_category_set
    from pipeline.stages import train as stage

    params, runtime = _start(params_path)
    stage.run(
        labels_dir=labels,
        out_dir=out,
        live_dir=live,
        categories=load_category_set(params.categories, background=params.background),
        background=params.background,
        params=params.train,
        runtime=runtime,
        stats_path=stats,
    )


@app.command()
def evaluate(
    bench: Annotated[str, typer.Option(help="Name of a benchmark under `benches:`.")],
    checkpoint: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = CHECKPOINT,
    out: Annotated[Path, typer.Option(help="Folder of metrics, plots and overlays.")] = REPORTS,
    params_path: ParamsPath = PARAMS,
    stats: Annotated[Path | None, typer.Option(help="Where the counts are written.")] = None,
) -> None:
    """6. Score the checkpoint on a benchmark: mIoU and mask AP, beside DenseCLIP alone."""
    from pipeline.stages import evaluate as stage

    params, runtime = _start(params_path)
    stage.run(
        bench_name=bench,
        bench=_lookup(params.benches, bench, section="benches", params_path=params_path),
        checkpoint_dir=checkpoint,
        out_dir=out,
        params=params.evaluate,
        baseline=params.pseudo_label,
        background=params.background,
        runtime=runtime,
        stats_path=stats or out / "stats" / f"evaluate-{bench}.json",
    )


@app.command()
def audit(
    name: Annotated[str, typer.Option(help="Name of an entry under `audits:`.")],
    archives: Annotated[Path, typer.Option(help="Parquet file of the archives.")] = ARCHIVES,
    labels: Annotated[Path, typer.Option(help="Folder of the label shards.")] = LABELS,
    out: Annotated[Path | None, typer.Option(help="Metrics file to write.")] = None,
    params_path: ParamsPath = PARAMS,
    stats: Annotated[Path | None, typer.Option(help="Where the counts are written.")] = None,
) -> None:
    """Score archives, pseudo-masks and pseudo-labels where the index has true masks."""
    from pipeline.stages import audit as stage

    params, runtime = _start(params_path)
    stage.run(
        name=name,
        audit=_lookup(params.audits, name, section="audits", params_path=params_path),
        archives_path=archives,
        labels_dir=labels,
        metrics_path=out or REPORTS / "metrics" / f"audit_{name}.json",
        params=params.train,
        runtime=runtime,
        stats_path=stats or STATS / f"audit-{name}.json",
    )


@app.command()
def report(
    archives: Annotated[Path, typer.Option(help="Parquet file of the archives.")] = ARCHIVES,
    labels: Annotated[Path, typer.Option(help="Folder of the label shards.")] = LABELS,
    live: Annotated[Path, typer.Option(help="Folder of the loss curves.")] = LIVE,
    reports: Annotated[Path, typer.Option(help="Folder of metrics, plots, stats.")] = REPORTS,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = REPORTS / "index.html",
    params_path: ParamsPath = PARAMS,
    stats: StatsPath = REPORTS / "report.json",
) -> None:
    """7. Write one self-contained HTML page about the whole run."""
    from pipeline.stages import report as stage

    stage.run(
        reports_dir=reports,
        archives_path=archives,
        labels_dir=labels,
        live_dir=live,
        params_path=params_path,
        out_path=out,
        stats_path=stats,
    )


@app.command()
def metrics(
    reports: Annotated[Path, typer.Option(help="Folder of the reports.")] = REPORTS,
) -> None:
    """Print the metrics files as one narrow table."""
    for path in sorted((reports / "metrics").glob("*.json")):
        print(path)
        for name, value in _numbers(read_json(path)):
            print(f"  {name:28} {'-' if value is None else value:>8}")


def _numbers(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers of nested metrics, named as DVC names them."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, int | float):
            yield f"{prefix}{key}", value


@app.command()
def predict(
    photos: Annotated[list[Path], typer.Argument(help="Image files or folders of images.")],
    out: Annotated[Path, typer.Option(help="Folder of overlays and predictions.json.")],
    categories: Annotated[
        str | None,
        typer.Option(help="Comma-separated names, any words; default: the trained categories."),
    ] = None,
    checkpoint: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = CHECKPOINT,
    params_path: ParamsPath = PARAMS,
) -> None:
    """Segment images: one overlay each, and one COCO JSON."""
    from pipeline.stages import predict as stage

    params, runtime = _start(params_path)
    stage.run(
        inputs=photos,
        categories=_names(categories),
        checkpoint_dir=checkpoint,
        out_dir=out,
        params=params.evaluate,
        runtime=runtime,
    )


@demo_app.command()
def world(
    name: Annotated[str, typer.Option(help="Name of an entry under `worlds:`.")] = "demo",
    out: Annotated[Path | None, typer.Option(help="Folder of the world.")] = None,
    params_path: ParamsPath = PARAMS,
    stats: Annotated[Path | None, typer.Option(help="Where the counts are written.")] = None,
) -> None:
    """Draw the demo's index dataset and benchmark."""
    from pipeline.demo.world import draw_world

    params = read_params(params_path)
    draw_world(
        out or Path("data") / name,
        params=_lookup(params.worlds, name, section="worlds", params_path=params_path),
        seed=params.seed,
        stats_path=stats or STATS / f"world-{name}.json",
    )


@demo_app.command()
def picture(
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("docs/demo.png"),
    bench: Annotated[str, typer.Option(help="Name of a benchmark under `benches:`.")] = "voc",
    checkpoint: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = CHECKPOINT,
    params_path: ParamsPath = PARAMS,
) -> None:
    """Draw the README's picture from the benchmark and the checkpoint."""
    from pipeline.demo.picture import draw_picture
    from pipeline.stages.evaluate import prediction_settings

    params, runtime = _start(params_path)
    draw_picture(
        checkpoint,
        out,
        bench=_lookup(params.benches, bench, section="benches", params_path=params_path),
        settings=prediction_settings(params.evaluate),
        runtime=runtime,
    )


@demo_app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Folder of the two networks.")] = DEMO_MODELS,
    work: Annotated[Path, typer.Option(help="Folder of the resumable state.")] = Path("data/work"),
    seed: Annotated[int, typer.Option(help="Seed of images and initial weights.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Pre-train the tiny CLIP and the tiny SelfMask; continues where it was stopped."""
    from pipeline.demo.pretrain import pretrain as run
    from pipeline.runtime import make_runtime

    run(out, work, runtime=make_runtime(device=device, seed=seed))
