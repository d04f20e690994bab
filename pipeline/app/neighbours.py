"""Images of the index by key, and those that look most like one, by embedding."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.formats.tables import iter_embedding_rows, list_embedding_shards
from pipeline.retrieval.exact import Rows, Scan, SearchTarget, iter_blocks
from pipeline.retrieval.purity import embeddings_at
from pipeline.retrieval.review import find_keys

COLUMNS = ["key", "source", "path", "member", "offset"]
BLOCK_ROWS = 8192
KEPT_IMAGES = 4096

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class IndexImage:
    """An image of the index.

    Attributes:
        key: sample key.
        source: name of its source.
        path, member, offset: lead to its bytes.
    """

    key: str
    source: str
    path: str
    member: str | None
    offset: int | None


@dataclass(frozen=True)
class Neighbour:
    """An image and its cosine similarity, in [-1, 1], to the one asked about."""

    image: IndexImage
    similarity: float


class IndexImages:
    """The embedded images, found by passes over their shards; blocks of these are in memory.

    Args:
        source_dirs: folders of embedding shards.

    Raises:
        PipelineError: there are none, or they do not belong together.
    """

    def __init__(self, source_dirs: Sequence[Path]) -> None:
        self._shards = list_embedding_shards(source_dirs)
        self._known: OrderedDict[str, IndexImage] = OrderedDict()
        self._lock = threading.Lock()

    def image(self, key: str) -> IndexImage:
        """The image of a sample key.

        Raises:
            PipelineError: the index has none.
        """
        images = self.images([key])
        if key not in images:
            raise PipelineError(f"{key}: no image of the index; run `pipeline embed` again")
        return images[key]

    def images(self, keys: Sequence[str]) -> dict[str, IndexImage]:
        """The images of these sample keys that the index has, by key."""
        with self._lock:
            found = {key: self._known[key] for key in keys if key in self._known}
        if unknown := [key for key in keys if key not in found]:
            positions = find_keys(self._shards, unknown).values()
            found |= {image.key: image for image in self._read(positions).values()}
        return found

    def like(self, key: str, count: int, among: Sequence[str] | None = None) -> list[Neighbour]:
        """The `count` images that look most like one, the nearest first, without itself.

        Args:
            key: of the image.
            count: 1 or more.
            among: sample keys of those that are compared; None for the whole index.

        Raises:
            PipelineError: the index has no such image.
        """
        position = find_keys(self._shards, [key]).get(key)
        if position is None:
            raise PipelineError(f"{key}: no image of the index; run `pipeline embed` again")
        vector = self._unit(position)
        if among is None:
            positions, similarities = self._nearest(vector, count + 1)
        else:
            others = np.array(sorted(find_keys(self._shards, among).values()), np.int64)
            positions, similarities = self._compared(vector, others)
        order = np.lexsort((positions, -similarities))
        ranked = [place for place in order if positions[place] != position][:count]
        images = self._read(positions[ranked].tolist())
        return [
            Neighbour(images[int(positions[place])], float(similarities[place])) for place in ranked
        ]

    def _unit(self, position: int) -> Vectors:
        for _, embeddings in embeddings_at(self._shards, np.array([position])):
            return _unit_rows(embeddings)[0]
        raise PipelineError("this image has no embedding; run `pipeline embed` again")

    def _nearest(self, vector: Vectors, count: int) -> tuple[Rows, Vectors]:
        """Positions (N,) and similarities (N,) of the nearest images of all, and perhaps others."""
        scan = Scan(SearchTarget(vector[None], vector[None][:0], count, 0, BLOCK_ROWS))
        for block in iter_blocks(self._shards, BLOCK_ROWS, lambda *_: None):
            scan.add(block)
        return scan.candidates[0].positions, scan.candidates[0].scores

    def _compared(self, vector: Vectors, positions: Rows) -> tuple[Rows, Vectors]:
        """Those of these positions that have an embedding, and similarities."""
        found = list(embeddings_at(self._shards, positions))
        if not found:
            return positions[:0], np.empty(0, np.float32)
        compared = np.concatenate([part for part, _ in found])
        return compared, np.concatenate([_unit_rows(part) @ vector for _, part in found])

    def _read(self, positions: Iterable[int]) -> dict[int, IndexImage]:
        """The images at some positions; they are remembered by key."""
        wanted = np.array(sorted(positions), np.int64)
        found: dict[int, IndexImage] = {}
        start = 0
        for rows in iter_embedding_rows(self._shards, columns=COLUMNS, block_rows=BLOCK_ROWS):
            inside = wanted[slice(*np.searchsorted(wanted, [start, start + len(rows)]))]
            taken = rows.take(pa.array(inside - start)).to_pylist()
            found |= {
                place: IndexImage(**row) for place, row in zip(inside.tolist(), taken, strict=True)
            }
            start += len(rows)
            if len(found) == len(wanted):
                break
        with self._lock:
            self._known.update({image.key: image for image in found.values()})
            while len(self._known) > KEPT_IMAGES:
                self._known.popitem(last=False)
        return found


def _unit_rows(embeddings: NDArray[np.floating]) -> Vectors:
    wide = embeddings.astype(np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
