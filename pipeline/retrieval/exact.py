"""Exact search: one pass over embedding shards that keeps the best images of every category.

A pass may be cut into parts of some shards each, wherever they are searched: the lists of the parts
are merged into those of the whole. Letters: N images of a block, K categories, M names of the
background, C embedding length.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from pipeline.engine.batching import slices
from pipeline.engine.parallel import read_ahead
from pipeline.engine.progress import Tally
from pipeline.engine.runtime import Runtime
from pipeline.engine.shard_run import Executor, Task
from pipeline.formats.tables import STATUS_OK, embedding_matrix, iter_embedding_rows
from pipeline.retrieval.ivf import Skip

# A matrix product sums float32 in an order of its own: similarities are off by less than this.
MARGIN = 1e-5
# So many embeddings stay in the processor's cache from one step to the next; as float64, so many.
ROWS_IN_CACHE, WIDE_ROWS_IN_CACHE = 256, 64
# Of the bits of a float16, all but the sign; the least number that is not finite.
MAGNITUDE, INFINITE = 0x7FFF, 0x7C00
SUFFIX = ".safetensors"

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class SearchTarget:
    """What a scan searches for, and how much of it is kept.

    Attributes:
        texts: (K, C) float32 unit text embeddings of the categories.
        background_texts: (M, C), likewise, of the background's names.
        k: length of each list.
        num_negatives: images nearer to the background than to the categories to be kept as well.
        block_rows: embeddings of a block; two blocks are held, of which one is being read.
    """

    texts: Floats
    background_texts: Floats
    k: int
    num_negatives: int
    block_rows: int


def search(
    shards: Sequence[Path],
    target: SearchTarget,
    *,
    executor: Executor,
    runtime: Runtime,
    tally: Tally,
) -> Scan:
    """Search embedding shards, part by part, and merge the lists of the parts.

    Args:
        shards: the shards; positions count their rows from the first one on.
        target: what is searched for.
        executor: where parts are searched, and how many they are.
        runtime: of this process.
        tally: learns what became of each image; skipped ones end up in the order of the shards.
    """
    lengths = [pq.read_metadata(shard).num_rows for shard in shards]
    firsts = np.cumsum([0, *lengths[:-1]]).tolist()
    located = list(zip(shards, firsts, strict=True))
    load = partial(PartSearch, target)
    found = Scan(target)
    skipped: dict[int, list[dict[str, str]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        tasks = [
            Task(number, part, Path(scratch) / f"{number:05d}{SUFFIX}")
            for number, part in enumerate(slices(located, executor.task_size(len(located))))
        ]
        made = executor.run(tasks, load=load, maker=load(runtime), tally=tally)
        for task, _, part in made:
            found.merge(load_file(task.path))
            skipped[task.number] = part.skipped
            task.path.unlink()
    tally.skipped = [entry for number in sorted(skipped) for entry in skipped[number]]
    return found


class PartSearch:
    """Searches some shards and writes the lists; a `pipeline.engine.shard_run.ShardMaker`.

    Args:
        target: what is searched for.
        runtime: not used: matrix products on the CPU keep up with the disk.
    """

    def __init__(self, target: SearchTarget, runtime: Runtime) -> None:
        del runtime
        self._target = target
        self.settings: dict[str, Any] = {}

    def make(self, items: Sequence[tuple[Path, int]], path: Path, tally: Tally) -> int:
        """Search shards, of each its path and the position of its first row."""
        scan = Scan(self._target)
        shards, firsts = zip(*items, strict=True)
        for block in iter_blocks(
            shards, self._target.block_rows, tally.skip, first_position=firsts[0]
        ):
            scan.add(block)
            tally.advance(len(block.positions))
        save_file(scan.lists(), path)
        return tally.items

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True, slots=True)
class Block:
    """Embedded images, and those that were left out.

    Attributes:
        positions: (N,) among all rows.
        embeddings: (N, C) float16.
        skipped: key and reason of each image that was left out.
    """

    positions: Rows
    embeddings: NDArray[np.float16]
    skipped: list[tuple[str, str]]


class Candidates:
    """The images that may be among the best `size`, with their scores.

    `choose` goes by approximate scores, `add` takes exact ones; what has no chance any more is
    dropped in between. In the end `positions` and `scores` hold the best `size` images, all those
    of a score equal to the last one, and perhaps a few more.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.positions: Rows = np.empty(0, np.int64)
        self.scores: Floats = np.empty(0, np.float32)
        self._best: Floats = np.full(size, -np.inf, np.float32)
        self._floor = -np.inf

    def choose(self, approximate: Floats) -> Rows:
        """The rows of a block, of these scores (N,), that may be among the best."""
        rows = np.flatnonzero(approximate >= self._floor)
        scores = approximate[rows]
        contenders = np.concatenate([self._best, scores])
        contenders.partition(len(scores))
        self._best = contenders[len(scores) :].copy()
        # Both the score that sets the bar and the one that is held against it may be off.
        self._floor = self._best[0] - 2 * MARGIN
        return rows[scores >= self._floor]

    def add(self, positions: Rows, scores: Floats) -> None:
        """Take images (N,) with their exact scores (N,)."""
        scores = np.concatenate([self.scores, scores])
        kept = scores >= self._floor
        self.scores = scores[kept]
        self.positions = np.concatenate([self.positions, positions])[kept]


class Scan:
    """Runs over embeddings once and keeps every category's candidates.

    Args:
        target: what is searched for.

    Attributes:
        candidates: of each category.
        near_background: images nearest to the background, from which negatives are chosen; none
            unless negatives are wanted.
    """

    def __init__(self, target: SearchTarget) -> None:
        self._texts = target.texts
        self._background_texts = target.background_texts
        self.candidates = [Candidates(target.k) for _ in target.texts]
        # At most K k of these images can be in the lists themselves.
        size = target.num_negatives + len(target.texts) * target.k if target.num_negatives else 0
        self.near_background = Candidates(size)
        self._lists = [*self.candidates, self.near_background]

    def add(self, block: Block) -> None:
        """Take a block of images into account."""
        similarities = _similarities(self._texts, block.embeddings)
        for found, text, row in zip(self.candidates, self._texts, similarities, strict=True):
            chosen = found.choose(row)
            if len(chosen):
                scores = inner_products(block.embeddings[chosen], text)
                found.add(block.positions[chosen], scores)
        if self.near_background.size:
            self._add_near_background(block, similarities)

    def _add_near_background(self, block: Block, similarities: Floats) -> None:
        background = _similarities(self._background_texts, block.embeddings)
        chosen = self.near_background.choose(background.max(axis=0) - similarities.max(axis=0))
        embeddings = block.embeddings[chosen]
        scores = _greatest(background[:, chosen], embeddings, self._background_texts)
        scores -= _greatest(similarities[:, chosen], embeddings, self._texts)
        self.near_background.add(block.positions[chosen], scores)

    def lists(self) -> dict[str, np.ndarray]:
        """All candidates: `positions`, `scores`, and the `lengths` of the lists that they form."""
        return {
            "positions": np.concatenate([found.positions for found in self._lists]),
            "scores": np.concatenate([found.scores for found in self._lists]),
            "lengths": np.array([len(found.positions) for found in self._lists]),
        }

    def merge(self, lists: dict[str, np.ndarray]) -> None:
        """Take the lists of another scan of the same target into account."""
        ends = np.cumsum(lists["lengths"])[:-1]
        for found, positions, scores in zip(
            self._lists,
            np.split(lists["positions"], ends),
            np.split(lists["scores"], ends),
            strict=True,
        ):
            if len(positions):
                chosen = found.choose(scores)
                found.add(positions[chosen], scores[chosen])


def iter_blocks(
    shards: Sequence[Path], block_rows: int, skip: Skip, *, first_position: int = 0
) -> Iterator[Block]:
    """Yield the embedded images of shards, at most `block_rows` at a time.

    An image whose embedding has no direction, zero or not finite, is left out.

    Args:
        shards: in the order of their positions.
        block_rows: rows of a block.
        skip: is called with the key of each image that is left out, and the reason.
        first_position: of the first row.

    Raises:
        PipelineError: a shard is damaged.
    """
    for block in read_ahead(_read_blocks(shards, block_rows, first_position)):
        for key, reason in block.skipped:
            skip(key, reason)
        if len(block.positions):
            yield block


def _read_blocks(shards: Sequence[Path], block_rows: int, position: int) -> Iterator[Block]:
    columns = ["key", "status", "embedding"]
    for rows in iter_embedding_rows(shards, columns=columns, block_rows=block_rows):
        yield _block(rows, position)
        position += len(rows)


def _block(rows: pa.RecordBatch, position: int) -> Block:
    """The images of a batch, the first at `position`, by whether their embedding has direction."""
    is_ok = pc.equal(rows["status"], STATUS_OK).to_numpy(zero_copy_only=False)
    if not is_ok.all():
        rows = rows.filter(pa.array(is_ok))
    keys, embeddings = rows["key"], embedding_matrix(rows["embedding"])
    positions = position + np.flatnonzero(is_ok)
    largest = np.empty(len(embeddings), np.uint16)
    for part in _slices(len(embeddings)):
        largest[part] = (embeddings[part].view(np.uint16) & MAGNITUDE).max(axis=1)
    is_finite, is_zero = largest < INFINITE, largest == 0
    if is_finite.all() and not is_zero.any():
        return Block(positions, embeddings, [])
    skipped = [
        (key, reason)
        for reason, is_meant in (
            ("embedding is not finite", ~is_finite),
            ("embedding is zero", is_zero),
        )
        for key in keys.filter(pa.array(is_meant)).to_pylist()
    ]
    has_direction = is_finite & ~is_zero
    return Block(positions[has_direction], embeddings[has_direction], skipped)


def _similarities(texts: Floats, embeddings: NDArray[np.float16]) -> Floats:
    """Inner products (K, N), each off by less than MARGIN."""
    vectors = torch.from_numpy(texts).T
    products = torch.empty(len(texts), len(embeddings))
    for rows in _slices(len(embeddings)):
        products[:, rows] = (torch.from_numpy(embeddings[rows]).float() @ vectors).T
    return products.numpy()


def _slices(count: int, size: int = ROWS_IN_CACHE) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)


def inner_products(embeddings: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Inner products (N,) float32 of embeddings (N, C) of any float with one vector (C,).

    Summed in float64 row by row, so that equal embeddings have equal similarities wherever they
    stand; a matrix product does not promise that.
    """
    products = np.empty(len(embeddings), np.float32)
    vector = text.astype(np.float64)
    for rows in _slices(len(embeddings), WIDE_ROWS_IN_CACHE):
        # Torch widens halves several times as fast as NumPy.
        wide = torch.from_numpy(embeddings[rows]).float().double().numpy()
        products[rows] = np.einsum("nc,c->n", wide, vector)
    return products


def _greatest(similarities: Floats, embeddings: NDArray[np.float16], texts: Floats) -> Floats:
    """Exact similarity (N,) of each image to its nearest text, given approximate (K, N)."""
    greatest = np.full(len(embeddings), -np.inf, np.float32)
    floor = similarities.max(axis=0, initial=-np.inf) - 2 * MARGIN
    for text, row in zip(texts, similarities, strict=True):
        near = np.flatnonzero(row >= floor)
        greatest[near] = np.maximum(greatest[near], inner_products(embeddings[near], text))
    return greatest
