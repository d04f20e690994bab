"""Data files in YAML, checked against a typed model; what is wrong is named by its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import PipelineError


class Record(BaseModel):
    """A part of a data file: frozen, strict, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(path: Path, model: type[AnyRecord]) -> AnyRecord:
    """Read and check a data file (YAML 1.2).

    Raises:
        PipelineError: the file cannot be read, is not YAML, or a key is unknown, missing or has a
            value of the wrong type; every offending place is named, one a line.
    """
    try:
        content = YAML(typ="safe", pure=True).load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read: {error.strerror}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path}: not valid YAML: {error}") from None
    return check_record(content, model, name=str(path))


def check_record(content: Any, model: type[AnyRecord], *, name: str) -> AnyRecord:
    """Check parsed content; `name` heads the error messages."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise PipelineError("\n".join(_complaints(name, error))) from None


def _complaints(name: str, error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"] if part != "[key]")
        head = f"{name}: {place}: " if place else f"{name}: "
        if item["type"] == "missing":
            lines.append(f"{head}is missing")
        elif item["type"] == "extra_forbidden":
            lines.append(f"{head}is an unknown key")
        elif item["type"] == "value_error":  # raised by a check of ours, which names the value
            lines.append(head + item["msg"].removeprefix("Value error, "))
        else:
            lines.append(f"{head}{item['msg']}, got {item['input']!r}")
    return lines
