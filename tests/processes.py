"""Calls in processes of their own: forks of the tests' process, which has loaded every module."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.cli import main
from pipeline.stages import embed, train  # noqa: F401  (else each fork would load them)

PATIENCE_S = 240


class Fork:
    """A call in a process of its own, which ends as a script of that call would.

    Attributes:
        pid: its process id.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        self._output = os.fdopen(reading, "rb", buffering=0)
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_with_output_to, args=(writing, call))
        self._process.start()
        os.close(writing)
        self.pid = self._process.pid or 0

    def poll(self) -> int | None:
        """The exit code, minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self) -> int:
        """The exit code, once it has ended."""
        self._process.join(PATIENCE_S)
        code = self.poll()
        assert code is not None, f"still running after {PATIENCE_S} s"
        return code

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return as soon as something is true, which must be before the process ends."""
        give_up = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.poll() is None, self.output()
            assert time.monotonic() < give_up
            time.sleep(0.002)

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it and wait for its end."""
        self._process.kill()
        self._process.join()

    def output(self) -> str:
        """What it has written since the last call, on either stream; less than 64 kB."""
        return (self._output.read(1 << 16) or b"").decode()


def run_pipeline(*args: object, cwd: Path, **environment: object) -> None:
    """`pipeline ARGS` in a folder, with further variables of the environment, for a fork."""
    os.chdir(cwd)
    os.environ.update({name: str(value) for name, value in environment.items()})
    sys.argv = ["pipeline", *map(str, args)]
    main()


def fork_pipeline(*args: object, cwd: Path, **environment: object) -> Fork:
    """`run_pipeline` in a process of its own."""
    return Fork(lambda: run_pipeline(*args, cwd=cwd, **environment))


def killed_after_moves(call: Callable[[], object], count: int) -> bool:
    """Kill a call once it has moved so many files and folders; whether it came so far."""
    process = Fork(lambda: _dying_after_moves(call, count))
    code = process.wait()
    assert code in (0, -signal.SIGKILL), process.output()
    return code != 0


def _dying_after_moves(call: Callable[[], object], count: int) -> None:
    replace, moves = Path.replace, iter(range(1, count + 1))

    def move(path: Path, target: Path) -> Path:
        moved = replace(path, target)
        if next(moves) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return moved

    Path.replace = move  # type: ignore[method-assign]
    call()


def _with_output_to(descriptor: int, call: Callable[[], object]) -> None:
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    call()
