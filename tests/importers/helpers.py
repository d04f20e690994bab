"""Files of others, as small as they can be, and readers of what is made of them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.formats.tables import ArchiveRow

C = 16
CATEGORIES = ["cat", "dog"]


def random_tensors(names: list[str], dim: int = C) -> dict[str, torch.Tensor]:
    vectors = torch.randn(len(names), dim)
    return {name: vector.clone() for name, vector in zip(names, vectors, strict=True)}


def vector_of(row: dict[str, Any]) -> np.ndarray:
    """Embedding (C,) of a row of a shard."""
    return np.frombuffer(row["embedding"], "<f2")


def write_pickle(path: Path, content: Any, protocol: int | None = None) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def write_clip_retrieval(
    folder: Path, parts: list[tuple[np.ndarray, dict[str, Any]]], numbers: list[str]
) -> Path:
    """The files of clip-retrieval's NumPy writer: arrays and a table of metadata a part."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for number, (array, columns) in zip(numbers, parts, strict=True):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", array)
        pq.write_table(pa.table(columns), folder / "metadata" / f"metadata_{number}.parquet")
    return folder


def places(rows: list[ArchiveRow]) -> list[tuple[str, int, str]]:
    return [(row.category, row.rank, Path(row.path).name) for row in rows]


class Shell:
    """Runs a command when it is unpickled by the usual means."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> Any:
        return os.system, (self._command,)
