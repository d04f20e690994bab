"""Images that a person has dropped from archives, as positions among the rows of all shards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.formats.review import NEGATIVES, Review, Reviewed
from pipeline.formats.tables import iter_embedding_rows
from pipeline.retrieval.exact import Rows
from pipeline.retrieval.ranking import Ranking

READ_ROWS = 65536


class DroppedImages:
    """What `data/review/archives.csv` keeps out of which lists.

    A category's list is without the images that were dropped from it. The negatives are without
    all that were dropped from anything: what is no good picture of a thing may still show it.

    Args:
        review: the decisions.
        shards: embedding shards, in the order of their positions; read only if there are decisions.
        categories: names in the order of the lists.

    Attributes:
        num_known: decisions that are about a category and an image that are there.
        unknown: the others.

    Raises:
        PipelineError: a shard is damaged.
    """

    def __init__(self, review: Review, shards: Sequence[Path], categories: Sequence[str]) -> None:
        places = find_keys(shards, {item.key for item in review}) if review else {}
        names = {NEGATIVES, *categories}
        self.unknown: list[Reviewed] = []
        self._by_category: dict[str, list[int]] = {name: [] for name in categories}
        everywhere: set[int] = set()
        for item in review:
            if item.category not in names or item.key not in places:
                self.unknown.append(item)
                continue
            everywhere.add(places[item.key])
            if item.category != NEGATIVES:
                self._by_category[item.category].append(places[item.key])
        self.num_known = len(review) - len(self.unknown)
        self._everywhere = sorted(everywhere)

    @property
    def most(self) -> int:
        """The greatest number of images that one category's list is without."""
        return max(map(len, self._by_category.values()), default=0)

    @property
    def total(self) -> int:
        """Number of images that the negatives are without."""
        return len(self._everywhere)

    def of_category(self, ranking: Ranking, category: str, size: int) -> Ranking:
        """The best `size` images of a category's list that were not dropped from it."""
        return _without(ranking, self._by_category[category], size)

    def of_negatives(self, ranking: Ranking) -> Ranking:
        """The list without all that was dropped."""
        return _without(ranking, self._everywhere, len(ranking))


def find_keys(shards: Sequence[Path], keys: Collection[str]) -> dict[str, int]:
    """Positions of the images of these sample keys; those that are nowhere are left out.

    Raises:
        PipelineError: a shard is damaged.
    """
    wanted = pa.array(sorted(keys), pa.string())
    found: dict[str, int] = {}
    start = 0
    for rows in iter_embedding_rows(shards, columns=["key"], block_rows=READ_ROWS):
        places = np.flatnonzero(pc.is_in(rows["key"], wanted).to_numpy(zero_copy_only=False))
        named = rows["key"].take(pa.array(places)).to_pylist()
        found.update(zip(named, (start + places).tolist(), strict=True))
        start += len(rows)
    return found


def _without(ranking: Ranking, positions: Sequence[int], size: int) -> Ranking:
    """The first `size` images that are not at these positions; ranks move up."""
    taken: Rows = np.asarray(positions, np.int64)
    kept = ranking.only(~np.isin(ranking.positions, taken))
    kept = kept.only(np.arange(len(kept)) < size)
    return Ranking(np.arange(1, len(kept) + 1), kept.similarities, kept.positions)
