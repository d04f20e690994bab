"""Runs of a variant with several seeds, as one: means, ranges, lifts and seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from pipeline.ablations.costs import StageCost
from pipeline.ablations.definitions import Ablation
from pipeline.ablations.results import AblationResult, RunResult, Spread, VariantResult

DIGITS = 2  # of a score
Number = Callable[[float | None], str]


class Table(NamedTuple):
    """Headings of the columns, and cells (variants, columns)."""

    headings: list[str]
    cells: list[list[str]]


def summarised(
    variant: VariantResult,
    runs: Sequence[RunResult],
    *,
    benches: Sequence[str],
    base: Sequence[RunResult] | None,
) -> VariantResult:
    """A variant with what its runs gave.

    Args:
        variant: with label, params and encoder.
        runs: one a seed.
        benches: the one that is chosen on first, the one that is reported last.
        base: runs of the variant that lifts are over; none: neither lifts nor seconds.
    """
    keys = list(runs[0].metrics[benches[0]])
    scores = {
        bench: _spreads({key: _values(runs, bench, key) for key in keys}) for bench in benches
    }
    changes: dict[str, Any] = {
        "experiment": runs[0].experiment,
        "metrics": {key: _mean(_values(runs, benches[0], key)) for key in keys},
        "scores": scores,
        "runs": list(runs),
    }
    if base is not None:
        by_seed = {run.seed: run for run in base}
        pairs = [(run, by_seed[run.seed]) for run in runs if run.seed in by_seed]
        changes["lift"] = _spreads({key: _lifts(pairs, benches[-1], key) for key in keys})
        changes["seconds"] = _mean([_seconds_of(*pair) for pair in pairs])
        changes["more_seconds"] = _mean([_more_seconds(*pair) for pair in pairs])
    return variant.model_copy(update=changes)


def table(ablation: Ablation, result: AblationResult, number: Number) -> Table:
    """An ablation's results in words: scores, and with `lift_over` lifts and seconds.

    Args:
        ablation: its definition.
        result: what it gave so far.
        number: writes a score; none where there is none.
    """
    pairs = [(bench, key) for bench in result.benches for key in ablation.metrics]
    heads = list(ablation.metrics.values())
    several = len(result.benches) > 1
    headings = [
        f"{bench} {ablation.metrics[key]}" if several else ablation.metrics[key]
        for bench, key in pairs
    ]
    if ablation.lift_over is not None:
        headings += [*(f"{head}, lift" for head in heads), "seconds", "more"]
    cells = []
    for variant in result.variants:
        row = [_in_words(_score(variant, result, *pair), number) for pair in pairs]
        if ablation.lift_over is not None:
            row += [_in_words(variant.lift.get(key), _signed(number)) for key in ablation.metrics]
            row += [_seconds(variant.seconds, number), _seconds(variant.more_seconds, number, "+")]
        cells.append(row)
    return Table(headings, cells)


def _values(runs: Sequence[RunResult], bench: str, key: str) -> list[float | None]:
    return [run.metrics[bench].get(key) for run in runs]


def _lifts(
    pairs: Sequence[tuple[RunResult, RunResult]], bench: str, key: str
) -> list[float | None]:
    """Differences between runs with one seed."""
    values = [(run.metrics[bench].get(key), base.metrics[bench].get(key)) for run, base in pairs]
    return [None if ours is None or other is None else ours - other for ours, other in values]


def _spreads(values: Mapping[str, Sequence[float | None]]) -> dict[str, Spread]:
    """Spreads by key; keys without a value are left out."""
    known = {key: [x for x in numbers if x is not None] for key, numbers in values.items()}
    return {
        key: Spread(
            mean=round(mean(numbers), DIGITS),
            min=round(min(numbers), DIGITS),
            max=round(max(numbers), DIGITS),
        )
        for key, numbers in known.items()
        if numbers
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return round(mean(known), DIGITS) if known else None


def _seconds_of(run: RunResult, base: RunResult) -> float | None:
    """Of the stages that the base does not run so; of the base itself, of all."""
    return _sum(run.stages if run is base else _without(run.stages, base.stages))


def _more_seconds(run: RunResult, base: RunResult) -> float | None:
    """The same, less those of the base in their place."""
    if run is base:
        return None
    seconds = _seconds_of(run, base), _sum(_without(base.stages, run.stages))
    return None if seconds[0] is None or seconds[1] is None else seconds[0] - seconds[1]


def _without(
    stages: Mapping[str, StageCost], others: Mapping[str, StageCost]
) -> dict[str, StageCost]:
    """The stages that were not run so among the others."""
    keys = {cost.key for cost in others.values()}
    return {name: cost for name, cost in stages.items() if cost.key not in keys}


def _sum(stages: Mapping[str, StageCost]) -> float | None:
    seconds = [cost.seconds for cost in stages.values()]
    return sum(s for s in seconds if s is not None) if None not in seconds else None


def _known_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(mean(known), 1) if known else None


def _score(variant: VariantResult, result: AblationResult, bench: str, key: str) -> Spread | None:
    """Of files without seeds, the score itself."""
    value = variant.metrics.get(key)
    if not variant.scores and bench == result.bench and value is not None:
        return _spreads({key: [value]})[key]
    return variant.scores.get(bench, {}).get(key)


def _in_words(spread: Spread | None, number: Number) -> str:
    if spread is None or spread.min == spread.max:
        return number(None if spread is None else spread.mean)
    return f"{number(spread.mean)} ({number(spread.min)} to {number(spread.max)})"


def _signed(number: Number) -> Number:
    return lambda value: ("+" if value is not None and value > 0 else "") + number(value)


def _seconds(value: float | None, number: Number, sign: str = "") -> str:
    return number(None) if value is None else f"{value:{sign}.0f}"
