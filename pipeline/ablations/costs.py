"""What the stages of an experiment took, wherever they were run.

What DVC has run before comes out of its run cache, in no time. So the seconds of a stage are noted
when it is run, under a key of all that decides it, and are found by that key from then on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML

from pipeline.engine.progress import FINISHED_BEFORE, times_path
from pipeline.files import digest, read_json, write_json
from pipeline.params.base import Section

DIGITS = 12
RESUMED = "resumed_at_"
Stages = Mapping[str, Mapping[str, Any]]


class StageCost(Section):
    """A stage of an experiment: the key of its run, and its seconds; none where nobody timed it."""

    key: str
    seconds: float | None = None


def read_lock(content: bytes | None) -> Stages:
    """The stages of a `dvc.lock` by name; none of no file."""
    lock = YAML(typ="safe", pure=True).load(content) if content else None
    return (lock or {}).get("stages") or {}


def stage_keys(stages: Stages) -> dict[str, str]:
    """Digest of command, inputs and params of every stage."""
    return {
        name: digest([stage.get("cmd"), _hashes(stage, "deps"), stage.get("params")])[:DIGITS]
        for name, stage in stages.items()
    }


def stages_of(stages: Stages, target: str) -> list[str]:
    """`target` and what it waits for, in the order of their names; of an unknown one, nothing."""
    found: set[str] = set()
    waiting = {target} & stages.keys()
    while waiting:
        name = waiting.pop()
        found.add(name)
        inputs = _hashes(stages[name], "deps")
        waiting |= {
            other
            for other in stages.keys() - found
            if any(_overlap(a, b) for a in inputs for b in _hashes(stages[other], "outs"))
        }
    return sorted(found)


class Notebook:
    """Seconds by key, in a file.

    Args:
        path: JSON file of an object; made at the first note.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def costs(self, stages: Stages, target: str) -> dict[str, StageCost]:
        """`target` and what it waits for, with the seconds that are known."""
        noted, keys = self._noted(), stage_keys(stages)
        return {
            name: StageCost(key=keys[name], seconds=noted.get(keys[name]))
            for name in stages_of(stages, target)
        }

    def note(
        self, stages: Stages, times: Mapping[str, bytes], *, before: Stages, is_whole: bool
    ) -> None:
        """Note the stages that have left a time.

        A stage that is as `before` is left out: its time may be that of a run which DVC dropped.

        Args:
            stages: as `dvc.lock` has them after the runs.
            times: content by path of the files that they left.
            before: as `dvc.lock` had them.
            is_whole: they began with nothing in the cache; if not, those that found something are
                left out.
        """
        keys, known = stage_keys(stages), {*stage_keys(before).values()}
        noted = self._noted()
        for name, run in _runs(stages, times):
            if keys[name] not in known and (is_whole or not _has_found(run)):
                noted[keys[name]] = run["seconds"]
        if noted:
            write_json(self._path, noted)

    def _noted(self) -> dict[str, float]:
        return read_json(self._path) if self._path.is_file() else {}


def _hashes(stage: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Hashes of a stage's `deps` or `outs` by path."""
    return {entry["path"]: entry.get("md5") for entry in stage.get(kind) or []}


def _overlap(path: str, other: str) -> bool:
    return PurePosixPath(path).is_relative_to(other) or PurePosixPath(other).is_relative_to(path)


def _runs(stages: Stages, times: Mapping[str, bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stages with what is in the file of times that stands beside their stats."""
    for name, stage in stages.items():
        for path in _hashes(stage, "outs"):
            beside = times_path(Path(path))
            if beside is not None and beside.as_posix() in times:
                yield name, json.loads(times[beside.as_posix()])


def _has_found(run: Mapping[str, Any]) -> bool:
    """Whether a run took something from the cache, or went on where another was killed."""
    counts = run.get("counts", {}).items()
    spared = ("cached", FINISHED_BEFORE)
    return any(count for name, count in counts if name in spared or name.startswith(RESUMED))
