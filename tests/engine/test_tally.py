"""Means by category, whatever the order in which parts come in."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np

from pipeline.engine.progress import StageRun, Tally


def test_measures_of_parts_add_up_to_the_same_means_in_any_order(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(3, 50))
    parts = []
    for number, row in enumerate(values):
        part = Tally()
        for value in row:
            part.measure(f"category {number % 2}", "margin", float(value))
        parts.append(json.loads(json.dumps(part.as_dict())))
    written = set()
    for order in permutations(parts):
        with StageRun("mask", stats_path=tmp_path / "mask.json") as stage:
            for part in order:
                stage.add(Tally.from_dict(part))
        written.add((tmp_path / "mask.json").read_bytes())
    assert len(written) == 1
    assert json.loads(written.pop())["categories"] == {
        "category 0": {"images": 100, "margin": round(float(values[::2].mean()), 4)},
        "category 1": {"images": 50, "margin": round(float(values[1].mean()), 4)},
    }


def test_without_measures_and_notes_the_stats_are_as_before(tmp_path: Path) -> None:
    with StageRun("mask", stats_path=tmp_path / "mask.json") as stage:
        stage.note("never_predicted", [])
    assert set(json.loads((tmp_path / "mask.json").read_text())) == {
        "stage",
        "items",
        "skipped",
        "counts",
        "skipped_items",
    }
