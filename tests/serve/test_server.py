"""The server as a process: its end, its workers, and clients that misbehave."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.serve.options import Address, Limits
from tests.conftest import encoded_image, noise_image
from tests.processes import Fork
from tests.serve.broken import BrokenSource
from tests.serve.slow import SlowSource

pytest.importorskip("uvicorn")
from pipeline.serve.server import serve

PNG = encoded_image(noise_image(5, 40, 56))
HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(PNG)
PATIENCE_S = 60


class Running:
    """A server in a process of its own."""

    def __init__(self, source: object, *, workers: int = 1, **limits: float) -> None:
        self.process = Fork(
            lambda: serve(
                source,
                address=Address(port=0),
                limits=Limits(**limits),
                workers=workers,
                threads=workers,
            )
        )
        text = ""

        def announced() -> bool:
            nonlocal text
            text += self.process.output()
            return "serving on" in text

        self.process.wait_until(announced)
        self.port = int(re.findall(r"http://127.0.0.1:(\d+)", text)[0])

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait()


def answer_of(connection: socket.socket) -> tuple[int, dict]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


@pytest.fixture
def run() -> Iterator[Callable[..., Running]]:
    """Function that starts a server; what still runs at the end is killed."""
    started: list[Running] = []

    def start(source: object, **options: float) -> Running:
        started.append(Running(source, **options))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()


@pytest.fixture(scope="module")
def misused() -> Iterator[Running]:
    """One with narrow limits, for clients that do not keep to them."""
    server = Running(SlowSource(), max_bytes=5000, head_s=0.5, timeout_s=0.5)
    yield server
    server.process.kill()


@pytest.mark.parametrize("workers", [1, 2])
def test_whoever_has_connected_is_answered_after_sigterm(
    run: Callable[..., Running], workers: int
) -> None:
    """Some have sent all, some a part of the body or of the head, some nothing yet."""
    server = run(SlowSource(seconds=0.05), workers=workers)
    whole = HEAD + PNG
    sent = [len(whole), len(whole), len(whole) - 10, len(HEAD) + 5, len(HEAD) - 3, 0] * 2
    connections = [server.connect() for _ in sent]
    for connection, length in zip(connections, sent, strict=True):
        connection.sendall(whole[:length])
    server.process.send_signal(signal.SIGTERM)
    for connection, length in zip(connections, sent, strict=True):
        connection.sendall(whole[length:])
    statuses = []
    for connection in connections:
        with connection:
            status, content = answer_of(connection)
            statuses.append(status)
            assert len(content["annotations"]) == 1
    assert statuses == [200] * len(sent)
    assert server.process.wait() == 0
    with pytest.raises(ConnectionRefusedError):
        server.connect()


def test_new_connections_are_refused_while_it_finishes(run: Callable[..., Running]) -> None:
    server = run(SlowSource(seconds=2.5))
    with server.connect() as connection:
        connection.sendall(HEAD + PNG)
        server.process.send_signal(signal.SIGTERM)

        def refused() -> bool:
            try:
                server.connect().close()
            except ConnectionRefusedError:
                return True
            return False

        server.process.wait_until(refused)
        assert server.process.poll() is None
        assert answer_of(connection)[0] == 200
    assert server.process.wait() == 0


def test_clients_that_ask_all_the_time_lose_nothing_at_its_end(
    run: Callable[..., Running],
) -> None:
    server = run(SlowSource(), batch_size=4)
    outcomes: list[object] = []

    def ask_until_refused() -> None:
        while True:
            try:
                connection = server.connect()
            except ConnectionRefusedError:
                return
            try:
                with connection:
                    connection.sendall(HEAD + PNG)
                    outcomes.append(answer_of(connection)[0])
            except (OSError, http.client.HTTPException) as error:
                outcomes.append(error)

    threads = [threading.Thread(target=ask_until_refused) for _ in range(6)]
    for thread in threads:
        thread.start()
    server.process.wait_until(lambda: len(outcomes) > 20)
    assert server.stop() == 0
    for thread in threads:
        thread.join(PATIENCE_S)
    assert set(outcomes) == {200}


def test_a_large_body_is_refused_before_it_is_sent(misused: Running) -> None:
    with misused.connect() as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n"
        )
        status, content = answer_of(connection)
    assert status == 413
    assert "999999999 bytes; at most 5000" in content["error"]


def test_a_client_that_sends_too_much_reads_why(misused: Running) -> None:
    with misused.connect() as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(50):
            connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert answer_of(connection)[0] == 413


def test_a_body_that_does_not_come_is_given_up(misused: Running) -> None:
    with misused.connect() as connection:
        connection.sendall(HEAD + PNG[:10])
        status, content = answer_of(connection)
    assert status == 408
    assert "0.5 s" in content["error"]


def drip(connection: socket.socket, data: bytes) -> None:
    """Send byte by byte, slowly, until something comes back."""
    connection.settimeout(0.02)
    for place in range(len(data)):
        connection.sendall(data[place : place + 1])
        try:
            if connection.recv(1, socket.MSG_PEEK):
                break
        except TimeoutError:
            continue
    connection.settimeout(PATIENCE_S)


def test_a_head_that_comes_byte_by_byte_is_given_up(misused: Running) -> None:
    """So it is if it never ends; the connection is closed."""
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\n" + b"X-More: %d\r\n" % 7 * 1000
    with misused.connect() as connection:
        drip(connection, head)
        status, content = answer_of(connection)
    assert status == 408
    assert content == {"error": "head: not received within 0.5 s"}


def test_a_body_that_comes_byte_by_byte_is_given_up(misused: Running) -> None:
    with misused.connect() as connection:
        connection.sendall(HEAD.replace(b"Content-Length: %d" % len(PNG), b"Content-Length: 4999"))
        drip(connection, bytes(4999))
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 408
        assert "body: not received within 0.5 s" in json.loads(response.read())["error"]


def test_a_connection_without_a_request_is_closed(misused: Running) -> None:
    with misused.connect() as connection:
        assert connection.recv(1) == b""


def test_an_answer_that_is_not_read_is_given_up(run: Callable[..., Running]) -> None:
    server = run(SlowSource(names=["n" * 200] * 100_000), head_s=0.2, timeout_s=0.2)
    descriptors = Path(f"/proc/{server.process.pid}/fd")
    if not descriptors.is_dir():
        pytest.skip("needs Linux")
    before = len(list(descriptors.iterdir()))
    connection = socket.socket()
    with connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE_S)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(b"GET /categories HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(4) == b"HTTP"
        assert len(list(descriptors.iterdir())) > before
        server.process.wait_until(lambda: len(list(descriptors.iterdir())) <= before)


def test_a_client_that_leaves_takes_nobody_with_it(misused: Running) -> None:
    for length in (3, len(HEAD), len(HEAD) + 20, len(HEAD) + len(PNG)):
        with misused.connect() as connection:
            connection.sendall((HEAD + PNG)[:length])
    with misused.connect() as connection:
        connection.sendall(HEAD + PNG)
        assert answer_of(connection)[0] == 200
    assert "Traceback" not in misused.process.output()


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PipelineError, match=f"--port {port}: .*choose another"):
            serve(SlowSource(), address=Address(port=port), limits=Limits(), workers=1, threads=1)


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "\udcff"])
def test_what_can_be_no_host_is_named(host: str) -> None:
    address = Address(host, 0)
    with pytest.raises(PipelineError, match=r"--host .*: not the name of a host; write") as error:
        serve(SlowSource(), address=address, limits=Limits(), workers=1, threads=1)
    assert str(error.value).isascii()


def test_workers_that_cannot_load_end_the_server() -> None:
    process = Fork(
        lambda: serve(
            BrokenSource(), address=Address(port=0), limits=Limits(), workers=2, threads=2
        )
    )
    assert process.wait() == 1
    assert "error: weights: no such file" in process.output()
