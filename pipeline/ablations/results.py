"""The file of an ablation's results, `reports/ablations/NAME.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.ablations.costs import StageCost
from pipeline.ablations.definitions import Settings
from pipeline.files import read_json, write_json
from pipeline.params.base import Section
from pipeline.params.reading import parse_section


class Spread(Section):
    """Mean and range of a number over the seeds."""

    mean: float
    min: float
    max: float


class RunResult(Section):
    """What a variant gave with one seed.

    Attributes:
        seed: that of params.yaml, or one of the next.
        experiment: name of its DVC experiment.
        metrics: scores by benchmark and key.
        stages: what was run for the benchmark that is reported, with its seconds.
    """

    seed: int
    experiment: str
    metrics: dict[str, dict[str, float | None]]
    stages: dict[str, StageCost]


class VariantResult(Section):
    """What one variant gave.

    Attributes:
        label: its name in tables.
        params: what it sets, by dotted key.
        experiment: name of the DVC experiment of its first seed; none before it has run, or where
            it failed.
        encoder: the trained encoder, as the metrics file's protocol has it.
        metrics: means of the scores on the benchmark that is chosen on, by key; one that the
            metrics file lacks is none.
        scores: mean and range by benchmark and key.
        lift: by key, what it scores above another variant with the same seed, on the benchmark that
            is reported: mean and range.
        seconds: of the stages that the other variant does not run so, mean over the seeds whose
            times are known; of that one itself, of all its stages.
        more_seconds: the same, less those of the other one in place of them.
        runs: one a seed.
    """

    label: str
    params: Settings
    experiment: str | None = None
    encoder: str | None = None
    metrics: dict[str, float | None] = Field(default_factory=dict)
    scores: dict[str, dict[str, Spread]] = Field(default_factory=dict)
    lift: dict[str, Spread] = Field(default_factory=dict)
    seconds: float | None = None
    more_seconds: float | None = None
    runs: list[RunResult] = Field(default_factory=list)


class AblationResult(Section):
    """What an ablation gave so far.

    Attributes:
        ablation: its name.
        bench: the benchmark that is scored, and chosen on.
        report_bench: the one that is reported then, if there is another.
        params: set for all variants.
        variants: in the order of the definition.
        note: what else a reader has to know, such as that it was measured before something changed.
    """

    ablation: str
    bench: str
    report_bench: str | None = None
    params: Settings
    variants: list[VariantResult]
    note: str = ""

    @property
    def benches(self) -> list[str]:
        """The benchmarks, that which is reported last."""
        return [self.bench, *([self.report_bench] if self.report_bench else [])]


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
