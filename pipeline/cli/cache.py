"""`pipeline cache`: what lies in the cache folder, and removing what is not needed."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.common import finite
from pipeline.errors import size_text

if TYPE_CHECKING:
    from pipeline.engine.cache_store import CacheEntry, Verdict

HEX = re.compile(r"[0-9a-f]{32,64}")
SHOWN_HEX, SHOWN_NAME, SHOWN_SETTINGS = 8, 20, 60
ROW = "{:13} {:20} {:>9} {:>9}  {:12}  {}"

cache_app = typer.Typer(
    help="What is kept between runs, in the folder $PIPELINE_CACHE (default: "
    "~/.cache/zutis-pipeline)."
)


@cache_app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Show what is there: entries, size, last use and settings."""
    from pipeline.engine.cache_store import list_cache
    from pipeline.engine.runtime import default_cache_dir

    root = default_cache_dir()
    everything = list_cache(root)
    if as_json:
        print(json.dumps(_as_json(root, everything), indent=1))
        return
    entries = [entry for entry in everything if not entry.is_leftover]
    leftovers = [entry for entry in everything if entry.is_leftover]
    print(root)
    print(ROW.format("kind", "name", "entries", "size", "last used", "settings"))
    for entry in entries:
        print(_row(entry, now=time.time()))
    print(ROW.format("total", "", "", size_text(_bytes(entries)), "", "").rstrip())
    if leftovers:
        print(
            f"left by killed runs: {len(leftovers)}, {size_text(_bytes(leftovers))}; "
            "`pipeline cache gc` removes those older than an hour"
        )


@cache_app.command()
def gc(
    unused_days: Annotated[
        float,
        typer.Option(min=0, callback=finite, help="Remove what was not used for so many days."),
    ] = 30,
    max_gb: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=finite,
            help="Then remove the least recently used until the rest fits.",
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="Look at this kind only; weights are looked at only if named here."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would go.")] = False,
) -> None:
    """Remove what killed runs left, and results that were not used for long."""
    from pipeline.engine.cache_store import collect
    from pipeline.engine.runtime import default_cache_dir

    root = default_cache_dir()
    num_bytes = 0
    for verdict in collect(
        root,
        now=time.time(),
        unused_days=unused_days,
        max_bytes=None if max_gb is None else round(Fraction(max_gb) * 10**9),
        kind=kind,
        dry_run=dry_run,
    ):
        print(_line(verdict, dry_run=dry_run), flush=True)
        num_bytes += verdict.entry.num_bytes if verdict.is_removed else 0
    print(f"{root}: {size_text(num_bytes)} {'would be freed' if dry_run else 'freed'}")


def _line(verdict: Verdict, *, dry_run: bool) -> str:
    removed = "would remove" if dry_run else "removed"
    entry = verdict.entry
    return (
        f"{removed if verdict.is_removed else 'kept'} {entry.kind}/{entry.paths[0].name} "
        f"({size_text(entry.num_bytes)}): {verdict.reason}"
    )


def _row(entry: CacheEntry, *, now: float) -> str:
    return ROW.format(
        entry.kind,
        _short(entry.name)[:SHOWN_NAME],
        "-" if entry.num_rows is None else entry.num_rows,
        size_text(entry.num_bytes),
        _ago(now - entry.last_used),
        _summary(entry.settings),
    ).rstrip()


def _as_json(root: Path, entries: list[CacheEntry]) -> dict[str, Any]:
    return {
        "path": str(root),
        "bytes": _bytes(entries),
        "entries": [
            {**asdict(entry), "paths": [str(path) for path in entry.paths]} for entry in entries
        ],
    }


def _bytes(entries: list[CacheEntry]) -> int:
    return sum(entry.num_bytes for entry in entries)


def _summary(settings: dict[str, Any]) -> str:
    """Settings in one short line: words and digests first, then numbers, then what is listed."""
    texts = {key: _short(value) for key, value in settings.items() if isinstance(value, str)}
    numbers = {key: value for key, value in settings.items() if isinstance(value, int | float)}
    lists = {f"num_{key}": len(value) for key, value in settings.items() if isinstance(value, list)}
    line = " ".join(f"{key}={value}" for key, value in {**texts, **numbers, **lists}.items())
    return line if len(line) <= SHOWN_SETTINGS else f"{line[: SHOWN_SETTINGS - 1]}…"


def _short(text: str) -> str:
    return text[:SHOWN_HEX] if HEX.fullmatch(text) else text


def _ago(seconds: float) -> str:
    minutes = int(max(seconds, 0) // 60)
    days, hours = minutes // 1440, minutes // 60
    if days >= 2:
        return f"{days} days ago"
    return f"{hours} hours ago" if hours >= 2 else f"{minutes} min ago"
