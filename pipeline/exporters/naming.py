"""Names of files that differ wherever they are copied to."""

from __future__ import annotations

import re
import unicodedata

# Of a stem in UTF-8. File systems have room for 255, suffixes and temporary names take the others.
MOST_BYTES = 200
UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029/\\]")


class UniqueNames:
    """Stems of file names that differ even where upper and lower case are the same."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._last: dict[str, int] = {}

    def take(self, stem: str) -> str:
        """`stem`, or with the first free number from 2."""
        folded = _folded(stem)
        name, number = stem, self._last.get(folded, 1)
        while _folded(name) in self._taken:
            number += 1
            name = f"{stem}_{number}"
        self._last[folded] = number
        self._taken.add(_folded(name))
        return name


def fit_stem(stem: str) -> str:
    """A stem that lists of names, a line each, can hold, and file systems; a long one is cut."""
    content = UNFIT.sub("_", stem).strip().encode("utf-8", "surrogateescape")
    return content[:MOST_BYTES].decode("utf-8", "ignore").rstrip() or "image"


def _folded(stem: str) -> str:
    """The same for names that some file system does not tell apart."""
    return unicodedata.normalize("NFC", stem.casefold())
