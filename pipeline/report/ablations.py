"""Ablations on this project's benchmark, the papers' tables beside them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pipeline.ablations.definitions import Ablation, list_ablations, read_ablation
from pipeline.ablations.results import AblationResult, read_result
from pipeline.ablations.summary import table
from pipeline.report.inputs import is_wanted, score


def read_ablations(
    results_dir: Path,
    published: Mapping[str, dict[str, Any]],
    benches: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Every ablation: what it varies, its results if it has run, and the papers' tables.

    Args:
        results_dir: folder of the files that `pipeline ablate` writes.
        published: the papers' tables by id; those that are not there are left out.
        benches: results on other benchmarks are not shown; None: all are.

    Raises:
        PipelineError: a file of results is damaged.
    """
    ablations = []
    for name in list_ablations():
        ablation, path = read_ablation(name), results_dir / f"{name}.json"
        result = read_result(path) if path.is_file() else None
        if result is not None and not all(is_wanted(name, benches) for name in result.benches):
            result = None
        ablations.append(
            {
                "name": name,
                "description": ablation.description,
                "carries_over": ablation.carries_over,
                "is_run": result is not None,
                "tables": [published[table] for table in ablation.tables if table in published],
                **(_shown(result, ablation) if result else {}),
            }
        )
    return ablations


def _shown(result: AblationResult, ablation: Ablation) -> dict[str, Any]:
    headings, cells = table(ablation, result, score)
    seeds = max(len(variant.runs) for variant in result.variants)
    encoders = {variant.encoder for variant in result.variants if variant.encoder}
    return {
        "bench": ", ".join(result.benches),
        "headings": headings,
        "encoder": encoders.pop() if len(encoders) == 1 else "",
        "for_all": _settings(result.params),
        "seeds": seeds,
        "lift_over": ablation.lift_over,
        "note": result.note,
        "variants": [
            {
                "label": variant.label,
                "settings": _settings(variant.params),
                "is_run": variant.experiment is not None,
                "seeds": len(variant.runs) if 0 < len(variant.runs) < seeds else None,
                "cells": row,
            }
            for variant, row in zip(result.variants, cells, strict=True)
        ],
    }


def _settings(params: Mapping[str, Any]) -> str:
    """`train.target: fused, k: 25`; in YAML's words."""
    words = {True: "true", False: "false", None: "null"}
    return ", ".join(
        f"{key}: {words[value] if value is None or isinstance(value, bool) else value}"
        for key, value in params.items()
    )
