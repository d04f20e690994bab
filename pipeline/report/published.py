"""The papers' tables, and this project's numbers beside them where they are the same benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


class OurRow(Section):
    """Where a row of this project comes from.

    Attributes:
        model: name of the row.
        backbone: its encoder.
        metrics: pattern of a metrics file's name, or a shipped benchmark with all of its results,
            however they differ; `{column}` stands for the column.
        images: number of images that must have been scored.
        protocol: lines that the file's protocol must have, with one value or one of several.
        values: column -> key in the file, dots reach into it.
    """

    model: str = "this project"
    backbone: str = ""
    metrics: str
    images: int | None = None
    protocol: dict[str, str | int | bool | list[str]]
    values: dict[str, str]


class PublishedTable(Section):
    """One table of a paper."""

    id: str
    source: str
    title: str
    bench: str = ""
    columns: dict[str, str]
    rows: list[PublishedRow] = Field(min_length=1)
    ours: list[OurRow]
    note: str = ""

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        rows: list[PublishedRow | OurRow] = [*self.rows, *self.ours]
        for row in rows:
            if unknown := row.values.keys() - self.columns.keys():
                raise ValueError(f"row {row.model!r}: {min(unknown)!r} is no column of {self.id}")
        return self


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
class _File:
    """A metrics file, and the shipped benchmark that it is of, if it is of one."""

    name: str
    bench: str
    metrics: Mapping[str, Any]
    protocol: Mapping[str, str]


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
    shipped = [bench for bench, _ in list_benches()]
    files = [_read_file(file, shipped) for file in sorted(metrics_dir.glob("*.json"))]
    tables = read_section(path, PublishedResults).tables
    return {table.id: _table(table, files) for table in tables}


def _read_file(path: Path, shipped: Sequence[str]) -> _File:
    """Args: shipped: names of benchmarks; a result is called BENCH or BENCH_DIFFERENCES."""
    metrics = read_object(path)
    benches = [bench for bench in shipped if f"{path.stem}_".startswith(f"{bench}_")]
    return _File(path.stem, max(benches, key=len, default=""), metrics, protocol_of(metrics))


def _table(table: PublishedTable, files: list[_File]) -> dict[str, Any]:
    reasons: dict[str, None] = {}
    rows = [
        _row(row, [score(row.values.get(column)) for column in table.columns], is_ours=False)
        for row in table.rows
    ]
    for ours in table.ours:
        cells = []
        for column in table.columns:
            files_of_cell = [file for file in files if _has_name(file, ours, column)]
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
        "has_ours": bool(table.ours),
    }


def _row(row: PublishedRow | OurRow, cells: list[str], *, is_ours: bool) -> dict[str, Any]:
    return {
        "model": row.model,
        "backbone": row.backbone,
        "cells": cells,
        "is_ours": is_ours,
        "is_run": any(cell not in (NOT_RUN, NO_VALUE) for cell in cells),
    }


def _has_name(file: _File, ours: OurRow, column: str) -> bool:
    wanted = ours.metrics.replace("{column}", column)
    is_asked_for = column in ours.values
    return is_asked_for and (file.bench == wanted or fnmatchcase(file.name, wanted))


def _cell(files: list[_File], ours: OurRow, column: str) -> str:
    if column not in ours.values:
        return NO_VALUE
    for file in files:
        value = value_at(file.metrics, ours.values[column])
        if is_number(value) and not any(_differences(file, ours, column)):
            return score(value)
    return NOT_RUN


def _reasons(files: list[_File], ours: OurRow, column: str) -> Iterator[str]:
    """Why files of the right name do not count."""
    for file in files:
        if differences := list(_differences(file, ours, column)):
            yield f"{file.name}.json: {'; '.join(differences)}"


def _differences(file: _File, ours: OurRow, column: str) -> Iterator[str]:
    for name, wanted in ours.protocol.items():
        accepted = wanted if isinstance(wanted, list) else [wanted]
        texts = [str(value).replace("{column}", column) for value in accepted]
        found = file.protocol.get(name, "not given")
        if found not in texts:
            yield f"{name.replace('_', ' ')} is {found}, not {texts[0]}"
    found_images = file.metrics.get("n_images")
    if ours.images is not None and found_images != ours.images:
        yield f"{found_images} images, not {ours.images}"
