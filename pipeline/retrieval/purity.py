"""How pure archives are likely to be, without truth: by the names and images nearest to theirs.

Letters: N images, M names, C embedding length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from pipeline.engine.batching import slices
from pipeline.formats.tables import STATUS_OK, embedding_matrix, iter_embedding_rows
from pipeline.retrieval.exact import Floats, Rows
from pipeline.retrieval.ranking import Ranking

BLOCK_ROWS = 4096
SAMPLED_SHARDS, SAMPLED_IMAGES, SAMPLE_SEED = 16, 1024, 0

Halves = NDArray[np.floating]


class NearestNames:
    """The two names that each of some images is most similar to, and so its margin to any other.

    Args:
        texts: (M, C) float32 unit text embeddings; M is 2 or more.
        keep_embeddings: whether those of the images are kept, for `thinned`.
    """

    def __init__(self, texts: Floats, *, keep_embeddings: bool) -> None:
        self._texts = torch.from_numpy(texts).double()
        self._parts: list[tuple[Rows, Floats, Rows]] = []
        self._kept: list[Halves] | None = [] if keep_embeddings else None
        self._order: Rows | None = None

    def add(self, positions: Rows, embeddings: Halves) -> None:
        """Look at images: positions (N,), embeddings (N, C); the same image may come again."""
        self._order = None
        for part in slices(range(len(positions)), BLOCK_ROWS):
            rows = slice(part[0], part[-1] + 1)
            values, names = self.two_best(embeddings[rows])
            self._parts.append((positions[rows], values, names))
            if self._kept is not None:
                self._kept.append(embeddings[rows])

    def two_best(self, embeddings: Halves) -> tuple[Floats, Rows]:
        """The greatest two similarities (N, 2) of each image, and the number (N,) of the best name.

        Summed in float64, so that equal embeddings have equal similarities.
        """
        wide = torch.from_numpy(embeddings).double()
        values, names = (wide @ self._texts.T).topk(2, dim=1)
        return values.float().numpy(), names[:, 0].numpy()

    def chance_level(self, embeddings: Halves) -> float:
        """How similar random images (N, C) are to the best of the names that they do not show.

        An image is taken to show the name that it is most similar to, so that this is the mean of
        the second greatest similarities.
        """
        return float(self.two_best(embeddings)[0][:, 1].mean(dtype=np.float64))

    def margins(self, ranking: Ranking, name: int) -> Floats:
        """Similarity (E,) of a list's images to name number `name`, less that to the best other."""
        rows = self._rows(ranking.positions)
        best, second = self._values[rows].T
        return ranking.similarities - np.where(self._names[rows] == name, second, best)

    def embeddings(self, ranking: Ranking) -> NDArray[np.float64]:
        """Unit embeddings (E, C) of a list's images, if they are kept."""
        rows = self._rows(ranking.positions)
        found = self._embeddings[rows].astype(np.float64)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def _rows(self, positions: Rows) -> Rows:
        if self._order is None:
            self._join()
        return np.searchsorted(self._positions, positions)

    def _join(self) -> None:
        positions, values, names = (
            np.concatenate(parts) for parts in zip(*self._parts, strict=True)
        )
        self._positions, self._order = np.unique(positions, return_index=True)
        self._values, self._names = values[self._order], names[self._order]
        if self._kept is not None:
            self._embeddings = np.concatenate(self._kept)[self._order]


def embeddings_at(shards: Sequence[Path], positions: Rows) -> Iterator[tuple[Rows, Halves]]:
    """Yield positions (n,) and embeddings (n, C) of the images at sorted positions that have one.

    Shards without any of them are not read.

    Args:
        shards: in the order of their positions.
        positions: (N,) among the rows of all shards.

    Raises:
        PipelineError: a shard is damaged.
    """
    for shard, (start, end) in zip(shards, pairwise(_bounds(shards)), strict=True):
        wanted = positions[slice(*np.searchsorted(positions, [start, end]))]
        if not len(wanted):
            continue
        columns = ["status", "embedding"]
        for rows in iter_embedding_rows([shard], columns=columns, block_rows=BLOCK_ROWS):
            part = wanted[slice(*np.searchsorted(wanted, [start, start + len(rows)]))]
            is_ok = pc.equal(rows["status"], STATUS_OK).to_numpy(zero_copy_only=False)
            part = part[is_ok[part - start]]
            chosen = rows["embedding"].take(pa.array(part - start))
            start += len(rows)
            if len(part):
                yield part, embedding_matrix(chosen)


def random_embeddings(shards: Sequence[Path]) -> Halves:
    """Embeddings (N, C) of up to a thousand random images, of at most 16 shards.

    The same ones every time; those without direction are left out.

    Raises:
        PipelineError: a shard is damaged.
    """
    generator = np.random.default_rng(SAMPLE_SEED)
    bounds = _bounds(shards)
    chosen = np.linspace(0, len(shards) - 1, min(SAMPLED_SHARDS, len(shards))).astype(int)
    most = SAMPLED_IMAGES // len(chosen)
    positions = [
        start + np.sort(generator.permutation(end - start)[:most])
        for start, end in (bounds[number : number + 2] for number in chosen)
    ]
    parts = [found for _, found in embeddings_at(shards, np.concatenate(positions))]
    found = np.concatenate(parts) if parts else np.empty((0, 1), np.float16)
    return found[np.isfinite(found).all(axis=1) & found.any(axis=1)]


def _bounds(shards: Sequence[Path]) -> list[int]:
    """Position of the first row of each shard, and the number of all rows."""
    return [0, *accumulate(pq.read_metadata(shard).num_rows for shard in shards)]


def thinned(
    embeddings: NDArray[np.float64], *, count: int, min_distance: float
) -> NDArray[np.bool_]:
    """The first `count` images of a ranking that are no near-duplicates of a better one chosen.

    Greedy: an image is chosen if its cosine distance from every one chosen before is
    `min_distance` or more.

    Args:
        embeddings: (E, C) unit rows, best first.
        count: of images to choose, at most.
        min_distance: in [0, 2].

    Returns:
        (E,) whether an image is chosen.
    """
    is_chosen = np.zeros(len(embeddings), dtype=bool)
    others = np.empty((min(count, len(embeddings)), embeddings.shape[1]))
    num_chosen = 0
    for row, embedding in enumerate(embeddings):
        if num_chosen == count:
            break
        nearest = (others[:num_chosen] @ embedding).max(initial=-1.0)
        if 1 - min(nearest, 1.0) >= min_distance:
            others[num_chosen] = embedding
            is_chosen[row] = True
            num_chosen += 1
    return is_chosen
