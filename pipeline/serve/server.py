"""Worker processes that share one listening socket, and their end, at which no request is lost."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event

import uvicorn

from pipeline.errors import PipelineError
from pipeline.serve.connection import connections_within
from pipeline.serve.options import Address, Limits, SegmenterSource
from pipeline.sockets import listen

BACKLOG = 1024
HEAD_S = 5.0  # that an open connection has for its request when the server ends
GRACE_S = 5.0  # beyond the timeout of a request, until those in flight are given up
POLL_S = 0.2
SETTLE_S = 0.05  # for handshakes that have begun
TURNS = 3  # of the loop: one sees who waits, the next accepts, the third sets up
SO_ATTACH_FILTER = 26  # of Linux's <asm-generic/socket.h>
# Classic BPF on a TCP header (code, jump if true, jump if false, constant): of the flags, byte 13,
# drop those with SYN (2), keep others whole.
DROP_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 2), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def serve(
    source: SegmenterSource, *, address: Address, limits: Limits, workers: int, threads: int
) -> None:
    """Answer requests until SIGTERM or SIGINT; then refuse new ones and finish those in flight.

    Args:
        source: the network; each worker loads its own.
        address: where to listen.
        limits: what a worker takes on.
        workers: processes; one is this process itself.
        threads: of the networks of all workers together.

    Raises:
        PipelineError: the network cannot be loaded, or nobody can listen there.
    """
    listener = listen(address.host, address.port, backlog=BACKLOG)
    share = max(1, threads // workers)
    if workers == 1:
        _serve_alone(source, listener, limits, share)
    else:
        _serve_together(source, listener, limits, workers, share)


def _announce(listener: socket.socket, workers: int, threads: int) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(
        f"serving on http://{shown}:{port}: {workers} worker{'s' * (workers > 1)} with {threads} "
        f"thread{'s' * (threads > 1)} each; Ctrl-C or SIGTERM ends it",
        flush=True,
    )


def _serve_alone(
    source: SegmenterSource, listener: socket.socket, limits: Limits, threads: int
) -> None:
    server = _make_server(source, limits, threads)
    _run(server, listener, lambda: _announce(listener, 1, threads))


def _make_server(source: SegmenterSource, limits: Limits, threads: int) -> _Server:
    segmenter = source.load(threads)
    from pipeline.serve.app import make_app

    app = make_app(segmenter, source, limits)
    config = uvicorn.Config(
        app,
        http=connections_within(limits),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        backlog=BACKLOG,
        # One request a connection: at the end none can be on its way over one that is closed.
        headers=[("Connection", "close")],
        server_header=False,
        timeout_graceful_shutdown=round(limits.timeout_s + GRACE_S),
    )
    return _Server(config)


class _Server(uvicorn.Server):
    """uvicorn's, which at its end also waits for requests that are about to come."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.when_started: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; then tell."""
        await super().startup(sockets)
        self.when_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take in who has connected, nobody else, and let them send; then finish."""
        for listener in sockets or []:
            _drop_new_connections(listener)
        await asyncio.sleep(SETTLE_S)
        for _ in range(TURNS):
            await asyncio.sleep(0)
        for server in self.servers:
            server.close()
        give_up = time.monotonic() + HEAD_S
        while time.monotonic() < give_up and any(
            getattr(connection, "cycle", None) is None
            for connection in self.server_state.connections
        ):
            await asyncio.sleep(0.01)
        await super().shutdown(sockets)


def _drop_new_connections(listener: socket.socket) -> None:
    """Have the kernel drop what asks to connect, and nothing else, where it can (Linux).

    Closing a socket resets whoever has connected since the last `accept`, with a request perhaps
    sent already. So nobody may connect for a moment before; who tries does so again after a second,
    and is refused.
    """
    instructions = b"".join(struct.pack("HBBI", *line) for line in DROP_SYN)
    code = ctypes.create_string_buffer(instructions)
    program = struct.pack("HP", len(DROP_SYN), ctypes.addressof(code))
    if sys.platform == "linux":
        with suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def _run(server: _Server, listener: socket.socket, when_started: Callable[[], None]) -> None:
    """Until a signal.

    uvicorn raises it once more afterwards, for the handlers that it found: the default one would
    end us by it.
    """

    def end(*_: object) -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    server.when_started = when_started
    server.run(sockets=[listener])


def _serve_together(
    source: SegmenterSource, listener: socket.socket, limits: Limits, workers: int, threads: int
) -> None:
    """Start the workers, replace those that die, and end them.

    Raises:
        PipelineError: one ended before it was ready.
    """
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))  # of the workers
    group = _Workers(source, listener, limits, threads)
    stop = _StopSignal()
    try:
        group.start(workers)
        group.wait_until_ready(stop)
        if not stop.received:
            _announce(listener, workers, threads)
        while not stop.received:
            group.replace_dead()
            time.sleep(POLL_S)
    finally:
        listener.close()  # before the workers do: the last of them takes in who still waits
        group.stop()


class _StopSignal:
    """Whether SIGTERM or SIGINT has come."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, *_: object) -> None:
        self.received = True


class _Workers:
    """Processes that answer requests from one socket."""

    def __init__(
        self, source: SegmenterSource, listener: socket.socket, limits: Limits, threads: int
    ) -> None:
        self._arguments = (source, listener, limits, threads)
        self._context = multiprocessing.get_context("spawn")
        self._processes: list[tuple[SpawnProcess, Event]] = []

    def start(self, count: int) -> None:
        """Start so many."""
        for _ in range(count):
            ready = self._context.Event()
            process = self._context.Process(target=_work, args=(*self._arguments, ready))
            process.start()
            self._processes.append((process, ready))

    def wait_until_ready(self, stop: _StopSignal) -> None:
        """Return when all have loaded their network, or at a signal.

        Raises:
            PipelineError: one has ended instead; it has said why.
        """
        while not stop.received and not all(ready.is_set() for _, ready in self._processes):
            if ended := self._ended():
                raise PipelineError(f"a worker ended (exit status {ended[0].exitcode}); see above")
            time.sleep(POLL_S)

    def replace_dead(self) -> None:
        """Start one for each that has ended.

        Raises:
            PipelineError: it ended before it was ready: the next would, too.
        """
        for process in self._ended():
            ready = next(ready for other, ready in self._processes if other is process)
            if not ready.is_set():
                raise PipelineError(f"a worker ended (exit status {process.exitcode}); see above")
            print(f"a worker ended (exit status {process.exitcode}); starting another", flush=True)
            self._processes = [pair for pair in self._processes if pair[0] is not process]
            self.start(1)

    def stop(self) -> None:
        """End all and wait until they have answered what they accepted."""
        for process, _ in self._processes:
            process.terminate()
        for process, _ in self._processes:
            process.join()

    def _ended(self) -> list[SpawnProcess]:
        sentinels = set(wait([process.sentinel for process, _ in self._processes], timeout=0))
        return [process for process, _ in self._processes if process.sentinel in sentinels]


def _work(
    source: SegmenterSource, listener: socket.socket, limits: Limits, threads: int, ready: Event
) -> None:
    """A worker process."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C is for the parent, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        server = _make_server(source, limits, threads)
    except PipelineError as error:
        sys.exit(f"error: {error}")
    _run(server, listener, ready.set)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
