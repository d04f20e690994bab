"""What the app looks at: the params of a workspace, and where its stages write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.engine.runtime import Runtime
    from pipeline.params.sections import Params


@dataclass(frozen=True)
class Workspace:
    """A folder in which stages have run, or will.

    Attributes:
        name: what the pages call it.
        params: the checked content of params.yaml.
        categories: names by label id from 1.
        paths: see `pipeline/paths.yaml`.
        checkpoint: folder of the checkpoint in force.
        runtime: gives device and precision, when a network is first wanted.
    """

    name: str
    params: Params
    categories: Sequence[str]
    paths: Mapping[str, Path]
    checkpoint: Path
    runtime: Callable[[], Runtime]
