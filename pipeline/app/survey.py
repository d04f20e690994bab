"""Measuring every item of a long list in the background, for sorting; no item is kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Measured = TypeVar("Measured")


class Survey(Generic[Measured]):
    """What was measured of each item so far, by a thread of its own.

    Args:
        items: yields what was measured, item after item; it may raise, which ends the survey.
        total: number of items.

    Attributes:
        rows: what was measured so far; it only grows.
        total: number of items.
    """

    def __init__(self, items: Callable[[], Iterator[Measured]], total: int) -> None:
        self.rows: list[Measured] = []
        self.total = total
        self._error: Exception | None = None
        self._stopped = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to measure."""
        return self._done.is_set()

    def wait(self, seconds: float) -> None:
        """Wait for the end, but no longer than that.

        Raises:
            Exception: what ended the survey early.
        """
        self._done.wait(seconds)
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End it after the item at hand."""
        self._stopped.set()

    def _run(self, items: Callable[[], Iterator[Measured]]) -> None:
        try:
            for row in items():
                if self._stopped.is_set():
                    return
                self.rows.append(row)
        except Exception as error:  # shown by whoever waits
            self._error = error
        finally:
            self._done.set()
