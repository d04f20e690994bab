"""The one exception that users are meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

LISTED_NAMES = 8
UNITS = ("B", "kB", "MB", "GB", "TB")


class PipelineError(Exception):
    """A mistake in the input: the message names the file or field, its value and the fix.

    The command line prints it as one line and exits with status 1; anything else is a bug and
    keeps its traceback.
    """


def did_you_mean(name: str, known: Sequence[str], *, count: int = 3) -> str:
    """A question with the names that are spelt alike, case aside, or nothing; for a message."""
    folded = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), folded, n=count, cutoff=0.4)
    return f"did you mean {' or '.join(folded[other] for other in close)}? " if close else ""


def first_line(error: Exception) -> str:
    """The first line of what another library says, for a message."""
    return str(error).strip().partition("\n")[0]


def install_command(extra: str = "") -> str:
    """What installs all packages, those of an extra too; for a message.

    In a clone it is run in its folder.
    """
    extras = f"[{extra}]" if extra else ""
    if (Path(__file__).parents[1] / "requirements.lock").is_file():
        return f"pip install -c requirements.lock -e '.{extras}'"
    return f"pip install 'zutis-pipeline{extras}'"


def listing(names: Sequence[str], shown: int = LISTED_NAMES) -> str:
    """Names for a message, the first ones of many; "none" for no name."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (", ".join(names[:shown]) or "none") + more


def counted(counts: Mapping[str, int]) -> str:
    """Counts for a message, the largest first: "3 .heic, 1 without extension"."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{count} {name}" for name, count in ordered if count)


def size_text(num_bytes: int) -> str:
    """A number of bytes in words: "1.5 GB"."""
    size, unit = float(num_bytes), 0
    while size >= 999.95 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.{min(unit, 1)}f} {UNITS[unit]}"
