"""Where an export is written: what may be replaced, and what the manifest says."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.files import check_writable, read_json

MANIFEST = "manifest.json"
TOOL = "zutis-pipeline"


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


def _is_export(folder: Path) -> bool:
    try:
        manifest = read_json(folder / MANIFEST)
    except PipelineError:
        return False
    return isinstance(manifest, dict) and manifest.get("tool") == TOOL
