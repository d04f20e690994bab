"""Training curves, from DVCLive's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.report.charts import line_chart
from pipeline.report.inputs import read_rows, to_float


def read_curves(live_dir: Path) -> list[dict[str, Any]]:
    """A line chart of every curve that DVCLive wrote (TSV with columns step and value).

    Losses come first.

    Raises:
        PipelineError: a file has other columns.
    """
    root = live_dir / "plots" / "metrics"
    charts = []
    for path in sorted(root.rglob("*.tsv"), key=lambda path: ("loss" not in path.stem, path)):
        name = path.relative_to(root).with_suffix("").as_posix()
        charts.append(line_chart(name, read_points(path)))
    return charts


def read_points(path: Path) -> list[tuple[float, float]]:
    """Steps and values of one curve; NaN where a cell is empty or not a number.

    Raises:
        PipelineError: the file has other columns.
    """
    rows = read_rows(path, delimiter="\t")
    columns = [name for name in rows[0] if name not in ("step", "timestamp")] if rows else []
    if len(columns) != 1 or "step" not in rows[0]:
        raise PipelineError(f"{path}: expected the columns step and one value; train again")
    return [(to_float(row["step"]), to_float(row[columns[0]])) for row in rows]
