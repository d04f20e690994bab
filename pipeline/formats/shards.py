"""WebDataset shards of samples: written whole, described by a manifest, read by index.

A sample is a dict: `__key__` and one entry of bytes per member (`jpg`, `mask.png`, `json`, ...). A
folder of shards holds `00000.tar`, `00001.tar`, ... and, written last, `_manifest.json`: for each
shard its name, samples, bytes and SHA-256, their total, and the settings of the stage.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from pipeline.errors import PipelineError
from pipeline.files import Location, check_replaceable, file_sha256, read_json, write_json

MANIFEST = "_manifest.json"  # readers of Parquet folders pass over names with an underscore
KEY = re.compile(r"[0-9A-Za-z_-]+")
SHARD_FILES = re.compile(r"\d{5,}\.(tar|parquet)|_manifest\.json")  # all that is in such a folder
TAR_BLOCK = 512
ZEROS_AT_ONCE = 1 << 20
MAX_OPEN = 128
AGAIN = "run the stage that writes it again"

StoredSample = dict[str, Any]


class TarHeader(tarfile.TarInfo):
    """A header that is whole; `tarfile` itself passes over others, or goes round in circles.

    Attributes:
        stored_size: the size in the header's own block; an extended header may name another one.
    """

    stored_size: int

    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> TarHeader:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise tarfile.ReadError(f"member {header.name} has a negative size")
        header.stored_size = header.size
        return header


def tar_headers(path: Location) -> Iterator[TarHeader]:
    """Yield the header of every member of an uncompressed tar, or of several joined into one.

    A tar that was cut off is an error even where the cut falls between two members, which
    `tarfile` passes over in silence.

    Raises:
        tarfile.ReadError: the file is cut off, damaged, or no tar; earlier members were yielded.
    """
    file_size = path.stat().st_size
    start: int | None = 0
    with path.open("rb") as file:
        while start is not None:
            file.seek(start)
            # Names are UTF-8 under any locale.
            with tarfile.open(fileobj=file, mode="r:", tarinfo=TarHeader, encoding="utf-8") as tar:
                for header in tar:
                    if tar.offset > file_size:
                        raise tarfile.ReadError(f"cut off inside member {header.name}")
                    if header.size < 0 or header.offset < start:
                        raise tarfile.ReadError(f"member {header.name} overlaps another one")
                    start = tar.offset
                    yield cast(TarHeader, header)
                end = tar.offset
            file.seek(end)
            if file.read(TAR_BLOCK) != bytes(TAR_BLOCK):
                raise tarfile.ReadError(f"cut off or damaged at byte {end}")
            start = _after_zeros(file, end + TAR_BLOCK)


def _after_zeros(file: IO[bytes], position: int) -> int | None:
    """The first block from `position`, where `file` is, that is not all zeros; None at its end."""
    while chunk := file.read(ZEROS_AT_ONCE):
        num_zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if num_zeros < len(chunk):
            return position + num_zeros // TAR_BLOCK * TAR_BLOCK
        position += len(chunk)
    return None


def tar_members(path: Location) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset of the data, size) of each regular file of a tar; see `tar_headers`."""
    for header in tar_headers(path):
        if header.isreg() and not header.issparse():
            yield header.name, header.offset_data, header.size


def shard_name(number: int, suffix: str = ".tar") -> str:
    """File name of a shard."""
    return f"{number:05d}{suffix}"


def shard_entry(path: Path, samples: int) -> dict[str, Any]:
    """What the manifest says of a shard: name, samples, bytes, SHA-256."""
    return {
        "name": path.name,
        "samples": samples,
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
    }


def check_shards_replaceable(folder: Path) -> None:
    """Refuse a folder that is to be replaced by one of shards, and is none of an earlier run.

    Raises:
        PipelineError: it holds something else, or shards without a manifest.
    """
    check_replaceable(folder, SHARD_FILES, needed=MANIFEST)


def write_manifest(
    shard_dir: Path,
    entries: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write and return the manifest of a folder of shards, which makes it complete.

    Raises:
        ValueError: a setting has the name of a manifest entry.
    """
    reserved = {"shards", "samples"} & set(settings or {})
    if reserved:
        raise ValueError(f"settings may not be named {', '.join(sorted(reserved))}")
    samples = sum(entry["samples"] for entry in entries)
    manifest = {"shards": list(entries), "samples": samples, **(settings or {})}
    write_json(shard_dir / MANIFEST, manifest)
    return manifest


def read_manifest(shard_dir: Path) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Raises:
        PipelineError: it is missing (the folder was not finished) or does not describe shards.
    """
    path = Path(shard_dir) / MANIFEST
    manifest = read_json(path)
    shards = manifest.get("shards") if isinstance(manifest, dict) else None
    if not isinstance(shards, list) or not all(map(_is_shard_entry, shards)):
        raise PipelineError(f"{path}: not a manifest of shards; run the stage that writes it again")
    return manifest


def open_samples(
    shard_dir: Path, *, members: Iterable[str] = (), max_open: int = MAX_OPEN
) -> SampleStore:
    """Check a folder of shards against its manifest and index its samples.

    Args:
        shard_dir: the folder.
        members: names that every sample must have, by default those of the first one.
        max_open: number of shards that stay open.

    Raises:
        PipelineError: a shard is missing, cut off or changed, or a sample lacks a member; the
            message names it.
    """
    return SampleStore(Path(shard_dir), frozenset(members), max_open)


class SampleStore:
    """Random access to the samples of a folder of shards.

    It may be used by several threads, pickled, and sent to worker processes. The first shards that
    are read stay open, up to a number; the others are opened at each read.

    Attributes:
        keys: sample keys, in order.
        manifest: content of _manifest.json.
    """

    def __init__(self, shard_dir: Path, members: frozenset[str], max_open: int) -> None:
        self._max_open = max_open
        self._descriptors: dict[Path, int] = {}
        self.manifest = read_manifest(shard_dir)
        self.keys: list[str] = []
        self._locations: list[tuple[Path, dict[str, tuple[int, int]]]] = []
        for entry in self.manifest["shards"]:
            path = shard_dir / entry["name"]
            check_shard(path, entry)
            for key, spans in index_tar(path).items():
                members = members or frozenset(spans)
                _check_members(path, key, members - spans.keys())
                self.keys.append(key)
                self._locations.append((path, spans))
        _check_unique(shard_dir, self.keys)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> StoredSample:
        """`__key__` and the bytes of all members of one sample."""
        path, spans = self._locations[index]
        sample: StoredSample = {"__key__": self.keys[index]}
        for name, span in spans.items():
            sample[name] = self._read(path, *span)
        return sample

    def member(self, index: int, name: str) -> bytes:
        """The bytes of one member; KeyError if the sample has none of that name."""
        path, spans = self._locations[index]
        return self._read(path, *spans[name])

    def json(self, index: int) -> dict[str, Any]:
        """The parsed member `json`."""
        return json.loads(self.member(index, "json"))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def _read(self, path: Path, offset: int, size: int) -> bytes:
        if path not in self._descriptors and len(self._descriptors) < self._max_open:
            opened = os.open(path, os.O_RDONLY)
            if self._descriptors.setdefault(path, opened) != opened:  # another thread was faster
                os.close(opened)
        if path in self._descriptors:
            return os.pread(self._descriptors[path], size, offset)
        with path.open("rb") as file:
            return os.pread(file.fileno(), size, offset)


def write_tar(path: Path, samples: Iterable[Mapping[str, Any]]) -> int:
    """Write one shard to its final place and return its number of samples.

    The same samples give the same bytes.

    Args:
        path: the file; it is not written atomically.
        samples: `__key__` and members; members are bytes, `json` may be a dict.

    Raises:
        ValueError: a key is used twice or has other characters than 0-9 A-Z a-z _ and -, or a
            member is not bytes.
    """
    from webdataset.writer import TarWriter

    seen: set[str] = set()
    with path.open("wb") as file:
        with TarWriter(file, user="", group="", encoder=False, mtime=0) as writer:
            for sample in samples:
                writer.write(_checked_sample(sample, seen))
        file.flush()
        os.fsync(file.fileno())
    return len(seen)


def _checked_sample(sample: Mapping[str, Any], seen: set[str]) -> StoredSample:
    key = sample["__key__"]
    if not KEY.fullmatch(key):
        raise ValueError(f"sample key {key!r} has characters other than 0-9 A-Z a-z _ -")
    if key in seen:
        raise ValueError(f"sample key {key!r} is used twice")
    seen.add(key)
    checked = dict(sample)
    if isinstance(checked.get("json"), Mapping):
        checked["json"] = json.dumps(checked["json"], ensure_ascii=False).encode()
    for name, value in checked.items():
        if name != "__key__" and not isinstance(value, bytes):
            raise ValueError(f"sample {key}: member {name!r} is {type(value).__name__}, not bytes")
    return checked


def _is_shard_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(name), kind)
        for name, kind in (("name", str), ("samples", int), ("bytes", int), ("sha256", str))
    )


def check_shard(path: Path, entry: Mapping[str, Any]) -> None:
    """Compare a shard with its entry in the manifest.

    Raises:
        PipelineError: it is missing, cut off, or has other content.
    """
    if not path.is_file():
        raise PipelineError(f"{path}: listed in {MANIFEST}, but missing; {AGAIN}")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise PipelineError(f"{path}: {size} bytes, {MANIFEST} says {entry['bytes']}; {AGAIN}")
    if file_sha256(path) != entry["sha256"]:
        raise PipelineError(f"{path}: content differs from the SHA-256 in {MANIFEST}; {AGAIN}")


def _check_members(path: Path, key: str, missing: frozenset[str]) -> None:
    if missing:
        raise PipelineError(f"{path}: sample {key} lacks {', '.join(sorted(missing))}")


def _check_unique(shard_dir: Path, keys: Sequence[str]) -> None:
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise PipelineError(f"{shard_dir}: sample {twice[0]} is there twice; {AGAIN}")


def index_tar(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Sample key -> member name -> (offset, size), in the shard's order; only headers are read.

    A key ends at the first dot.

    Raises:
        PipelineError: a tar that is cut off, or a member that is none of a sample.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        for file_name, offset, size in tar_members(path):
            key, _, name = file_name.partition(".")
            if not KEY.fullmatch(key) or not name:
                raise PipelineError(f"{path}: {file_name!r} is not the name of a sample's member")
            samples.setdefault(key, {})[name] = (offset, size)
    except tarfile.TarError as error:
        raise PipelineError(f"{path}: not a whole tar: {error}") from None
    return samples
