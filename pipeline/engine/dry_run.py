"""What a stage would do: its items, what of them is done, and how long the rest would take.

Nothing is written and no network is loaded, so what an encoder's weights decide is left open: what
is said to be done is so if they are the same. What a run that was cut off has finished counts only
if all of its settings were these, which only the stage itself can tell: it is a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engine.cache import stored_keys
from pipeline.engine.cache_store import settings_of
from pipeline.engine.progress import FINISHED_BEFORE, times_path
from pipeline.errors import PipelineError
from pipeline.files import parts_left, read_json

LOOKED_AT = 200  # items, evenly spaced, whose keys are compared with those of the cache
MINUTE_S, HOUR_S = 60, 3600


@dataclass(frozen=True)
class CacheUse:
    """Where results of a stage lie in the cache.

    Attributes:
        kind: folder of the cache.
        known: part of the settings that the results depend on: what no network decides.
        key: that of an item's result; None for an item that needs none. It may read the item.
    """

    kind: str
    known: Mapping[str, Any]
    key: Callable[[Any], str | None]


class DryRun:
    """Takes the place of an executor: says what would be made, and makes nothing.

    Args:
        stats_path: counts of the last run, beside which its time is.
    """

    def __init__(self, stats_path: Path) -> None:
        self._stats_path = stats_path

    def shards(
        self,
        items: Sequence[Any],
        *,
        shard_size: int,
        out_dir: Path,
        row_suffix: str,
        cached: CacheUse | None,
        cache_dir: Path,
    ) -> None:
        """Print what is known of a stage that makes shards.

        Args:
            items: all of them.
            shard_size: items of a shard.
            out_dir: where the shards go.
            row_suffix: of the file beside a shard that is finished.
            cached: where results lie; None where there is no telling.
            cache_dir: the cache folder.
        """
        num_shards = -(-len(items) // shard_size)
        print(f"  items    {len(items)} in {num_shards} shards of {shard_size}")
        finished = max(
            (len(list(part.glob(f"*{row_suffix}"))) for part in parts_left(out_dir)), default=0
        )
        if finished:
            print(f"  finished at most {finished} shards, of a run that was cut off")
        left = max(0, len(items) - finished * shard_size)
        if cached is not None:
            share = _share_done(items, cached, cache_dir)
            print(f"  done     about {round(share * len(items))} of {len(items)}, by the cache")
            left = min(left, round((1 - share) * len(items)))
        self.time(left, bound="at least " if finished else "")

    def items(self, count: int, *, unit: str = "images", text: str = "") -> None:
        """Print what is known of a stage that does `count` items in one go."""
        print(f"  items    {count} {unit}{text}")
        self.time(count, unit=unit)

    def time(self, left: int, *, unit: str = "items", bound: str = "") -> None:
        """Print how long `left` items take at the rate of the last run; `bound` stands before."""
        rate = last_rate(self._stats_path)
        if rate is None:
            print(f"  time     unknown: no run of {left or 'any'} {unit} was measured here")
        else:
            duration = f"{bound}{_duration(left / rate)}"
            print(f"  time     {duration} for {left} {unit}, {rate:.3g} a second")


def last_rate(stats_path: Path) -> float | None:
    """New items a second of the last run with these stats; None where it made nothing new."""
    path = times_path(stats_path)
    if path is None:
        return None
    try:
        run, stats = read_json(path), read_json(stats_path)
    except PipelineError:
        return None
    counts = run["counts"]
    # The stage `mask` counts what it makes, for its negatives take no time.
    new = counts.get("masked", stats["items"] - counts.get("cached", 0))
    new -= counts.get(FINISHED_BEFORE, 0)
    seconds = run["seconds"] - run.get("earlier_seconds", 0.0)
    return new / seconds if new > 0 and seconds > 0 else None


def _share_done(items: Sequence[Any], cached: CacheUse, cache_dir: Path) -> float:
    """Share of the items whose results are in the cache, or that need none, by a sample.

    Of several folders whose settings agree with what is known, the one with most of them counts.
    """
    if not items:
        return 1.0
    places = np.linspace(0, len(items) - 1, min(LOOKED_AT, len(items))).astype(int)
    keys = [cached.key(items[place]) for place in places]
    wanted = [key for key in keys if key is not None]
    folders = [
        folder
        for folder in sorted((cache_dir / cached.kind).glob("*"))
        if _agrees(settings_of([folder]), cached.known)
    ]
    found = [sum(key in known for key in wanted) for known in map(stored_keys, folders)]
    return (len(keys) - len(wanted) + max(found, default=0)) / len(keys)


def _agrees(settings: Any, known: Any) -> bool:
    """Whether settings hold all that is known of them, at any depth."""
    if not isinstance(known, Mapping):
        return bool(settings == known)
    return isinstance(settings, Mapping) and all(
        name in settings and _agrees(settings[name], value) for name, value in known.items()
    )


def _duration(seconds: float) -> str:
    if seconds < MINUTE_S:
        return f"{seconds:.0f} s"
    if seconds < HOUR_S:
        return f"{seconds / MINUTE_S:.0f} min"
    return f"{seconds / HOUR_S:.1f} h"
