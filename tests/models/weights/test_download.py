"""Downloads from a real HTTP server on this computer, with and without ranges, cut and killed."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PipelineError
from pipeline.models.weights.download import discard, download, note_path
from tests.paths import ROOT

CONTENT = bytes(range(256)) * 9000 + b"end"
PATIENCE_S = 60


class FileServer(ThreadingHTTPServer):
    """Serves `content` at /weights.pt; what it lacks or spoils is an attribute."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.ranges = True
        self.version: str | None = '"1"'
        self.says_length = True
        self.stop_after: int | None = None  # bytes of a body before the connection is closed
        self.hold = threading.Event()  # set: a body that was stopped is closed at once
        self.hold.set()
        self.requests: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.pt"

    def asked_ranges(self) -> list[str | None]:
        return [headers.get("Range") for headers in self.requests]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(dict(self.headers.items()))
        if self.path != "/weights.pt":
            self.send_error(404)
            return
        start = self._start()
        if start is not None and start >= len(server.content):
            self.send_error(416)
            return
        self.send_response(200 if start is None else 206)
        body = server.content[start or 0 :]
        if start is not None:
            last, total = len(server.content) - 1, len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{last}/{total}")
        if server.version:
            self.send_header("ETag", server.version)
        if server.says_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.stop_after])
        self.wfile.flush()
        server.hold.wait(PATIENCE_S)

    def _start(self) -> int | None:
        asked = self.headers.get("Range")
        changed = self.headers.get("If-Range", self.server.version) != self.server.version
        if not self.server.ranges or asked is None or changed:
            return None
        return int(asked.removeprefix("bytes=").removesuffix("-"))

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.hold.set()
        running.shutdown()


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "weights.part.pt"


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("says_length", [True, False])
def test_a_file_arrives_whole(
    server: FileServer, part: Path, ranges: bool, says_length: bool
) -> None:
    server.ranges, server.says_length = ranges, says_length
    download(server.url, part, size=len(CONTENT))
    assert part.read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_a_finished_download_asks_no_more(server: FileServer, part: Path) -> None:
    download(server.url, part)
    download(server.url, part)
    assert part.read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_without_a_length_a_finished_download_survives_another_call(
    server: FileServer, part: Path
) -> None:
    server.says_length = False
    download(server.url, part)
    download(server.url, part)  # the server answers 416: nothing is behind the last byte
    assert part.read_bytes() == CONTENT


@pytest.mark.parametrize("version", ['"1"', 'W/"1"', None])
def test_a_cut_download_continues_where_it_stopped(
    server: FileServer, part: Path, version: str | None
) -> None:
    server.version, server.stop_after = version, 1000
    with pytest.raises(PipelineError, match=f"after 1000 of {len(CONTENT)} bytes; the same comm"):
        download(server.url, part)
    server.stop_after = None
    download(server.url, part)
    assert part.read_bytes() == CONTENT
    assert server.asked_ranges() == [None, "bytes=1000-"]


def test_a_cut_download_starts_over_without_ranges(server: FileServer, part: Path) -> None:
    server.ranges, server.stop_after = False, 1000
    with pytest.raises(PipelineError, match="after 1000 of"):
        download(server.url, part)
    server.stop_after = None
    download(server.url, part)
    assert part.read_bytes() == CONTENT


def test_pieces_of_two_versions_are_not_joined(server: FileServer, part: Path) -> None:
    server.stop_after = 1000
    with pytest.raises(PipelineError):
        download(server.url, part)
    server.content, server.version, server.stop_after = b"n" * 5000, '"2"', None
    download(server.url, part)
    assert part.read_bytes() == b"n" * 5000


def test_another_url_starts_over(server: FileServer, part: Path) -> None:
    server.stop_after = 1000
    with pytest.raises(PipelineError):
        download(server.url.replace("127.0.0.1", "localhost"), part)
    server.stop_after = None
    download(server.url, part)
    assert part.read_bytes() == CONTENT
    assert server.asked_ranges() == [None, None]


def test_a_killed_download_continues(server: FileServer, part: Path) -> None:
    half = 1_500_000
    server.stop_after = half
    server.hold.clear()
    code = (
        "import sys; from pathlib import Path\n"
        "from pipeline.models.weights.download import download\n"
        "download(sys.argv[1], Path(sys.argv[2]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, server.url, str(part)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + PATIENCE_S
    while not (part.exists() and part.stat().st_size >= 1 << 20):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    server.hold.set()
    received = part.stat().st_size
    assert received <= half
    server.stop_after = None
    download(server.url, part)
    assert hashlib.sha256(part.read_bytes()).digest() == hashlib.sha256(CONTENT).digest()
    assert server.asked_ranges() == [None, f"bytes={received}-"]


def test_a_file_of_another_size_is_refused_before_it_is_downloaded(
    server: FileServer, part: Path
) -> None:
    with pytest.raises(PipelineError, match=f"offers {len(CONTENT)} bytes, .* has 7"):
        download(server.url, part, size=7)
    assert not part.exists()


def test_a_missing_file_and_a_missing_server_are_named(
    server: FileServer, part: Path, tmp_path: Path
) -> None:
    wrong = server.url.replace("weights", "nothing")
    with pytest.raises(PipelineError, match=r"nothing\.pt: the server answered 404 .*--url"):
        download(wrong, part)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/x.pt"
        with pytest.raises(PipelineError, match=r"x\.pt: cannot be reached .*weights add"):
            download(url, part)
    assert list(tmp_path.iterdir()) == []


def test_discard_leaves_nothing(server: FileServer, part: Path, tmp_path: Path) -> None:
    download(server.url, part)
    assert note_path(part).exists()
    discard(part)
    assert list(tmp_path.iterdir()) == []
