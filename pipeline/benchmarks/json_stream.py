"""Reads a JSON file of hundreds of megabytes an element at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import PipelineError

CHUNK = 1 << 20
_INK = re.compile(r"\S")
_DELIMITERS = tuple(" \t\r\n,:]}")
_DECODER = json.JSONDecoder()


def visit_arrays(
    path: Path, visitors: Mapping[str, Callable[[Any], None]], *, chunk_size: int = CHUNK
) -> set[str]:
    """Call a function with every element of some arrays of a JSON object, in the file's order.

    Memory holds a piece of the file and one element.

    Args:
        path: file that holds one JSON object.
        visitors: key of the object -> what is called with each element of its array.
        chunk_size: characters read at once.

    Returns:
        The visited keys that the object has.

    Raises:
        PipelineError: no such file, not JSON, not an object, or the value of a visited key is not
            an array.
    """
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            return _visit_object(_Cursor(path, file, chunk_size), visitors)
    except FileNotFoundError:
        raise PipelineError(f"{path}: no such file; expected annotations as JSON") from None
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PipelineError(f"{path}: not a text file (UTF-8); expected JSON") from None


def _visit_object(cursor: _Cursor, visitors: Mapping[str, Callable[[Any], None]]) -> set[str]:
    found = set()

    def visit_member() -> None:
        key = cursor.value()
        if not isinstance(key, str):
            raise cursor.error("expected a key")
        cursor.take(":")
        visitor = visitors.get(key)
        if visitor is not None:
            found.add(key)
            _visit_items(cursor, lambda: visitor(cursor.value()), closing="]")
        elif cursor.peek() == "[":
            _visit_items(cursor, cursor.value, closing="]")
        else:
            cursor.value()

    _visit_items(cursor, visit_member, closing="}")
    if cursor.peek():
        raise cursor.error("expected the end of the file")
    return found


def _visit_items(cursor: _Cursor, visit: Callable[[], Any], *, closing: str) -> None:
    """Call `visit` at each item, which commas separate, between a bracket and its `closing`."""
    cursor.take("{" if closing == "}" else "[")
    if cursor.peek() == closing:
        cursor.take(closing)
        return
    while True:
        visit()
        if cursor.peek() == closing:
            cursor.take(closing)
            return
        cursor.take(",")


class _Cursor:
    """A place in the text of a file."""

    def __init__(self, path: Path, file: TextIO, chunk_size: int) -> None:
        self._path = path
        self._file = file
        self._chunk_size = chunk_size
        self._text = ""
        self._position = 0
        self._dropped = 0
        self._ended = False

    def peek(self) -> str:
        """The next character that is not blank, "" at the end."""
        while True:
            ink = _INK.search(self._text, self._position)
            if ink is not None:
                self._position = ink.start()
                return ink.group()
            self._position = len(self._text)
            if self._ended:
                return ""
            self._read_on()

    def take(self, character: str) -> None:
        """Step over `character`, which must come next."""
        if self.peek() != character:
            raise self.error(f"expected {character!r}")
        self._position += 1

    def value(self) -> Any:
        """Decode the value that comes next."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if self._ended:
                    raise self.error(error.msg) from None
            else:
                # A number may go on in the next chunk.
                if self._ended or self._text[end : end + 1] in _DELIMITERS:
                    self._position = end
                    return value
            self._read_on()

    def error(self, problem: str) -> PipelineError:
        """What to raise when the text here is not what it should be."""
        return PipelineError(
            f"{self._path}: not valid JSON at character {self._dropped + self._position}: "
            f"{problem}; if the file is cut short or damaged, unpack or download it again"
        )

    def _read_on(self) -> None:
        # As much again as is there: a long text is not copied more than twice.
        chunk = self._file.read(max(self._chunk_size, len(self._text) - self._position))
        self._ended = not chunk
        self._dropped += self._position
        self._text = self._text[self._position :] + chunk
        self._position = 0
