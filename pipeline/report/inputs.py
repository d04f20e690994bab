"""How the report reads numbers and files, and how it writes numbers."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeGuard

from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.params.base import EncoderParams

NO_VALUE = "\u2013"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        PipelineError: no JSON, or something else than an object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise PipelineError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_rows(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    """Rows of a text table by the names in its first line."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def is_wanted(name: str, names: Collection[str] | None) -> bool:
    """Whether `name` is one of `names`; None wants every name."""
    return names is None or name in names


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def to_float(text: str | None) -> float:
    """A table's number; NaN where the cell is empty or not a number."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def score(percentage: Any) -> str:
    """A percentage with one decimal; a dash where there is none."""
    return f"{percentage:.1f}" if is_number(percentage) else NO_VALUE


def integer(value: Any) -> str:
    """A whole number, its thousands apart; a dash where there is none."""
    return f"{int(value):,}" if is_number(value) else NO_VALUE


def encoder_name(encoder: EncoderParams) -> str:
    """`ViT-B-16-quickgelu / openai`; of local files the names without folders."""
    return " / ".join(Path(part).name for part in encoder.published_as())
