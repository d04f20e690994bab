"""Members of tars that others wrote: every one is found, and links lead to what they stand for."""

from __future__ import annotations

import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pipeline.files import Location
from pipeline.formats.images import one_line
from pipeline.formats.shards import TarHeader, tar_headers

MAX_LINKS = 40  # on the way to one file, as on Linux
MAX_PARTS = 1000


class TarMember(NamedTuple):
    """One member that is no folder.

    Attributes:
        name: its own, also where it is a link.
        offset: byte at which its data begins, or that of a link's target; None if there is none.
        size: number of bytes of the data.
        problem: why there is no data to read; else None.
    """

    name: str
    offset: int | None = None
    size: int | None = None
    problem: str | None = None


def find_members(path: Location, left_out: Counter[str]) -> Iterator[TarMember]:
    """Yield all members of an uncompressed tar but folders, in their order.

    Args:
        path: the tar, which may be several joined into one.
        left_out: learns of links to folders.

    Raises:
        tarfile.ReadError: the tar is cut off, damaged or none.
    """
    headers = list(tar_headers(path))
    by_name = _by_name(headers) if any(map(_is_link, headers)) else {}
    for header in headers:
        target = _follow(header, by_name)
        if isinstance(target, str):
            yield TarMember(header.name, problem=target)
        elif target.isdir():
            if target is not header:
                left_out["link to a folder"] += 1
        else:
            problem = _problem(target)
            if problem:
                yield TarMember(header.name, problem=problem)
            else:
                yield TarMember(header.name, target.offset_data, target.size)


def _is_link(header: TarHeader) -> bool:
    return header.issym() or header.islnk()


def _by_name(headers: Sequence[TarHeader]) -> dict[str, TarHeader]:
    """What each name stands for; a file rather than a link, where a name is there twice."""
    ordered = sorted(headers, key=lambda header: header.isreg())
    by_name = {posixpath.normpath(header.name): header for header in ordered}
    for folder in {posixpath.dirname(name) for name in by_name}:
        by_name.setdefault(folder, _folder(folder))  # which often have no member of their own
    return by_name


def _folder(name: str) -> TarHeader:
    header = TarHeader(name)
    header.type = tarfile.DIRTYPE
    return header


def _follow(header: TarHeader, by_name: Mapping[str, TarHeader], depth: int = 0) -> TarHeader | str:
    """What a header stands for in the end, or why that is not there."""
    if not _is_link(header):
        return header
    if depth == MAX_LINKS:
        return "link that leads to itself"
    folder = posixpath.dirname(header.name) if header.issym() else ""
    name = _without_linked_folders(posixpath.join(folder, header.linkname), by_name)
    if name not in by_name:
        return f"link to {one_line(header.linkname)}, which is not in the tar"
    return _follow(by_name[name], by_name, depth + 1)


def _without_linked_folders(name: str, by_name: Mapping[str, TarHeader]) -> str:
    """The name of a member, found as a file system does: links to folders are followed first."""
    links = 0
    done, todo = _split(name)
    while todo and links < MAX_LINKS and len(todo) < MAX_PARTS:
        part = todo.pop()
        if part == ".." and done and done[-1] not in ("", ".."):
            done.pop()
            continue
        done.append(part)
        folder = by_name.get("/".join(done)) if todo else None
        if folder is not None and folder.issym():
            links += 1
            root, parts = _split(folder.linkname)
            done = root or done[:-1]
            todo += parts
    return "/".join(done)


def _split(name: str) -> tuple[list[str], list[str]]:
    """[""] if a name is absolute, else []; and its parts, the last one first."""
    parts = [part for part in reversed(name.split("/")) if part not in ("", ".")]
    return [""] if name.startswith("/") else [], parts


def _problem(header: TarHeader) -> str | None:
    if header.issparse():
        return "stored as a sparse file, which cannot be read by offset; pack it without --sparse"
    if not header.isreg():
        return "not a regular file"
    if header.size != header.stored_size:
        return "its size is in an extended header, which cannot be read by offset; pack it anew"
    return None
