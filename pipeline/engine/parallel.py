"""Threads that decode, refine and encode images while the network computes.

Results come in the order of the inputs, whatever the number of threads, so outputs do not depend on
it. Threads are enough: the libraries that do the work release the interpreter while they do it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

END: Any = object()


class Workers:
    """A pool of threads; with none of them, all is done at once by the one that asks.

    Args:
        count: number of threads, 0 or more.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool = ThreadPoolExecutor(count) if count else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the threads; what they have not begun is not done."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, function: Callable[[Item], Result], item: Item) -> Future[Result]:
        """Start `function(item)`."""
        if self._pool:
            return self._pool.submit(function, item)
        future: Future[Result] = Future()
        try:
            future.set_result(function(item))
        except Exception as error:
            future.set_exception(error)
        return future

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int
    ) -> Iterator[Result]:
        """Yield `function(item)` in order, with at most `ahead` results waiting to be taken."""
        if self._pool is None:
            yield from map(function, items)
            return
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(self.submit(function, item))
            if len(pending) > ahead + self._count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def read_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield items, while a thread makes the next one."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, iterator, END)
        while (item := coming.result()) is not END:
            coming = reader.submit(next, iterator, END)
            yield item
