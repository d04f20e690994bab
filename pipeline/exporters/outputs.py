"""Where results are written for others: what may be replaced, and what the manifest says."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.files import check_writable, native_path, read_json, utf8_text, write_json

MANIFEST = "manifest.json"
TOOL = "zutis-pipeline"
UNFINISHED = ".unfinished.json"


def check_folder(out_dir: Path, *, force: bool) -> None:
    """Refuse a folder in which something would be lost.

    Args:
        out_dir: replaced as a whole.
        force: replace an earlier export.

    Raises:
        PipelineError: it holds something, and is no export or not to be replaced.
        OSError: nothing can be written there.
    """
    check_writable(out_dir, folder=True)
    if not out_dir.is_dir() or not any(out_dir.iterdir()):
        return
    if not _is_export(out_dir):
        raise PipelineError(
            f"--out {out_dir}: holds what `pipeline export` has not written; choose another "
            "folder, or move it away"
        )
    if not force:
        raise PipelineError(
            f"--out {out_dir}: holds an export already; replace it with --force, or choose another "
            "folder"
        )


def check_file(out_path: Path, *, force: bool) -> None:
    """Refuse a file that is there already.

    Args:
        out_path: the file.
        force: replace it.

    Raises:
        PipelineError: it is there, and not to be replaced.
        OSError: nothing can be written there.
    """
    check_writable(out_path)
    if out_path.exists() and not force:
        raise PipelineError(
            f"--out {out_path}: is there already; replace it with --force, or choose another name"
        )


def check_own(out_dir: Path, paths: Iterable[Path], ours: Collection[Path], *, by: str) -> None:
    """Refuse a folder in which something would be replaced that no earlier run has written.

    Args:
        out_dir: the folder.
        paths: below it, what would be replaced.
        ours: what an earlier run has written.
        by: the command.

    Raises:
        PipelineError: with the name of such a thing.
    """
    for path in paths:
        if os.path.lexists(path) and path not in ours:
            raise PipelineError(
                f"--out {out_dir}: {path.relative_to(out_dir)} was not written by {by} and would "
                "be replaced; choose another folder, or move it away"
            )


@contextmanager
def announcing(out_dir: Path) -> Iterator[Callable[[Iterable[Path]], None]]:
    """Yield a function that says what will lie in a folder, before any of it is put there.

    A run that is cut off while it replaces one thing after the other leaves the list, a hidden
    file, for `announced`; it goes once the block succeeds.

    Args:
        out_dir: the folder; the function takes paths below it, those that may still lie there too.
    """

    def announce(paths: Iterable[Path]) -> None:
        names = {utf8_text(path.relative_to(out_dir).as_posix(), path) for path in paths}
        write_json(out_dir / UNFINISHED, sorted(names))

    yield announce
    (out_dir / UNFINISHED).unlink(missing_ok=True)


def announced(out_dir: Path) -> set[Path]:
    """What a run that was cut off may have put into a folder; see `announcing`."""
    try:
        return {out_dir / native_path(name) for name in read_json(out_dir / UNFINISHED)}
    except (PipelineError, TypeError):  # none, or that of something else
        return set()


def _is_export(folder: Path) -> bool:
    try:
        manifest = read_json(folder / MANIFEST)
    except PipelineError:
        return False
    return isinstance(manifest, dict) and manifest.get("tool") == TOOL
