"""Resumable downloads over HTTP, with the standard library alone."""

from __future__ import annotations

from collections.abc import Iterator
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from pipeline.errors import PipelineError
from pipeline.files import read_json, write_json

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60
PARTIAL_CONTENT = 206
RANGE_NOT_SATISFIABLE = 416
REMEDY = "try again later, name a mirror with --url, or use `pipeline weights add` offline"


def download(url: str, part: Path, *, size: int | None = None) -> None:
    """Bring the file at `url` to `part`, continuing where an earlier call of it was stopped.

    A note beside `part` (JSON) holds the URL and the server's mark of the file's version, so that
    pieces of two files are never joined. Where the server cannot continue, all of it comes anew.

    Args:
        url: http or https.
        part: file that grows; after an error it stays, for the next call.
        size: expected bytes, if known.

    Raises:
        PipelineError: no such file, no network, a connection that broke off, or a file of another
            size; the message names the URL.
        OSError: the disk is full; `part` stays.
    """
    note = note_path(part)
    earlier = _note_of_earlier_call(part, note, url)
    received = part.stat().st_size if earlier else 0
    if earlier and earlier["total"] == received:
        return
    with _request(url, received, earlier.get("version")) as response:
        if response.status != PARTIAL_CONTENT:
            received = 0
        total = _total(response.headers, received)
        if size is not None and total is not None and total != size:
            raise PipelineError(
                f"{url}: the server offers {total} bytes, but the published file has {size}: it "
                f"is another file; {REMEDY}"
            )
        if received == 0:
            part.unlink(missing_ok=True)
            version = response.headers.get("ETag") or response.headers.get("Last-Modified")
            write_json(note, {"url": url, "version": version, "total": total})
        received = _append(response, part, url=url, received=received, total=total)
    if total is not None and received < total:
        raise PipelineError(
            f"{url}: the connection ended after {received} of {total} bytes; the same command "
            "continues"
        )


def discard(part: Path) -> None:
    """Remove what `download` has left at `part`."""
    part.unlink(missing_ok=True)
    note_path(part).unlink(missing_ok=True)


def note_path(part: Path) -> Path:
    """Where `download` keeps its note about `part`."""
    return part.with_name(f"{part.name}.json")


def _note_of_earlier_call(part: Path, note: Path, url: str) -> dict[str, Any]:
    """The note of an earlier call for the same URL; empty if there is nothing to continue."""
    if not part.is_file() or not note.is_file():
        return {}
    content = read_json(note)
    return content if content["url"] == url else {}


def _request(url: str, received: int, version: str | None) -> Any:
    """The server's answer, from byte `received` on (status 206) or from the first (200).

    Raises:
        PipelineError: it cannot be reached or has no such file.
    """
    request = Request(url, headers={"User-Agent": "zutis-pipeline"})
    if received:
        request.add_header("Range", f"bytes={received}-")
        if version and not version.startswith("W/"):  # a weak mark is not allowed here
            request.add_header("If-Range", version)
    try:
        response = urlopen(request, timeout=TIMEOUT_S)
    except HTTPError as error:
        if error.code == RANGE_NOT_SATISFIABLE and received:
            return _request(url, 0, None)
        raise PipelineError(
            f"{url}: the server answered {error.code} {error.reason}; {REMEDY}"
        ) from None
    except (URLError, HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise PipelineError(f"{url}: cannot be reached ({reason}); {REMEDY}") from None
    start = f"bytes {received}-"
    if response.status == PARTIAL_CONTENT and not _content_range(response).startswith(start):
        response.close()
        return _request(url, 0, None)
    return response


def _content_range(response: Any) -> str:
    return str(response.headers.get("Content-Range", ""))


def _total(headers: HTTPMessage, received: int) -> int | None:
    """Bytes of the whole file, if the server says so."""
    length = headers.get("Content-Length", "")
    return received + int(length) if length.isdigit() else None


def _append(response: Any, part: Path, *, url: str, received: int, total: int | None) -> int:
    """Write the body behind the first `received` bytes of `part`; returns the bytes it has then."""
    bar = tqdm(
        desc=part.stem.removesuffix(".part"),
        initial=received,
        total=total,
        unit="B",
        unit_scale=True,
    )
    try:
        with bar, part.open("ab") as file:
            for chunk in _chunks(response, url):
                file.write(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    except OSError as error:
        error.filename = str(part)
        raise
    return received


def _chunks(response: Any, url: str) -> Iterator[bytes]:
    """The body in pieces.

    Raises:
        PipelineError: the connection broke.
    """
    while True:
        try:
            chunk = response.read(CHUNK_BYTES)
        except (OSError, HTTPException) as error:
            raise PipelineError(
                f"{url}: the connection broke ({error}); the same command continues"
            ) from None
        if not chunk:
            return
        yield chunk
