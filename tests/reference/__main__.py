"""Command line: run every case of a folder of reference vectors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .checks import Result
from .runner import find_cases, run_folder

DEFAULT_FOLDER = Path(__file__).parent / "data"
NAME_WIDTH = 66


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line a case; return 0 if all agree, 1 if one does not, 2 if there is none."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.reference",
        description="Compare this pipeline with reference vectors of the published systems. "
        "Prints for each case its name, the largest absolute and relative error, and ok or not.",
        epilog="Exit status: 0 all agree, 1 a case does not, 2 wrong usage or no case found.",
    )
    parser.add_argument(
        "folder",
        metavar="DIR",
        type=Path,
        nargs="?",
        default=DEFAULT_FOLDER,
        help="folder of NAME.json, NAME.io.safetensors, NAME.weights.safetensors "
        "(default: those of the repository)",
    )
    folder = parser.parse_args(arguments).folder
    if not folder.is_dir():
        print(f"error: {folder}: no such folder", file=sys.stderr)
        return 2
    if not find_cases(folder)[0]:
        print(f"error: {folder}: holds no case (NAME.json and its tensors)", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # the same sums in the same order everywhere
    count = failed = 0
    for result in run_folder(folder):
        print(_line(result), flush=True)
        count += 1
        failed += not result.ok
    print(f"{count} cases, {failed} not ok", file=sys.stderr)
    return 1 if failed else 0


def _line(result: Result) -> str:
    errors = f"abs {result.abs_error:8.2e}  rel {result.rel_error:8.2e}"
    verdict = "ok" if result.ok else f"not ok: {result.reason}"
    return f"{result.name:<{NAME_WIDTH}} {errors}  {verdict}"


if __name__ == "__main__":
    sys.exit(main())
