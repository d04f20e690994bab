"""What the commands share: default paths, options, and how a command starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from pipeline.errors import PipelineError
from pipeline.files import as_location
from pipeline.params.reading import read_params
from pipeline.params.sections import Params

if TYPE_CHECKING:  # importing torch takes seconds that `--help` and mistakes need not wait for
    from pipeline.engine.runtime import Runtime
    from pipeline.engine.shard_run import Executor

ParamsPath = Annotated[Path, typer.Option("--params", help="Params file.")]
StatsPath = Annotated[Path, typer.Option("--stats", help="Where the counts are written (JSON).")]


def location(text: str) -> Any:
    """An option for a path or a URL."""
    return typer.Option(parser=as_location, metavar="<path|url>", help=text)


ExecutorName = Annotated[
    Literal["local", "ray"],
    typer.Option(
        envvar="PIPELINE_EXECUTOR",
        help="Where shards are made: here, or on the Ray cluster of $RAY_ADDRESS.",
    ),
]
RayWorkers = Annotated[
    int | None,
    typer.Option(
        envvar="PIPELINE_RAY_WORKERS",
        min=1,
        help="Actors of `--executor ray`; default: one a GPU, without GPUs one a core.",
    ),
]

PARAMS = Path("params.yaml")
EMBEDDINGS = Path("data/embeddings")
ARCHIVES = Path("data/archives.parquet")
MASKS = Path("data/masks")
LABELS = Path("data/labels")
CHECKPOINT = Path("models/zutis")
PREDICTIONS = Path("data/predictions")
REPORTS = Path("reports")
LIVE = REPORTS / "live"
STATS = REPORTS / "stats"

Entry = TypeVar("Entry")


def start(params_path: Path) -> tuple[Params, Runtime]:
    from pipeline.engine.runtime import make_runtime, seed_generators

    params = read_params(params_path)
    seed_generators(params.seed)
    return params, make_runtime(device=params.device, seed=params.seed)


def make_executor(name: Literal["local", "ray"], params: Params, workers: int | None) -> Executor:
    if name == "ray":
        from pipeline.engine.ray_executor import RayExecutor

        return RayExecutor(device=params.device, seed=params.seed, workers=workers)
    from pipeline.engine.shard_run import LocalExecutor

    return LocalExecutor()


def lookup(table: dict[str, Entry], name: str, *, section: str, params_path: Path) -> Entry:
    if name not in table:
        known = ", ".join(sorted(table)) or "none"
        raise PipelineError(
            f"{params_path}: {name!r} is not under `{section}:`; there are: {known}"
        )
    return table[name]


def names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    from pipeline.vocabulary.categories import load_category_set

    return load_category_set([name.strip() for name in text.split(",")])
