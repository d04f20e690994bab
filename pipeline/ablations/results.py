"""The file of an ablation's results, `reports/ablations/NAME.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.ablations.definitions import Settings
from pipeline.files import read_json, write_json
from pipeline.params.base import Section
from pipeline.params.reading import parse_section


class VariantResult(Section):
    """What one variant gave.

    Attributes:
        label: its name in tables.
        params: what it sets, by dotted key.
        experiment: name of its DVC experiment; none before it has run, or where it failed.
        encoder: the trained encoder, as the metrics file's protocol has it.
        metrics: scores by key; one that the metrics file lacks is none.
    """

    label: str
    params: Settings
    experiment: str | None = None
    encoder: str | None = None
    metrics: dict[str, float | None] = Field(default_factory=dict)


class AblationResult(Section):
    """What an ablation gave so far: the benchmark, params set for all variants, the variants."""

    ablation: str
    bench: str
    params: Settings
    variants: list[VariantResult]


def read_result(path: Path) -> AblationResult:
    """Read a file of results.

    Raises:
        PipelineError: no such file, or its content is not what `write_result` writes.
    """
    return parse_section(read_json(path), AblationResult, name=str(path))


def write_result(path: Path, result: AblationResult) -> None:
    """Write a file of results: equal results give equal bytes."""
    write_json(path, result.model_dump())


def value_at(metrics: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key of nested metrics; none where there is none."""
    value: Any = metrics
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def protocol_of(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The lines `name: value` of a metrics file's protocol, by name."""
    lines = metrics.get("protocol") or []
    return dict(line.split(": ", 1) for line in lines if ": " in line)
