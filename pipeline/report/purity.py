"""How pure the archives look without truth: what stages have measured of each category."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.report.inputs import NO_VALUE, integer, is_number, read_object

PURITY_COLUMNS = {
    "similarity": ("Similarity", "of image and name, mean"),
    "margin": ("Margin", "similarity less that to the best other name, mean"),
    "components": ("Components", "connected parts of a pseudo-mask, mean"),
    "agreement": ("Agreement", "share of the pseudo-mask that dense labels give the category, %"),
}
DIGITS = {"similarity": 3, "margin": 3, "components": 1, "agreement": 1}


def read_purity(stats_dir: Path, categories: Sequence[str]) -> list[dict[str, Any]]:
    """One row a category: its `name`, number of `images` and `cells` of `PURITY_COLUMNS`.

    Args:
        stats_dir: folder with the stats of retrieve, mask and pseudo_label.
        categories: names, in order.

    Returns:
        The rows; none before a stage has measured anything.

    Raises:
        PipelineError: a stats file is damaged.
    """
    measured: dict[str, dict[str, Any]] = {}
    for stage in ("pseudo_label", "mask", "retrieve"):  # the images are those of the last
        path = stats_dir / f"{stage}.json"
        found = read_object(path).get("categories") if path.is_file() else None
        for name, values in (found or {}).items():
            measured.setdefault(name, {}).update(values)
    if not measured:
        return []
    return [_row(name, measured.get(name, {})) for name in categories]


def _row(name: str, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "images": integer(values.get("images", 0)),
        "cells": [_cell(column, values.get(column)) for column in PURITY_COLUMNS],
    }


def _cell(column: str, value: Any) -> str:
    if not is_number(value):
        return NO_VALUE
    return f"{100 * value if column == 'agreement' else value:.{DIGITS[column]}f}"
