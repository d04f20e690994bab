"""Which numbers of the papers' tables can be made here, and the making of them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.doctor.needs import missing
from pipeline.errors import PipelineError, did_you_mean, listing
from pipeline.files import write_bytes, write_json
from pipeline.params.reading import read_section
from pipeline.report.inputs import score
from pipeline.report.published import MetricsFile, OurRow, PublishedResults, PublishedTable
from pipeline.reproduce.picture import Pair, grid_picture
from pipeline.reproduce.recipes import REPORTS, Recipe, Step, recipe

PUBLISHED = Path("reports/published.yaml")
METRICS = Path("reports/metrics")
HINT = (
    "`pipeline benches NAME` says where the data of a benchmark come from; "
    "`pipeline weights fetch NAME` downloads weights"
)
# Exit statuses.
ALL_THERE, FAILED, NOT_AT_HAND = 0, 1, 3


@dataclass(frozen=True)
class Cell:
    """A number of this project in a table.

    Attributes:
        row: its row.
        column: key of its column.
        paper: the number in print, or None.
        value: the number here, or None before it is measured.
        recipe: what makes it; None where nothing does.
        missing: what that needs and is not there.
    """

    row: OurRow
    column: str
    paper: float | None
    value: float | None
    recipe: Recipe | None
    missing: tuple[str, ...]

    @property
    def can_run(self) -> bool:
        """Whether it is not measured yet and can be."""
        return self.value is None and self.recipe is not None and not self.missing


class Tables:
    """The papers' tables and this project's numbers in them; paths are those of the project.

    Args:
        data: folder in place of `data/raw`.
        cache_dir: cache folder, with weights.
    """

    def __init__(self, *, data: Path | None, cache_dir: Path) -> None:
        """Read the tables.

        Raises:
            PipelineError: there is no file of them, or it is damaged.
        """
        if not PUBLISHED.is_file():
            raise PipelineError(f"{PUBLISHED}: no such file here; run this in the project's folder")
        self.all = read_section(PUBLISHED, PublishedResults).tables
        self._data = data
        self._cache_dir = cache_dir

    def named(self, name: str) -> list[PublishedTable]:
        """The tables of a name, or of one that is the first part of theirs, as `denseclip-2`.

        Raises:
            PipelineError: there is none.
        """
        found = [table for table in self.all if name in (table.id, *table.also)]
        found = found or [table for table in self.all if _is_part(name, table.id)]
        if not found:
            known = [table.id for table in self.all]
            raise PipelineError(
                f"{name!r} is no table; {did_you_mean(name, known)}there are: {', '.join(known)}; "
                "`pipeline reproduce list` says which can run"
            )
        return found

    def cells(self, table: PublishedTable, row: OurRow) -> list[Cell]:
        """The numbers of a row as they are now."""
        published = table.counterpart(row)
        printed = published.values if published else {}
        files = [MetricsFile.read(path) for path in sorted(METRICS.glob("*.json"))]
        return [self._cell(table, row, column, printed.get(column), files) for column in row.values]

    def _cell(
        self,
        table: PublishedTable,
        row: OurRow,
        column: str,
        paper: float | None,
        files: Sequence[MetricsFile],
    ) -> Cell:
        values = [file.number(row, column) for file in files if file.has_name_of(row, column)]
        recipes: list[tuple[Recipe, tuple[str, ...]]] = []
        reasons: tuple[str, ...] = ()
        for way in row.run:
            if way.columns and column not in way.columns:
                continue
            try:
                made = recipe(way, bench=table.bench, column=column, data=self._data)
            except PipelineError as error:
                reasons = (str(error),)
                continue
            values.append(_made(made, row, column, measured=way.measure))
            recipes.append((made, self._missing(made)))
        recipes.sort(key=lambda pair: len(pair[1]) > 0)
        chosen, lacks = recipes[0] if recipes else (None, reasons)
        value = next((value for value in values if value is not None), None)
        return Cell(row, column, paper, value, chosen, lacks)

    def _missing(self, made: Recipe) -> tuple[str, ...]:
        steps = [step for step in made.steps if step.result is None]
        lines = [str(item) for step in steps for item in missing(step.sections, self._cache_dir)]
        return tuple(dict.fromkeys(lines))


def overview(tables: Tables) -> str:
    """A line a row of every table: measured, can run, or what is missing."""
    lines = []
    for table in tables.all:
        lines.append(f"{table.id}: {table.source}: {table.title}")
        for number, row in enumerate(table.ours, start=1):
            lines.append(f"  {number:2} {row.name}: {_state(tables.cells(table, row))}")
    return "\n".join([*lines, HINT])


def reproduce(tables: Tables, name: str, *, rows: Sequence[str] = (), dry_run: bool = False) -> int:
    """Run what can be run of a table, and print paper, ours and the difference.

    Every command is printed; one whose output is there already is not run. Where one fails, the
    rows that do not need it go on.

    Args:
        tables: all of them.
        name: of a table, or the first part of the names of several.
        rows: numbers of rows, or words that are part of their names; none: all.
        dry_run: only print the commands, also those that lack something.

    Returns:
        `ALL_THERE` where every number is there (or, dry, could be made), `FAILED` where a command
        failed or gave no number of this table, `NOT_AT_HAND` where data or weights are missing.

    Raises:
        PipelineError: an unknown table or row.
    """
    chosen = [(table, _rows(table, rows)) for table in tables.named(name)]
    if rows and not any(found for _, found in chosen):
        known = [f"{table.id}: {row.name}" for table, _ in chosen for row in table.ours]
        raise PipelineError(f"--rows: {', '.join(rows)}: no such row; there are: {listing(known)}")
    status = ALL_THERE
    runner = _Runner(dry_run=dry_run)
    for table, found in chosen:
        before = [cell for row in found for cell in tables.cells(table, row)]
        _print_missing(before)
        for cell in before:
            if cell.recipe is not None and (cell.can_run or (dry_run and cell.value is None)):
                runner.run(cell.recipe)
        after = before if dry_run else [c for row in found for c in tables.cells(table, row)]
        _print_reasons(after)
        print(_compared(table, after))
        if table.picture and not dry_run:
            path = REPORTS / f"{table.id}.svg"
            write_bytes(path, grid_picture(table.title, table.columns, _by_row(after)).encode())
            print(path)
        open_cells = [cell for cell in after if cell.value is None]
        if any(cell.missing or cell.recipe is None for cell in open_cells):
            status = status or NOT_AT_HAND
        if not dry_run and any(cell.can_run for cell in open_cells):
            status = FAILED
    return status


def _by_row(cells: Sequence[Cell]) -> dict[str, dict[str, Pair]]:
    """Name of a row -> column -> the number in print and ours."""
    rows: dict[str, dict[str, Pair]] = {}
    for cell in cells:
        rows.setdefault(cell.row.name, {})[cell.column] = cell.paper, cell.value
    return rows


def _is_part(name: str, table_id: str) -> bool:
    """`denseclip-2` of `denseclip-2a` and of `denseclip-2-voc`, but not of `denseclip-20`."""
    return re.fullmatch(rf"{re.escape(name)}(-.*|(?<=\d)[a-z])", table_id) is not None


def _rows(table: PublishedTable, wanted: Sequence[str]) -> list[OurRow]:
    if not wanted:
        return table.ours
    return [
        row
        for number, row in enumerate(table.ours, start=1)
        if any(
            text == str(number) or (not text.isdigit() and text.lower() in row.name.lower())
            for text in wanted
        )
    ]


def _made(made: Recipe, row: OurRow, column: str, *, measured: bool) -> float | None:
    """The number that a recipe has left, if its commands have been run."""
    path = made.steps[-1].result
    if path is None:
        return None
    if measured:  # no benchmark, so no protocol to compare
        row = row.model_copy(update={"protocol": {}, "images": None})
    return MetricsFile.read(path).number(row, column)


def _state(cells: Sequence[Cell]) -> str:
    open_cells = [cell for cell in cells if cell.value is None]
    if not open_cells:
        return "measured"
    states = [f"{len(cells) - len(open_cells)} of {len(cells)} measured"]
    states = [] if len(open_cells) == len(cells) else states
    if num_ready := sum(cell.can_run for cell in open_cells):
        share = f"{num_ready} of {len(cells)} " if num_ready < len(open_cells) else ""
        states.append(f"{share}can run now")
    lacks = dict.fromkeys(line for cell in open_cells for line in cell.missing)
    if lacks:
        states.append(f"missing: {'; '.join(lacks)}")
    elif any(cell.recipe is None for cell in open_cells):
        states.append("no command makes it")
    return "; ".join(states)


def _print_missing(cells: Sequence[Cell]) -> None:
    lines = [line for cell in cells if cell.value is None for line in cell.missing]
    for line in dict.fromkeys(lines):
        print(f"missing: {line}")
    if lines:
        print(HINT)


def _print_reasons(cells: Sequence[Cell]) -> None:
    """Why numbers that have been made do not count."""
    lines: dict[str, None] = {}
    for cell in cells:
        path = cell.recipe.steps[-1].result if cell.recipe else None
        if cell.value is None and path is not None:
            reasons = MetricsFile.read(path).reasons(cell.row, cell.column) or ["has no number"]
            lines[f"{path}: {'; '.join(reasons)}"] = None
    for line in lines:
        print(line)


class _Runner:
    """Runs, or prints, commands that have not been run, each once."""

    def __init__(self, *, dry_run: bool) -> None:
        self._dry_run = dry_run
        self._begun: set[tuple[str, ...]] = set()
        self._described: set[Path] = set()
        self._failed: set[Path] = set()

    def run(self, made: Recipe) -> None:
        """All commands of a recipe, as far as none before them has failed."""
        for step in made.steps:
            if any(other.folder in self._failed for other in made.steps):
                return
            if step.result is not None or step.words in self._begun:
                continue
            self._begun.add(step.words)
            if made.params_path not in self._described:
                self._described.add(made.params_path)
                print(f"# {made.params_path}: {made.origin}")
            print(f"$ {made.command(step)}", flush=True)
            if not (self._dry_run or _call(made, step)):
                self._failed.add(step.folder)


def _call(made: Recipe, step: Step) -> bool:
    """Run a command; whether it ended well."""
    write_bytes(made.params_path, made.params_text.encode())
    words = [sys.executable, "-m", "pipeline", "--params", str(made.params_path), *step.words]
    code = subprocess.run(words, check=False).returncode
    if code:
        print(f"exit status {code}", flush=True)
        return False
    if step.marked:
        write_json(step.folder / step.done, {"command": made.command(step)})
    return True


def _difference(cell: Cell) -> str:
    if cell.paper is None or cell.value is None:
        return score(None)
    return f"{cell.value - cell.paper:+.1f}"


def _compared(table: PublishedTable, cells: Sequence[Cell]) -> str:
    lines = [f"{table.id}: {table.source}: {table.title}"]
    rows = [("row", "column", "paper", "ours", "difference")]
    for cell in cells:
        numbers = (score(cell.paper), score(cell.value), _difference(cell))
        rows.append((cell.row.name, table.columns[cell.column], *numbers))
    widths = [max(len(row[index]) for row in rows) for index in range(2)]
    for row in rows:
        left = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=False))
        lines.append(f"  {left}  {row[2]:>6} | {row[3]:>6} | {row[4]:>10}")
    return "\n".join(lines)
