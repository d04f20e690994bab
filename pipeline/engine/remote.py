"""Inputs and outputs that lie elsewhere: any URL that fsspec knows, such as s3:// and gs://.

Stages work on local files. An input is brought to the cache first, and only what has changed since
the last time; an output is made here, then sent: its manifest last, so that a reader sees a whole
folder or none. What a process has asked for here is marked as in use until the process ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from pipeline.engine.cache import UseMark
from pipeline.errors import PipelineError
from pipeline.files import Location, atomic_path, check_contents, digest, read_json, write_json
from pipeline.formats.shards import MANIFEST, SHARD_FILES

NOTE = ".fetched.json"
SENDING = "_sending"  # beside shards that are being sent: what is there is ours, if not whole
SENT_AT_ONCE = 4  # files; a store may hold each of them in memory
VERSION_FIELDS = ("size", "ETag", "etag", "md5Hash", "LastModified", "mtime", "updated")

_marks: dict[Path, UseMark] = {}  # by folder; nobody says when a copy is no longer read


def fetch(location: Location, cache_dir: Path) -> Path:
    """A local copy of a file or of a folder with all that is below it.

    Args:
        location: a path, which is returned as it is, or a URL.
        cache_dir: where copies are kept; a file is brought again if its size, time or checksum at
            the other end has changed.

    Raises:
        PipelineError: there is nothing at the URL.
    """
    if isinstance(location, Path):
        return location
    copy = _local_path(location, cache_dir, "fetched")
    if location.is_file():
        _fetch_files({copy.name: location}, copy.parent)
        return copy
    files = {path.relative_to(location).as_posix(): path for path in _files_below(location)}
    if not files:
        raise PipelineError(f"{location}: no such file or folder; run the stage that writes it")
    _fetch_files(files, copy)
    return copy


@contextmanager
def publishing(location: Location, cache_dir: Path) -> Iterator[Path]:
    """A local place for an output, which goes to its URL once the block succeeds.

    Args:
        location: a path, which is yielded as it is, or a URL of a file or folder.
        cache_dir: where the output is made.
    """
    if isinstance(location, Path):
        yield location
        return
    _check_target(location)
    made = _local_path(location, cache_dir, "made")
    yield made
    if made.is_file():
        location.fs.put_file(str(made), location.path)
    else:
        _send_folder(made, location)


def _local_path(location: Location, cache_dir: Path, purpose: str) -> Path:
    """A place for what lies at a URL; what is made never touches what others read."""
    folder = cache_dir / "remote" / digest(str(location))[:32]
    folder.mkdir(parents=True, exist_ok=True)
    _marks.setdefault(folder, UseMark(folder)).take()
    if not (folder / "settings.json").exists():
        write_json(folder / "settings.json", {"url": str(location)})
    return folder / purpose / location.name


def _check_target(location: Location) -> None:
    """Find out now whether an output can be sent, and whether it would replace something else."""
    if location.is_dir():
        names = {path.relative_to(location).as_posix() for path in _files_below(location)}
        needed = None if SENDING in names else MANIFEST
        check_contents(location, sorted(names - {SENDING}), SHARD_FILES, needed=needed)
    probe = location.parent / f".{location.name}.probe"
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.write_bytes(b"")
    probe.unlink()


def _fetch_files(files: dict[str, Location], folder: Path) -> None:
    """Bring files by their names below `folder`, and remove what else is there."""
    note_path = folder / NOTE
    note = read_json(note_path) if note_path.is_file() else {}
    versions = {name: _version(path) for name, path in files.items()}
    kept = {n for n in files if note.get(n) == versions[n] and (folder / n).is_file()}
    ours = {*kept, NOTE}
    for path in list(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in ours:
            path.unlink()
    for name in tqdm([n for n in files if n not in kept], desc="fetch", unit="file", leave=False):
        with atomic_path(folder / name) as temporary:
            files[name].fs.get_file(files[name].path, str(temporary))
        note[name] = versions[name]
        write_json(note_path, note)


def _send_folder(folder: Path, location: Location) -> None:
    """Send the files of a folder, the manifest last, and remove all others there."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    location.mkdir(parents=True, exist_ok=True)
    (location / SENDING).write_bytes(b"")
    (location / MANIFEST).unlink(missing_ok=True)
    _send(folder, location, [name for name in names if name != MANIFEST])
    kept = {*names, SENDING}
    for path in list(_files_below(location)):
        if path.relative_to(location).as_posix() not in kept:
            path.unlink()
    if MANIFEST in names:
        _send(folder, location, [MANIFEST])
    (location / SENDING).unlink()


def _send(folder: Path, location: Location, names: list[str]) -> None:
    """Send files by their names below `folder`, several at a time where the store can."""
    for parent in {(location / name).parent for name in names}:
        parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(names), desc="send", unit="file", leave=False) as bar:
        for start in range(0, len(names), SENT_AT_ONCE):
            batch = names[start : start + SENT_AT_ONCE]
            sources = [str(folder / name) for name in batch]
            location.fs.put(sources, [(location / name).path for name in batch])
            bar.update(len(batch))


def _files_below(location: Location) -> Iterator[Location]:
    """All files of a folder and of the folders in it."""
    return (path for path in location.rglob("*") if path.is_file())


def _version(path: Location) -> str:
    """What tells versions of a file apart without reading it: its size, its time, its checksum."""
    info = path.fs.info(path.path)
    return " ".join(str(info.get(name)) for name in VERSION_FIELDS)
