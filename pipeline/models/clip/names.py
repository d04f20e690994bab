"""A closed list of names, for text towers that know no others."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from pipeline.errors import PipelineError

NAMES_FIELD = "categories or background"
NUM_NEAREST = 5
SPELT_ALIKE = 0.75
IRREGULAR = {"mice": "mouse", "geese": "goose", "oxen": "ox"}
PLURALS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))


def normalise_name(name: str) -> str:
    """Lower case, with single blanks for blanks, hyphens, underscores and slashes."""
    return re.sub(r"[\s_/-]+", " ", name.casefold()).strip()


def resolve_name(name: str, known: Sequence[str], *, source: str, field: str = NAMES_FIELD) -> str:
    """The name of the list that `name` means: case, hyphens and a plural do not count.

    Args:
        name: as the user wrote it.
        known: the normalised names.
        source: what knows no others, for the message.
        field: where the name comes from, for the message.

    Raises:
        PipelineError: it is none of them; the message has the nearest.
    """
    wanted = normalise_name(name)
    for candidate in (wanted, *_singulars(wanted)):
        if candidate in known:
            return candidate
    raise PipelineError(
        f"{field}: {name!r} is none of the {len(known)} names that {source} knows; "
        f"{_nearest(wanted, known)}. `pipeline weights names {source} WORD` finds those with a "
        "word; any name will do with the weights of a full CLIP (encoder.model, encoder.pretrained)"
    )


def find_names(word: str, known: Sequence[str], *, source: str) -> list[str]:
    """The names that hold a word or a part of one.

    Raises:
        PipelineError: there is none; the message has the nearest.
    """
    part = normalise_name(word)
    found = [name for name in known if part in name]
    if not found:
        raise PipelineError(
            f"{word!r} is in none of the {len(known)} names that {source} knows; "
            f"{_nearest(part, known)}"
        )
    return found


def _singulars(name: str) -> list[str]:
    """What the last word may be the plural of."""
    head, blank, last = name.rpartition(" ")
    words = [IRREGULAR[last]] if last in IRREGULAR else []
    words += [last.removesuffix(end) + new for end, new in PLURALS if last.endswith(end)]
    return [head + blank + word for word in words]


def _nearest(name: str, known: Sequence[str]) -> str:
    """Names that share a word, else those of similar letters, in words."""
    words = set(name.split())
    sharing = [other for other in known if words & set(other.split())]
    if sharing:
        near = difflib.get_close_matches(name, sharing, n=NUM_NEAREST, cutoff=0.0)
        return f"the nearest are {', '.join(near)}"
    near = difflib.get_close_matches(name, known, n=NUM_NEAREST, cutoff=SPELT_ALIKE)
    return f"the nearest are by spelling alone: {', '.join(near)}" if near else "none is near"
