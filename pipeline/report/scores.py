"""Scores on benchmarks, by class and group, and of the audits of index images."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.report.inputs import (
    integer,
    is_number,
    is_wanted,
    read_object,
    read_rows,
    score,
    to_float,
)
from pipeline.report.wording import AUDIT_MEASURES, BENCH_COLUMNS

AUDIT_PREFIX = "audit_"


def read_benches(
    metrics_dir: Path, plots_dir: Path, names: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Headline, table rows, protocol and class bars of every benchmark, or of those in `names`.

    Raises:
        PipelineError: a metrics file or table of classes is damaged.
    """
    benches = []
    for path in sorted(metrics_dir.glob("*.json")):
        if path.stem.startswith(AUDIT_PREFIX) or not is_wanted(path.stem, names):
            continue
        metrics = read_object(path)
        groups = metrics.get("groups") or {}
        benches.append(
            {
                "name": path.stem,
                "headline": _headline(metrics),
                "rows": [_scores(path.stem, metrics)]
                + [_scores(name, group, is_group=True) for name, group in groups.items()],
                "protocol": dict(line.split(": ", 1) for line in metrics.get("protocol", [])),
                "per_class": _per_class(plots_dir / f"{path.stem}_per_class.csv"),
            }
        )
    return benches


def bench_columns(benches: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Headings of the scores that any of these benchmarks has, by key."""
    present = {key for bench in benches for row in bench["rows"] for key in row["scores"]}
    return {key: heading for key, heading in BENCH_COLUMNS.items() if key in present}


def read_audits(metrics_dir: Path, names: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Scores of archives, pseudo-masks and pseudo-labels of every audit, or of those in `names`.

    Raises:
        PipelineError: a metrics file is damaged.
    """
    audits = []
    for path in sorted(metrics_dir.glob(f"{AUDIT_PREFIX}*.json")):
        name = path.stem.removeprefix(AUDIT_PREFIX)
        if is_wanted(name, names):
            metrics = read_object(path)
            scores = {key: score(metrics[key]) for key in AUDIT_MEASURES if key in metrics}
            audits.append({"name": name, "scores": scores})
    return audits


def _headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    miou, baseline = metrics.get("miou"), metrics.get("baseline_miou")
    gain = miou - baseline if is_number(miou) and is_number(baseline) else None
    return {
        "miou": score(miou),
        "ap50": score(metrics.get("ap50")),
        "baseline": score(baseline),
        "gain": "" if gain is None else f"{gain:+.1f}",
        "n_images": integer(metrics.get("n_images")),
    }


def _scores(name: str, metrics: Mapping[str, Any], *, is_group: bool = False) -> dict[str, Any]:
    return {
        "name": name,
        "is_group": is_group,
        "n_images": integer(metrics.get("n_images")),
        "scores": {key: score(metrics[key]) for key in BENCH_COLUMNS if key in metrics},
    }


def _per_class(path: Path) -> list[dict[str, Any]]:
    """Bars of the classes, best first; those that never occur last."""
    if not path.is_file():
        return []
    rows = read_rows(path)
    if rows and not {"category", "iou"} <= rows[0].keys():
        raise PipelineError(f"{path}: expected the columns category, iou, baseline_iou")
    scored = [
        (row["category"], to_float(row["iou"]), to_float(row.get("baseline_iou"))) for row in rows
    ]
    return [
        {"name": name, "iou": score(iou), "baseline": score(baseline)}
        for name, iou, baseline in sorted(
            scored, key=lambda bar: -bar[1] if is_number(bar[1]) else math.inf
        )
    ]
