"""A closed list of names, for text towers that know no others."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from pipeline.errors import PipelineError

NUM_NEAREST = 5
IRREGULAR = {"mice": "mouse", "geese": "goose", "oxen": "ox"}
PLURALS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))


def normalise_name(name: str) -> str:
    """Lower case, with single blanks for blanks, hyphens, underscores and slashes."""
    return re.sub(r"[\s_/-]+", " ", name.casefold()).strip()


def resolve_name(name: str, known: Sequence[str], *, source: str) -> str:
    """The name of the list that `name` means: case, hyphens and a plural do not count.

    Args:
        name: as the user wrote it.
        known: the normalised names.
        source: what knows no others, for the message.

    Raises:
        PipelineError: it is none of them; the message has the nearest.
    """
    wanted = normalise_name(name)
    for candidate in (wanted, *_singulars(wanted)):
        if candidate in known:
            return candidate
    raise PipelineError(
        f"categories or background: {name!r} is none of the {len(known)} names that {source} "
        f"knows; the nearest are {', '.join(_nearest(wanted, known))}. Use one of its names, or "
        "the weights of a full CLIP (encoder.model, encoder.pretrained)"
    )


def _singulars(name: str) -> list[str]:
    """What the last word may be the plural of."""
    head, blank, last = name.rpartition(" ")
    words = [IRREGULAR[last]] if last in IRREGULAR else []
    words += [last.removesuffix(end) + new for end, new in PLURALS if last.endswith(end)]
    return [head + blank + word for word in words]


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """Names that share a word, then those of similar letters."""
    words = set(name.split())
    sharing = [other for other in known if words & set(other.split())]
    close = difflib.get_close_matches(name, known, n=NUM_NEAREST, cutoff=0.0)
    by_likeness = difflib.get_close_matches(name, sharing, n=NUM_NEAREST, cutoff=0.0)
    return list(dict.fromkeys([*by_likeness, *close]))[:NUM_NEAREST]
