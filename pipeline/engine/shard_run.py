"""Stages that make shards: each shard by itself, from its own items, here or on many machines.

A shard's bytes depend on its items and on the settings alone. So it does not matter who makes it,
or when: a run that was killed keeps the shards that were finished, and a lost worker's shard is
made again by another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pipeline.engine.batching import slices
from pipeline.engine.dry_run import CacheUse, DryRun
from pipeline.engine.progress import FINISHED_BEFORE, StageRun, Tally
from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.files import atomic_path, claim, file_versions, refuse_url, resumable_dir, write_json
from pipeline.formats.shards import (
    check_shard,
    check_shards_replaceable,
    shard_entry,
    shard_name,
    write_manifest,
)

Item = TypeVar("Item")

ROW_SUFFIX = ".row.json"


class ShardMaker(Protocol):
    """What a stage does; it has loaded what it needs.

    Attributes:
        settings: all that its shards depend on besides their items; representable in JSON.
    """

    settings: dict[str, Any]

    def make(self, items: Sequence[Any], path: Path, tally: Tally) -> int:
        """Write the shard of some items to `path`; returns its number of samples."""

    def close(self) -> None:
        """Let go of threads and caches."""


Load = Callable[[Runtime], ShardMaker]


@dataclass(frozen=True)
class Job:
    """The shards of a stage, before anything is loaded.

    Attributes:
        stage: its name, in the manifest beside the settings of the maker.
        items: what shards are made of, in order; picklable.
        shard_size: items of a shard; the last one may have fewer.
        load: gives the maker on any machine; picklable.
        inputs: what shards depend on besides items and settings; representable in JSON.
        files: paths that the items lead to; a shard is made again where one has changed.
        remedy: what to do if no item can be used.
        suffix: of the shards' names.
        max_error_rate: share of items that may be skipped; None for any.
        section: of params.yaml, which says so; that of the stage's name without it.
        left_out: number of files by kind that are no items.
        warnings: what is wrong with the result, see `StageRun.warn`.
        review: is shown what became of all items before the shards are put in place.
        cached: where results of items lie in the cache, for a dry run.
    """

    stage: str
    items: Sequence[Any]
    shard_size: int
    load: Load
    inputs: Any = None
    files: Sequence[str] = ()
    remedy: str = ""
    suffix: str = ".tar"
    max_error_rate: float | None = None
    section: str | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    review: Callable[[StageRun], None] | None = None
    cached: CacheUse | None = None

    def plan(self) -> list[Sequence[Any]]:
        """The items of each shard."""
        return slices(self.items, self.shard_size)

    def key(self, settings: Any) -> str:
        """Digest of all that the shards depend on, in no more memory than one item takes."""
        depends = [settings, self.shard_size, self.inputs]
        hasher = hashlib.sha256(json.dumps(depends, sort_keys=True).encode())
        for item in chain(self.items, file_versions(self.files)):
            hasher.update(repr(item).encode("utf-8", "surrogatepass"))
        return hasher.hexdigest()


@dataclass(frozen=True)
class Task:
    """One shard to be made.

    Attributes:
        number: of the shard.
        items: what it is made of; picklable.
        path: where it goes.
    """

    number: int
    items: Sequence[Any]
    path: Path


class Executor(Protocol):
    """Where shards are made."""

    def run(
        self, tasks: Sequence[Task], *, load: Load, maker: ShardMaker, tally: Tally
    ) -> Iterator[tuple[Task, int, Tally]]:
        """Make the shards, in any order.

        Args:
            tasks: what to make.
            load: gives a maker anywhere; picklable.
            maker: one that is here.
            tally: learns what became of each item.

        Yields:
            A task whose file is there, its number of samples, and what became of its items.
        """

    def task_size(self, count: int) -> int:
        """How many of `count` items to give to a task, where one task for all would do least."""


class LocalExecutor:
    """Makes one shard after the other in this process."""

    def run(
        self, tasks: Sequence[Task], *, load: Load, maker: ShardMaker, tally: Tally
    ) -> Iterator[tuple[Task, int, Tally]]:
        del load
        for task in tasks:
            part = Tally(tally)
            with atomic_path(task.path) as temporary:
                samples = maker.make(task.items, temporary, part)
            yield task, samples, part

    def task_size(self, count: int) -> int:
        return max(1, count)


def run_job(
    job: Job,
    *,
    out_dir: Path,
    stats_path: Path,
    runtime: Runtime,
    executor: Executor | DryRun | None = None,
) -> dict[str, Any]:
    """Make a folder of shards with its manifest; returns the manifest, of a dry run nothing.

    Finished shards lie beside `out_dir` until all are there, each with a row of its own: name,
    samples, bytes, SHA-256, and what became of its items. One counts as finished only if it agrees
    with its row. A shard without samples is left out; the others keep their numbers.

    Args:
        job: what is made.
        out_dir: the folder, replaced as a whole at the end.
        stats_path: JSON of counts.
        runtime: device, seed and cache folder.
        executor: where the shards are made; here by default.

    Raises:
        PipelineError: not one item could be used, or more of them were skipped than may be;
            `out_dir` holds something else, or another run is at work on it.
    """
    refuse_url(out_dir)
    check_shards_replaceable(out_dir)
    if isinstance(executor, DryRun):
        executor.shards(
            job.items,
            shard_size=job.shard_size,
            out_dir=out_dir,
            row_suffix=ROW_SUFFIX,
            cached=job.cached,
            cache_dir=runtime.cache_dir,
        )
        return {}
    maker = job.load(runtime)
    with (
        closing(maker),
        StageRun(
            job.stage,
            stats_path=stats_path,
            total=len(job.items),
            max_error_rate=job.max_error_rate,
            section=job.section,
        ) as stage,
        claim(out_dir),
        resumable_dir(out_dir, job.key(maker.settings)) as folder,
    ):
        stage.left_out.update(job.left_out)
        for text in job.warnings:
            stage.warn(text)
        rows = _make(job, folder, maker, executor or LocalExecutor(), stage)
        if job.review:
            job.review(stage)
        if stage.items == 0:
            _keep_only(folder, [])
            raise _nothing_usable(stage, job.remedy)
        return _finish(folder, rows, stage, {job.stage: maker.settings})


def _make(
    job: Job, folder: Path, maker: ShardMaker, executor: Executor, stage: StageRun
) -> list[dict[str, Any]]:
    """Make the shards that are not finished yet; returns the rows of all, in order."""
    tasks = [
        Task(number, items, folder / shard_name(number, job.suffix))
        for number, items in enumerate(job.plan())
    ]
    rows = {task.number: row for task in tasks if (row := _finished_row(task.path))}
    if rows:
        print(f"{job.stage}: {len(rows)} of {len(tasks)} shards were finished", flush=True)
    for row in rows.values():
        stage.add(Tally.from_dict(row))
        stage.count_in_run(FINISHED_BEFORE, row["items"])
    open_tasks = [task for task in tasks if task.number not in rows]
    for task, samples, part in executor.run(open_tasks, load=job.load, maker=maker, tally=stage):
        rows[task.number] = _row(task.path, samples, part)
        write_json(_row_path(task.path), rows[task.number])
    return [rows[number] for number in sorted(rows)]


def _finish(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    stage: StageRun,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Put rows into one manifest, and skipped items in order, whoever was done with them first."""
    stage.skipped = [entry for row in rows for entry in row["skipped"]]
    entries = [row["shard"] for row in rows if row["shard"]["samples"]]
    names = [entry["name"] for entry in entries]
    _keep_only(folder, names)
    for name in names:
        _row_path(folder / name).unlink()
    return write_manifest(folder, entries, settings)


def _keep_only(folder: Path, names: Sequence[str]) -> None:
    """Remove all but some shards and their rows: what else a killed run may have left, too."""
    kept = {*names, *(_row_path(folder / name).name for name in names)}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()


def _row(path: Path, samples: int, tally: Tally) -> dict[str, Any]:
    return {"shard": shard_entry(path, samples), **tally.as_dict()}


def _row_path(path: Path) -> Path:
    return path.with_name(path.name + ROW_SUFFIX)


def _finished_row(path: Path) -> dict[str, Any] | None:
    """The row of a shard that is finished and whole; else none."""
    try:
        row = json.loads(_row_path(path).read_text(encoding="utf-8"))
        check_shard(path, row["shard"])
    except (OSError, ValueError, KeyError, TypeError, PipelineError):
        return None
    return row


def _nothing_usable(stage: StageRun, remedy: str) -> PipelineError:
    first = stage.skipped[0]
    return PipelineError(
        f"none of the {len(stage.skipped)} images can be read; the first, {first['item']}: "
        f"{first['reason']}. {remedy}"
    )
