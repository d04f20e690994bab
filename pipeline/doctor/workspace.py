"""The workspace: git and DVC."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml.error import YAMLError

from pipeline.doctor.finding import Finding
from pipeline.errors import first_line, listing
from pipeline.params.reading import load_yaml

PATIENCE_S = 120  # of `dvc status`, which hashes what has changed
OVERDUE = 3  # exit status here of a command that took longer


def check_workspace(folder: Path, *, idle: Collection[str] = ()) -> Iterator[Finding]:
    """What git and DVC know of a folder; both are only asked, and change nothing that they track.

    Args:
        folder: of params.yaml.
        idle: stages that have nothing to do.
    """
    has_git = _git("rev-parse", "--is-inside-work-tree", folder=folder) is not None
    if not has_git:
        yield Finding("git", "warn", f"{folder}: no repository", "git init")
    else:
        yield _changes(folder)
    if not _has_dvc(folder):
        fix = "dvc init" if has_git else "git init && dvc init"
        yield Finding("dvc", "warn", f"{folder}: no DVC project", fix)
        return
    yield _remote(folder)
    if not (folder / "dvc.yaml").is_file():
        yield Finding("dvc stages", "warn", "no dvc.yaml here", "copy that of the project")
    elif missing := missing_params(folder):
        text = f"params.yaml lacks {listing(missing)}, which dvc.yaml asks for"
        fix = f"add what `pipeline init --preset folder` has, as `{missing[0]}: ...`"
        yield Finding("dvc stages", "fail", text, fix)
    else:
        yield _stages(folder, idle)


def missing_params(folder: Path) -> list[str]:
    """Sections that stages of dvc.yaml name and params.yaml lacks, even where they have defaults.

    DVC itself says so when it comes to the stage, which may be after hours.
    """
    stages, params = (_mapping(folder / name) for name in ("dvc.yaml", "params.yaml"))
    if not params:
        return []
    asked: dict[str, None] = {}
    for stage in (stages.get("stages") or {}).values():
        tables = [stage["foreach"]] if "foreach" in stage else []
        for key in (*tables, *stage.get("do", stage).get("params", [])):
            asked[str(key).strip("${}").partition(".")[0]] = None
    return [section for section in asked if section not in params]


def _mapping(path: Path) -> dict[str, Any]:
    """A YAML file; nothing where it is none, which others report."""
    try:
        content = load_yaml(path.read_bytes())
    except (OSError, YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _changes(folder: Path) -> Finding:
    lines = (_git("status", "--porcelain", folder=folder) or "").splitlines()
    if _git("rev-parse", "--verify", "-q", "HEAD", folder=folder) is None:
        return Finding("git", "warn", "no commit yet", "git add . && git commit")
    if lines:
        text = f"{len(lines)} changes that are not committed"
        return Finding("git", "warn", text, "git commit, so that a result names its code")
    return Finding("git", "ok", "clean")


def _has_dvc(folder: Path) -> bool:
    return any(
        (above / ".dvc").is_dir() for above in (folder.absolute(), *folder.resolve().parents)
    )


def _remote(folder: Path) -> Finding:
    code, output = _dvc("remote", "list", folder=folder)
    if code:
        return Finding("dvc", "fail", first_line(Exception(output)), "mend .dvc/config")
    remotes = [line.split()[0] for line in output.splitlines() if line.strip()]
    if not remotes:
        text = "initialised; no remote: results are on this disk alone"
        return Finding("dvc", "warn", text, "dvc remote add -d NAME URL, then dvc push")
    return Finding("dvc", "ok", f"initialised; remote {', '.join(remotes)}")


def _stages(folder: Path, idle: Collection[str]) -> Finding:
    """What is out of date, by dvc.lock; what has nothing to do is left out."""
    code, output = _dvc("status", "--json", folder=folder)
    if code == OVERDUE:
        return Finding("dvc stages", "warn", f"dvc status took more than {PATIENCE_S} s", "")
    try:
        stale = [name for name in json.loads(output) if name not in idle]
    except ValueError:
        return Finding("dvc stages", "fail", output.strip().partition("\n")[0], "mend dvc.yaml")
    if stale:
        text = f"{len(stale)} out of date: {listing(stale)}"
        return Finding("dvc stages", "warn", text, "dvc repro")
    return Finding("dvc stages", "ok", "up to date")


def _git(*words: str, folder: Path) -> str | None:
    """What git says; None if it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def _dvc(*words: str, folder: Path) -> tuple[int, str]:
    """Exit status of a DVC command, and what it says."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *words],
            cwd=folder,
            env=os.environ | {"DVC_NO_ANALYTICS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        return OVERDUE, ""
    return done.returncode, done.stdout or done.stderr
