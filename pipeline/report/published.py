"""The papers' tables, and this project's numbers beside them where they are the same benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from pipeline.ablations.results import protocol_of, value_at
from pipeline.params.base import Section
from pipeline.params.reading import read_section
from pipeline.presets import list_benches
from pipeline.report.inputs import NO_VALUE, is_number, read_object, score

NOT_RUN = "not run"


class PublishedRow(Section):
    """A row in print: percent by column."""

    model: str
    backbone: str = ""
    values: dict[str, float]


class Way(Section):
    """How numbers of a row are made; `{column}` in a text stands for the column.

    Attributes:
        preset: name of the params that it starts from.
        columns: those that it gives; empty: all.
        ablation: takes the params of its variant `variant`.
        variant: label of the variant.
        params: what else differs from the preset, by dotted key.
        bench: name of the benchmark; empty: the table's, or else the column.
        unseen: train without the categories that are `unseen` in the benchmark.
        model: a dense labeller that is scored alone.
        checkpoint: published weights that are scored; without either, the preset is trained.
        corruption: NAME:LEVEL.
        measure: instead of a score, size and speed of the network, which needs no weights.
    """

    preset: str
    columns: list[str] = Field(default_factory=list)
    ablation: str = ""
    variant: str = ""
    params: dict[str, Any] = Field(default_factory=dict)
    bench: str = ""
    unseen: bool = False
    model: str | None = None
    checkpoint: str | None = None
    corruption: str | None = None
    measure: bool = False


class OurRow(Section):
    """Where a row of this project comes from.

    Attributes:
        model: name of the row.
        backbone: its encoder.
        metrics: pattern of a metrics file's name, or a shipped benchmark with all of its results,
            however they differ; `{column}` stands for the column. Empty: there is none but what
            `run` leaves.
        images: number of images that must have been scored.
        protocol: lines that the file's protocol must have, with one value or one of several.
        values: column -> key in the file, dots reach into it.
        beside: model of the published row that it is compared with, of the same backbone if several
            have that name.
        run: ways to make it, the preferred one first.
    """

    model: str = "this project"
    backbone: str = ""
    metrics: str = ""
    images: int | None = None
    protocol: dict[str, str | int | bool | list[str]]
    values: dict[str, str]
    beside: str = ""
    run: list[Way] = Field(default_factory=list)

    @property
    def name(self) -> str:
        """Model and backbone."""
        return ", ".join(part for part in (self.model, self.backbone) if part)


class PublishedTable(Section):
    """One table of a paper; `also` are other names of it, `picture` asks for one of its grid."""

    id: str
    also: list[str] = Field(default_factory=list)
    source: str
    title: str
    bench: str = ""
    columns: dict[str, str]
    rows: list[PublishedRow] = Field(min_length=1)
    ours: list[OurRow]
    note: str = ""
    picture: bool = False

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        rows: list[PublishedRow | OurRow] = [*self.rows, *self.ours]
        for row in rows:
            if unknown := row.values.keys() - self.columns.keys():
                raise ValueError(f"row {row.model!r}: {min(unknown)!r} is no column of {self.id}")
        for ours in self.ours:
            if ours.beside and self.counterpart(ours) is None:
                raise ValueError(f"row {ours.name!r}: no one row {ours.beside!r} in {self.id}")
        return self

    def counterpart(self, ours: OurRow) -> PublishedRow | None:
        """The published row that a row of this project is compared with."""
        named = [row for row in self.rows if ours.beside and row.model == ours.beside]
        if len(named) > 1:
            named = [row for row in named if row.backbone == ours.backbone]
        return named[0] if len(named) == 1 else None


class PublishedResults(Section):
    """All tables."""

    tables: list[PublishedTable]

    @model_validator(mode="after")
    def _check_ids(self) -> Self:
        ids = [table.id for table in self.tables]
        if twice := {name for name in ids if ids.count(name) > 1}:
            raise ValueError(f"id {min(twice)!r} comes twice")
        return self


@dataclass(frozen=True)
class MetricsFile:
    """A metrics file, and the shipped benchmark that it is of, if it is of one."""

    name: str
    bench: str
    metrics: Mapping[str, Any]
    protocol: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> MetricsFile:
        """Read one; a result is called BENCH or BENCH_DIFFERENCES.

        Raises:
            PipelineError: it is damaged.
        """
        metrics = read_object(path)
        shipped = [bench for bench, _ in list_benches()]
        benches = [bench for bench in shipped if f"{path.stem}_".startswith(f"{bench}_")]
        bench = max(benches, key=len, default="")
        return cls(path.stem, bench, metrics, protocol_of(metrics))

    def has_name_of(self, ours: OurRow, column: str) -> bool:
        """Whether its name is that of a row's file."""
        wanted = ours.metrics.replace("{column}", column)
        if not wanted or column not in ours.values:
            return False
        return self.bench == wanted or fnmatchcase(self.name, wanted)

    def number(self, ours: OurRow, column: str) -> float | None:
        """The number of a row, if this file's protocol is that of the row."""
        value = value_at(self.metrics, ours.values[column])
        return float(value) if is_number(value) and not self.reasons(ours, column) else None

    def reasons(self, ours: OurRow, column: str) -> list[str]:
        """Why its numbers are not those of a row, if they are not."""
        return list(_differences(self, ours, column))


def read_published(path: Path, metrics_dir: Path) -> dict[str, dict[str, Any]]:
    """The papers' tables for the page, by id, this project's rows last.

    A number of this project is there only if a metrics file's protocol says that it is of this
    benchmark and this encoder; else it is "not run", and `reasons` say why files of that name do
    not count.

    Returns:
        By id: source, title, headings, rows with their cells, `is_ours` and `is_run` of them,
        note, reasons, and whether any number of ours `has_numbers`; nothing without the file.

    Raises:
        PipelineError: the tables or a metrics file are damaged.
    """
    if not path.is_file():
        return {}
    files = [MetricsFile.read(file) for file in sorted(metrics_dir.glob("*.json"))]
    tables = read_section(path, PublishedResults).tables
    return {table.id: _table(table, files) for table in tables}


def _table(table: PublishedTable, files: list[MetricsFile]) -> dict[str, Any]:
    reasons: dict[str, None] = {}
    on_page = [ours for ours in table.ours if ours.metrics]
    rows = [
        _row(row, [score(row.values.get(column)) for column in table.columns], is_ours=False)
        for row in table.rows
    ]
    for ours in on_page:
        cells = []
        for column in table.columns:
            files_of_cell = [file for file in files if file.has_name_of(ours, column)]
            cells.append(_cell(files_of_cell, ours, column))
            reasons |= dict.fromkeys(_reasons(files_of_cell, ours, column))
        rows.append(_row(ours, cells, is_ours=True))
    has_numbers = any(row["is_run"] for row in rows if row["is_ours"])
    return {
        "source": table.source,
        "title": table.title,
        "headings": list(table.columns.values()),
        "rows": rows,
        "note": table.note,
        "reasons": [] if has_numbers else list(reasons),
        "has_numbers": has_numbers,
        "has_ours": bool(on_page),
    }


def _row(row: PublishedRow | OurRow, cells: list[str], *, is_ours: bool) -> dict[str, Any]:
    return {
        "model": row.model,
        "backbone": row.backbone,
        "cells": cells,
        "is_ours": is_ours,
        "is_run": any(cell not in (NOT_RUN, NO_VALUE) for cell in cells),
    }


def _cell(files: list[MetricsFile], ours: OurRow, column: str) -> str:
    if column not in ours.values:
        return NO_VALUE
    for file in files:
        if (value := file.number(ours, column)) is not None:
            return score(value)
    return NOT_RUN


def _reasons(files: list[MetricsFile], ours: OurRow, column: str) -> Iterator[str]:
    """Why files of the right name do not count."""
    for file in files:
        if differences := file.reasons(ours, column):
            yield f"{file.name}.json: {'; '.join(differences)}"


def _differences(file: MetricsFile, ours: OurRow, column: str) -> Iterator[str]:
    for name, wanted in ours.protocol.items():
        accepted = wanted if isinstance(wanted, list) else [wanted]
        texts = [str(value).replace("{column}", column) for value in accepted]
        found = file.protocol.get(name, "not given")
        if found not in texts:
            yield f"{name.replace('_', ' ')} is {found}, not {texts[0]}"
    found_images = file.metrics.get("n_images")
    if ours.images is not None and found_images != ours.images:
        yield f"{found_images} images, not {ours.images}"
