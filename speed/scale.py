"""python -m speed.scale: time and memory against input size, in `speed/results/scale.json`.

Each size runs in a process of its own, on files that have just been written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from speed.harness import Curve, track_peak, use_threads

REPORT = Path("speed/results/scale.json")
SPARE_DISK = 1.2


def main() -> int:
    """Measure the curves and write the report."""
    options = _options()
    use_threads(options.threads)
    # Only now: NumPy and torch read the number of threads when they are imported.
    import torch

    from pipeline.files import write_json
    from speed.machine import describe_machine

    torch.set_num_threads(options.threads)
    curves = _curves()
    if options.measure:
        name, folder = options.measure
        print(json.dumps(_measure(curves[name], Path(folder))))
        return 0
    machine = describe_machine(options.threads)
    rows = []
    for name in options.only or curves:
        print(f"{name}: {curves[name].title}", flush=True)
        for size in options.sizes or curves[name].sizes:
            row = _row(curves[name], size, dim=options.dim, threads=options.threads)
            if row is not None:
                print(_line(row), flush=True)
                rows.append(row)
    write_json(options.out, {"machine": machine, "dim": options.dim, "rows": rows})
    print(f"written to {options.out}")
    return 0


def _curves() -> dict[str, Curve]:
    from speed import evaluation, retrieval, stages

    return {module.CURVE.name: module.CURVE for module in (retrieval, stages, evaluation)}


def _options() -> Any:
    parser = argparse.ArgumentParser(prog="python -m speed.scale", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="a curve; repeatable")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of items")
    parser.add_argument("--dim", type=int, default=512, help="length of an embedding (512)")
    parser.add_argument("--threads", type=int, default=1, help="of NumPy and torch (1)")
    parser.add_argument("--out", type=Path, default=REPORT, help=f"report ({REPORT})")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def _row(curve: Curve, size: int, *, dim: int, threads: int) -> dict[str, Any] | None:
    """Measure one size; None if its input does not fit the disk."""
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        needed = int(SPARE_DISK * size * curve.bytes_of_item(dim))
        free = shutil.disk_usage(folder).free
        if needed > free:
            print(f"  {size}: left out, it needs {needed / 1e9:.0f} GB of {free / 1e9:.0f} GB free")
            return None
        curve.prepare(Path(folder), size, dim)
        command = [sys.executable, "-m", "speed.scale", "--measure", curve.name, folder]
        command += ["--threads", str(threads)]
        finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured = json.loads(finished.stdout.splitlines()[-1])
    return {
        "curve": curve.name,
        "size": size,
        **measured,
        "items_per_second": size / measured["seconds"],
    }


def _measure(curve: Curve, folder: Path) -> dict[str, float]:
    """Seconds of the stage, core seconds of its threads, and MB by which it raises the memory."""
    with (
        (folder / "log.txt").open("w") as log,
        redirect_stdout(log),
        redirect_stderr(log),
        track_peak() as peak,
    ):
        start, start_of_cores = time.perf_counter(), time.process_time()
        curve.run(folder)
        seconds = time.perf_counter() - start
        core_seconds = time.process_time() - start_of_cores
    return {"seconds": seconds, "core_seconds": core_seconds, "memory_mb": peak[0]}


def _line(row: dict[str, Any]) -> str:
    return (
        f"  {row['size']:>10,} items  {row['seconds']:8.2f} s  {row['core_seconds']:8.2f} core s  "
        f"{row['items_per_second']:10,.0f} items/s  {row['memory_mb']:6.0f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())
