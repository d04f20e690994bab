"""A small DVC project, run and committed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def call(folder: Path, *words: str) -> str:
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    }
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def finished_project(folder: Path, files: Mapping[str, str]) -> Path:
    """Write files, by name, into an empty folder; run the stages and commit all."""
    for name, content in files.items():
        (folder / name).write_text(content)
    call(folder, "git", "init", "-q")
    call(folder, "git", "config", "user.email", "tests@example.org")
    call(folder, "git", "config", "user.name", "tests")
    call(folder, sys.executable, "-m", "dvc", "init", "-q")
    call(folder, sys.executable, "-m", "dvc", "config", "core.analytics", "false")
    call(folder, sys.executable, "-m", "dvc", "repro", "-q")
    call(folder, "git", "add", "-A")
    call(folder, "git", "commit", "-qm", "run")
    return folder
