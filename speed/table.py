"""python -m speed.table REPORT...: reports of `python -m speed` as a table for reading.

Times are those of a row's last run; a row counts as reached if it was in every run that has it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from speed.registry import select

LEAST_WHOLE = 100  # numbers from here on are shown without decimals
MILLISECONDS = 1000  # in a second

Rows = dict[str, dict[str, Any]]


def markdown(reports: list[Path]) -> str:
    """A line for each row of the reports, in the order of the first; a column for each report."""
    runs: list[Rows] = [
        {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
        for path in reports
    ]
    head = ["", "published", "ours", *(f"run {number}" for number in range(1, 1 + len(runs)))]
    lines = [[*head, "target", "reached"], ["---"] * (len(head) + 2)]
    names = dict.fromkeys(name for run in runs for name in run)
    overheads = {bench.name for bench in select() if bench.overhead}
    lines += [_line([run.get(name) for run in runs], name in overheads) for name in names]
    return "\n".join(map(table_row, lines))


def table_row(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _line(runs: list[dict[str, Any] | None], is_overhead: bool) -> list[str]:
    made = [run for run in runs if run is not None]
    last = made[-1]
    reached = sum(run["reached"] for run in made)
    times = _amounts((last["published"], last["ours"]), last["unit"])
    target = f"{'at most ' if is_overhead else ''}{last['target']:.4g}x"
    verdict = "yes" if reached == len(made) else f"**{reached} of {len(made)}**"
    return [last["title"], *times, *map(_ratio, runs), target, verdict]


def _ratio(run: dict[str, Any] | None) -> str:
    if run is None:
        return ""
    spread = f" ({run['low']:.2f} to {run['high']:.2f})" if run["ratios"] else ""
    return f"{run['ratio']:.2f}x{spread}"


def _amounts(values: tuple[float, ...], unit: str) -> list[str]:
    """All in one unit: milliseconds if each takes less than a second."""
    if unit == "s" and max(values) < 1:
        values, unit = tuple(MILLISECONDS * value for value in values), "ms"
    return [f"{v:,.0f} {unit}" if v >= LEAST_WHOLE else f"{v:.3g} {unit}" for v in values]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m speed.table", description=__doc__)
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT")
    print(markdown(parser.parse_args().reports))
