"""What was opened from a file, and is opened again once the file has changed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from pipeline.errors import PipelineError
from pipeline.files import digest
from pipeline.formats.shards import MANIFEST

T = TypeVar("T")

OUTDATED = "what this page shows has been made anew since; load the page again"


class MissingError(PipelineError):
    """Something that a stage has not made yet; the message says which to run."""


def not_made(path: Path, stage: str) -> MissingError:
    """The error of something that is not there yet.

    Args:
        path: the file or folder that is waited for.
        stage: the command that makes it.
    """
    return MissingError(f"{path}: not made yet; run `dvc repro` first, or `{stage}` alone")


class Opened(Generic[T]):
    """The content of the newest version of some files.

    Args:
        files: files that change whenever the content does.
        make: opens it.
        stage: the command that makes the files, for the message.
    """

    def __init__(self, files: list[Path], make: Callable[[], T], *, stage: str) -> None:
        self._files = files
        self._make = make
        self._stage = stage
        self._lock = threading.Lock()
        self._version = ""
        self._content: T | None = None

    @property
    def version(self) -> str:
        """A short text that differs for each version of the files.

        Raises:
            MissingError: one of them is not there.
        """
        states = []
        for path in self._files:
            if not path.is_file():
                made = path.parent if path.name == MANIFEST else path
                raise not_made(made, self._stage)
            state = path.stat()
            states.append([str(path), state.st_size, state.st_mtime_ns])
        return digest(states)[:12]

    def check(self, version: object) -> None:
        """Refuse what is asked of another version, whose numbers stand for something else.

        Args:
            version: that of the page which asks; None for the newest.

        Raises:
            MissingError: a file is not there.
            PipelineError: it is another one.
        """
        if version not in (None, self.version):
            raise PipelineError(OUTDATED)

    @property
    def is_there(self) -> bool:
        """Whether the files are there."""
        return all(path.is_file() for path in self._files)

    def get(self) -> T:
        """The content.

        Raises:
            MissingError: a file is not there.
            PipelineError: from opening it.
        """
        version = self.version
        with self._lock:
            if self._content is None or version != self._version:
                self._content, self._version = self._make(), version
            return self._content
