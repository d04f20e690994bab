"""python -m speed: the table of ratios, and `speed/results/bench.json`; `python -m speed serve`."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from speed.harness import Row, peak_memory, run_bench, serve_seconds, use_threads

REPORT = Path("speed/results/bench.json")


def main() -> int:
    """Run the benches; exit status 1 if two sides do not agree, or one of them fails."""
    if sys.argv[1:2] == ["serve"]:
        from speed.serving import main as load_service

        return load_service(sys.argv[2:])
    options = _options()
    use_threads(options.threads)
    # Only now: NumPy and torch read the number of threads when they are imported.
    import torch

    from pipeline.files import write_json
    from speed.machine import describe_machine
    from speed.registry import select

    torch.set_num_threads(options.threads)
    if options.memory_of:
        (bench,) = select([options.memory_of])
        print(json.dumps(peak_memory(bench, options.side, quick=options.quick)))
        return 0
    if options.time_of:
        (bench,) = select([options.time_of])
        serve_seconds(bench, options.side, quick=options.quick)
        return 0
    machine = describe_machine(options.threads)
    out = options.out or (None if options.quick or options.only else REPORT)
    rows: list[Row] = []
    failures = 0
    for bench in select(options.only):
        print(f"{bench.name}: {bench.title}", flush=True)
        try:
            rows += run_bench(
                bench,
                quick=options.quick,
                repeats=options.repeats,
                budget=options.budget,
                memory=not options.quick if options.memory is None else options.memory,
                threads=options.threads,
            )
            print(f"  {rows[-1].check or rows[-2].check}", flush=True)
        except AssertionError as error:
            failures += 1
            print(f"  NOT THE SAME RESULT: {error}", flush=True)
        except Exception:  # the other rows took their time, too
            failures += 1
            traceback.print_exc()
        if out is not None:
            write_json(out, {"machine": machine, "rows": [asdict(row) for row in rows]})
    print(_table(rows))
    if out is not None:
        print(f"written to {out}")
    return int(failures > 0)


def _options() -> Any:
    parser = argparse.ArgumentParser(prog="python -m speed", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="a row; repeatable")
    parser.add_argument("--repeats", type=int, default=5, help="least turns of both sides (5)")
    parser.add_argument(
        "--budget", type=float, default=60.0, help="seconds a row after which no turn starts (60)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of NumPy and torch (1)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it all run?")
    parser.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        help="peak memory of both sides, in processes of their own (unless --quick)",
    )
    parser.add_argument("--out", type=Path, help=f"report ({REPORT}; none with --quick and --only)")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--time-of", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("published", "ours"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _table(rows: list[Row]) -> str:
    head = ("row", "published", "ours", "ratio", "low-high", "target", "stretch", "MB", "reached")
    lines = [head, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.published:.4g} {row.unit}",
        f"{row.ours:.4g} {row.unit}",
        f"{row.ratio:.2f}x",
        f"{row.low:.2f}-{row.high:.2f}",
        f"{row.target:.2f}x",
        "" if row.stretch is None else f"{row.stretch:.2f}x",
        "" if row.memory_mb is None else f"{row.memory_mb:.0f}",
        "yes" if row.reached else "NO",
    )


if __name__ == "__main__":
    sys.exit(main())
