"""From an entry of `benches` to a benchmark that is there."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.benchmarks import Benchmark, open_bench
from pipeline.benchmarks.selection import SelectedBenchmark
from pipeline.errors import PipelineError, listing
from pipeline.vocabulary.categories import load_category_set

if TYPE_CHECKING:
    from pipeline.params.benches import BenchParams


def open_truth(bench: BenchParams, background: Sequence[str], *, field: str) -> Benchmark:
    """The labelled set of a section that is to be trained on, as `open_benchmark`.

    Masks of objects are not looked for.
    """
    semantic = bench.model_copy(update={"metrics": ["semantic"]})
    return open_benchmark("", semantic, background, field=field)


def open_benchmark(
    name: str, bench: BenchParams, background: Sequence[str], *, field: str | None = None
) -> Benchmark:
    """The labelled set of an entry, with all its parts there.

    Args:
        name: of the entry, for messages.
        bench: the entry.
        background: names of label id 0, which no category may have.
        field: where the entry stands in the params, for messages; `benches.NAME` by default.

    Raises:
        PipelineError: a part is missing, or a name of `scored` or `unseen` is no category.
    """
    field = field or f"benches.{name}"
    categories = load_category_set(
        bench.categories, background=background, field=f"{field}.categories"
    )
    scored = categories
    if bench.scored:
        scored = load_category_set(bench.scored, field=f"{field}.scored")
        _check_known(scored, categories, field=f"{field}.scored")
    _check_known(bench.unseen, scored, field=f"{field}.unseen")
    benchmark = open_bench(
        format=bench.format,
        root=bench.root,
        split=bench.split,
        categories=list(categories),
        groups=bench.groups,
        **bench.layout(),
    )
    return SelectedBenchmark(benchmark, scored) if bench.scored else benchmark


def _check_known(names: Sequence[str], categories: Sequence[str], *, field: str) -> None:
    """Raise for names that are no categories; the message has the nearest ones."""
    unknown = [name for name in names if name not in categories]
    if not unknown:
        return
    close = [difflib.get_close_matches(name, categories, n=1) for name in unknown]
    nearest = list(dict.fromkeys(match for matches in close for match in matches))
    hint = f"did you mean {listing(nearest)}? " if nearest else ""
    raise PipelineError(
        f"{field}: {listing(unknown)}: not among its categories; {hint}They are: "
        f"{listing(categories)}"
    )
