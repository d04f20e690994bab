"""Device, precision, seed and progress: decided once, here, and handed to the stages."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from tqdm import tqdm

from pipeline.errors import PipelineError
from pipeline.files import check_writable, write_json

CACHE_VARIABLE = "PIPELINE_CACHE"
LISTED_SKIPS = 1000


@dataclass(frozen=True)
class Runtime:
    """Where a stage computes and what it starts from.

    Attributes:
        device: the device of the networks.
        amp_dtype: autocast precision, or None for plain float32.
        seed: seed of every random generator.
        cache_dir: folder of results that outlive the outputs of the DAG.
    """

    device: torch.device
    amp_dtype: torch.dtype | None
    seed: int
    cache_dir: Path

    def autocast(self) -> AbstractContextManager[object]:
        """Context in which the networks run."""
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)


def make_runtime(*, device: str = "auto", seed: int = 0) -> Runtime:
    """Pick device and precision: bfloat16 on CUDA, float32 on CPU.

    Raises:
        PipelineError: `device` is "cuda" where there is none, or not a known name.
    """
    has_cuda = torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda"):
        raise PipelineError(f"params.yaml: device: {device!r} is not one of auto, cpu, cuda")
    if device == "cuda" and not has_cuda:
        raise PipelineError("params.yaml: device: cuda, but no CUDA device was found; use auto")
    chosen = torch.device("cuda" if has_cuda and device != "cpu" else "cpu")
    amp_dtype = torch.bfloat16 if chosen.type == "cuda" else None
    return Runtime(device=chosen, amp_dtype=amp_dtype, seed=seed, cache_dir=default_cache_dir())


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def default_cache_dir() -> Path:
    """Folder of cached per-image results: $PIPELINE_CACHE, else the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "zutis-pipeline"


class StageRun:
    """Progress bar, counts and the closing line of one run of a stage.

    On a clean exit it writes `stats_path` (JSON: stage, items, skipped, seconds,
    items_per_second, counts, skipped_items) and prints one summary line; on an exception it
    writes nothing. A `silent` one counts and does nothing else: for the processes beside the main
    one.
    """

    def __init__(
        self,
        stage: str,
        *,
        stats_path: Path,
        total: int | None = None,
        unit: str = "image",
        silent: bool = False,
    ) -> None:
        if not silent:
            check_writable(stats_path)
        self.stage = stage
        self.items = 0
        self.skipped: list[dict[str, str]] = []
        self.counts: Counter[str] = Counter()
        self._stats_path = stats_path
        self._unit = unit
        self._silent = silent
        self._bar = tqdm(
            total=total,
            desc=stage,
            unit=unit,
            dynamic_ncols=True,
            mininterval=0.5,
            disable=silent,
        )
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def total(self, count: int) -> None:
        """Set the expected number of items."""
        self._bar.total = count
        self._bar.refresh()

    def start_at(self, count: int) -> None:
        """Show `count` items as finished by an earlier run; they are no items of this one."""
        self.count(f"resumed_at_{self._unit}", count)
        self._bar.initial = self._bar.n = count
        self._bar.refresh()

    def advance(self, count: int = 1) -> None:
        """Count `count` finished items."""
        self.items += count
        self._bar.update(count)

    def skip(self, item: str, reason: str) -> None:
        """Count and list one item that was left out."""
        self.skipped.append({"item": item, "reason": reason})
        self._bar.update(1)

    def count(self, name: str, count: int = 1) -> None:
        """Add to a named count of the stats file."""
        self.counts[name] += count

    def postfix(self, text: str) -> None:
        """Show a short text behind the bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        if kind is not None or self._silent:
            return
        seconds = time.monotonic() - self._start
        rate = self.items / seconds if seconds > 0 else 0.0
        write_json(
            self._stats_path,
            {
                "stage": self.stage,
                "items": self.items,
                "skipped": len(self.skipped),
                "seconds": round(seconds, 3),
                "items_per_second": round(rate, 3),
                "counts": dict(sorted(self.counts.items())),
                "skipped_items": self.skipped[:LISTED_SKIPS],
            },
        )
        extra = "".join(f", {name} {count}" for name, count in sorted(self.counts.items()))
        print(
            f"{self.stage}: {self.items} {self._unit}s, {len(self.skipped)} skipped, "
            f"{seconds:.1f} s, {rate:.1f} {self._unit}s/s{extra}",
            flush=True,
        )
