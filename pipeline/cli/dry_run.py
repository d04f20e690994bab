"""`--dry-run` of the stages: what they read and write, before they say what they would do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import PipelineError
from pipeline.files import Location, is_url

if TYPE_CHECKING:
    from pipeline.engine.dry_run import DryRun

DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Only say what would be done, what of it is done, and how long the rest takes at the "
        "rate of the last run. Nothing is written, no network loaded.",
    ),
]


def start(
    stage: str,
    *,
    reads: Mapping[str, Location],
    writes: Sequence[Location],
    stats: Path,
    may_lack: Sequence[Path] = (),
) -> DryRun:
    """Begin a dry run: print inputs and outputs.

    Args:
        stage: its name.
        reads: inputs, by the stage that makes them.
        writes: outputs beside the stats.
        stats: counts of the stage.
        may_lack: inputs that it does without.

    Raises:
        PipelineError: an input is missing, a path is a URL, or an output cannot be written; the
            message says which.
    """
    from pipeline.engine.dry_run import DryRun

    for path in (*reads.values(), *writes):
        if is_url(path):
            raise PipelineError(f"--dry-run: {path}: looks at paths of this machine alone")
    print(f"{stage}, a dry run")
    for path in (*reads.values(), *may_lack):
        print(f"  reads    {path}{'' if path.exists() else ', which is missing'}")
    for path in (*writes, stats):
        print(f"  writes   {path}{', in place of what is there' if path.exists() else ''}")
        _check_writable(path)
    missing = [(maker, path) for maker, path in reads.items() if not path.exists()]
    if missing:
        maker, path = missing[0]
        raise PipelineError(f"{path}: missing; run `pipeline {maker}` first")
    return DryRun(stats)


def _check_writable(path: Path) -> None:
    """Refuse an output that could not be written; unlike `check_writable`, nothing is tried."""
    parent = next(above for above in path.absolute().parents if above.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise PipelineError(f"{path}: cannot be written below {parent}; choose another path")
