"""python -m benchmarks.table REPORT...: reports of `python -m benchmarks` as a table for reading.

Times are those of a row's last run; a row counts as reached if it was in every run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

LEAST_EXACT = 1000  # whole numbers from here on
MILLISECONDS = 0.5  # times below are told in them

Rows = dict[str, dict[str, Any]]


def markdown(reports: list[Path]) -> str:
    """One line a row of the reports, the first report's order first; one column of ratios each."""
    runs: list[Rows] = [
        {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
        for path in reports
    ]
    head = ["", "published", "ours", *(f"run {number}" for number in range(1, 1 + len(runs)))]
    lines = [[*head, "target", "reached"], ["---"] * (len(head) + 2)]
    names = dict.fromkeys(name for run in runs for name in run)
    lines += [_line([run.get(name) for run in runs]) for name in names]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(runs: list[dict[str, Any] | None]) -> list[str]:
    made = [run for run in runs if run is not None]
    last = made[-1]
    reached = sum(run["reached"] for run in made)
    times = [_amount(last[side], last["unit"]) for side in ("published", "ours")]
    # The ratio of an overhead is ours over the bare network's, and better below its target.
    is_overhead = last["stretch"] is not None and last["stretch"] < last["target"]
    target = f"{'at most ' if is_overhead else ''}{last['target']:.4g}x"
    verdict = "yes" if reached == len(made) else f"**{reached} of {len(made)}**"
    return [last["title"], *times, *map(_ratio, runs), target, verdict]


def _ratio(run: dict[str, Any] | None) -> str:
    if run is None:
        return ""
    spread = f" ({run['low']:.2f} to {run['high']:.2f})" if run["ratios"] else ""
    return f"{run['ratio']:.2f}x{spread}"


def _amount(value: float, unit: str) -> str:
    if unit == "s" and value < MILLISECONDS:
        value, unit = 1000 * value, "ms"
    return f"{value:,.0f} {unit}" if value >= LEAST_EXACT else f"{value:.3g} {unit}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT")
    print(markdown(parser.parse_args().reports))
