"""Read a folder of reference vectors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

RECORD, IO, WEIGHTS = ".json", ".io.safetensors", ".weights.safetensors"
SUFFIXES = (IO, WEIGHTS, RECORD)
DESCRIPTIONS = ("README.md", "manifest.json")


class Tensors:
    """Tensors by name, remembering which ones were asked for.

    `part("A")` shows those whose names start with "A.", without that prefix.
    """

    def __init__(
        self, tensors: dict[str, Tensor], prefix: str = "", read: set[str] | None = None
    ) -> None:
        self._tensors = tensors
        self._prefix = prefix
        self._read: set[str] = set() if read is None else read

    def __getitem__(self, name: str) -> Tensor:
        key = self._prefix + name
        if key not in self._tensors:
            raise KeyError(f"there is no tensor {key}")
        self._read.add(key)
        return self._tensors[key]

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def names(self) -> list[str]:
        """Names in this part, sorted."""
        start = len(self._prefix)
        return sorted(key[start:] for key in self._tensors if key.startswith(self._prefix))

    def part(self, prefix: str) -> Tensors:
        """The tensors of a sub-case."""
        return Tensors(self._tensors, f"{self._prefix}{prefix}.", self._read)

    def shapes(self) -> dict[str, list[int]]:
        """Shape of every tensor by its full name."""
        return {name: list(value.shape) for name, value in self._tensors.items()}

    def unread(self) -> list[str]:
        """Full names of the tensors that nobody asked for."""
        return sorted(self._tensors.keys() - self._read)


@dataclass(frozen=True)
class Vectors:
    """The files of one name.

    Attributes:
        name: of the files, without suffix.
        folder: in which they lie.
        record: content of the JSON file.
        io: inputs and outputs; empty if the family has none.
        stored_weights: as stored, in half precision; empty if the family has none.
    """

    name: str
    folder: Path
    record: dict[str, Any]
    io: Tensors
    stored_weights: dict[str, Tensor]

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Weights in float32 whose names start with `prefix`, without it."""
        return {
            name.removeprefix(prefix): value.float() if value.is_floating_point() else value
            for name, value in self.stored_weights.items()
            if name.startswith(prefix)
        }

    def parts(self) -> list[str]:
        """Names of the sub-cases: prefixes of the tensors, and `cases` of the record."""
        prefixes = {name.split(".")[0] for name in self.io.names() if "." in name}
        return sorted(prefixes | set(self.record.get("cases", {})))


def read_record(path: Path) -> dict[str, Any]:
    """Content of a JSON file.

    Raises:
        ValueError: it is damaged, or no object.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        raise ValueError(f"{path.name} holds no object")
    return record


def weights_path(folder: Path, name: str, record: dict[str, Any]) -> Path:
    """The weights of a case: a file of its own name, else the one that its record names."""
    own = folder / (name + WEIGHTS)
    if own.exists() or "weights_file" not in record:
        return own
    return folder / record["weights_file"].split(" ")[0]  # a remark may follow the file's name


def read_vectors(folder: Path, name: str, *, io: bool, weights: bool) -> Vectors:
    """Read the files of `name`.

    Raises:
        FileNotFoundError: one of those wanted does not exist; the message names it.
        ValueError, safetensors.SafetensorError: one is damaged.
    """
    record_path, io_path = folder / (name + RECORD), folder / (name + IO)
    wanted = [record_path] + [io_path] * io
    record = read_record(record_path) if record_path.exists() else {}
    if weights and record_path.exists():  # it names them
        wanted.append(weights_path(folder, name, record))
    missing = [path.name for path in wanted if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)} is missing")
    return Vectors(
        name,
        folder,
        record,
        Tensors(load_file(io_path) if io else {}),
        load_file(wanted[-1]) if weights else {},
    )
