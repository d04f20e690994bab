"""Commands of the pipeline in a folder of their own, timed once: a second run reads the record."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.files import digest, read_json, write_json

ROOT = Path(__file__).parents[1]
KIBIBYTES = 1024  # in a mebibyte
HIGH_WATER = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)
WATCH_SECONDS = 0.1


@dataclass(frozen=True)
class Record:
    """What a command took.

    Attributes:
        key: digest of command, params and what went before.
        seconds: on the clock, from the start of the process to its end.
        core_seconds: of all its threads.
        peak_mb: the most memory that it held.
        error: its last line if it failed, else None.
    """

    key: str
    seconds: float
    core_seconds: float
    peak_mb: float
    error: str | None = None


class Folder:
    """A folder in which commands of the pipeline run, each with its own params."""

    def __init__(self, root: Path, *, fresh: bool = False) -> None:
        """Args: fresh: forget what was recorded."""
        self.root = root
        self._records = root / "steps"
        self._records.mkdir(parents=True, exist_ok=True)
        if fresh:
            for path in self._records.glob("*.json"):
                path.unlink()

    def run(
        self,
        name: str,
        params: Mapping[str, Any],
        command: Sequence[str],
        *,
        after: Sequence[Record] = (),
        reads: Sequence[str] = (),
        writes: Sequence[str] = (),
    ) -> Record:
        """Run `pipeline COMMAND` unless it is recorded already.

        Args:
            name: of the step, also of its params file.
            params: content of params.yaml.
            command: words after `pipeline --params FILE`.
            after: the steps whose outputs it reads.
            reads: the sections of the params that decide what it writes.
            writes: its outputs, below the folder.

        Returns:
            Its record; a failed one is run again the next time.
        """
        path = self._records / f"{name}.json"
        decides = {section: params.get(section) for section in reads}
        key = digest([list(command), decides, [record.key for record in after]])
        if failed := [record.error for record in after if record.error]:
            return Record(key, 0.0, 0.0, 0.0, f"not run: {failed[0]}")
        if path.is_file():
            known = Record(**read_json(path))
            if known.key == key and all((self.root / entry).exists() for entry in writes):
                return known
        print(f"{self.root.name}: {name}", flush=True)
        record = self._timed(name, params, command, key)
        if record.error is None:
            write_json(path, asdict(record))
        else:
            print(f"  {record.error}", flush=True)
        return record

    def _timed(
        self, name: str, params: Mapping[str, Any], command: Sequence[str], key: str
    ) -> Record:
        params_path = self.root / f"{name}.yaml"
        with params_path.open("w", encoding="utf-8") as file:
            YAML(typ="safe", pure=True).dump(dict(params), file)
        log_path = self.root / f"{name}.log"
        words = [sys.executable, "-m", "pipeline", "--params", params_path.name, *command]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.setdefault("PIPELINE_CACHE", str(self.root / "cache"))
        start = time.perf_counter()
        with log_path.open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                words, cwd=self.root, stdout=log, stderr=log, env=environment
            )
            peak_mb, status, usage = _watch(process)
        lines = log_path.read_text(encoding="utf-8").splitlines()
        return Record(
            key,
            seconds=round(time.perf_counter() - start, 2),
            core_seconds=round(usage.ru_utime + usage.ru_stime, 2),
            peak_mb=round(peak_mb, 1),
            error=None if status == 0 else (lines or ["no output"])[-1],
        )


def _watch(process: subprocess.Popen[bytes]) -> tuple[float, int, resource.struct_rusage]:
    """Wait for a process: the most MB that it held, exit status, and what it used.

    The peak that `wait4` reports may be that of the parent, which a fork takes over.
    """
    status_path = Path(f"/proc/{process.pid}/status")
    peak_kb = 0
    pid = 0
    while pid == 0:
        if found := HIGH_WATER.search(status_path.read_text(encoding="utf-8")):
            peak_kb = max(peak_kb, int(found[1]))
        time.sleep(WATCH_SECONDS)
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    return peak_kb / KIBIBYTES, process.returncode, usage
