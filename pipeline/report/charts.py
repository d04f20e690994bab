"""Geometry of the report's line charts; the template draws them as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT = 360, 216
LEFT, RIGHT, TOP, BOTTOM = 66, 10, 12, 38
MAX_POINTS = 300
SMOOTHING = 1 / 20


def line_chart(
    name: str, points: Sequence[tuple[float, float]], *, mark: float | None = None
) -> dict[str, Any]:
    """Describe a line chart of (step, value) points, with an upright line at the step `mark`.

    Points that are not finite are left out, long curves are averaged down to `MAX_POINTS`, and a
    running mean over a twentieth of the curve goes with it.

    Returns:
        Name, sizes, ticks, the SVG point lists `raw` and `smooth`, and a sentence for readers who
        do not see the drawing. `raw` is empty where no point is finite, `mark` where there is none
        or it is off the axis.
    """
    finite = sorted((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))
    curve = _bucket_means(finite, MAX_POINTS)
    smooth = _running_mean(curve, max(1, round(len(curve) * SMOOTHING)))
    xs, ys = [x for x, _ in curve] or [0.0], [y for _, y in curve] or [0.0]
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs), 4), nice_ticks(min(ys), max(ys), 4)
    x_range = min(xs), max(xs)
    y_range = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def at_x(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * _share(x, x_range)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(y, y_range)

    def line(values: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in values)

    return {
        "name": name,
        "value_name": name.rpartition("/")[2].replace("_", " "),
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
        "x_ticks": [
            {"at": f"{at_x(tick):.1f}", "label": tick_label(tick)}
            for tick in x_ticks
            if x_range[0] <= tick <= x_range[1]
        ],
        "y_ticks": [{"at": f"{at_y(tick):.1f}", "label": tick_label(tick)} for tick in y_ticks],
        "raw": line(curve),
        "smooth": line(smooth) if len(smooth) > 2 else "",
        "mark": f"{at_x(mark):.1f}"
        if mark is not None and x_range[0] <= mark <= x_range[1]
        else "",
        "summary": _summary(finite),
    }


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (steps of 1, 2 or 5 times a power of ten) that span a range."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_label(value: float) -> str:
    """A tick's number, short: 20k, 0.25, 1e-06."""
    if abs(value) >= 1000:
        return f"{value / 1000:g}k"
    return f"{round(value, 10):.4g}"


def _share(value: float, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return (value - low) / (high - low) if high > low else 0.5


def _bucket_means(
    points: Sequence[tuple[float, float]], max_points: int
) -> list[tuple[float, float]]:
    size = max(1, math.ceil(len(points) / max_points))
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part))
        for part in buckets
    ]


def _running_mean(points: Sequence[tuple[float, float]], reach: int) -> list[tuple[float, float]]:
    windows = (
        (x, points[max(0, index - reach) : index + reach + 1])
        for index, (x, _) in enumerate(points)
    )
    return [(x, sum(y for _, y in window) / len(window)) for x, window in windows]


def _summary(points: Sequence[tuple[float, float]]) -> str:
    if not points:
        return "no finite values"
    (first_x, first_y), (last_x, last_y) = points[0], points[-1]
    low_x, low_y = min(points, key=lambda point: (point[1], point[0]))
    return (
        f"{first_y:.4g} at step {first_x:g}, {last_y:.4g} at step {last_x:g}, "
        f"lowest {low_y:.4g} at step {low_x:g}"
    )
