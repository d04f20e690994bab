"""The index dataset: which images there are, and the bytes of each.

Three formats: a folder tree of image files, WebDataset tars (img2dataset's output as it is), and
Parquet files with a column of image bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from PIL import Image

from pipeline.errors import PipelineError, counted
from pipeline.files import Location, as_location, is_url, stored_location, utf8_text
from pipeline.formats.images import (
    EXTENSIONS,
    FORMATS,
    MAX_FILE_BYTES,
    ImageError,
    one_line,
    read_file,
    read_range,
)
from pipeline.formats.shards import TAR_BLOCK
from pipeline.formats.tars import TarMember, find_members

if TYPE_CHECKING:  # folders of images need neither Parquet nor tars
    import pyarrow as pa
    import pyarrow.parquet as pq

# What lies beside images and is none: never opened, never counted.
COMPANIONS = {
    *(".json", ".jsonl", ".txt", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".html", ".log"),
    *(".cls", ".npy", ".npz", ".pt", ".pth", ".pkl", ".mat", ".db", ".ini", ".py"),
}
KIND = re.compile(r"(\.tar)?\.(?!\d+$)[a-z0-9_+-]{1,10}$")
PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
SHARD_FORMATS = {".tar": "webdataset", ".parquet": "parquet"}
FORMAT_KINDS = {*SHARD_FORMATS, *EXTENSIONS}
# Told by their first bytes, which begin no text; those of the first ones begin nothing else either.
CERTAIN_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
SNIFFED_FORMATS = tuple(name for name in FORMATS if name not in ("BMP", "PPM"))
SIGNATURE_BYTES = 16
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "bytes", "img", "image_bytes", "content")
KEY_DIGITS = 20
# A folder of links to folders of links ... has more paths than anyone can list.
MAX_WAYS = 1000
# More rows than this, and than the file has bytes, are no images.
ROWS_OF_ANY_FILE = 1_000_000


class SourceSpec(Protocol):
    """What describes a source: `SourceParams` of params.yaml, for one."""

    @property
    def format(self) -> str: ...
    @property
    def root(self) -> Location: ...
    @property
    def pattern(self) -> str: ...


class ImageLocation(Protocol):
    """Where an image's bytes are: an `ImageRef` or a row of a table."""

    @property
    def path(self) -> str: ...
    @property
    def member(self) -> str | None: ...
    @property
    def offset(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of a source.

    Attributes:
        key: sample key.
        source: name of the source.
        path: the file that holds it, below the root as given.
        member: name in the tar, or row number in the Parquet file; None for a file of its own.
        offset: byte at which its data begins in the tar; None elsewhere.
        size: number of bytes in the tar; None elsewhere.
        problem: why it cannot be read, as far as its name and place tell; else None.
    """

    key: str
    source: str
    path: str
    member: str | None = None
    offset: int | None = None
    size: int | None = None
    problem: str | None = None


def sample_key(source: str, path: str, member: str | None = None) -> str:
    """Key of an image: 20 hex digits, the same wherever the source's root lies.

    Args:
        source: name of the source.
        path: file, relative to the root, with forward slashes.
        member: see `ImageRef`.
    """
    text = "\0".join((source, path, member or ""))
    return hashlib.sha1(text.encode()).hexdigest()[:KEY_DIGITS]


def list_images(
    name: str,
    source: SourceSpec,
    left_out: Counter[str] | None = None,
    *,
    field: str | None = None,
) -> Iterator[ImageRef]:
    """Yield all images of a source in a fixed order: by file name, within a file by position.

    Links are followed, except those that lead back to a folder above. A file counts as an image by
    its extension (`EXTENSIONS`, in any case), one of another kind by its first bytes. What has the
    name of an image is listed even where it cannot be read: `read_image` says why.

    Args:
        name: name of the source.
        source: format, root, and pattern of tars or Parquet files relative to the root; braces and
            wildcards are expanded, an empty pattern means all of them.
        left_out: learns how many files of which kind ("hidden", ".heic", "without extension") are
            no images; those of kinds that lie beside images (`COMPANIONS`) are not counted.
        field: where the source stands in the params, for messages; `index.NAME` by default.

    Raises:
        PipelineError: the root is missing, a folder cannot be listed, a file named by the pattern
            is missing, a tar or Parquet file is broken, or there is no image.
    """
    left_out = Counter() if left_out is None else left_out
    field = field or f"index.{name}"
    try:
        root = as_location(source.root)
    except ValueError as error:
        raise PipelineError(f"{field}.root: {error}") from None
    if not root.is_dir():
        raise PipelineError(f"{field}.root: {root}: no such folder")
    listers = {"folder": _list_folder, "webdataset": _list_tars, "parquet": _list_parquet}
    count = 0
    for path, member in listers[source.format](field, source, left_out):
        relative = utf8_text(path.relative_to(root).as_posix(), path)
        member_name = utf8_text(member.name, path) if member else None
        yield ImageRef(
            key=sample_key(name, relative, member_name),
            source=name,
            path=utf8_text(path.as_posix(), path),
            member=member_name,
            offset=member.offset if member else None,
            size=member.size if member else None,
            problem=member.problem if member else None,
        )
        count += 1
    if count == 0:
        wanted = (
            "a column of image bytes"
            if source.format == "parquet"
            else f"images with the extensions {' '.join(EXTENSIONS)}"
        )
        raise PipelineError(
            f"{field}: no images below {root} (format {source.format}); expected {wanted}"
            + _hint(left_out)
        )


def image_name(location: ImageLocation) -> str:
    """The file of an image, and the member in it, as lists and messages name it."""
    if location.member is None:
        return location.path
    return f"{location.path}:{location.member}"


def read_image(location: ImageLocation) -> bytes:
    """The bytes of one image, as stored.

    Args:
        location: path, member and offset, as in `ImageRef`.

    Raises:
        ImageError: the file is gone or cannot be read, or no longer holds the image there.
    """
    if isinstance(location, ImageRef) and location.problem:
        raise ImageError(location.problem)
    path = stored_location(location.path)
    try:
        if location.member is None:
            path.stat()  # says that a file is missing
            return read_file(path)
        if location.offset is not None:
            return _read_tar_member(path, location.offset)
        return _read_parquet_row(path, location.member)
    except FileNotFoundError:
        raise ImageError("file is missing") from None
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or one_line(error)}") from None


# Listers yield the file and, unless it is the image itself, the part of it.
Found = tuple[Location, TarMember | None]


def _list_folder(field: str, source: SourceSpec, left_out: Counter[str]) -> Iterator[Found]:
    if source.pattern:
        raise PipelineError(
            f"{field}.pattern: {source.pattern!r} has no meaning for format folder; remove it"
        )
    for path in image_files(as_location(source.root), left_out):
        yield path, None


def image_files(root: Location, left_out: Counter[str]) -> Iterator[Location]:
    """Yield the images below a folder in a fixed order; see `list_images`.

    Raises:
        PipelineError: something cannot be listed, or links lead to one folder in too many ways.
    """
    for path in _files_below(root, left_out):
        if _is_image(path.name, partial(_begins_like_image, path, 0), left_out):
            yield path


def _is_image(
    name: str, begins_like_image: Callable[[tuple[str, ...]], bool], left_out: Counter[str]
) -> bool:
    """Whether a name is that of an image; if it does not tell, the first bytes do."""
    base_name = name.rpartition("/")[2]
    suffix = PurePosixPath(base_name).suffix.lower()
    if base_name.startswith("."):
        if suffix in EXTENSIONS:
            left_out["hidden"] += 1
        return False
    if suffix in EXTENSIONS:
        return True
    if suffix in COMPANIONS:
        return False
    if begins_like_image(CERTAIN_FORMATS if suffix else SNIFFED_FORMATS):
        return True
    left_out[_kind(base_name)] += 1
    return False


def _kind(base_name: str) -> str:
    match = KIND.search(base_name.lower())
    return match.group() if match else "without extension"


def _begins_like_image(path: Location, start: int, formats: Sequence[str]) -> bool:
    """Whether one of the formats begins at byte `start`; also if that cannot be read.

    Objects at a URL are not looked into: each would cost a request.
    """
    if is_url(path):
        return False
    try:
        head = read_range(path, start, start + SIGNATURE_BYTES).ljust(SIGNATURE_BYTES, b"\0")
    except (ImageError, OSError):
        return True
    Image.init()
    checks = (Image.OPEN[name][1] for name in formats)
    return any(accepts(head) is True for accepts in checks if accepts)


def _files_below(root: Location, left_out: Counter[str]) -> Iterator[Location]:
    return _objects_below(root) if is_url(root) else _walk(root, left_out)


def _walk(root: Path, left_out: Counter[str]) -> Iterator[Path]:
    """What is no folder below a folder, in the order of the names, without hidden ones.

    Raises:
        PipelineError: something cannot be listed, or links lead to one folder in too many ways.
    """
    ways: Counter[tuple[int, int]] = Counter()
    entry: Path | None = root
    try:
        levels = {_identity(root): _visible(root, left_out)}  # of the folder and those above it
        while levels:
            folder = next(reversed(levels))
            entry = next(levels[folder], None)
            if entry is None:
                del levels[folder]
            elif os.path.isdir(entry):  # noqa: PTH112 `is_dir` raises where a link leads nowhere
                folder = _identity(entry)
                if folder in levels:
                    left_out["link to a folder above"] += 1
                    continue
                ways[folder] += 1
                if ways[folder] > MAX_WAYS:
                    raise PipelineError(f"{entry}: links lead here in over {MAX_WAYS} ways")
                levels[folder] = _visible(entry, left_out)
            else:
                yield entry
    except OSError as error:
        raise PipelineError(
            f"{entry}: cannot be listed: {error.strerror}; make it readable or take it out"
        ) from None


def _objects_below(root: Location) -> Iterator[Location]:
    """The same for a URL, where there are no links."""
    paths = [path for path in root.rglob("*") if path.is_file() and not _is_hidden(path, root)]
    yield from sorted(paths, key=lambda path: path.relative_to(root).parts)


def _identity(folder: Path) -> tuple[int, int]:
    """The same for all paths of a folder."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _visible(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    visible = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if not entry.name.startswith("."):
            visible.append(entry)
        elif entry.suffix.lower() in EXTENSIONS:
            left_out["hidden"] += 1
    return iter(visible)


def _list_tars(field: str, source: SourceSpec, left_out: Counter[str]) -> Iterator[Found]:
    for path in _matching_files(field, source, ".tar", left_out):
        seen: dict[str, int | None] = {}
        try:
            _check_regular(path)
            for member in find_members(path, left_out):
                if not _is_image(member.name, partial(_member_begins, path, member), left_out):
                    continue
                if member.name not in seen:
                    seen[member.name] = member.offset
                    yield path, member
                elif member.offset is not None and member.offset == seen[member.name]:
                    left_out["link to itself"] += 1
                else:
                    raise tarfile.ReadError(
                        f"member {member.name} is there twice, as in tars that were joined or "
                        "appended to"
                    )
        except PipelineError:
            raise
        except Exception as error:  # hostile headers make tarfile raise any exception
            raise _broken(path, _tar_reason(path, error)) from None


def _member_begins(path: Location, member: TarMember, formats: Sequence[str]) -> bool:
    return member.offset is None or _begins_like_image(path, member.offset, formats)


def _check_regular(path: Path) -> None:
    """Raise OSError for what is no file: a folder, a pipe that might never end, a dangling link."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")


def _tar_reason(path: Path, error: Exception) -> str:
    if path.is_file():
        with path.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                return "compressed tars cannot be read by offset; unpack it"
    return one_line(error) or type(error).__name__


def _list_parquet(field: str, source: SourceSpec, left_out: Counter[str]) -> Iterator[Found]:
    for path in _matching_files(field, source, ".parquet", left_out):
        try:
            _check_regular(path)
            with _open_parquet(path) as file:
                num_rows = file.metadata.num_rows
                image_column(file.schema_arrow, path)
            if num_rows > max(ROWS_OF_ANY_FILE, path.stat().st_size):
                raise OSError(f"{num_rows} rows in {path.stat().st_size} bytes")
        except PipelineError:
            raise
        except Exception as error:  # damaged metadata makes Arrow raise any exception
            raise _broken(path, one_line(error) or type(error).__name__) from None
        for row in range(num_rows):
            yield path, TarMember(str(row))


def _broken(path: Path, reason: str) -> PipelineError:
    return PipelineError(f"{path}: broken: {reason}; replace the file or leave it out")


def _matching_files(
    field: str, source: SourceSpec, suffix: str, left_out: Counter[str]
) -> list[Location]:
    """The files that a pattern names, each once, in the order of their names.

    Without a pattern, `left_out` learns of files that are neither such nor beside such.
    """
    root = as_location(source.root)
    patterns = _expand(field, source.pattern or f"**/*{suffix}")
    found: set[Location] = set()
    for pattern in patterns:
        if any(letter in pattern for letter in "*?["):
            found.update(path for path in root.glob(pattern) if not _is_hidden(path, root))
        elif (root / pattern).is_file():
            found.add(root / pattern)
        else:
            raise PipelineError(f"{field}.pattern: {root / pattern}: no such file")
    deep = [Path(pattern).parts for pattern in patterns if "**" in Path(pattern).parts]
    others: Counter[str] = Counter()
    if not found or (deep and not is_url(root)):  # `glob` stops at links to folders
        for path in _files_below(root, others):
            if any(_fits(path.relative_to(root).parts, parts) for parts in deep):
                found.add(path)
            elif path.suffix.lower() not in COMPANIONS:
                others[_kind(path.name)] += 1
    if not found:
        raise PipelineError(
            f"{field}: no {suffix} file below {root}"
            + (f" matches pattern {source.pattern!r}" if source.pattern else "")
            + _hint(others)
        )
    if not source.pattern:
        left_out.update({kind: n for kind, n in others.items() if kind not in SHARD_FORMATS})
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path has the form of a pattern in which `**` stands for any folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**" and _fits(parts, pattern[1:]):
        return True
    if not parts:
        return False
    if pattern[0] == "**":
        return _fits(parts[1:], pattern)
    is_same = fnmatchcase(parts[0].lower(), pattern[0].lower())
    return is_same and _fits(parts[1:], pattern[1:])


def _hint(others: Counter[str]) -> str:
    """What there is instead of images, and what to do about it."""
    hint = f"; left out: {counted(others)}" if others else ""
    formats = {SHARD_FORMATS.get(kind, "folder") for kind in others.keys() & FORMAT_KINDS}
    if formats:
        hint += f"; for these write format: {' or '.join(sorted(formats))}"
    if any(kind.endswith(PACKED) for kind in others):
        hint += "; packed files have to be unpacked first"
    return hint


def _expand(field: str, pattern: str) -> list[str]:
    """The patterns that braces stand for, each fit for `Path.glob`."""
    from webdataset.shardlists import expand_urls

    where = f"{field}.pattern: {pattern!r}"
    try:
        patterns = expand_urls(pattern)
    except ValueError as error:
        raise PipelineError(f"{where}: {error}") from None
    for single in map(Path, patterns):
        if single.is_absolute() or ".." in single.parts:
            raise PipelineError(f"{where}: expected a pattern below the root, as in '*.tar'")
        if any("**" in part and part != "**" for part in single.parts):
            raise PipelineError(f"{where}: ** stands for whole folders only, as in '**/*.tar'")
    return list(patterns)


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def image_column(schema: pa.Schema, path: Path) -> str:
    """Name of the column that holds image bytes, plain or as Hugging Face's struct.

    Known names come first; else a single column of bytes is taken.

    Raises:
        PipelineError: there is none, or several under unknown names; `path` heads the message.
    """
    candidates = [field.name for field in schema if _holds_bytes(field.type)]
    for known in IMAGE_COLUMNS:
        if known in candidates:
            return known
    if len(candidates) == 1:
        return candidates[0]
    raise PipelineError(
        f"{path}: expected one column of image bytes, named {', '.join(IMAGE_COLUMNS)}; "
        f"its columns are {', '.join(schema.names)}"
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _read_tar_member(path: Path, offset: int) -> bytes:
    """Data at `offset`; its size stands in the header block just before it."""
    block = read_range(path, max(0, offset - TAR_BLOCK), offset)
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise ImageError("the tar has changed since it was listed") from None
    if not 0 <= header.size <= MAX_FILE_BYTES:
        raise ImageError(f"too large: {header.size} bytes")
    data = read_range(path, offset, offset + header.size)
    if len(data) != header.size:
        raise ImageError("truncated")
    return data


def _read_parquet_row(path: Path, member: str) -> bytes:
    try:
        row = int(member)
        if row < 0:
            raise ImageError(f"row {row} is none")
        with _parquet_lock:
            group, start = _row_group_of(path, row)
            column = _row_group_column(path, path.stat().st_mtime_ns, group)
        value = column[row - start].as_py()
    except (ImageError, OSError):
        raise
    except Exception as error:  # damaged pages make Arrow raise any exception
        raise ImageError(f"cannot be read: {one_line(error) or type(error).__name__}") from None
    data = value["bytes"] if isinstance(value, dict) else value
    if data is None:
        raise ImageError("no image bytes in the row")
    return data


# A row group is read as a whole and may be large, so the last two are kept, for all threads; the
# time of the file's last change tells whether they still hold.
_parquet_lock = threading.Lock()


def _row_group_of(path: Path, row: int) -> tuple[int, int]:
    """The row group that holds a row, and its first row."""
    _check_regular(path)
    start = 0
    for group, size in enumerate(_row_group_sizes(path, path.stat().st_mtime_ns)):
        if row < start + size:
            return group, start
        start += size
    raise ImageError(f"the file has {start} rows, row {row} was asked for")


def _open_parquet(path: Location) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path.open("rb") if is_url(path) else utf8_text(str(path), path))


@lru_cache(maxsize=64)
def _row_group_sizes(path: Path, _mtime_ns: int) -> list[int]:
    with _open_parquet(path) as file:
        metadata = file.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


@lru_cache(maxsize=2)
def _row_group_column(path: Path, _mtime_ns: int, group: int) -> pa.ChunkedArray:
    with _open_parquet(path) as file:
        column = image_column(file.schema_arrow, path)
        return file.read_row_group(group, columns=[column])[column]
