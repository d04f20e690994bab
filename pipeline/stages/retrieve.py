"""Stage 2, retrieve: embeddings and category names -> archives, the top-k images of each category.

ZUTIS section 3.1. Letters: N images of a block, K categories, C embedding length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.engine.progress import StageRun
from pipeline.engine.runtime import Runtime
from pipeline.engine.shard_run import Executor, LocalExecutor
from pipeline.errors import PipelineError
from pipeline.formats.tables import (
    STATUS_OK,
    encoder_name,
    iter_embedding_rows,
    list_embedding_shards,
    shard_encoder,
    write_archive_table,
)
from pipeline.models.clip import check_distinct, load_clip, text_embeddings
from pipeline.params.base import EncoderParams
from pipeline.params.sections import RetrieveParams
from pipeline.retrieval.exact import (
    Candidates,
    Floats,
    Rows,
    SearchTarget,
    inner_products,
    iter_blocks,
    search,
)
from pipeline.retrieval.ivf import EmbeddingIndex, Skip, cached_index
from pipeline.retrieval.ranking import (
    Ranking,
    _negatives,
    _positions,
    count_losses,
    settle_overlaps,
    without,
)
from pipeline.vocabulary.prompts import templates

READ_ROWS = 8192
SPARE_CANDIDATES = 64
RECALL_SAMPLE = 3
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
    executor: Executor | None = None,
) -> None:
    """Retrieve the archive of each category: the images of the greatest inner products.

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
        params: prompt templates, policy on overlaps, negatives, search, rows held at a time.
        encoder: the CLIP that made the embeddings.
        runtime: device of the text encoder; its cache folder keeps the index of `search: ivf`.
        stats_path: JSON file of the counts. `overlaps`: images that several categories wanted;
            `dropped`: list entries that the policy took out; `empty_archives`. With `search: ivf`
            also `ivf_lists` of the index, of which `ivf_probes` were searched, `ivf_built`: 1 if it
            was not in the cache; and, for at most three categories, `recall_found` of the
            `recall_wanted` images of the exact lists.
        executor: where shards are searched, if not through an index; here by default.

    Raises:
        PipelineError: fewer than k images are embedded, or by another encoder than `encoder`; a
            shard is damaged; negatives are wanted of an approximate search.
    """
    if params.search == "ivf" and params.num_negatives:
        raise PipelineError(
            f"params.yaml: retrieve.num_negatives: {params.num_negatives} images need "
            "retrieve.search: exact, for they are far from what an approximate search looks at"
        )
    source_dirs = [embeddings_dir / name for name in sources]
    shards = list_embedding_shards(source_dirs)
    num_images = _count_images(shards)
    _check_k(k, num_images, source_dirs)
    texts, background_texts = _text_embeddings(
        shards[0],
        {"categories": categories, "background": background},
        params=params,
        encoder=encoder,
        runtime=runtime,
    )
    with StageRun("retrieve", stats_path=stats_path, total=num_images) as stage_run:
        if params.search == "ivf":
            index = _index(shards, num_images, runtime.cache_dir / "retrieve", stage_run)
            candidates = _search(index, texts, k, params.probes, stage_run)
            near_background = Candidates(0)
        else:
            found = search(
                shards,
                SearchTarget(texts, background_texts, k, params.num_negatives, params.block_rows),
                executor=executor or LocalExecutor(),
                runtime=runtime,
                tally=stage_run,
            )
            candidates, near_background = found.candidates, found.near_background
        _check_k(k, stage_run.items, source_dirs)
        images = _Images(shards, [*candidates, near_background])
        lists = [images.ranked(found) for found in candidates]
        negatives = _negatives(
            images.ranked(near_background),
            lists,
            params.num_negatives,
            contested=params.overlap == "best",
        )
        archives = without(settle_overlaps(lists, params.overlap), negatives)
        _, times = np.unique(_positions(lists), return_counts=True)
        stage_run.count("overlaps", int(np.count_nonzero(times > 1)))
        count_losses(stage_run, categories, lists, archives)
        _warn_of_large_k(stage_run, k, len(categories))
        stage_run.count("negatives", len(negatives))
        names = [NEGATIVES, *categories]
        write_archive_table(out_path, images.archives(names, [negatives, *archives]))


def _index(
    shards: list[Path], num_images: int, cache_dir: Path, stage_run: StageRun
) -> EmbeddingIndex:
    """The index of all images with direction, of the cache or new; counts what it leaves out."""

    def blocks(skip: Skip) -> Iterator[tuple[Rows, NDArray[np.float16]]]:
        for block in iter_blocks(shards, READ_ROWS, skip):
            yield block.positions, block.embeddings

    index, is_new = cached_index(cache_dir, shards, num_images=num_images, blocks=blocks)
    for key, reason in index.skipped:
        stage_run.skip(key, reason)
    stage_run.advance(index.num_images)
    stage_run.count_in_run("ivf_built", int(is_new))
    return index


def _search(
    index: EmbeddingIndex, texts: Floats, k: int, probes: int, stage_run: StageRun
) -> list[Candidates]:
    """Candidates of each category, and the recall of a few categories in the stats.

    They are ranked by the embeddings that the index holds, which are those of the shards.
    """
    size = min(k + SPARE_CANDIDATES, index.num_images)

    def scored(some: Floats, num_lists: int) -> Iterator[Candidates]:
        found = index.nearest(some, size, probes=num_lists)
        for text, (positions, embeddings) in zip(some, found, strict=True):
            candidates = Candidates(k)
            candidates.add(positions, inner_products(embeddings, text))
            yield candidates

    candidates = list(scored(texts, probes))
    sample = np.linspace(0, len(texts) - 1, min(RECALL_SAMPLE, len(texts))).astype(int)
    for number, exact in zip(sample, scored(texts[sample], index.num_lists), strict=True):
        last = np.sort(exact.scores)[-k:][0]
        recalled = np.count_nonzero(candidates[number].scores >= last)
        stage_run.count("recall_found", min(int(recalled), k))
        stage_run.count("recall_wanted", k)
    stage_run.count("ivf_lists", index.num_lists)
    stage_run.count("ivf_probes", min(probes, index.num_lists))
    return candidates


def _count_images(shards: list[Path]) -> int:
    """Number of rows with an embedding."""
    return sum(
        pc.sum(pc.equal(rows["status"], STATUS_OK)).as_py() or 0
        for rows in iter_embedding_rows(shards, columns=["status"], block_rows=READ_ROWS)
    )


def _check_k(k: int, num_images: int, source_dirs: list[Path]) -> None:
    if k > num_images:
        raise PipelineError(
            f"params.yaml: k: {k} is larger than the {num_images} embedded images below "
            f"{', '.join(map(str, source_dirs))}; lower k to {num_images} or less, or add images "
            "to the index"
        )


def _text_embeddings(
    shard: Path,
    lists: dict[str, list[str]],
    *,
    params: RetrieveParams,
    encoder: EncoderParams,
    runtime: Runtime,
) -> list[np.ndarray]:
    """For each list of N names, unit text embeddings (N, C) of the encoder that made the shards.

    `lists` has them by the field that they come from.
    """
    embedded_by, dim = shard_encoder(shard)
    wanted = encoder_name(encoder.model, str(encoder.pretrained))
    if embedded_by != wanted:
        raise PipelineError(
            f"{shard}: embedded by {embedded_by}, but the texts are to be embedded by {wanted}; "
            "run `pipeline embed` again"
        )
    clip = load_clip(encoder, runtime.device, cache_dir=runtime.cache_dir, field="embed.encoder")
    if clip.embed_dim != dim:
        raise PipelineError(
            f"{shard}: embeddings of length {dim}, but {wanted} has {clip.embed_dim}; "
            "run `pipeline embed` again"
        )
    check_distinct(clip, **lists)
    prompts = templates(params.templates)
    return [
        text_embeddings(clip, names, prompts, field=field).float().cpu().contiguous().numpy()
        for field, names in lists.items()
    ]


def _warn_of_large_k(stage_run: StageRun, k: int, num_categories: int) -> None:
    """Archives of k images each need a pool that has as many for each category."""
    share = stage_run.items // num_categories
    if k > share:
        stage_run.warn(
            f"k: {k} images for each of {num_categories} categories are more than the "
            f"{stage_run.items} of the index, so that archives hold images of other things; lower "
            f"k to {max(1, share)} or less, or add images"
        )


class _Images:
    """What the shards know of the candidates: turns these into ranked lists, and lists into rows.

    Args:
        shards: the shards.
        candidates: all the candidates that there are.
    """

    def __init__(self, shards: list[Path], candidates: Sequence[Candidates]) -> None:
        self._positions = np.unique(np.concatenate([found.positions for found in candidates]))
        self._table = _rows_at(shards, self._positions)
        self._key_ranks = pc.rank(self._table["key"]).to_numpy()

    def ranked(self, candidates: Candidates) -> Ranking:
        """The best images: highest score first, equal scores by key."""
        key_ranks = self._key_ranks[self._rows(candidates.positions)]
        best = np.lexsort((key_ranks, -candidates.scores))[: candidates.size]
        return Ranking(
            np.arange(1, len(best) + 1), candidates.scores[best], candidates.positions[best]
        )

    def archives(self, names: list[str], archives: list[Ranking]) -> pa.Table:
        """Rows of the archives of label ids 0..K."""
        label_ids = np.repeat(np.arange(len(archives)), [len(part) for part in archives])
        table = self._table.take(pa.array(self._rows(_positions(archives))))
        columns = {
            "category": pa.array(names).take(pa.array(label_ids)),
            "label_id": pa.array(label_ids),
            "rank": pa.array(np.concatenate([part.ranks for part in archives])),
            "similarity": pa.array(np.concatenate([part.similarities for part in archives])),
        }
        for name, column in columns.items():
            table = table.append_column(name, column)
        return table

    def _rows(self, positions: Rows) -> Rows:
        return np.searchsorted(self._positions, positions)


def _rows_at(shards: list[Path], positions: Rows) -> pa.Table:
    """The image columns at sorted positions among the rows of all shards."""
    parts = []
    start = 0
    for rows in iter_embedding_rows(shards, columns=IMAGE_COLUMNS, block_rows=READ_ROWS):
        first, end = np.searchsorted(positions, [start, start + len(rows)])
        parts.append(rows.take(pa.array(positions[first:end] - start)))
        start += len(rows)
    return pa.Table.from_batches(parts)
