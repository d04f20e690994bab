"""Ranked lists of images, and which category keeps an image that several want."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import listing
from pipeline.retrieval.exact import Floats, Rows

if TYPE_CHECKING:
    from pipeline.engine.progress import StageRun


@dataclass(frozen=True, slots=True)
class Ranking:
    """Images of a ranked list, best first; all (E,).

    Attributes:
        ranks: from 1; with gaps where images were taken out.
        similarities: float32.
        positions: rows among those of all shards.
    """

    ranks: Rows
    similarities: Floats
    positions: Rows

    def __len__(self) -> int:
        return len(self.ranks)

    def only(self, kept: NDArray[np.bool_]) -> Self:
        """Without the images that the mask (E,) leaves out; ranks stay."""
        return type(self)(self.ranks[kept], self.similarities[kept], self.positions[kept])


def settle_overlaps(lists: list[Ranking], policy: str) -> list[Ranking]:
    """Decide which category keeps an image that several want.

    Args:
        lists: the ranked list of each category, in the order of the categories.
        policy: `all`: every category keeps it. `best`: the one it is most similar to, on a tie the
            earlier one. `last`: the last one, as the published code does.

    Returns:
        The lists without the images that were lost; ranks are not renumbered.
    """
    if policy == "all":
        return lists
    sizes = [len(part) for part in lists]
    numbers = np.repeat(np.arange(len(lists)), sizes)
    positions = _positions(lists)
    worth = numbers if policy == "last" else np.concatenate([part.similarities for part in lists])
    order = np.lexsort((numbers, -worth, positions))
    _, firsts = np.unique(positions[order], return_index=True)
    is_kept = np.zeros(len(positions), dtype=bool)
    is_kept[order[firsts]] = True
    masks = np.split(is_kept, np.cumsum(sizes)[:-1])
    return [part.only(mask) for part, mask in zip(lists, masks, strict=True)]


def without(lists: list[Ranking], taken: Ranking) -> list[Ranking]:
    """The lists without the images of `taken`; ranks stay."""
    return [part.only(~np.isin(part.positions, taken.positions)) for part in lists]


def count_losses(
    stage_run: StageRun,
    categories: Sequence[str],
    lists: Sequence[Ranking],
    archives: Sequence[Ranking],
) -> None:
    """Count what `archives` lack of `lists`, and name the categories that got no image."""
    stage_run.count("dropped", sum(map(len, lists)) - sum(map(len, archives)))
    empty = [name for name, part in zip(categories, archives, strict=True) if len(part) == 0]
    stage_run.count("empty_archives", len(empty))
    if empty:
        stage_run.warn(
            f"no image is left for {listing(empty)}: they cannot be learnt; rename or remove them, "
            "or look at retrieve.overlap"
        )


def _positions(lists: Sequence[Ranking]) -> Rows:
    """Positions of the images of all lists, one list after the other."""
    return np.concatenate([part.positions for part in lists])


def _negatives(
    near_background: Ranking, lists: list[Ranking], num_negatives: int, *, contested: bool
) -> Ranking:
    """The images nearest to a name of the background, in no list of a category.

    Ranked by how much nearer they are to it than to any category; that is their similarity. With
    `contested`, an image of a list counts too if it is nearer to the background.
    """
    is_free = ~np.isin(near_background.positions, _positions(lists))
    if contested:
        is_free |= near_background.similarities > 0
    free = near_background.only(is_free)
    kept = slice(num_negatives)
    return Ranking(np.arange(1, len(free) + 1)[kept], free.similarities[kept], free.positions[kept])
