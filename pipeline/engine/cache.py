"""Results that outlive the stage which computed them.

DVC deletes the outputs of a stage before it runs again, so work that is to be continued or
re-used lives outside them. A `BlobCache` maps a key (the hash of an input) to bytes (the result)
under fixed settings; other settings are another folder.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files import digest, write_bytes, write_json
from pipeline.formats.parquet import UNREADABLE

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

CHUNK_NAME = re.compile(r"[0-9a-f]{32}\.parquet")
CHUNK_ENTRIES, CHUNK_BYTES = 256, 64 << 20  # many small chunks would be slow to open
NUM_OPEN_CHUNKS = 8
IN_USE = "in_use.lock"


class BlobCache:
    """Bytes by key, kept in Parquet chunks that are written once and never changed.

    A chunk lies at `<root>/<digest of settings>/<digest of its bytes>.parquet`, columns `key` and
    `value`. It appears whole or not at all, so a killed run loses at most the entries since the
    last flush, and several processes may write to one cache at once. A chunk whose bytes no longer
    agree with its name is removed; its entries then count as missing. While a cache is open its
    folder is marked as in use, so that `pipeline cache gc` leaves it alone.

    Only keys are held in memory, with the values of the few chunks read last: read keys in about
    the order in which they were put.

    Args:
        root: folder that holds one folder a settings digest; made at the first flush.
        settings: all that the results depend on besides the key; must be representable in JSON.
    """

    def __init__(self, root: Path, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.dir = Path(root) / digest(settings)[:32]
        self._use = UseMark(self.dir)
        self._use.take()
        self._pending: dict[str, bytes] = {}
        self._pending_bytes = 0
        self._chunks: OrderedDict[str, dict[str, bytes]] = OrderedDict()
        self._chunk_of: dict[str, str] = {}
        self._scan()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Flush, and let go of the folder."""
        try:
            self.flush()
        finally:
            self._use.release()

    def __len__(self) -> int:
        return len(self._chunk_of.keys() | self._pending.keys())

    def get(self, key: str) -> bytes | None:
        """The bytes stored under `key`, or None if there are none (or they were damaged)."""
        if key in self._pending:
            return self._pending[key]
        while (name := self._chunk_of.get(key)) is not None:
            values = self._read_chunk(name)
            if values is not None:
                return values[key]
            self._discard(name)
        return None

    def put(self, key: str, value: bytes) -> None:
        """Store `value` under `key`; it is on disk after the next flush."""
        self._pending_bytes += len(value)
        self._pending[key] = value

    def settle(self) -> None:
        """Flush if many entries are pending.

        Called between two batches, so that the results of one stay together: a run that is killed
        and continues then forms the very batches of one that was never interrupted, and gives its
        bytes.
        """
        if len(self._pending) >= CHUNK_ENTRIES or self._pending_bytes >= CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write all entries not yet on disk as one chunk."""
        if not self._pending:
            return
        data = _encode_chunk(self._pending)
        name = f"{_bytes_digest(data)}.parquet"
        if not (self.dir / "settings.json").exists():
            write_json(self.dir / "settings.json", self.settings)
        self._use.take()
        write_bytes(self.dir / name, data)
        self._chunk_of.update(dict.fromkeys(self._pending, name))
        self._pending = {}
        self._pending_bytes = 0

    def _scan(self) -> None:
        """Read the keys of all chunks; remove the chunks that cannot be read."""
        self._chunk_of = {}
        for path in sorted(self.dir.glob("*.parquet")):
            if not CHUNK_NAME.fullmatch(path.name):
                continue
            try:
                keys = pq.read_table(path, columns=["key"])["key"].to_pylist()
            except (*UNREADABLE, KeyError):
                if self._read_intact(path.name) is None:
                    path.unlink(missing_ok=True)
                    continue
                raise
            self._chunk_of.update(dict.fromkeys(keys, path.name))

    def _read_chunk(self, name: str) -> dict[str, bytes] | None:
        """Key -> value of one chunk, or None if it is gone or damaged."""
        if name in self._chunks:
            self._chunks.move_to_end(name)
            return self._chunks[name]
        data = self._read_intact(name)
        if data is None:
            return None
        table = pq.read_table(io.BytesIO(data))
        values = dict(zip(table["key"].to_pylist(), table["value"].to_pylist(), strict=True))
        self._chunks[name] = values
        if len(self._chunks) > NUM_OPEN_CHUNKS:
            self._chunks.popitem(last=False)
        return values

    def _read_intact(self, name: str) -> bytes | None:
        """The bytes of a chunk, or None if it is gone or they disagree with its name."""
        try:
            data = (self.dir / name).read_bytes()
        except FileNotFoundError:
            return None
        return data if f"{_bytes_digest(data)}.parquet" == name else None

    def _discard(self, name: str) -> None:
        """Remove a damaged chunk; its keys may still be found in other chunks."""
        (self.dir / name).unlink(missing_ok=True)
        self._scan()


def stored_keys(folder: Path) -> set[str]:
    """The keys of a cache's folder, which is only read; damaged chunks are passed over."""
    keys: set[str] = set()
    for path in sorted(folder.glob("*.parquet")):
        with suppress(*UNREADABLE, KeyError):
            keys.update(pq.read_table(path, columns=["key"])["key"].to_pylist())
    return keys


class UseMark:
    """A shared lock on `in_use.lock` of a folder, whose time tells when the folder was last used.

    A folder that is not there, cannot be written or has no locks is used without. As a context,
    it is taken at the beginning and released at the end.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / IN_USE
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> None:
        """Lock, unless it is locked already, and note the time."""
        with suppress(OSError):
            if self._descriptor is None:
                self._descriptor = open_locked(self._path, shared=True)
            os.utime(self._path)

    def release(self) -> None:
        """Unlock; it can be taken again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()


def open_locked(path: Path, *, shared: bool = False) -> int | None:
    """Open `path`, made if need be, and lock it; closing the descriptor ends the lock.

    Several processes may hold a shared lock, and taking one waits for the end of an exclusive one.
    An exclusive lock is taken at once or not at all: None if another process holds one. The file's
    time stays.

    Raises:
        OSError: the file cannot be opened or made, or its file system has no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), str(path))
    access = os.O_RDONLY if shared else os.O_RDWR
    while True:
        descriptor = os.open(path, access | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has removed the file: the lock is of no use


def _bytes_digest(data: bytes) -> str:
    """The name of a chunk without suffix: what its bytes hash to."""
    return hashlib.sha256(data).hexdigest()[:32]


def _encode_chunk(entries: dict[str, bytes]) -> bytes:
    """The bytes of a Parquet file with these entries."""
    table = pa.table(
        {
            "key": pa.array(entries.keys(), pa.string()),
            "value": pa.array(entries.values(), pa.large_binary()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none", use_dictionary=False)
    return buffer.getvalue()
