"""Stage 2, retrieve: embeddings and category names -> archives, the top-k images of each category.

ZUTIS section 3.1. Letters: N images of a block, K categories, C embedding length.

The stats hold the mean similarity of each archive, its mean margin to the best other name, and
`random_similarity`, how similar a random image is to a name that it does not show. `overlaps`:
images that several categories wanted; `dropped`: list entries that the policy took out;
`empty_archives`. With `search: ivf` also `ivf_lists` of the index, of which `ivf_probes` were
searched, `ivf_built`: 1 if it was not in the cache; and, for at most three categories,
`recall_found` of the `recall_wanted` images of the exact lists. With a filter also `passed_over`,
the images that it left out of the lists. With decisions of a person also `reviewed`, those about an
image of the index, and `unknown_reviews`, the others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.engine.dry_run import DryRun
from pipeline.engine.progress import StageRun, Tally
from pipeline.engine.runtime import Runtime
from pipeline.engine.shard_run import Executor, LocalExecutor
from pipeline.errors import PipelineError, listing
from pipeline.formats.review import ARCHIVE_VERDICTS, NEGATIVES, read_review, unknown_warning
from pipeline.formats.tables import (
    STATUS_OK,
    encoder_name,
    iter_embedding_rows,
    list_embedding_shards,
    shard_encoder,
    write_archive_table,
)
from pipeline.models.clip import category_embeddings, check_distinct, load_clip, text_embeddings
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
from pipeline.retrieval.purity import (
    Halves,
    NearestNames,
    embeddings_at,
    random_embeddings,
    thinned,
)
from pipeline.retrieval.ranking import (
    Ranking,
    _negatives,
    _positions,
    count_losses,
    settle_overlaps,
    without,
)
from pipeline.retrieval.review import DroppedImages
from pipeline.vocabulary.categories import Names, all_texts
from pipeline.vocabulary.prompts import templates

READ_ROWS = 8192
SPARE_CANDIDATES = 64
RECALL_SAMPLE = 3
# With a filter, so many times k images of each category are looked at, and this many at least.
LOOKED_AT, LEAST_LOOKED_AT = 4, 1024
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
    texts: Mapping[str, Sequence[str]] = MappingProxyType({}),
    review_path: Path | None = None,
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
        stats_path: JSON file of the counts, see above.
        texts: what stands for a category in prompts, see `Names`; of several the mean embedding.
        review_path: images that a person has dropped from a category (`pipeline.formats.review`):
            they are not in its list, and the next ones move up. None: none.
        executor: where shards are searched, if not through an index; here by default.

    Raises:
        PipelineError: fewer than k images are embedded, or by another encoder than `encoder`; a
            shard is damaged; negatives are wanted of an approximate search; a filter leaves
            nothing; a line of `review_path` is malformed.
    """
    _check_search(params)
    source_dirs = [embeddings_dir / name for name in sources]
    shards = list_embedding_shards(source_dirs)
    num_images = _count_images(shards)
    _check_k(k, num_images, source_dirs)
    names = Names(categories, background, texts)
    queries = _queries(shards[0], names, params=params, encoder=encoder, runtime=runtime)
    nearest = NearestNames(np.concatenate(queries), keep_embeddings=params.min_distance is not None)
    review = read_review(review_path, ARCHIVE_VERDICTS) if review_path else {}
    dropped, dropped_in = DroppedImages(review, shards, categories), review_path if review else None
    size = _list_size(k, num_images, params)
    target = _target(queries, params, size=min(num_images, size + dropped.most), dropped=dropped)
    with StageRun("retrieve", stats_path=stats_path, total=num_images) as stage_run:
        if params.search == "exact":
            where = executor or LocalExecutor()
            scan = search(shards, target, executor=where, runtime=runtime, tally=stage_run)
            candidates, near_background = scan.candidates, scan.near_background
        else:
            index = _index(shards, num_images, runtime.cache_dir / "retrieve", stage_run)
            candidates = _search(index, target, k, params.probes, nearest, stage_run)
            near_background = Candidates(0)
        _check_k(k, stage_run.items, source_dirs)
        images = _Images(shards, [*candidates, near_background])
        rankings = [
            dropped.of_category(images.ranked(found), category, size)
            for category, found in zip(categories, candidates, strict=True)
        ]
        if params.search == "exact":
            for positions, embeddings in embeddings_at(shards, np.unique(_positions(rankings))):
                nearest.add(positions, embeddings)
        lists = _filtered(rankings, nearest, k, params, stage_run)
        _check_some_left(rankings, lists, nearest, params, dropped_in)
        _warn_of_short_lists(stage_run, categories, lists, k, params, dropped_in)
        _count_reviewed(stage_run, dropped, dropped_in)
        negatives = _negatives(
            dropped.of_negatives(images.ranked(near_background)),
            lists,
            params.num_negatives,
            contested=params.overlap == "best",
        )
        archives = without(settle_overlaps(lists, params.overlap), negatives)
        _count(stage_run, categories, lists, negatives, archives, k=k)
        _measure(stage_run, categories, archives, nearest)
        _warn_of_unknown(stage_run, categories, rankings, k, nearest, random_embeddings(shards))
        table = images.archives([NEGATIVES, *categories], [negatives, *archives])
        write_archive_table(out_path, table)


def _check_search(params: RetrieveParams) -> None:
    if params.search == "ivf" and params.num_negatives:
        raise PipelineError(
            f"params.yaml: retrieve.num_negatives: {params.num_negatives} images need "
            "retrieve.search: exact, for they are far from what an approximate search looks at"
        )


def _target(
    queries: Sequence[Floats], params: RetrieveParams, *, size: int, dropped: DroppedImages
) -> SearchTarget:
    """What is searched for: lists of `size`, and negatives enough if the dropped are among them."""
    num_negatives = params.num_negatives and params.num_negatives + dropped.total
    texts, background_texts = queries
    return SearchTarget(texts, background_texts, size, num_negatives, params.block_rows)


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
    index: EmbeddingIndex,
    target: SearchTarget,
    k: int,
    probes: int,
    nearest: NearestNames,
    tally: Tally,
) -> list[Candidates]:
    """The list of each category, and the recall of the top-k of a few in the stats.

    They are ranked by the embeddings that the index holds, which are those of the shards; `nearest`
    is shown them.
    """
    texts, size = target.texts, target.k
    wanted = min(size + SPARE_CANDIDATES, index.num_images)

    def scored(some: Floats, num_lists: int) -> Iterator[Candidates]:
        found = index.nearest(some, wanted, probes=num_lists)
        for text, (positions, embeddings) in zip(some, found, strict=True):
            candidates = Candidates(size)
            candidates.add(positions, inner_products(embeddings, text))
            nearest.add(positions, embeddings)
            yield candidates

    candidates = list(scored(texts, probes))
    sample = np.linspace(0, len(texts) - 1, min(RECALL_SAMPLE, len(texts))).astype(int)
    for number, exact in zip(sample, scored(texts[sample], index.num_lists), strict=True):
        last = np.sort(exact.scores)[-k:][0]
        recalled = np.count_nonzero(candidates[number].scores >= last)
        tally.count("recall_found", min(int(recalled), k))
        tally.count("recall_wanted", k)
    tally.count("ivf_lists", index.num_lists)
    tally.count("ivf_probes", min(probes, index.num_lists))
    return candidates


def _list_size(k: int, num_images: int, params: RetrieveParams) -> int:
    """How many images of each category are looked at, so that others can take places."""
    if params.min_margin is None and params.min_distance is None:
        return k
    return min(num_images, max(LOOKED_AT * k, LEAST_LOOKED_AT))


def _filtered(
    rankings: Sequence[Ranking],
    nearest: NearestNames,
    k: int,
    params: RetrieveParams,
    tally: Tally,
) -> list[Ranking]:
    """The k best images of each ranking that pass the filters; counts those passed over."""
    lists = []
    for name, ranking in enumerate(rankings):
        kept = ranking
        if params.min_margin is not None:
            kept = kept.only(nearest.margins(kept, name) >= params.min_margin)
        if params.min_distance is not None:
            embeddings = nearest.embeddings(kept)
            kept = kept.only(thinned(embeddings, count=k, min_distance=params.min_distance))
        kept = kept.only(np.arange(len(kept)) < k)
        if len(ranking) > k:
            last = kept.ranks[-1] if len(kept) == k else len(ranking)
            tally.count("passed_over", int(last) - len(kept))
        lists.append(kept)
    return lists


def _check_some_left(
    rankings: Sequence[Ranking],
    lists: Sequence[Ranking],
    nearest: NearestNames,
    params: RetrieveParams,
    dropped_in: Path | None,
) -> None:
    """Refuse to go on where dropped images or filters leave no image of any category."""
    if not any(map(len, rankings)):
        raise PipelineError(f"{dropped_in}: drops every image from every category; remove lines")
    if not any(map(len, lists)):
        greatest = max(
            float(nearest.margins(ranking, name).max())
            for name, ranking in enumerate(rankings)
            if len(ranking)
        )
        raise PipelineError(
            f"params.yaml: retrieve.min_margin: {params.min_margin:g} leaves no image of any "
            f"category; the greatest margin is {greatest:.4f}: lower it"
        )


def _warn_of_short_lists(
    stage_run: StageRun,
    categories: Sequence[str],
    lists: Sequence[Ranking],
    k: int,
    params: RetrieveParams,
    dropped_in: Path | None,
) -> None:
    """Lists that filters and dropped images leave with less than k images."""
    short = [
        f"{name} {len(part)}" for name, part in zip(categories, lists, strict=True) if len(part) < k
    ]
    if not short:
        return
    filters = [
        f"retrieve.{field}: {value:g}"
        for field in ("min_margin", "min_distance")
        if (value := getattr(params, field)) is not None
    ]
    filters += [f"the images dropped in {dropped_in}"] if dropped_in else []
    stage_run.warn(
        f"{' and '.join(filters)} leave less than k: {k} images for {listing(short)}; lower "
        "them, or add images"
    )


def _count_reviewed(stage_run: StageRun, dropped: DroppedImages, dropped_in: Path | None) -> None:
    """Count the decisions, if there are any, and warn of those about what is not there."""
    if not dropped_in:
        return
    stage_run.count("reviewed", dropped.num_known)
    stage_run.count("unknown_reviews", len(dropped.unknown))
    if dropped.unknown:
        stage_run.warn(unknown_warning(dropped_in, dropped.unknown, "the index"))


def _count(
    stage_run: StageRun,
    categories: Sequence[str],
    lists: Sequence[Ranking],
    negatives: Ranking,
    archives: Sequence[Ranking],
    *,
    k: int,
) -> None:
    """Count what became of the images of the lists."""
    _, times = np.unique(_positions(lists), return_counts=True)
    stage_run.count("overlaps", int(np.count_nonzero(times > 1)))
    count_losses(stage_run, categories, lists, archives)
    _warn_of_large_k(stage_run, k, len(categories))
    stage_run.count("negatives", len(negatives))


def _measure(
    tally: Tally, categories: Sequence[str], archives: Sequence[Ranking], nearest: NearestNames
) -> None:
    """Similarity and margin of the images of each archive."""
    for name, (category, archive) in enumerate(zip(categories, archives, strict=True)):
        for similarity, margin in zip(
            archive.similarities, nearest.margins(archive, name), strict=True
        ):
            tally.measure(category, "similarity", float(similarity))
            tally.measure(category, "margin", float(margin))


def _warn_of_unknown(
    stage_run: StageRun,
    categories: Sequence[str],
    rankings: Sequence[Ranking],
    k: int,
    nearest: NearestNames,
    random: Halves,
) -> None:
    """Names whose best images are no more similar to them than random images are to any name."""
    if not len(random):
        return
    level = nearest.chance_level(random)
    stage_run.note("random_similarity", level)
    unknown = [
        f"{name} {mean:.4f}"
        for name, ranking in zip(categories, rankings, strict=True)
        if len(ranking)
        and (mean := float(ranking.similarities[:k].mean(dtype=np.float64))) <= level
    ]
    if unknown:
        text = (
            f"the encoder hardly knows {listing(unknown)}: the mean similarity of the {k} best "
            f"images is not above the {level:.4f} of random images and names that they do not "
            "show; use another word, another embed.encoder, or add images"
        )
        stage_run.warn(text)
        print(f"retrieve: warning: {text}", file=sys.stderr, flush=True)


def dry_run(
    dry: DryRun, *, embeddings_dir: Path, sources: Sequence[str], categories: Sequence[str], k: int
) -> None:
    """Say what `run` would do.

    Raises:
        PipelineError: there are no embeddings, or fewer than k.
    """
    source_dirs = [embeddings_dir / name for name in sources]
    num_images = _count_images(list_embedding_shards(source_dirs))
    _check_k(k, num_images, source_dirs)
    dry.items(num_images, text=f", searched for the {k} of each of {len(categories)} categories")


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


def _queries(
    shard: Path,
    names: Names,
    *,
    params: RetrieveParams,
    encoder: EncoderParams,
    runtime: Runtime,
) -> list[np.ndarray]:
    """Unit text embeddings of categories (K, C), and of the names of the background.

    They are of the encoder that made the shards.
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
    texts = all_texts(names.categories, names.texts)
    check_distinct(clip, categories=texts, background=names.background)
    prompts = templates(params.templates)
    found = (
        category_embeddings(clip, names.categories, prompts, names.texts),
        text_embeddings(clip, names.background, prompts, field="background"),
    )
    return [embeddings.float().cpu().contiguous().numpy() for embeddings in found]


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
