"""Atomic files and folders: a reader sees the old content or the new one, never a half.

And claims, which end with the process that holds them, however it ends.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import PipelineError, install_command

SCHEME = "://"
URL_AS_PATH = re.compile(r"[a-z][a-z0-9+.-]+:/")
URL_OF_ONE_SLASH = re.compile(r"[a-z][a-z0-9+.-]+:/(?!/)")
FILE_URL = re.compile(r"file:(?!///)")
WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")
KEY_DIGITS = 16
TEMPORARY = rf"(\w{{8}}|[0-9a-f]{{{KEY_DIGITS}}})"  # in the names of temporary folders
ABANDONED_SECONDS = 3600
# Problem and remedy, by error number.
OUT_OF_SPACE = {
    errno.ENOSPC: ("no space left on the disk", "free some"),
    errno.EDQUOT: ("no space left in the disk quota", "free some"),
    errno.EFBIG: ("a file is larger than the disk or `ulimit -f` allows", "have that changed"),
}
# What else is about a path and the user's to mend.
BAD_PATH = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
BAD_PATH_CODES = (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)

Location = Any  # a `Path`, or a `UPath` with a URL, which is used in the same way


def is_url(location: Any) -> bool:
    """Whether a location is a `UPath` with a URL."""
    return hasattr(location, "fs")


def as_location(text: Any) -> Location:
    """A path, or a URL as an object that is used like one, of what a user has written.

    Raises:
        ValueError: neither, a mistake in writing one, or a URL of which the package that reads it
            is not installed.
    """
    if is_url(text):
        return text
    if not isinstance(text, str | os.PathLike):
        raise ValueError("Input should be a path or a URL")
    if isinstance(text, str):
        check_written(text)
    return stored_location(text)


def stored_location(text: Any) -> Location:
    """The location of which `text` is the form in a table, which may be any name.

    Raises:
        ValueError: a URL of which the package that reads it is not installed.
    """
    if SCHEME not in str(text):
        return native_path(text)
    try:
        from upath import UPath

        location = UPath(text)
        location.fs  # noqa: B018 the package of this scheme is imported here
    except ImportError as error:
        raise ValueError(
            f"URLs need further packages: {install_command('remote')} ({error})"
        ) from None
    except ValueError as error:
        raise ValueError(f"{text}: not a URL that fsspec knows ({error})") from None
    return location


def check_written(text: Any) -> Any:
    """A path or URL as it is.

    Raises:
        ValueError: it is one that nobody means; the message says what to write.
    """
    written = str(text)
    if written.startswith("~") and _expanded(Path(written)) != Path(written):
        raise ValueError(f"{written}: ~ is not expanded here; write {_expanded(Path(text))}")
    if WINDOWS_PATH.match(written) and os.name != "nt":
        raise ValueError(
            f"{written}: a path of Windows; write it as this system has it, under WSL as "
            "/mnt/c/folder"
        )
    if FILE_URL.match(written):
        path = "/" + written.removeprefix("file:").lstrip("/")
        raise ValueError(f"{written}: not the URL of a file; write the path alone, {path}")
    if URL_OF_ONE_SLASH.match(written):
        scheme, _, rest = written.partition(":/")
        raise ValueError(f"{written}: a URL has two slashes; write {scheme}://{rest}")
    return text


def _expanded(path: Path) -> Path:
    with suppress(RuntimeError):  # no such user
        return path.expanduser()
    return path


def native_path(text: Any) -> Path:
    """The path that a name in UTF-8 has on this machine.

    Under a locale such as C, Python holds the bytes of other letters than ASCII as surrogates.
    """
    return Path(os.fsdecode(str(text).encode("utf-8", "surrogateescape")))


def utf8_text(text: str, path: Any) -> str:
    """A name as tables and JSON files hold it, the same under any locale.

    Args:
        text: the name as Python has it.
        path: the file, for the message.

    Raises:
        PipelineError: it has bytes that are not UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        raise PipelineError(f"{str(path)!a}: file name is not UTF-8; rename the file") from None


def given_path(path: Path) -> Path:
    """A path from the command line, with a `~` that no shell has expanded put in full.

    Raises:
        PipelineError: it was a URL.
    """
    refuse_url(path)
    return path if path.exists() else _expanded(path)


def refuse_url(path: Path) -> None:
    """Raise PipelineError for what was a URL before it was made a path."""
    if URL_AS_PATH.match(str(path)):
        raise PipelineError(f"{path}: this must be a path; a URL cannot be used here")


def file_versions(paths: Iterable[str]) -> Iterator[tuple[int, int] | None]:
    """Size and time of each file, once, to tell changed ones; None for URLs and no file."""
    for path in dict.fromkeys(paths):
        try:
            status = None if SCHEME in path else native_path(path).stat()
        except OSError:
            status = None
        yield (status.st_size, status.st_mtime_ns) if status else None


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, moved over it once the block succeeds.

    Parent folders are made. The data is synced before the move; on any exception the temporary
    file and the folders made for it are removed, and `path` keeps what it had.
    """
    path = Path(path)
    with _making_parents(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replace_dir(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, swapped in once the block succeeds.

    What a run that was killed while it swapped has left is put back first.
    """
    path = _link_target(path)
    with _making_parents(path):
        _tidy_up(path)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            _move_over(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def resumable_dir(path: Path, key: str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, swapped in once the block succeeds.

    After an exception or a kill the folder stays, if there is anything in it, and the next call
    with the same key finds it as it was; those of other keys are removed.

    Args:
        path: the folder that is made.
        key: digest of all that its content depends on.
    """
    path = _link_target(path)
    temporary = path.with_name(f".{path.name}.{key[:KEY_DIGITS]}.part")
    with _making_parents(path):
        _tidy_up(path)
        for other in parts_left(path):
            if other != temporary:
                shutil.rmtree(other)
        temporary.mkdir(exist_ok=True)
        try:
            yield temporary
            _move_over(temporary, path)
        finally:
            with suppress(OSError):  # not empty, or moved
                temporary.rmdir()


def parts_left(path: Path) -> list[Path]:
    """What runs that were cut off have left of a folder of `resumable_dir`."""
    path = _link_target(path)
    if not path.parent.is_dir():
        return []
    return _leftovers(path, f"[0-9a-f]{{{KEY_DIGITS}}}\\.part")


def _link_target(path: Path) -> Path:
    """The folder that a link leads to, so that the link stays one; any other path as it is."""
    return Path(path).resolve() if Path(path).is_symlink() else Path(path)


def _tidy_up(path: Path) -> None:
    """Put back what was at `path`, if a run was killed while it moved another folder there.

    What else killed runs have left beside it is removed; a fresh `.tmp` may be another run's.
    """
    for retired in _leftovers(path, rf"{TEMPORARY}\.old"):
        if path.exists():
            shutil.rmtree(retired, ignore_errors=True)
        else:
            retired.replace(path)
    for gone in _leftovers(path, rf"{TEMPORARY}\.gone"):
        shutil.rmtree(gone, ignore_errors=True)
    for folder in _leftovers(path, rf"{TEMPORARY}\.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(folder)


def _leftovers(path: Path, pattern: str) -> list[Path]:
    """The temporary folders of exactly this name, of which the end matches a pattern."""
    name = re.compile(rf"\.{re.escape(path.name)}\.{pattern}")
    return [left for left in path.parent.iterdir() if name.fullmatch(left.name) and left.is_dir()]


def _move_over(temporary: Path, path: Path) -> None:
    """Move a folder to `path`; one that is there is removed."""
    retired, gone = temporary.with_suffix(".old"), temporary.with_suffix(".gone")
    if path.is_dir():
        path.replace(retired)
    temporary.replace(path)
    if retired.is_dir():
        retired.replace(gone)  # what a kill leaves of it is not to be put back
        shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def claim(path: Path) -> Iterator[None]:
    """Keep other processes of this machine from claiming `path`, a file or folder, in the block.

    The lock file lies in the folder of temporary files, named after the path, and goes at the end.
    Where it cannot be made, the block runs without.

    Raises:
        PipelineError: another run has claimed it; the message names both.
    """
    name = f"zutis-pipeline-{digest(str(Path(path).resolve()))[:32]}.lock"
    lock_path = Path(tempfile.gettempdir()) / name
    # The holder may just be removing the file: not only one try.
    lock = FileLock(lock_path, timeout=0.1, fallback_to_soft=False)
    try:
        lock.acquire()
        lock_path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except Timeout:
        raise PipelineError(
            f"{path}: another run is writing it ({_holder(lock_path)}); wait until it has ended, "
            "or stop it"
        ) from None
    except OSError:  # a full disk takes the lock, but not who holds it
        pass
    try:
        yield
    finally:
        if lock.is_locked:  # not in a fork
            with suppress(OSError):
                lock_path.unlink()
            lock.release()


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Raise now the OSError that writing `path` would raise after hours of work.

    Args:
        path: what is to be written.
        folder: it is a folder, replaced whole or made; else a file.

    Raises:
        PipelineError: it is a URL, or there can be no file where it is to be.
    """
    refuse_url(path)
    path = Path(path).absolute()
    if path.exists() and path.is_dir() != folder:
        code = errno.ENOTDIR if folder else errno.EISDIR
        raise OSError(code, os.strerror(code), str(path))
    parent = next(above for above in path.parents if os.path.lexists(above))
    if parent.exists() and not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent))
    try:
        with _naming_in_errors(path), tempfile.TemporaryFile(dir=parent, prefix=f".{path.name}."):
            pass
    except FileNotFoundError:  # a link to nowhere, or a folder that is none, such as /proc
        raise PipelineError(f"{path}: {parent} takes no files; choose another path") from None


def check_replaceable(path: Path, ours: re.Pattern[str], *, needed: str | None = None) -> None:
    """Refuse a folder from which `replace_dir` would remove what no earlier run has written.

    One that is missing or empty can be replaced; hidden files do not count.

    Args:
        path: the folder.
        ours: names of all that an earlier run may have put into it.
        needed: path below it of something that every earlier run has written.

    Raises:
        PipelineError: something else is there, or what is needed is not; the message names it.
    """
    if not path.is_dir():
        return
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    check_contents(path, names, ours, needed=needed)


def check_contents(
    folder: Location, names: Sequence[str], ours: re.Pattern[str], *, needed: str | None
) -> None:
    """Refuse a folder, which is to be replaced, for what is in it or what it lacks.

    Args:
        folder: here or at a URL.
        names: of all that is in it.
        ours: names of all that an earlier run may have put into it.
        needed: path below it of something without which names of ours alone are not ours.

    Raises:
        PipelineError: with the first other name, or with what is needed.
    """
    other = next((name for name in names if not ours.fullmatch(name)), None)
    if other is not None:
        raise PipelineError(
            f"{folder}: would be replaced as a whole, but holds other things too, such as "
            f"{other}; give a folder of its own"
        )
    if names and needed and not (folder / needed).exists():
        raise PipelineError(
            f"{folder}: would be replaced as a whole, but has no {needed}, so no earlier run has "
            "written it; give a folder of its own"
        )


def disk_fault(error: OSError) -> tuple[str, str] | None:
    """Problem, with the file, and remedy where an error is about the user's disk; else None."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in OUT_OF_SPACE:
        problem, remedy = OUT_OF_SPACE[error.errno]
        return f"{problem}{where}", remedy
    if isinstance(error, BAD_PATH) or error.errno in BAD_PATH_CODES:
        return f"{error.strerror}{where}", "make it writable or choose another path"
    return None


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path` atomically; NaN and infinities become null."""
    text = json.dumps(_without_nan(value), indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        PipelineError: the file is missing or is not JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PipelineError(f"{path}: no such file; run the stage that writes it first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path}: not valid JSON ({error})") from None


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON-serialisable value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def _making_parents(path: Path) -> Iterator[None]:
    """Make the folders above `path`; if the block fails, remove those that are still empty."""
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        with _naming_in_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _naming_in_errors(path: Path) -> Iterator[None]:
    """Put `path` into an OSError about its temporary file, or about a full disk and no file."""
    try:
        yield
    except OSError as error:
        nameless = error.filename is None and error.errno in OUT_OF_SPACE
        if nameless or f".{path.name}." in str(error.filename):
            error.filename, error.filename2 = str(path), None
        raise


def _holder(lock_path: Path) -> str:
    """Who holds a claim, in words; it may just be about to write that, or to remove it."""
    with suppress(OSError):
        return lock_path.read_text(encoding="utf-8") or "process unknown"
    return "process unknown"


def _without_nan(value: Any) -> Any:
    """The value with None for every NaN and infinity in it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


def _umask() -> int:
    """The permissions that new files are to lack; they can be read by setting them only."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
