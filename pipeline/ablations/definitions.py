"""Ablations as data: which params vary, what is compared, and the papers' tables beside it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from pipeline.errors import PipelineError
from pipeline.params.base import Count, Section
from pipeline.params.reading import read_section

FOLDER = Path(__file__).resolve().parents[1] / "presets" / "ablations"

# Dotted key of params.yaml -> value.
Settings = dict[str, Any]


class Variant(Section):
    """One setting: its name in tables, and the params that it sets, by dotted key.

    A mapping takes the place of a whole section. Where the method of a section is set, as by
    `mask.source`, what params.yaml says there and the new method lacks goes. `factors` multiply
    what params.yaml, or what is set for all variants, says at these keys.
    """

    label: Annotated[str, Field(pattern=r"\S")]
    params: Settings = Field(default_factory=dict)
    factors: dict[str, float] = Field(default_factory=dict)


class Ablation(Section):
    """What one ablation varies.

    Attributes:
        description: one line.
        metrics: keys of a metrics file (dots reach into it) and their headings.
        tables: ids of the papers' tables in `reports/published.yaml`, if they have any.
        student: the only one that has these params; none: any.
        variants: what the papers vary.
        demo_variants: what stands for it where params.yaml draws a world; none: the same variants,
            empty: the embedded default has nothing to vary.
        carries_over: what of the embedded default's result carries over to photos, and what not.
        seeds: how many runs of a variant, each with a seed of its own, unless the command says so.
        lift_over: label of the variant that lifts and seconds are counted from; none: neither is
            shown. With it, settings are chosen on the benchmark for development.
    """

    description: Annotated[str, Field(pattern=r"\S")]
    metrics: Annotated[dict[str, str], Field(min_length=1)]
    tables: list[str] = Field(default_factory=list)
    student: str | None = None
    variants: Annotated[list[Variant], Field(min_length=2)]
    demo_variants: list[Variant] | None = None
    carries_over: str
    seeds: Count = 1
    lift_over: str | None = None

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        """Refuse a label that comes twice, and a lift over a variant that is not there."""
        for variants in (self.variants, self.demo_variants or []):
            labels = [variant.label for variant in variants]
            if len(set(labels)) < len(labels):
                raise ValueError(f"labels of variants must differ; there are {labels}")
            if self.lift_over is not None and labels and self.lift_over not in labels:
                raise ValueError(f"lift_over: {self.lift_over!r} is no variant; there are {labels}")
        return self

    def variants_for(self, *, demo: bool) -> list[Variant]:
        """The variants for the embedded default or for everything else."""
        if demo and self.demo_variants is not None:
            return self.demo_variants
        return self.variants


def list_ablations(folder: Path = FOLDER) -> list[str]:
    """Names of all ablations, in order."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_ablation(name: str, folder: Path = FOLDER) -> Ablation:
    """The definition of an ablation.

    Raises:
        PipelineError: no ablation has this name, or its file is wrong.
    """
    names = list_ablations(folder)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise PipelineError(f"ablation {name!r} is unknown; {hint}known: {', '.join(names)}")
    return read_section(folder / f"{name}.yaml", Ablation)
