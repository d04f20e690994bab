"""python -m speed serve: requests a second and latencies of `pipeline serve`, over loopback.

In a workspace with a trained checkpoint (`make demo`) it starts the service, lets clients send
photos one after the other, each over a connection of its own, and ends it with SIGTERM while all
of them wait. With `--onnx FILE` torch and ONNX take turns.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median, quantiles

from pipeline.files import write_json
from speed.inputs import jpeg, photo
from speed.machine import describe_machine

ROOT = Path(__file__).parents[1]
REPORT = Path("speed/results/serve.json")
ADDRESS = re.compile(r"http://([\d.]+):(\d+)")
PHOTOS = 8
TORCH, ONNX = "torch", "onnx"
WARM_UP = 2  # requests of each client that are not counted
OK, BUSY = 200, 503
PATIENCE_S = 120


@dataclass(frozen=True)
class Load:
    """What was measured of one service.

    Attributes:
        network: what answers, `torch` or `onnx`.
        workers, clients: processes that answer, and those that ask at the same time.
        requests: answered with 200 and counted.
        failed: answered otherwise or not at all.
        requests_per_second: of all clients together.
        median_ms, p95_ms: from the start of the connection to the last byte of the answer.
        stopped_in_flight: requests that waited when SIGTERM came.
        stopped_answered: how many of them were answered all the same.
    """

    network: str
    workers: int
    clients: int
    requests: int
    failed: int
    requests_per_second: float
    median_ms: float
    p95_ms: float
    stopped_in_flight: int
    stopped_answered: int


@dataclass(frozen=True)
class Service:
    """A running `pipeline serve`."""

    process: subprocess.Popen[str]
    host: str
    port: int

    def ask(self, body: bytes) -> int:
        """Send an image; the status of the answer, once it is whole, 0 for none."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE_S)
        try:
            connection.request("POST", "/predict", body)
            response = connection.getresponse()
            response.read()
            return response.status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each network with each number of workers; exit status 1 if a request failed."""
    options = _options(arguments)
    bodies = [jpeg(photo(seed, *options.size)) for seed in range(PHOTOS)]
    networks = _networks(options)
    loads = []
    for _ in range(options.rounds):
        for workers, network in product(options.workers, networks):
            loads.append(_measure(network, networks[network], workers, options, bodies))
            print(_line(loads[-1]), flush=True)
    if ONNX in networks:
        for workers in options.workers:
            print(_ratio_line(workers, loads), flush=True)
    machine = describe_machine(len(os.sched_getaffinity(0)))
    size = f"{options.size[0]} x {options.size[1]}"
    if options.out is not None:
        loads_json = [asdict(load) for load in loads]
        write_json(options.out, {"machine": machine, "photos": size, "loads": loads_json})
        print(f"written to {options.out}")
    lost = any(load.failed or load.stopped_answered < load.stopped_in_flight for load in loads)
    return int(lost)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m speed serve", description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--clients", type=int, default=4, help="at the same time (4)")
    parser.add_argument("--requests", type=int, default=200, help="at most, of all clients (200)")
    parser.add_argument("--seconds", type=float, default=30.0, help="at most, a service (30)")
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), metavar=("W", "H"))
    parser.add_argument("--checkpoint", type=Path, help="as of `pipeline serve`")
    parser.add_argument("--onnx", type=Path, help="measure this file of `pipeline export`, too")
    parser.add_argument("--rounds", type=int, default=1, help="of all that is measured (1)")
    parser.add_argument("--out", type=Path, help=f"report, such as {REPORT}")
    return parser.parse_args(arguments)


def _networks(options: argparse.Namespace) -> dict[str, list[str]]:
    """Words of `pipeline serve` for each network."""
    networks = {TORCH: ["--checkpoint", str(options.checkpoint)] if options.checkpoint else []}
    if options.onnx:
        networks[ONNX] = ["--onnx", str(options.onnx)]
    return networks


def _measure(
    network: str,
    words: Sequence[str],
    workers: int,
    options: argparse.Namespace,
    bodies: Sequence[bytes],
) -> Load:
    service = _start(workers, words)
    try:
        clients = options.clients
        for _ in range(WARM_UP):
            _together(clients, lambda number: service.ask(bodies[number % PHOTOS]))
        seconds, failed, elapsed = _ask_many(service, options, bodies)
        in_flight, answered = _stop_under_load(service, clients, bodies)
    finally:
        service.process.terminate()
        service.process.wait(PATIENCE_S)
    return Load(
        network=network,
        workers=workers,
        clients=clients,
        requests=len(seconds),
        failed=failed,
        requests_per_second=round(len(seconds) / elapsed, 2),
        median_ms=round(1000 * median(seconds), 1),
        p95_ms=round(1000 * quantiles(seconds, n=20, method="inclusive")[-1], 1),
        stopped_in_flight=in_flight,
        stopped_answered=answered,
    )


def _start(workers: int, network: Sequence[str]) -> Service:
    words = [sys.executable, "-m", "pipeline", "serve", "--port", "0", "--workers", str(workers)]
    words += network
    # The service divides the cores itself.
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if found := ADDRESS.search(line):
            return Service(process, found[1], int(found[2]))
    raise SystemExit(f"`pipeline serve` ended with status {process.wait()}; see above")


def _together(count: int, call: Callable[[int], object]) -> None:
    """Run so many calls at the same time, each with its number."""
    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _ask_many(
    service: Service, options: argparse.Namespace, bodies: Sequence[bytes]
) -> tuple[list[float], int, float]:
    """Seconds of each request that was answered, how many were not, and seconds in all."""
    seconds: list[float] = []
    failed = 0
    start = time.perf_counter()
    each = max(1, options.requests // options.clients)

    def client(number: int) -> None:
        nonlocal failed
        for turn in range(each):
            begin = time.perf_counter()
            if begin - start > options.seconds:
                break
            if service.ask(bodies[(number + turn) % PHOTOS]) == OK:
                seconds.append(time.perf_counter() - begin)
            else:
                failed += 1

    _together(options.clients, client)
    return seconds, failed, time.perf_counter() - start


def _stop_under_load(service: Service, clients: int, bodies: Sequence[bytes]) -> tuple[int, int]:
    """SIGTERM while each client waits: how many did, and how many of them were answered."""
    statuses: list[int] = []

    def ask_or_stop(number: int) -> None:
        if number < clients:
            statuses.append(service.ask(bodies[number % PHOTOS]))
        else:
            time.sleep(0.02)  # so that all have connected
            service.process.send_signal(signal.SIGTERM)

    _together(clients + 1, ask_or_stop)
    return clients, sum(status in (OK, BUSY) for status in statuses)


def _line(load: Load) -> str:
    return (
        f"{load.network}, {load.workers} workers, {load.clients} clients: {load.requests} "
        f"requests, {load.failed} failed, {load.requests_per_second:g} a second, median "
        f"{load.median_ms:g} ms, p95 {load.p95_ms:g} ms; at SIGTERM {load.stopped_answered} of "
        f"{load.stopped_in_flight} answered"
    )


def _ratio_line(workers: int, loads: Sequence[Load]) -> str:
    """How the medians over the rounds compare."""
    rates, tails = (
        {
            network: median(
                getattr(load, field)
                for load in loads
                if (load.network, load.workers) == (network, workers)
            )
            for network in (TORCH, ONNX)
        }
        for field in ("requests_per_second", "p95_ms")
    )
    return (
        f"{workers} workers, medians: {rates[TORCH]:g} and {rates[ONNX]:g} a second, p95 "
        f"{tails[TORCH]:g} and {tails[ONNX]:g} ms; "
        f"ONNX {rates[ONNX] / rates[TORCH]:.2f} times torch"
    )


if __name__ == "__main__":
    sys.exit(main())
