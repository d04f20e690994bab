"""An approximate index of embeddings, built once for a pool and kept in the cache.

An inverted file of faiss: k-means splits the pool into lists, and a search looks at the lists whose
centres are nearest to the query. It holds each embedding as it is stored, in float16, so that what
is found can be ranked exactly. Letters: N images, K queries, C embedding length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError, first_line
from pipeline.files import digest, read_json, replace_dir, write_json

VERSION = 1
# faiss asks for 39 images or more to find a centre by.
LEAST_IMAGES_PER_LIST, TRAINED_PER_LIST = 39, 64
INDEX, FACTS = "index.faiss", "facts.json"

Skip = Callable[[str, str], None]
Blocks = Callable[[Skip], Iterator[tuple[NDArray[np.int64], NDArray[np.float16]]]]


@dataclass(frozen=True)
class EmbeddingIndex:
    """An index and what it was built from.

    Attributes:
        num_images: N.
        num_lists: lists that the pool is split into.
        skipped: (key, reason) of images that are not in it.
        index: of faiss; its ids are the positions of the images.
    """

    num_images: int
    num_lists: int
    skipped: list[tuple[str, str]]
    index: Any  # faiss tells no more of what it reads than that it is an index

    def nearest(
        self, queries: NDArray[np.float32], count: int, *, probes: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Yield positions (count,) and embeddings (count, C) of the images nearest to each query.

        Args:
            queries: (K, C).
            count: images a query, at most N.
            probes: lists to look at; more if these have too few images.
        """
        for query in queries:
            self.index.nprobe = min(probes, self.num_lists)
            _, positions, embeddings = self.index.search_and_reconstruct(query[None], count)
            while (positions < 0).any():
                self.index.nprobe *= 2
                _, positions, embeddings = self.index.search_and_reconstruct(query[None], count)
            yield positions[0], embeddings[0]


def cached_index(
    root: Path, shards: list[Path], *, num_images: int, blocks: Blocks
) -> tuple[EmbeddingIndex, bool]:
    """The index of a pool, and whether it had to be built.

    It lies at `<root>/<digest of the shards' paths>`, one for a pool, and is built again when a
    shard has another size or time. Building holds the whole index in memory, 2 C bytes an image; a
    search maps the file.

    Args:
        root: folder of the indexes.
        shards: files that `blocks` reads.
        num_images: about how many images there are.
        blocks: yields positions (n,) and unit embeddings (n, C), and calls what it is given with
            (key, reason) of each image that it leaves out; called twice.

    Raises:
        PipelineError: `blocks` yields no image, or the file in the cache is damaged.
    """
    paths = [str(path.resolve()) for path in shards]
    states = [(path.stat().st_size, path.stat().st_mtime_ns) for path in shards]
    state = digest([VERSION, paths, states])
    folder = root / digest(paths)[:32]
    is_new = not (folder / FACTS).is_file() or read_json(folder / FACTS)["state"] != state
    if is_new:
        skipped: list[tuple[str, str]] = []
        index = _build(blocks, num_images, lambda key, reason: skipped.append((key, reason)))
        with replace_dir(folder) as temporary:
            faiss.write_index(index, str(temporary / INDEX))
            write_json(temporary / FACTS, {"state": state, "skipped": skipped})
    return _read(folder), is_new


def _read(folder: Path) -> EmbeddingIndex:
    try:
        flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
        index: Any = faiss.read_index(str(folder / INDEX), flags)
    except RuntimeError as error:
        raise PipelineError(
            f"{folder / INDEX}: not a readable index: {first_line(error)}; remove the "
            "folder to have it built again"
        ) from None
    skipped = [(key, reason) for key, reason in read_json(folder / FACTS)["skipped"]]
    return EmbeddingIndex(index.ntotal, index.nlist, skipped, index)


def _build(blocks: Blocks, num_images: int, skip: Skip) -> faiss.IndexIVF:
    """Find the lists' centres on a part of the images, then add all."""
    most_lists = math.isqrt(num_images)
    step = max(1, num_images // (TRAINED_PER_LIST * most_lists))
    parts = [embeddings[::step] for _, embeddings in blocks(lambda *_: None)]
    if not parts:
        raise PipelineError("retrieve.search: ivf: every embedding is zero or not finite")
    sample = np.concatenate(parts)
    num_lists = max(1, min(most_lists, len(sample) // LEAST_IMAGES_PER_LIST))
    dim = sample.shape[1]
    # Codes that are no residuals: the embeddings themselves, not their distances from a centre.
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(dim),
        dim,
        num_lists,
        faiss.ScalarQuantizer.QT_fp16,
        faiss.METRIC_INNER_PRODUCT,
        False,
    )
    index.cp.min_points_per_centroid = 1  # no warning of a small pool
    index.train(sample.astype(np.float32))
    for positions, embeddings in blocks(skip):
        index.add_with_ids(embeddings.astype(np.float32), positions)
    return index
