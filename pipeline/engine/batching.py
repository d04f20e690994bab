"""Items cut into parts: of a plan, of what fits into memory, of what a network takes at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

Item = TypeVar("Item")


def slices(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Cut items into parts of `size`, the last one perhaps smaller: the plan of a stage."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` consecutive items; the last one may be shorter."""
    while batch := list(islice(items, size)):
        yield batch


def equal_size_batches(
    items: Iterable[Item], batch_size: int, *, size_of: Callable[[Item], Hashable]
) -> Iterator[Sequence[Item]]:
    """At most `batch_size` items of equal `size_of` at a time, sizes as they first come."""
    of_size: dict[Hashable, list[Item]] = {}
    for item in items:
        of_size.setdefault(size_of(item), []).append(item)
    for group in of_size.values():
        yield from slices(group, batch_size)
