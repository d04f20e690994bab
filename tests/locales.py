"""Python code in a process of its own, under a locale with all letters and under one without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LOCALES = {
    "utf8": {"PYTHONUTF8": "1"},
    "c": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def run_in_locale(locale: str, code: str, *args: object, cwd: Path) -> None:
    """`python -c CODE ARGS` under one of `LOCALES`, with the modules of this process; no errors."""
    modules = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=cwd,
        env=os.environ | modules | LOCALES[locale],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
