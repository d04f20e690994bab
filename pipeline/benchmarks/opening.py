"""From an entry of `benches` to a benchmark that is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.benchmarks import Benchmark, open_bench
from pipeline.errors import PipelineError, listing
from pipeline.vocabulary.categories import load_category_set

if TYPE_CHECKING:
    from pipeline.params.benches import BenchParams


def open_benchmark(name: str, bench: BenchParams, background: Sequence[str]) -> Benchmark:
    """The labelled set of an entry, with all its parts there.

    Args:
        name: of the entry, for messages.
        bench: the entry.
        background: names of label id 0, which no category may have.

    Raises:
        PipelineError: a part is missing, or a name of `unseen` is no category.
    """
    categories = load_category_set(
        bench.categories, background=background, field=f"benches.{name}.categories"
    )
    if unknown := [unseen for unseen in bench.unseen if unseen not in categories]:
        raise PipelineError(
            f"benches.{name}.unseen: {listing(unknown)}: not among its categories: "
            f"{listing(categories)}"
        )
    return open_bench(
        format=bench.format,
        root=bench.root,
        split=bench.split,
        categories=list(categories),
        groups=bench.groups,
        **bench.layout(),
    )
