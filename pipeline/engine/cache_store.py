"""What lies in the cache folder, and what of it may go.

The folder holds one folder a kind of result (`embed`, `masks`, ...), and that holds one folder a
settings digest. Other things in it, such as weights and what describes them, belong together if
they share a name up to the first dot. Links are never followed.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.engine.cache import CHUNK_NAME, IN_USE, open_locked
from pipeline.errors import PipelineError
from pipeline.files import read_json

DIGEST = re.compile(r"[0-9a-f]{32}")
LEFTOVER = re.compile(r"\.(.+)\.[0-9a-z_]{8}\.(?:tmp|old)")
SETTINGS = "settings.json"
# A run that is still at work may have written what is younger than this and has no mark of its use.
RECENT_S = 3600
DAY_S = 86400


@dataclass(frozen=True)
class CacheEntry:
    """Results of one kind under one set of settings, named weights, or what a killed run left.

    Attributes:
        kind: folder it lies in.
        name: digest of the settings, else its name up to the first dot.
        paths: its files and folders; one folder for a digest.
        num_rows: keys in its chunks; one that two runs computed counts twice. None without chunks.
        num_bytes: of all its files.
        last_used: seconds of the epoch: when it was opened last, else when it was written last.
        is_marked: whether stages mark it while they use it.
        is_leftover: whether it is a temporary file or folder.
        settings: what the results depend on; empty where nothing says so.
    """

    kind: str
    name: str
    paths: tuple[Path, ...]
    num_rows: int | None
    num_bytes: int
    last_used: float
    is_marked: bool
    is_leftover: bool
    settings: dict[str, Any]

    @property
    def is_digest(self) -> bool:
        """Whether a stage can compute it again; someone has put there what has another name."""
        return DIGEST.fullmatch(self.name) is not None


@dataclass(frozen=True)
class Verdict:
    """What became of an entry that was to go: whether it is removed, and why or why not."""

    entry: CacheEntry
    is_removed: bool
    reason: str


def list_cache(root: Path) -> list[CacheEntry]:
    """All entries and leftovers of a cache folder, by kind and name; changes nothing."""
    entries: list[CacheEntry] = []
    for kind in _children(root):
        if _is_folder(kind) and not kind.name.startswith("."):
            entries.extend(_entries(kind))
    return entries


def collect(
    root: Path,
    *,
    now: float,
    unused_days: float,
    max_bytes: int | None = None,
    kind: str | None = None,
    dry_run: bool = False,
) -> Iterator[Verdict]:
    """Remove what is not needed, and say of each thing why.

    Leftovers older than an hour go first; then what was not used for so many days; then the least
    recently used, until the rest has at most `max_bytes`. What a stage has open is kept. Weights
    and whatever else is not named by a digest go, and count, only if their kind is given.

    Args:
        root: the cache folder.
        now: seconds of the epoch.
        unused_days: age from which an entry is not needed.
        max_bytes: bound on the size of all that is looked at.
        kind: look at this folder of `root` only.
        dry_run: remove nothing.

    Raises:
        PipelineError: there is no such kind.
        OSError: something cannot be removed.
    """
    entries = list_cache(root)
    known = sorted({entry.kind for entry in entries})
    if kind is not None and kind not in known:
        raise PipelineError(f"{root}: has no {kind!r}; there are: {', '.join(known) or 'none'}")
    looked_at = [entry for entry in entries if entry.kind == kind or (not kind and entry.is_digest)]
    looked_at.sort(key=lambda entry: (not entry.is_leftover, entry.last_used))
    num_bytes = sum(entry.num_bytes for entry in looked_at)
    for entry in looked_at:
        is_too_much = max_bytes is not None and num_bytes > max_bytes
        age_s = max(0.0, now - entry.last_used)  # clocks of two machines may differ
        reason = _reason(entry, age_s, unused_days=unused_days, is_too_much=is_too_much)
        if reason is not None:
            verdict = _remove(entry, reason, age_s=age_s, dry_run=dry_run)
            num_bytes -= entry.num_bytes if verdict.is_removed else 0
            yield verdict


def _entries(kind: Path) -> Iterator[CacheEntry]:
    """The entries of one kind, each followed by what killed runs left in it."""
    children = _children(kind)
    visible = sorted((path for path in children if not path.name.startswith(".")), key=_stem)
    for name, group in groupby(visible, key=_stem):
        paths = tuple(group)
        yield _entry(kind.name, name, paths)
        for path in filter(_is_folder, paths):
            for left in _leftovers(path):
                yield _entry(kind.name, name, (left,), is_leftover=True)
    for path in _leftovers(kind):
        yield _entry(kind.name, _stem(path), (path,), is_leftover=True)


def _entry(
    kind: str, name: str, paths: tuple[Path, ...], *, is_leftover: bool = False
) -> CacheEntry:
    """What lies at some paths of one kind, which belong together."""
    files = [file for path in paths for file in _files(path)]
    stats = _stats_of(files)
    marks = _stats_of([path / IN_USE for path in paths])
    chunks = [file for file in files if CHUNK_NAME.fullmatch(file.name)]
    return CacheEntry(
        kind=kind,
        name=name,
        paths=paths,
        num_rows=sum(map(_num_rows, chunks)) if chunks else None,
        num_bytes=sum(stat.st_size for stat in stats),
        last_used=max((stat.st_mtime for stat in marks or stats or _stats_of(paths)), default=0.0),
        is_marked=bool(marks),
        is_leftover=is_leftover,
        settings=settings_of(paths),
    )


def _reason(
    entry: CacheEntry, age_s: float, *, unused_days: float, is_too_much: bool
) -> str | None:
    """Why an entry is to go, or None if it is to stay."""
    if entry.is_leftover:
        return "left by a killed run" if age_s > RECENT_S else None
    if age_s >= unused_days * DAY_S:
        return f"not used for {age_s / DAY_S:.0f} days"
    return "least recently used" if is_too_much else None


def _remove(entry: CacheEntry, reason: str, *, age_s: float, dry_run: bool) -> Verdict:
    """Remove an entry unless something is at work with it."""
    if not entry.is_marked and age_s <= RECENT_S:
        return Verdict(entry, False, "written within the last hour")
    with _keeping_stages_out(entry.paths) as obstacle:
        if obstacle is not None:
            return Verdict(entry, False, obstacle)
        renamed = [] if dry_run else [_rename_as_leftover(path) for path in entry.paths]
    for path in renamed:
        if _is_folder(path):
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return Verdict(entry, True, reason)


@contextmanager
def _keeping_stages_out(paths: Sequence[Path]) -> Iterator[str | None]:
    """Keep stages from beginning to use folders in the block; yields why it cannot be had."""
    with ExitStack() as locks:
        for path in _existing([path / IN_USE for path in paths]):
            try:
                descriptor = open_locked(path)
            except OSError as error:
                yield f"cannot be locked: {error.strerror}"
                return
            if descriptor is None:
                yield "in use by a running stage"
                return
            locks.callback(os.close, descriptor)
        yield None


def _rename_as_leftover(path: Path) -> Path:
    """Give a path the name of a leftover, so that it goes as a whole even if this run is killed."""
    hidden = path
    if not path.name.startswith("."):
        hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with suppress(FileNotFoundError):  # someone was faster
        path.rename(hidden)
    return hidden


def settings_of(paths: Sequence[Path]) -> dict[str, Any]:
    """What `settings.json` in a folder, or a JSON file among the paths, says of an entry."""
    files = [path / SETTINGS for path in paths] + [p for p in paths if p.suffix == ".json"]
    for path in _existing(files):
        with suppress(PipelineError, OSError):
            content = read_json(path)
            if isinstance(content, dict):
                return content
    return {}


def _num_rows(chunk: Path) -> int:
    """Rows of a chunk by its footer; 0 if it is damaged."""
    try:
        return int(pq.read_metadata(chunk).num_rows)
    except (pa.ArrowException, OSError):
        return 0


def _stem(path: Path) -> str:
    """The name up to the first dot, of a leftover that of the file it was to be."""
    return path.name.removeprefix(".").partition(".")[0]


def _leftovers(folder: Path) -> list[Path]:
    """What killed runs have left in a folder."""
    return [path for path in _children(folder) if LEFTOVER.fullmatch(path.name)]


def _files(path: Path) -> Iterator[Path]:
    """All files and links below a path, or itself if it is one; without the leftovers in it."""
    if not _is_folder(path):
        yield path
    for child in _children(path) if _is_folder(path) else []:
        if not LEFTOVER.fullmatch(child.name):
            yield from _files(child)


def _children(folder: Path) -> list[Path]:
    """What is in a folder, sorted; nothing if it is not there or may not be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _is_folder(path: Path) -> bool:
    """Whether it is a folder, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def _existing(paths: Sequence[Path]) -> list[Path]:
    """Those of the paths that are files, and no links."""
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def _stats_of(paths: Sequence[Path]) -> list[os.stat_result]:
    """Size and times of those paths that are there; others may remove some at any time."""
    stats = []
    for path in paths:
        with suppress(OSError):
            stats.append(path.lstat())
    return stats
