"""One comparison of ours with the published: its name, its errors, and whether they pass.

Float tensors pass if the largest difference is within `RELATIVE` of the largest published value.
For values beyond a few units that would be loose, so the bound stays at `MAX_BOUND` until
`FLOAT32_NOISE` of the largest value exceeds it. Where the published code's exact re-implementation
agrees better, a family passes a tighter `relative` or `bound`. Labels, masks and indices are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

RELATIVE = 1e-4
MAX_BOUND = 5e-4
FLOAT32_NOISE = 2e-5
ZERO_BOUND = 1e-7  # where everything published is 0
TIE = 1e-5  # the better of two scores is not decided below this difference


@dataclass(frozen=True)
class Result:
    """One line of the report.

    Attributes:
        name: file name, sub-case and quantity, joined by slashes.
        abs_error: largest absolute difference.
        rel_error: the same, over the largest published absolute value.
        ok: whether ours agrees.
        reason: why not; empty if it agrees.
    """

    name: str
    abs_error: float
    rel_error: float
    ok: bool
    reason: str = ""


Check = Callable[[], Iterable[Result]]
Parts = Iterator[tuple[str, Check]]  # sub-cases by name, each run on its own


def failure(name: str, reason: str) -> Result:
    """A case that could not be compared."""
    return Result(name, math.nan, math.nan, ok=False, reason=reason)


def close(
    name: str,
    actual: Tensor | ArrayLike,
    expected: Tensor | ArrayLike,
    *,
    relative: float = RELATIVE,
    bound: float | None = None,
    slack: Tensor | ArrayLike = 0.0,
) -> Result:
    """Compare floats as described above.

    Args:
        name: of the result.
        actual: ours.
        expected: the published values, of the same shape.
        relative: largest error over the largest published value.
        bound: largest absolute error, instead of `relative`.
        slack: by how much rounding may move each value: no error up to there.
    """
    ours, published = _floats(actual), _floats(expected)
    if ours.shape != published.shape:
        return failure(name, f"shape {ours.shape}, published {published.shape}")
    beyond = np.maximum(np.abs(ours - published) - _floats(slack), 0)
    error, scale = _largest(beyond), _largest(published)
    if bound is None:
        bound = max(min(relative * scale, MAX_BOUND), min(relative, FLOAT32_NOISE) * scale)
        bound = bound or ZERO_BOUND
    ok = error <= bound
    reason = "" if ok else f"error {error:.2e}, allowed {bound:.2e}"
    return Result(name, error, _over(error, scale), ok, reason)


def close_each(
    name: str,
    actual: Mapping[str, float],
    expected: Mapping[str, float],
    *,
    scales: Mapping[str, float],
    relative: float,
    slack: Mapping[str, float] | None = None,
) -> Result:
    """Compare numbers by name, each error beyond its `slack` relative to a scale of its own."""
    if actual.keys() != expected.keys():
        return failure(name, f"names differ: {_some(sorted(actual.keys() ^ expected.keys()))}")
    errors = {key: abs(actual[key] - value) for key, value in expected.items()}
    if slack is not None:
        errors = {key: error - min(error, slack[key]) for key, error in errors.items()}
    shares = {key: _over(error, scales[key]) for key, error in errors.items()}
    wrong = [key for key, share in shares.items() if not share <= relative]
    return Result(
        name,
        max(errors.values(), default=0.0),
        max(shares.values(), default=0.0),
        ok=not wrong,
        reason=f"more than {relative:.0e} off: {_some(wrong)}" if wrong else "",
    )


def equal(
    name: str,
    actual: Tensor | ArrayLike,
    expected: Tensor | ArrayLike,
    *,
    decided: Tensor | ArrayLike | None = None,
) -> Result:
    """Compare integers and booleans exactly.

    Args:
        name: of the result.
        actual: ours.
        expected: the published values, of the same shape.
        decided: where they are compared; elsewhere rounding decides. None for everywhere.
    """
    ours, published = _floats(actual), _floats(expected)
    if ours.shape != published.shape:
        return failure(name, f"shape {ours.shape}, published {published.shape}")
    difference = np.abs(ours - published)
    if decided is not None:
        difference = np.where(_floats(decided) > 0, difference, 0)
    error = _largest(difference)
    reason = f"{np.count_nonzero(difference)} of {difference.size} differ" if error else ""
    return Result(name, error, _over(error, _largest(published)), ok=error == 0, reason=reason)


def none_differs(name: str, differing: Collection[str]) -> Result:
    """Pass if no item differs; the largest error is 1 if any does."""
    reason = f"{len(differing)} differ: {_some(sorted(differing))}" if differing else ""
    error = float(bool(differing))
    return Result(name, error, error, ok=not differing, reason=reason)


def first_is_clear(scores: Tensor) -> Tensor:
    """Where the best of the scores (B, K, ...) leads by more than a tie.

    Scores above 1 carry errors of their own magnitude, so there the lead must grow with them.
    """
    if scores.shape[1] < 2:
        return torch.ones_like(scores[:, 0], dtype=torch.bool)
    best, second = scores.topk(2, dim=1).values.unbind(dim=1)
    return best - second > TIE * max(1.0, float(scores.abs().max()))


def _floats(values: Tensor | ArrayLike) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _largest(values: np.ndarray) -> float:
    """Largest magnitude; 0 of nothing, NaN if anything is not a number."""
    return float(np.abs(values).max()) if values.size else 0.0


def _over(error: float, scale: float) -> float:
    if error == 0:
        return 0.0
    return error / scale if scale else math.inf


def _some(names: Sequence[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
