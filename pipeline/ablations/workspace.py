"""DVC experiments in the workspace, which is as before once they have run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError, listing
from pipeline.files import read_json, write_bytes

PARAMS, LOCK = "params.yaml", "dvc.lock"
# What ablations and `dvc repro` write may differ from the last commit: another processor rounds
# otherwise. Code and params may not, for they decide what an experiment is.
WRITTEN = ("reports/ablations", "reports/metrics", LOCK)
LISTED, LAST_LINES = 5, 2
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Workspace:
    """A project folder in which experiments run, each from the state of the last commit.

    Args:
        root: folder of dvc.yaml.
        metrics: the metrics file, relative to it, that experiments are run for.
        log_path: where DVC's output goes.
    """

    def __init__(self, root: Path, *, metrics: str, log_path: Path) -> None:
        self._root = root
        self._metrics = metrics
        self._log_path = log_path

    def check(self) -> None:
        """Refuse to start where the state before could not be brought back.

        Raises:
            PipelineError: no git repository or no DVC project, tracked files that differ from the
                last commit, or outputs that differ from dvc.lock or are not in DVC's cache.
        """
        self._log_path.unlink(missing_ok=True)
        head = self._git("rev-parse", "--verify", "HEAD")
        if head.returncode:
            raise PipelineError(
                f"{self._root}: no git repository with a commit, and DVC experiments need one; "
                "run `git init`, `git add` and `git commit`"
            )
        changed = self._git(
            *("status", "--porcelain", "--untracked-files=no", "--", "."),
            *(f":!{path}" for path in WRITTEN),
        ).stdout.splitlines()
        if changed:
            raise PipelineError(
                f"{listing([line[3:] for line in changed], LISTED)}: differ from the last commit, "
                "and an ablation starts from it: commit them; after an ablation that was killed, "
                f"run `git checkout {PARAMS} {LOCK} reports/metrics` and `dvc checkout --force`"
            )
        if differing := self._uncommitted_outputs():
            raise PipelineError(
                f"{listing(differing, LISTED)}: differ from {LOCK} or are not in DVC's cache, so "
                "that they could not be brought back; run `dvc repro` (or `dvc checkout`) first"
            )

    def run(self, words: Sequence[str]) -> dict[str, Any] | None:
        """Run DVC with these words; the workspace is as before when this returns or raises.

        Returns:
            The metrics that it left; none where DVC failed.

        Raises:
            KeyboardInterrupt: stopped from outside (also by SIGTERM or SIGHUP); DVC and its stage
                have ended then.
        """
        with self._kept():
            if self._dvc(words):
                return None
            content: dict[str, Any] = read_json(self._path(self._metrics))
            return content

    def find(self, experiment: str) -> dict[str, Any] | None:
        """Metrics of an experiment that was run from the last commit; none without such a one."""
        head = self._git("rev-parse", "HEAD").stdout.strip()
        ref = f"refs/exps/{head[:2]}/{head[2:]}/{experiment}"
        shown = self._git("show", f"{ref}:./{self._metrics}")
        return None if shown.returncode else json.loads(shown.stdout)

    def last_words(self) -> str:
        """The last lines of DVC's output, which say why it failed."""
        text = self._log_path.read_text(encoding="utf-8", errors="replace")
        return " / ".join(
            [line.strip() for line in text.splitlines() if line.strip()][-LAST_LINES:]
        )

    def _uncommitted_outputs(self) -> list[str]:
        answer = subprocess.run(
            [*_DVC, "data", "status", "--json"],
            cwd=self._root,
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode:
            raise PipelineError(f"dvc data status: {answer.stderr.strip()}")
        status = json.loads(answer.stdout)
        kinds = [*status.get("uncommitted", {}).values(), status.get("not_in_cache", [])]
        return sorted({path for paths in kinds for path in paths})

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Bring params, lock file, metrics and outputs back after the block, whatever ends it."""
        files = {name: self._content(name) for name in (PARAMS, LOCK, self._metrics)}
        handlers = {number: signal.getsignal(number) for number in STOPPING}
        for number in STOPPING[1:]:
            signal.signal(number, signal.default_int_handler)
        try:
            yield
        finally:
            for number in STOPPING:  # ignored by DVC too
                signal.signal(number, signal.SIG_IGN)
            try:
                self._restore(files)
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    def _restore(self, files: dict[str, bytes | None]) -> None:
        for name, content in files.items():
            if content is None:
                self._path(name).unlink(missing_ok=True)
            else:
                write_bytes(self._path(name), content)
        if self._dvc(["checkout", "--force", "--quiet"]):
            raise PipelineError(
                f"dvc checkout: {self.last_words()}; the outputs are not those of {LOCK}, see "
                f"{self._log_path} and run `dvc checkout --force`"
            )

    def _dvc(self, words: Sequence[str]) -> int:
        """Run DVC in a process group of its own, its output into the log; returns its status."""
        # A stage's command is found beside this Python, whether or not its folder is on the path.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("ab") as log:
            process = subprocess.Popen(
                [*_DVC, *words],
                cwd=self._root,
                env=os.environ | {"PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
            try:
                return process.wait()
            except KeyboardInterrupt:
                _stop(process)
                raise

    def _git(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", *words], cwd=self._root, capture_output=True, text=True, check=False
        )

    def _path(self, name: str) -> Path:
        return self._root / name

    def _content(self, name: str) -> bytes | None:
        path = self._path(name)
        return path.read_bytes() if path.is_file() else None


_DVC = (sys.executable, "-m", "dvc")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End DVC and its stage as Ctrl-C does; kill them if asked again."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait()
            return
        except KeyboardInterrupt:
            continue
