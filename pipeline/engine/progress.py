"""What became of the items of a stage: counts, progress bar, closing line and stats file."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from pipeline.errors import PipelineError, counted, listing
from pipeline.files import check_writable, claim, write_json

LISTED_SKIPS = 1000
FINISHED_BEFORE = "finished_before"  # count of the items that an earlier run has done
# So many errors never fail a stage by their rate: one of a few images is more than any small share.
FORGIVEN_ERRORS = 1
SHOWN_OFFENDERS, SHOWN_REASONS = 3, 8
MILLION, MEASURED_DIGITS, LISTED_NOTES = 1_000_000, 4, 50


class Tally:
    """What became of some items.

    Args:
        whole: the tally that these items belong to, which is told at once.

    Attributes:
        items: number of items that are finished.
        skipped: `item` and `reason` of each one that was left out.
        counts: further counts by name.
        run_counts: counts that say how a run went, not what came out of it: what lay in the cache
            decides them.
        measures: by category and name, how often something was measured, and the sum in millionths:
            integers, so that it is the same in whatever order items are done.
    """

    def __init__(self, whole: Tally | None = None) -> None:
        self.items = 0
        self.skipped: list[dict[str, str]] = []
        self.counts: Counter[str] = Counter()
        self.run_counts: Counter[str] = Counter()
        self.measures: dict[str, dict[str, list[int]]] = {}
        self._whole = whole

    def advance(self, count: int = 1) -> None:
        """Count `count` finished items."""
        self.items += count
        if self._whole is not None:
            self._whole.advance(count)

    def skip(self, item: str, reason: str) -> None:
        """Count and list one item that was left out."""
        self.skipped.append({"item": item, "reason": reason})
        if self._whole is not None:
            self._whole.skip(item, reason)

    def count(self, name: str, count: int = 1) -> None:
        """Add to a named count."""
        self.counts[name] += count
        if self._whole is not None:
            self._whole.count(name, count)

    def count_in_run(self, name: str, count: int = 1) -> None:
        """Add to a named count of this run, which another run over the same items may not have."""
        self.run_counts[name] += count
        if self._whole is not None:
            self._whole.count_in_run(name, count)

    def measure(self, category: str, name: str, value: float) -> None:
        """Add to what is known of a category; its mean goes to the stats."""
        self._add_measured(category, name, 1, round(value * MILLION))

    def _add_measured(self, category: str, name: str, times: int, total: int) -> None:
        known = self.measures.setdefault(category, {}).setdefault(name, [0, 0])
        known[0] += times
        known[1] += total
        if self._whole is not None:
            self._whole._add_measured(category, name, times, total)

    def measured(self, category: str, name: str) -> tuple[int, float]:
        """How often something was measured of a category, and the sum."""
        times, total = self.measures.get(category, {}).get(name, (0, 0))
        return times, total / MILLION

    def add(self, other: Tally) -> None:
        """Take in the items of another tally."""
        self.advance(other.items)
        for entry in other.skipped:
            self.skip(entry["item"], entry["reason"])
        for name, count in other.counts.items():
            self.count(name, count)
        for name, count in other.run_counts.items():
            self.count_in_run(name, count)
        for category, measures in other.measures.items():
            for name, (times, total) in measures.items():
                self._add_measured(category, name, times, total)

    def as_dict(self) -> dict[str, Any]:
        """`items`, `skipped`, `counts`, `run_counts` and `measures`, as JSON has them."""
        return {
            "items": self.items,
            "skipped": self.skipped,
            "counts": dict(self.counts),
            "run_counts": dict(self.run_counts),
            "measures": self.measures,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Tally:
        """The tally of which `as_dict` is among the entries of `content`."""
        tally = Tally()
        tally.items, tally.skipped = content["items"], content["skipped"]
        tally.counts.update(content["counts"])
        tally.run_counts.update(content.get("run_counts", {}))
        tally.measures.update(content.get("measures", {}))
        return tally


def times_path(stats_path: Path) -> Path | None:
    """Where the time of a run is kept: `times/NAME.json` beside `stats/NAME.json`, else nowhere.

    NAME may lie in a folder: a command of several stages has one.
    """
    for folder in stats_path.parents[:2]:
        if folder.name == "stats":
            return folder.with_name("times") / stats_path.relative_to(folder)
    return None


class StageRun(Tally):
    """Progress bar, counts and the closing line of one run of a stage.

    On a clean exit it writes `stats_path` (JSON: stage, items, skipped, counts, skipped_items, and
    left_out, warnings, notes and the means by category if there are any) and prints one summary
    line; on an exception it writes nothing. The time and what lay in the cache go to a file of
    their own, see `times_path`, so that equal inputs give equal stats. Until then no other process
    can start a run with the same `stats_path`, which is to say the same stage in the same
    workspace.

    Args:
        stage: its name.
        stats_path: the file of counts.
        total: number of items, if known.
        unit: what an item is called.
        max_error_rate: share of `total` that may be skipped; the item that exceeds it, and
            `FORGIVEN_ERRORS`, raises PipelineError. None: any share.
        section: of params.yaml that says so; of the stage's name without it.
        silent: count and do nothing else, claim nothing: for the processes beside the main one.
        earlier_seconds: what else the stage took before this: part of its time, of no item's.

    Attributes:
        left_out: number of files by kind that are no items, and so not among the skipped.

    Raises:
        PipelineError: another run is at work with the same `stats_path`.
    """

    def __init__(
        self,
        stage: str,
        *,
        stats_path: Path,
        total: int | None = None,
        unit: str = "image",
        max_error_rate: float | None = None,
        section: str | None = None,
        silent: bool = False,
        earlier_seconds: float = 0.0,
    ) -> None:
        super().__init__()
        self.left_out: Counter[str] = Counter()
        self._claims = ExitStack()
        if not silent:
            check_writable(stats_path)
            self._claims.enter_context(claim(stats_path))
        self.stage = stage
        self._section = section or stage
        self._stats_path = stats_path
        self._times_path = times_path(stats_path)
        self._total = total
        self._unit = unit
        self._max_error_rate = max_error_rate
        self._silent = silent
        self._earlier_seconds = earlier_seconds
        self._warnings: list[str] = []
        self._notes: dict[str, float | list[str]] = {}
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

    def start_at(self, count: int) -> None:
        """Show `count` items as finished by an earlier run; they are no items of this one."""
        self.count_in_run(f"resumed_at_{self._unit}", count)
        self._bar.initial = self._bar.n = count
        self._bar.refresh()

    def advance(self, count: int = 1) -> None:
        """Count `count` finished items."""
        super().advance(count)
        self._bar.update(count)

    def skip(self, item: str, reason: str) -> None:
        """Count and list one item that was left out.

        Raises:
            PipelineError: there are too many of them.
        """
        super().skip(item, reason)
        self._bar.update(1)
        if self._max_error_rate is None or self._total is None:
            return
        if len(self.skipped) > max(FORGIVEN_ERRORS, self._max_error_rate * self._total):
            raise PipelineError(self._too_many_skipped(self._max_error_rate, self._total))

    def _too_many_skipped(self, max_error_rate: float, total: int) -> str:
        """That too many items were skipped: the reasons, most frequent first, with examples."""
        examples: dict[str, list[str]] = defaultdict(list)
        for entry in self.skipped:
            examples[entry["reason"]].append(entry["item"])
        worst = sorted(examples.items(), key=lambda pair: -len(pair[1]))
        lines = [
            f"  {len(items)} {reason}: {', '.join(items[:SHOWN_OFFENDERS])}"
            for reason, items in worst[:SHOWN_REASONS]
        ]
        return (
            f"{self.stage}: {len(self.skipped)} of {total} {self._unit}s so far cannot be used, "
            f"more than {self._section}.max_error_rate: {max_error_rate:g} allows (a single one is "
            "always forgiven); mend them, take them out, or raise it:\n" + "\n".join(lines)
        )

    def warn(self, text: str) -> None:
        """Say in the summary line, and in the report, what is wrong with the result."""
        self._warnings.append(text)

    def note(self, what: str, value: float | Sequence[str]) -> None:
        """Put a number into the stats, or names, which are printed as well; no names: nothing."""
        if isinstance(value, float):
            self._notes[what] = round(value, MEASURED_DIGITS)
        elif value:
            self._notes[what] = list(value)

    def postfix(self, text: str) -> None:
        """Show a short text behind the bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._claims:
            self._bar.close()
            if kind is None and not self._silent:
                self._finish()

    def _finish(self) -> None:
        """Write the stats and print the summary line."""
        seconds = time.monotonic() - self._start
        rate = self.items / seconds if seconds > 0 else 0.0
        all_counts = dict(sorted({**self.counts, **self.run_counts}.items()))
        stats_counts = all_counts
        if self._times_path is not None:
            stats_counts = dict(sorted(self.counts.items()))
            run_counts = dict(sorted(self.run_counts.items()))
            earlier = round(self._earlier_seconds, 3)
            run = {
                "stage": self.stage,
                "seconds": round(seconds + earlier, 3),
                **({"earlier_seconds": earlier} if earlier else {}),
                "counts": run_counts,
            }
            write_json(self._times_path, run)
        write_json(
            self._stats_path,
            {
                "stage": self.stage,
                "items": self.items,
                "skipped": len(self.skipped),
                "counts": stats_counts,
                "skipped_items": self.skipped[:LISTED_SKIPS],
                **({"left_out": dict(sorted(self.left_out.items()))} if self.left_out else {}),
                **({"warnings": self._warnings} if self._warnings else {}),
                **self._notes,
                **({"categories": self._means()} if self.measures else {}),
            },
        )
        for what, value in self._notes.items():
            if isinstance(value, list):
                names = listing(value, LISTED_NOTES)
                print(f"{self.stage}: {what.replace('_', ' ')}: {names}", flush=True)
        skipped, whole = len(self.skipped), self.items + len(self.skipped)
        share = f" ({100 * skipped / whole:.1f} % of {whole})" if skipped else ""
        extra = "".join(f", {name} {count}" for name, count in all_counts.items())
        if self.left_out:
            extra += f", left out: {counted(self.left_out)}"
        extra += "".join(f"; warning: {text}" for text in self._warnings)
        print(
            f"{self.stage}: {self.items} {self._unit}s, {skipped} skipped{share}, "
            f"{seconds:.1f} s, {rate:.1f} {self._unit}s/s{extra}",
            flush=True,
        )

    def _means(self) -> dict[str, dict[str, Any]]:
        """By category, the mean of each measure, and of how many images."""
        return {
            category: {
                "images": max(times for times, _ in measures.values()),
                **{
                    name: round(total / MILLION / times, MEASURED_DIGITS)
                    for name, (times, total) in sorted(measures.items())
                },
            }
            for category, measures in sorted(self.measures.items())
        }
