"""DVC experiments in the workspace, which is as before once they have run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.ablations.costs import Notebook, StageCost, read_lock
from pipeline.engine.runtime import CACHE_VARIABLE, default_cache_dir
from pipeline.errors import PipelineError, listing
from pipeline.files import read_json, write_bytes
from pipeline.models.weights.zoo import FOLDER as WEIGHTS

PARAMS, LOCK = "params.yaml", "dvc.lock"
TIMES = "reports/times"
SCRATCH = ".dvc/tmp"
# What ablations and `dvc repro` write may differ from the last commit: another processor rounds
# otherwise. Code and params may not, for they decide what an experiment is.
WRITTEN = ("reports/ablations", "reports/metrics", LOCK)
LISTED, LAST_LINES = 5, 2
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Outcome(NamedTuple):
    """What an experiment left: the metrics files in order, and what its stages took."""

    metrics: list[dict[str, Any]]
    stages: dict[str, StageCost]


class Workspace:
    """A project folder in which experiments run, each from the state of the last commit.

    Args:
        root: folder of dvc.yaml.
        metrics: the metrics files, relative to it, that experiments are run for.
        target: the stage whose costs, and those of all that it waits for, are asked for.
        log_path: where DVC's output goes.
    """

    def __init__(self, root: Path, *, metrics: Sequence[str], target: str, log_path: Path) -> None:
        self._root = root
        self._metrics = metrics
        self._target = target
        self._log_path = log_path
        self._notebook = Notebook(root / SCRATCH / "ablation-times.json")

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
                f"run `git checkout HEAD -- {PARAMS} {LOCK} reports/metrics` and "
                "`dvc checkout --force`"
            )
        if differing := self._uncommitted_outputs():
            raise PipelineError(
                f"{listing(differing, LISTED)}: differ from {LOCK} or are not in DVC's cache, so "
                "that they could not be brought back; run `dvc repro` (or `dvc checkout`) first"
            )

    def run(self, words: Sequence[str], *, own_cache: str | None = None) -> Outcome | None:
        """Run DVC with these words; the workspace is as before when this returns or raises.

        Args:
            words: after `dvc`.
            own_cache: name of a cache of its own, so that no stage is spared what it takes; it
                stays there until the run succeeds. None: the common one.

        Returns:
            What it left; none where DVC failed.

        Raises:
            KeyboardInterrupt: stopped from outside (also by SIGTERM or SIGHUP); DVC and its stage
                have ended then.
        """
        cache = self._root / SCRATCH / "ablation-caches" / own_cache if own_cache else None
        is_whole = cache is not None and not cache.exists()
        with self._kept(is_whole=is_whole):
            with _ctrl_c_for_children():
                process = self._start_dvc(words, cache)
            if _ended(process):
                return None
            metrics = [read_json(self._path(path)) for path in self._metrics]
            lock = self._content(LOCK)
        if cache is not None:
            shutil.rmtree(cache)
        return Outcome(metrics, self._notebook.costs(read_lock(lock), self._target))

    def find(self, experiment: str) -> Outcome | None:
        """What an experiment left that was run from the last commit; none without such a one."""
        head = self._git("rev-parse", "HEAD").stdout.strip()
        ref = f"refs/exps/{head[:2]}/{head[2:]}/{experiment}"
        *metrics, lock = (self._git("show", f"{ref}:./{path}") for path in (*self._metrics, LOCK))
        if any(shown.returncode for shown in metrics):
            return None
        stages = read_lock(lock.stdout.encode())
        contents = [json.loads(shown.stdout) for shown in metrics]
        return Outcome(contents, self._notebook.costs(stages, self._target))

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
    def _kept(self, *, is_whole: bool) -> Iterator[None]:
        """Bring files and outputs back after the block, whatever ends it; note what its runs took.

        The files are params, lock file, metrics and times; `is_whole` is as `Notebook.note` has it.
        """
        times = self._times()
        files = {name: self._content(name) for name in (PARAMS, LOCK, *self._metrics)} | times
        shutil.rmtree(self._path(TIMES), ignore_errors=True)
        handlers = {number: signal.getsignal(number) for number in STOPPING}
        for number in STOPPING[1:]:
            signal.signal(number, signal.default_int_handler)
        try:
            yield
        finally:
            for number in STOPPING:  # ignored by DVC too
                signal.signal(number, signal.SIG_IGN)
            try:
                stages, ran = read_lock(self._content(LOCK)), self._times()
                shutil.rmtree(self._path(TIMES), ignore_errors=True)
                self._restore(files)
                before = read_lock(files[LOCK])
                self._notebook.note(stages, ran, before=before, is_whole=is_whole)
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    def _restore(self, files: dict[str, bytes | None]) -> None:
        for name, content in files.items():
            if content is None:
                self._path(name).unlink(missing_ok=True)
            else:
                write_bytes(self._path(name), content)
        # A stage that was never run has no outputs to bring back; those of the others are seen to.
        failed = _ended(self._start_dvc(["checkout", "--force", "--quiet", "--allow-missing"]))
        differing = self._uncommitted_outputs()
        if failed or differing:
            why = self.last_words() if failed else listing(differing, LISTED)
            raise PipelineError(
                f"dvc checkout: {why}; the outputs are not those of {LOCK}, see "
                f"{self._log_path} and run `dvc checkout --force`"
            )

    def _start_dvc(
        self, words: Sequence[str], cache: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """DVC in a process group of its own, its output into the log."""
        # A stage's command is found beside this Python, whether or not its folder is on the path.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment = os.environ | {"PATH": path}
        if cache is not None:
            _make_cache(cache)
            environment[CACHE_VARIABLE] = str(cache.resolve())
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("ab") as log:
            return subprocess.Popen(
                [*_DVC, *words],
                cwd=self._root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def _git(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", *words], cwd=self._root, capture_output=True, text=True, check=False
        )

    def _times(self) -> dict[str, bytes]:
        """Content of the files of times, by path."""
        paths = sorted(self._path(TIMES).rglob("*.json"))
        return {path.relative_to(self._root).as_posix(): path.read_bytes() for path in paths}

    def _path(self, name: str) -> Path:
        return self._root / name

    def _content(self, name: str) -> bytes | None:
        path = self._path(name)
        return path.read_bytes() if path.is_file() else None


_DVC = (sys.executable, "-m", "dvc")


def _make_cache(folder: Path) -> None:
    """An empty cache with the weights of the common one; one that is there stays as it is."""
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / WEIGHTS).symlink_to((default_cache_dir() / WEIGHTS).resolve())


@contextmanager
def _ctrl_c_for_children() -> Iterator[None]:
    """Let children started in the block heed Ctrl-C, where a shell's background job ignores it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _ended(process: subprocess.Popen[bytes]) -> int:
    """Wait for DVC and return its status; what interrupts the wait stops it."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        _stop(process)
        raise


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
