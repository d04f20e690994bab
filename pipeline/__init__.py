"""Name categories, point at unlabelled images, get a segmenter."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# OpenMP threads that spin while they wait starve each other, and other processes, of cores. Its
# library reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from pipeline.inference.segmenter import Segmenter

__all__ = ["Segmenter", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`Segmenter`, imported when it is first asked for: torch takes seconds."""
    if name == "Segmenter":
        from pipeline.inference.segmenter import Segmenter

        return Segmenter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
