"""The benchmarks run at tiny sizes, and both sides of each agree; no time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from speed import evaluation, retrieval, stages
from speed.harness import Bench, Curve, timed
from speed.registry import select
from speed.table import markdown
from tests.paths import ROOT

CURVES = [(evaluation.CURVE, 20), (retrieval.CURVE, 600), (stages.CURVE, 20)]


@pytest.mark.parametrize("bench", select(), ids=lambda bench: bench.name)
def test_both_sides_of_a_bench_agree(bench: Bench, tmp_path: Path) -> None:
    pair = bench.prepare(tmp_path, True)
    assert pair.check(timed(pair.published)[1], timed(pair.ours)[1])


@pytest.mark.parametrize(("curve", "size"), CURVES, ids=["evaluate", "retrieve", "mask"])
def test_a_curve_runs(curve: Curve, size: int, tmp_path: Path) -> None:
    curve.prepare(tmp_path, size, 16)
    curve.run(tmp_path)


def benchmark(*options: str) -> None:
    subprocess.run(
        [sys.executable, "-m", *options],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )


def test_the_table_is_written(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    benchmark(
        *("speed", "--quick", "--budget", "0.1", "--repeats", "1"),
        *("--only", "confusion", "--out", str(out)),
    )
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["rows"]] == ["confusion"]
    assert report["rows"][0]["ratio"] > 0
    assert report["machine"]


def row(name: str, **values: Any) -> dict[str, Any]:
    times = {"unit": "s", "published": 12.34, "ours": 0.5, "ratio": 24.68, "target": 20.0}
    spread = {"low": 20.0, "high": 30.0, "ratios": [20.0, 30.0]}
    return {"name": name, "title": f"the {name}", "reached": True, **times, **spread, **values}


def test_reports_become_one_table(tmp_path: Path) -> None:
    memory = {"unit": "MB", "published": 8015.2, "ours": 68.57, "ratios": []}
    first = [row("losses"), row("losses_memory", **memory), row("embed", target=1.15)]
    second = [row("embed", reached=False, target=1.15, ours=0.25, published=0.125)]
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, rows in zip(paths, (first, second), strict=True):
        path.write_text(json.dumps({"rows": rows}))
    _, _, *lines = markdown(paths).splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        ["the losses", "12.3 s", "0.5 s", "24.68x (20.00 to 30.00)", "", "20x", "yes"],
        ["the losses_memory", "8,015 MB", "68.6 MB", "24.68x", "", "20x", "yes"],
        [
            *("the embed", "125 ms", "250 ms", "24.68x (20.00 to 30.00)"),
            *("24.68x (20.00 to 30.00)", "at most 1.15x", "**1 of 2**"),
        ],
    ]


def test_the_benchmark_of_a_gpu_runs_without_one() -> None:
    benchmark("speed.gpu", "--quick", "--device", "cpu")
