"""Geometry of the line charts."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.report.charts import line_chart, nice_ticks


def points_of(line: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (point.split(",") for point in line.split())]


def test_line_chart_maps_ends_to_corners() -> None:
    chart = line_chart("loss", [(0, 0.0), (100, 8.0)])
    first, last = points_of(chart["raw"])
    assert first == (chart["left"], chart["bottom"])
    assert last == (chart["right"], chart["top"])
    assert [tick["label"] for tick in chart["y_ticks"]] == ["0", "2", "4", "6", "8"]


@pytest.mark.parametrize(
    ("mark", "place"), [(None, ""), (0, "66.0"), (50, "208.0"), (100, "350.0"), (101, ""), (-1, "")]
)
def test_a_mark_stands_at_its_step(mark: float | None, place: str) -> None:
    assert line_chart("loss", [(0, 1.0), (100, 8.0)], mark=mark)["mark"] == place


@pytest.mark.parametrize("points", [[], [(1, float("nan"))], [(5, 2.0)], [(1, 3.0), (2, 3.0)]])
def test_line_chart_of_few_or_equal_points(
    points: list[tuple[float, float]],
) -> None:
    chart = line_chart("loss", points)
    for x, y in points_of(chart["raw"]):
        assert chart["left"] <= x <= chart["right"]
        assert chart["top"] <= y <= chart["bottom"]
    assert (chart["raw"] == "") == (chart["summary"] == "no finite values")


def test_line_chart_averages_long_curves_and_keeps_inside() -> None:
    rng = np.random.default_rng(0)
    chart = line_chart("loss", [(step, float(rng.normal())) for step in range(20_000)])
    points = points_of(chart["raw"])
    assert 100 < len(points) <= 300
    assert all(chart["top"] <= y <= chart["bottom"] for _, y in points)
    assert {tick["label"] for tick in chart["x_ticks"]} >= {"5k", "10k", "15k"}


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.0]),
        (0.3, 2.9, [0.0, 1.0, 2.0, 3.0]),
        (-3.0, 3.0, [-4.0, -2.0, 0.0, 2.0, 4.0]),
        (2e-6, 9e-6, [2e-6, 4e-6, 6e-6, 8e-6, 1e-5]),
        (5.0, 5.0, [5.0]),
    ],
)
def test_ticks_are_round_and_span_the_range(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high, 4) == pytest.approx(ticks)
