"""The benchmarks run at tiny sizes, and both sides of each agree; no time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import evaluation, retrieval, stages
from benchmarks.harness import Bench, Curve, timed
from benchmarks.registry import select
from benchmarks.table import markdown

ROOT = Path(__file__).resolve().parents[1]
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
        *("benchmarks", "--quick", "--budget", "0.1", "--repeats", "1"),
        *("--only", "confusion", "--out", str(out)),
    )
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["rows"]] == ["confusion"]
    assert report["rows"][0]["ratio"] > 0
    assert report["machine"]


def test_the_readme_shows_the_reports() -> None:
    reports = [ROOT / "reports" / name for name in ("bench.json", "bench-again.json")]
    assert markdown(reports) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_benchmark_of_a_gpu_runs_without_one() -> None:
    benchmark("benchmarks.gpu", "--quick", "--device", "cpu")
