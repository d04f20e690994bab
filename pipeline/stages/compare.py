"""Scores of every DenseCLIP+ beside the network of `train`, in one metrics file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.files import read_json, write_json

SCORES_NAME = "scores.json"


def run(*, reports_dir: Path, names: Sequence[str], out_path: Path) -> None:
    """Write the scores of all entries, by name.

    Args:
        reports_dir: a folder an entry, with its `SCORES_NAME`.
        names: of the entries; what else lies there is left alone.
        out_path: metrics file to write.

    Raises:
        PipelineError: an entry has no scores yet.
    """
    paths = {name: reports_dir / name / SCORES_NAME for name in names}
    for name, path in paths.items():
        if not path.is_file():
            raise PipelineError(f"{path}: no such file; run `pipeline plus --name {name}` first")
    write_json(out_path, {name: read_json(path) for name, path in paths.items()})
