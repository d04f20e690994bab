"""Two sides of a row: timed in turns, their peak memory measured in processes of their own."""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal, Self

Side = Literal["published", "ours"]

MIN_SECONDS = 0.2  # a call shorter than this is repeated within one timing
MIN_ROUNDS = 2
ENOUGH = 0.25  # of the budget: after the turns asked for, further ones fill this much
MEBIBYTE = 2**20
RESET_PEAK = "5"


@dataclass(frozen=True)
class Timed:
    """What a side returns if not all of its call is to count.

    Attributes:
        seconds: the part that counts.
        value: its result.
    """

    seconds: float
    value: Any


@dataclass(frozen=True)
class Pair:
    """Both sides of a row, ready to run on the same inputs.

    Attributes:
        published: the plain reading of the method; in a row of overhead, the bare network.
        ours: the pipeline.
        check: compares a result of each and says what agrees, in a few words; AssertionError
            otherwise.
    """

    published: Callable[[], Any]
    ours: Callable[[], Any]
    check: Callable[[Any, Any], str]


@dataclass(frozen=True)
class Bench:
    """One row of the table.

    Attributes:
        name: a word, for `--only`.
        title: what is measured, and at which sizes.
        target: ratio to reach; for an overhead, not to exceed.
        stretch: likewise, what would be close to the hardware's bound.
        prepare: makes the inputs: an empty folder, whether to take tiny sizes -> `Pair`.
        overhead: the ratio is ours / bare network, not published / ours.
        memory_target_mb: bound on our peak memory; it becomes a row of its own.
    """

    name: str
    title: str
    target: float
    stretch: float
    prepare: Callable[[Path, bool], Pair]
    overhead: bool = False
    memory_target_mb: float | None = None


@dataclass(frozen=True)
class Curve:
    """How time and memory of a stage grow with its input.

    Attributes:
        name: a word, for `--only`.
        title: what is measured.
        sizes: numbers of items, by default.
        bytes_of_item: that `prepare` writes, about; a size that does not fit the disk is left out.
        prepare: makes the input: an empty folder, number of items, dimension C of an embedding.
        run: runs the stage on what `prepare` left in the folder, in a process of its own.
    """

    name: str
    title: str
    sizes: tuple[int, ...]
    bytes_of_item: Callable[[int], int]
    prepare: Callable[[Path, int, int], object]
    run: Callable[[Path], object]


@dataclass
class Row:
    """One line of the table and of the report; times are medians."""

    name: str
    title: str
    ratio: float
    low: float
    high: float
    memory_mb: float | None
    target: float
    stretch: float | None
    reached: bool
    unit: str = "s"
    published: float | None = None
    ours: float | None = None
    published_memory_mb: float | None = None
    repeats: int = 1
    check: str = ""
    ratios: list[float] = field(default_factory=list)


def run_bench(
    bench: Bench, *, quick: bool, repeats: int, budget: float, memory: bool, threads: int
) -> list[Row]:
    """Check and time a bench, and measure the memory of both sides.

    Args:
        bench: see `Bench`.
        quick: tiny sizes.
        repeats: least number of turns; short ones go on for a quarter of the budget.
        budget: seconds after which no further turn starts, once two are made.
        memory: whether to measure memory, each side in a process of its own.
        threads: for those processes.

    Returns:
        Its row; and one for memory if that has a target.

    Raises:
        AssertionError: the two sides do not agree.
    """
    peaks: dict[Side, float | None] = {"published": None, "ours": None}
    if memory:
        sides: list[Side] = ["ours"] if bench.overhead else ["published", "ours"]
        for side in sides:
            peaks[side] = _measured_apart(bench.name, side, quick=quick, threads=threads)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, _quiet():
        pair = bench.prepare(Path(folder), quick)
        agreement = pair.check(timed(pair.published)[1], timed(pair.ours)[1])
        del pair
    times, ratios = _time_in_turns(
        bench, quick=quick, repeats=repeats, budget=budget, threads=threads
    )
    ratio = median(ratios)
    row = Row(
        name=bench.name,
        title=bench.title,
        ratio=ratio,
        low=min(ratios),
        high=max(ratios),
        memory_mb=peaks["ours"],
        target=bench.target,
        stretch=bench.stretch,
        reached=ratio <= bench.target if bench.overhead else ratio >= bench.target,
        published=median(times["published"]),
        ours=median(times["ours"]),
        published_memory_mb=peaks["published"],
        repeats=len(ratios),
        check=agreement,
        ratios=ratios,
    )
    return [row, *_memory_rows(bench, peaks)]


def _memory_rows(bench: Bench, peaks: dict[Side, float | None]) -> list[Row]:
    """How many times less memory ours takes, and what its bound would be."""
    published, ours = peaks["published"], peaks["ours"]
    if bench.memory_target_mb is None or published is None or ours is None:
        return []
    ratio = published / max(ours, 1.0)
    return [
        Row(
            name=f"{bench.name}_memory",
            title=f"peak memory of the above, under {bench.memory_target_mb:.0f} MB",
            ratio=ratio,
            low=ratio,
            high=ratio,
            memory_mb=ours,
            target=published / bench.memory_target_mb,
            stretch=None,
            reached=ours <= bench.memory_target_mb,
            unit="MB",
            published=published,
            ours=ours,
            published_memory_mb=published,
        )
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the summaries and bars of the stages."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _time_in_turns(
    bench: Bench, *, quick: bool, repeats: int, budget: float, threads: int
) -> tuple[dict[Side, list[float]], list[float]]:
    """Seconds of both sides and a ratio for each turn.

    Each side has a process of its own, as in use: memory that one gives back to the system would
    have to be claimed again by the other.
    """
    times: dict[Side, list[float]] = {"published": [], "ours": []}
    ratios: list[float] = []
    with (
        _Timer(bench.name, "published", quick=quick, threads=threads) as published,
        _Timer(bench.name, "ours", quick=quick, threads=threads) as ours,
    ):
        started = time.perf_counter()
        for turn in itertools.count():
            spent = (time.perf_counter() - started) / budget
            if (turn >= MIN_ROUNDS and spent > 1) or (turn >= repeats and spent > ENOUGH):
                break
            times["published"].append(published.seconds())
            times["ours"].append(ours.seconds())
            ratio = times["published"][-1] / times["ours"][-1]
            ratios.append(1 / ratio if bench.overhead else ratio)
    return times, ratios


class _Timer:
    """One side of a bench in a process that waits between its calls; see `serve_seconds`."""

    def __init__(self, name: str, side: Side, *, quick: bool, threads: int) -> None:
        command = _command("--time-of", name, side, quick=quick, threads=threads)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate("")

    def seconds(self) -> float:
        """Mean seconds of a few calls."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args}: exit {self._process.wait()}")
        return float(line)


def serve_seconds(bench: Bench, side: Side, *, quick: bool) -> None:
    """Write the seconds of a first call, then for every line read the mean seconds of some."""
    answers = sys.stdout
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, _quiet():
        pair = bench.prepare(Path(folder), quick)
        call = pair.published if side == "published" else pair.ours
        first = timed(call)[0]
        print(first, file=answers, flush=True)
        calls = max(1, round(MIN_SECONDS / max(first, 1e-6)))
        for _ in sys.stdin:
            gc.collect()
            print(sum(timed(call)[0] for _ in range(calls)) / calls, file=answers, flush=True)


def timed(side: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, or the part of them that it says counts, and its result."""
    start = time.perf_counter()
    result = side()
    seconds = time.perf_counter() - start
    return (result.seconds, result.value) if isinstance(result, Timed) else (seconds, result)


def _measured_apart(name: str, side: Side, *, quick: bool, threads: int) -> float:
    """Peak memory in MB of one side of a bench, in a process that runs nothing else."""
    command = _command("--memory-of", name, side, quick=quick, threads=threads)
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {finished.returncode}\n{finished.stderr}")
    return float(json.loads(finished.stdout.splitlines()[-1]))


def _command(task: str, name: str, side: Side, *, quick: bool, threads: int) -> list[str]:
    """What runs one side of a bench in another process."""
    command = [sys.executable, "-m", "speed", task, name, "--side", side]
    return [*command, "--threads", str(threads), *(["--quick"] if quick else [])]


def peak_memory(bench: Bench, side: Side, *, quick: bool) -> float:
    """MB by which one call of a side raises the memory of this process above its inputs.

    A call at tiny sizes goes before, so that code which is loaded at first use does not count.
    """
    for tiny in (True, quick):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder, _quiet():
            pair = bench.prepare(Path(folder), tiny)
            call = pair.published if side == "published" else pair.ours
            with track_peak() as peak:
                call()
    return peak[0]


@contextmanager
def track_peak() -> Iterator[list[float]]:
    """Yield a list that holds, after the block, the MB by which the block raised the peak."""
    gc.collect()
    _return_freed_memory()
    _reset_peak()
    before = _resident_bytes()
    peak: list[float] = []
    yield peak
    peak.append(max(0.0, (_peak_bytes() - before) / MEBIBYTE))


def _return_freed_memory() -> None:
    """Give pages that the inputs have left behind back to the system (glibc only)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _reset_peak() -> None:
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)


def _resident_bytes() -> int:
    return _status_bytes("VmRSS") if sys.platform == "linux" else _peak_bytes()


def _peak_bytes() -> int:
    # getrusage would do, but on Linux a child process inherits its parent's peak.
    if sys.platform == "linux":
        return _status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status_bytes(entry: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {entry}")


def use_threads(count: int) -> None:
    """Bound the threads of this process and its children; before NumPy and torch are imported."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(count)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
