"""Scores on benchmarks, by class and group, and of the audits of index images."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.formats.images import ImageError, load_image
from pipeline.pictures.confusion import describe_pairs
from pipeline.pictures.report import fit_image, picture
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
SIDE, MAX_BYTES = 2400, 300_000  # of a confusion matrix


def read_benches(
    metrics_dir: Path, plots_dir: Path, names: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Headline, table rows, protocol, class bars and confusion matrix of every benchmark.

    Or of those in `names`. A file without a number of images is of no benchmark.

    Raises:
        PipelineError: a metrics file, or a table or picture of the classes, is damaged.
    """
    benches = []
    for path in sorted(metrics_dir.glob("*.json")):
        if path.stem.startswith(AUDIT_PREFIX) or not is_wanted(path.stem, names):
            continue
        metrics = read_object(path)
        if "n_images" not in metrics:
            continue
        groups = metrics.get("groups") or {}
        benches.append(
            {
                "name": path.stem,
                "headline": _headline(metrics),
                "rows": [score_row(path.stem, metrics)]
                + [score_row(name, group, is_group=True) for name, group in groups.items()],
                "protocol": dict(line.split(": ", 1) for line in metrics.get("protocol", [])),
                "per_class": _per_class(plots_dir / f"{path.stem}_per_class.csv"),
                "confusion": _confusion(plots_dir / f"{path.stem}_confusion.png"),
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


def score_row(name: str, metrics: Mapping[str, Any], *, is_group: bool = False) -> dict[str, Any]:
    """A row of a table of scores, as `bench_columns` heads it."""
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


def _confusion(path: Path) -> dict[str, Any] | None:
    """Picture of the confusion matrix; the pairs that it lists are also its text."""
    table = path.with_suffix(".csv")
    if not (path.is_file() and table.is_file()):
        return None
    try:
        names, counts = _read_counts(table)
        image = fit_image(load_image(path), SIDE)
    except (ImageError, ValueError) as error:
        raise PipelineError(f"{path}: {error}; run `pipeline score` again") from None
    if not counts.any():  # no label maps were scored
        return None
    pairs = "; ".join(describe_pairs(counts, names)) or "no mistakes"
    return picture(image, alt=f"Confusion matrix. {pairs}", max_bytes=MAX_BYTES)


def _read_counts(path: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Classes, and pixels by true (row) and predicted class.

    Raises:
        ValueError: not a square table of whole numbers.
    """
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    counts = np.array([row[1:] for row in rows], dtype=np.int64)
    if counts.shape != (len(header) - 1,) * 2:
        raise ValueError(f"{path.name} is no square table")
    return header[1:], counts
