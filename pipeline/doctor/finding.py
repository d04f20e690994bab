"""One line of a check-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What was found out about one thing.

    Attributes:
        name: of the thing.
        state: `fail` where a run would end, `warn` where it may, or where something is odd.
        text: what is there, in one line.
        fix: what to do; empty where nothing is to be done.
    """

    name: str
    state: State
    text: str
    fix: str = ""


def failed(findings: Sequence[Finding]) -> bool:
    """Whether anything would end a run."""
    return any(finding.state == "fail" for finding in findings)
