"""Stage 2, retrieve: embeddings and category names -> archives, the top-k images of each category.

ZUTIS section 3.1. Letters: N images of a block, K categories, C embedding length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.prompts import templates
from pipeline.data.tables import (
    STATUS_OK,
    ArchiveRow,
    encoder_name,
    iter_embedding_shards,
    list_embedding_shards,
    shard_encoder,
    write_archives,
)
from pipeline.errors import PipelineError
from pipeline.models.clip import load_clip, text_embeddings
from pipeline.params import EncoderParams, RetrieveParams
from pipeline.runtime import Runtime, StageRun

# faiss sums float32 in an order of its own: it may swap similarities closer than this.
MARGIN = 1e-5
SPARE_CANDIDATES = 64
ROWS_AT_ONCE = 4096
NEGATIVES = "background"
IMAGE_COLUMNS = ["key", "source", "path", "member", "offset", "width", "height", "sha256"]


def run(
    *,
    embeddings_dir: Path,
    sources: Sequence[str],
    out_path: Path,
    categories: list[str],
    background: list[str],
    k: int,
    params: RetrieveParams,
    encoder: EncoderParams,
    runtime: Runtime,
    stats_path: Path,
) -> None:
    """Retrieve the archive of each category by exact inner product.

    Images of equal similarity are ranked by their keys. An image without direction (zero or not
    finite) is skipped and counted. Under the policies `best` and `last` an archive loses the images
    that went to other categories, and under `best` also the negatives; ranks stay those of the
    top-k list, with gaps.

    Args:
        embeddings_dir: one folder of shards a source.
        sources: names of the sources to search; other folders are ignored.
        out_path: Parquet file of the archives.
        categories: K names; label ids are their positions from 1.
        background: names of what no category names; the negatives are images of these.
        k: images of each top-k list.
        params: prompt templates, policy on overlaps, negatives, rows held at a time.
        encoder: the CLIP that made the embeddings.
        runtime: device of the text encoder.
        stats_path: JSON file of the counts. `overlaps`: images that several categories wanted;
            `dropped`: list entries that the policy took out; `empty_archives`.

    Raises:
        PipelineError: fewer than k images are embedded, or by another encoder than `encoder`.
    """
    source_dirs = [embeddings_dir / name for name in sources]
    num_images = _count_images(source_dirs)
    _check_k(k, num_images, source_dirs)
    texts, background_texts = _text_embeddings(
        source_dirs, (categories, background), params=params, encoder=encoder, runtime=runtime
    )
    with StageRun("retrieve", stats_path=stats_path, total=num_images) as stage_run:
        scan = _Scan(texts, background_texts, k=k, num_negatives=params.num_negatives)
        for block in _blocks(source_dirs, params.block_rows, stage_run):
            scan.add(block)
            stage_run.advance(len(block.keys))
        _check_k(k, stage_run.items, source_dirs)
        lists = [ranking.entries() for ranking in scan.rankings]
        negatives = scan.negatives(lists, contested=params.overlap == "best")
        archives = without(settle_overlaps(lists, params.overlap), negatives)
        _count_overlaps(stage_run, lists, archives)
        stage_run.count("negatives", len(negatives))
        names = [NEGATIVES, *categories]
        write_archives(out_path, _rows(source_dirs, names, [negatives, *archives]))


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a ranked list: its rank from 1, similarity, and row among all shards' rows."""

    rank: int
    similarity: float
    position: int


def settle_overlaps(lists: list[list[Entry]], policy: str) -> list[list[Entry]]:
    """Decide which category keeps an image that several want.

    Args:
        lists: the ranked list of each category, in the order of the categories.
        policy: `all`: every category keeps it. `best`: the one it is most similar to, on a tie the
            earlier one. `last`: the last one, as the published code does.

    Returns:
        The lists without the entries that were lost; ranks are not renumbered.
    """
    if policy == "all":
        return lists
    owner: dict[int, tuple[float, int]] = {}
    for index, entries in enumerate(lists):
        for entry in entries:
            held = owner.get(entry.position)
            if policy == "last" or held is None or entry.similarity > held[0]:
                owner[entry.position] = (entry.similarity, index)
    return [
        [entry for entry in entries if owner[entry.position][1] == index]
        for index, entries in enumerate(lists)
    ]


def without(lists: list[list[Entry]], taken: list[Entry]) -> list[list[Entry]]:
    """The lists without the images of `taken`; ranks stay."""
    positions = {entry.position for entry in taken}
    return [[entry for entry in part if entry.position not in positions] for part in lists]


@dataclass(frozen=True, slots=True)
class _Block:
    """Embedded images: keys (N,) of bytes, positions (N,) among all rows, embeddings (N, C)."""

    keys: np.ndarray
    positions: np.ndarray
    embeddings: np.ndarray

    def take(self, rows: np.ndarray) -> Self:
        """The images at the given rows of this block."""
        return type(self)(self.keys[rows], self.positions[rows], self.embeddings[rows])


class _Ranking:
    """The best `size` images so far: highest score first, equal scores by key."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._scores = np.empty(0, np.float32)
        self._keys = np.empty(0, "S1")
        self._positions = np.empty(0, np.int64)

    @property
    def threshold(self) -> float:
        """Score below which no image can enter any more."""
        return float(self._scores[-1]) if len(self._scores) == self._size else -np.inf

    def add(self, block: _Block, scores: np.ndarray) -> None:
        """Merge a block's images with their scores (N,) float32."""
        scores = np.concatenate([self._scores, scores])
        keys = np.concatenate([self._keys, block.keys])
        positions = np.concatenate([self._positions, block.positions])
        kept = np.lexsort((keys, -scores))[: self._size]
        self._scores, self._keys, self._positions = scores[kept], keys[kept], positions[kept]

    def entries(self) -> list[Entry]:
        """The ranked list."""
        pairs = zip(self._scores.tolist(), self._positions.tolist(), strict=True)
        return [Entry(rank, score, position) for rank, (score, position) in enumerate(pairs, 1)]


class _Scan:
    """Runs over the index dataset once and keeps every category's best images.

    Args:
        texts: (K, C) float32 unit text embeddings of the categories.
        background_texts: (M, C), likewise, of the background's names.
        k: length of each list.
        num_negatives: images nearer to the background than to the categories to be kept as well.
    """

    def __init__(
        self, texts: np.ndarray, background_texts: np.ndarray, *, k: int, num_negatives: int
    ) -> None:
        self._texts = texts
        self._background_texts = background_texts
        self._k = k
        self._num_negatives = num_negatives
        self.rankings = [_Ranking(k) for _ in self._texts]
        # At most K k of these images can be in the lists themselves.
        self._emptiest = _Ranking(num_negatives + len(self._texts) * k)

    def add(self, block: _Block) -> None:
        """Take a block of images into account."""
        if len(block.keys) == 0:
            return
        index = faiss.IndexFlatIP(block.embeddings.shape[1])
        index.add(block.embeddings)
        for ranking, text, rows in zip(
            self.rankings, self._texts, self._candidates(index), strict=True
        ):
            images = block.take(rows)
            ranking.add(images, inner_products(images.embeddings, text))
        if self._num_negatives:
            nearest = _greatest_similarities(block.embeddings, self._texts)
            background = _greatest_similarities(block.embeddings, self._background_texts)
            self._emptiest.add(block, background - nearest)

    def negatives(self, lists: list[list[Entry]], *, contested: bool) -> list[Entry]:
        """The images nearest to a name of the background, in no list of a category.

        Ranked by how much nearer they are to it than to any category; that is their `similarity`.
        With `contested`, an image of a list counts too if it is nearer to the background.
        """
        if not self._num_negatives:
            return []
        wanted = {entry.position for entries in lists for entry in entries}
        kept = [
            entry
            for entry in self._emptiest.entries()
            if entry.position not in wanted or (contested and entry.similarity > 0)
        ]
        return [
            Entry(rank, entry.similarity, entry.position)
            for rank, entry in enumerate(kept[: self._num_negatives], 1)
        ]

    def _candidates(self, index: Any) -> Iterator[np.ndarray]:
        """For each category, the rows that may enter its list, ties at its end included."""
        size = min(index.ntotal, self._k + SPARE_CANDIDATES)
        similarities, rows = index.search(self._texts, size)
        last = min(self._k, size) - 1
        while size < index.ntotal and (similarities[:, -1] >= similarities[:, last] - MARGIN).any():
            size = min(index.ntotal, 2 * size)
            similarities, rows = index.search(self._texts, size)
        for ranking, found, row in zip(self.rankings, similarities, rows, strict=True):
            yield row[found >= max(found[last], ranking.threshold) - MARGIN]


def inner_products(embeddings: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Inner products (N,) float32 of embeddings (N, C) with one vector (C,).

    Summed in float64 row by row, so that equal embeddings have equal similarities wherever they
    stand; a matrix product does not promise that.
    """
    products = embeddings.astype(np.float64) * text.astype(np.float64)
    return products.sum(axis=1).astype(np.float32)


def _greatest_similarities(embeddings: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Similarity (N,) of each image to the text that it is most similar to."""
    greatest = np.empty(len(embeddings), np.float32)
    for start in range(0, len(embeddings), ROWS_AT_ONCE):
        rows = embeddings[start : start + ROWS_AT_ONCE]
        nearest = texts[(rows @ texts.T).argmax(axis=1)]
        greatest[start : start + len(rows)] = (
            rows.astype(np.float64) * nearest.astype(np.float64)
        ).sum(axis=1)
    return greatest


def _count_images(source_dirs: list[Path]) -> int:
    """Number of rows with an embedding."""
    return sum(
        pc.sum(pc.equal(table["status"], STATUS_OK)).as_py() or 0
        for table in iter_embedding_shards(source_dirs, columns=["status"])
    )


def _check_k(k: int, num_images: int, source_dirs: list[Path]) -> None:
    if k > num_images:
        raise PipelineError(
            f"params.yaml: k: {k} is larger than the {num_images} embedded images below "
            f"{', '.join(map(str, source_dirs))}; lower k to {num_images} or less, or add images "
            "to the index"
        )


def _text_embeddings(
    source_dirs: list[Path],
    lists: Sequence[list[str]],
    *,
    params: RetrieveParams,
    encoder: EncoderParams,
    runtime: Runtime,
) -> list[np.ndarray]:
    """For each list of N names, unit text embeddings (N, C) of the encoder that made the shards."""
    shard = list_embedding_shards(source_dirs)[0]
    embedded_by, dim = shard_encoder(shard)
    wanted = encoder_name(encoder.model, encoder.pretrained)
    if embedded_by != wanted:
        raise PipelineError(
            f"{shard}: embedded by {embedded_by}, but the texts are to be embedded by {wanted}; "
            "run `pipeline embed` again"
        )
    clip = load_clip(encoder.model, encoder.pretrained, runtime.device, cache_dir=runtime.cache_dir)
    if clip.embed_dim != dim:
        raise PipelineError(
            f"{shard}: embeddings of length {dim}, but {wanted} has {clip.embed_dim}; "
            "run `pipeline embed` again"
        )
    prompts = templates(params.templates)
    return [
        np.ascontiguousarray(text_embeddings(clip, names, prompts).float().cpu().numpy())
        for names in lists
    ]


def _blocks(source_dirs: list[Path], block_rows: int, stage_run: StageRun) -> Iterator[_Block]:
    """Yield the embedded images of all shards, at most `block_rows` at a time."""
    position = 0
    columns = ["key", "status", "embedding"]
    for table in iter_embedding_shards(source_dirs, columns=columns):
        for start in range(0, table.num_rows, block_rows):
            rows = table.slice(start, block_rows)
            yield _with_direction(_block(rows, position + start), stage_run)
        position += table.num_rows


def _block(table: pa.Table, position: int) -> _Block:
    """The rows of a table that have an embedding; `position` is that of the first row."""
    is_ok = pc.equal(table["status"], STATUS_OK).to_numpy()
    embedded = table.filter(pa.array(is_ok))
    embedding = embedded["embedding"].combine_chunks()
    values = embedding.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return _Block(
        keys=np.array(embedded["key"].to_pylist(), dtype=np.bytes_),
        positions=position + np.flatnonzero(is_ok),
        embeddings=values.reshape(-1, embedding.type.list_size),
    )


def _with_direction(block: _Block, stage_run: StageRun) -> _Block:
    """Leave out, and count, embeddings that are zero or not finite."""
    is_finite = np.isfinite(block.embeddings).all(axis=1)
    is_zero = ~block.embeddings.any(axis=1)
    if is_finite.all() and not is_zero.any():
        return block
    for key in block.keys[~is_finite]:
        stage_run.skip(key.decode(), "embedding is not finite")
    for key in block.keys[is_zero]:
        stage_run.skip(key.decode(), "embedding is zero")
    return block.take(np.flatnonzero(is_finite & ~is_zero))


def _count_overlaps(
    stage_run: StageRun, lists: list[list[Entry]], archives: list[list[Entry]]
) -> None:
    wanted = Counter(entry.position for entries in lists for entry in entries)
    stage_run.count("overlaps", sum(times > 1 for times in wanted.values()))
    stage_run.count("dropped", sum(map(len, lists)) - sum(map(len, archives)))
    stage_run.count("empty_archives", sum(not entries for entries in archives))


def _rows(
    source_dirs: list[Path], names: list[str], archives: list[list[Entry]]
) -> Iterator[ArchiveRow]:
    """Join the lists of label ids 0..K with what the shards know of their images."""
    wanted: dict[int, list[tuple[int, Entry]]] = {}
    for label_id, entries in enumerate(archives):
        for entry in entries:
            wanted.setdefault(entry.position, []).append((label_id, entry))
    for position, image in _images_at(source_dirs, sorted(wanted)):
        for label_id, entry in wanted[position]:
            yield ArchiveRow(
                category=names[label_id],
                label_id=label_id,
                rank=entry.rank,
                similarity=entry.similarity,
                **image,
            )


def _images_at(
    source_dirs: list[Path], positions: list[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (position, its columns) for sorted positions among the rows of all shards."""
    wanted = np.array(positions, np.int64)
    start = 0
    for table in iter_embedding_shards(source_dirs, columns=IMAGE_COLUMNS):
        here = wanted[(wanted >= start) & (wanted < start + table.num_rows)]
        images = table.take(pa.array(here - start)).to_pylist()
        yield from zip(here.tolist(), images, strict=True)
        start += table.num_rows
