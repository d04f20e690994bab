"""Decisions while they are made: read, changed under a lock, undone."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Mapping
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.files import claim
from pipeline.formats.review import Decision, Review, Reviewed, read_review, write_review

UNDO_STEPS = 200

Changes = Mapping[Reviewed, Decision | None]


class ReviewBook:
    """One file of decisions.

    The file is read anew each time, so that edits by hand count, and replaced whole. Other threads
    and processes wait or are refused.

    Args:
        path: see `pipeline.formats.review`.
        verdicts: those that it may hold.
    """

    def __init__(self, path: Path, verdicts: Collection[str]) -> None:
        self.path = path
        self._verdicts = verdicts
        self._lock = threading.Lock()
        self._undo: deque[Changes] = deque(maxlen=UNDO_STEPS)

    def read(self) -> Review:
        """All decisions.

        Raises:
            PipelineError: a line is malformed.
        """
        return read_review(self.path, self._verdicts)

    def change(self, changes: Changes) -> None:
        """Take decisions; None takes one back. The whole is one step to be undone.

        Raises:
            PipelineError: a line of the file is malformed, or another process is writing it.
        """
        with self._lock:
            before = self._write(changes)
            self._undo.append(before)

    def undo(self) -> Changes:
        """Undo the last step that is not undone yet; what has changed by that.

        Raises:
            PipelineError: there is none; else as `change`.
        """
        with self._lock:
            if not self._undo:
                raise PipelineError("nothing to undo since the app was started")
            changes = self._undo[-1]
            self._write(changes)
            self._undo.pop()
            return changes

    def _write(self, changes: Changes) -> Changes:
        """Write changes; returns those that would take them back."""
        with claim(self.path):
            review = dict(self.read())
            before = {item: review.get(item) for item in changes}
            for item, decision in changes.items():
                if decision is None:
                    review.pop(item, None)
                else:
                    review[item] = decision
            write_review(self.path, review)
        return before


def listed(changes: Changes) -> list[dict[str, str | None]]:
    """Changes as JSON: what each image's verdict is now, or none."""
    return [
        {"category": category, "key": key, "verdict": decision.verdict if decision else None}
        for (category, key), decision in changes.items()
    ]
