"""Retrieval: from embeddings on disk to the best images of every category.

Letters: N images, K categories, C embedding length.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from benchmarks.harness import Bench, Pair
from benchmarks.inputs import TINY_VISION, cpu_runtime, write_clip
from pipeline.data.tables import embedding_schema, encoder_name, read_archives, write_table
from pipeline.models.clip import load_clip, text_embeddings
from pipeline.params import EncoderParams, RetrieveParams
from pipeline.stages import retrieve

SHARD_ROWS = 10_000
TIE = 1e-6
SOURCE = "index"

Ranked = dict[str, list[str]]


def published_retrieve(
    embeddings_path: Path, out_path: Path, text: torch.Tensor, categories: list[str], k: int
) -> Ranked:
    """Everything in memory: name -> tensor, one matrix, all names sorted for every category."""
    with embeddings_path.open("rb") as file:
        embedding_of_name = pickle.load(file)
    names = list(embedding_of_name)
    similarities = text @ torch.stack(list(embedding_of_name.values())).T
    ranked: Ranked = {}
    for category, row in zip(categories, similarities, strict=True):
        order = torch.argsort(row, descending=True)
        ranked[category] = np.array(names)[order.numpy()].tolist()[:k]
    out_path.write_text(json.dumps(ranked))
    return ranked


def _write_embeddings(
    folder: Path, embeddings: NDArray[np.float16], encoder: EncoderParams
) -> list[str]:
    """Shards of the embed stage, and the published dictionary; the names of the images."""
    names = [f"{number:020d}" for number in range(len(embeddings))]
    schema = embedding_schema(embeddings.shape[1], encoder_name(encoder.model, encoder.pretrained))
    for start in range(0, len(names), SHARD_ROWS):
        part = names[start : start + SHARD_ROWS]
        values = embeddings[start : start + SHARD_ROWS]
        columns = {
            "key": part,
            "source": [SOURCE] * len(part),
            "path": [f"data/raw/index/{name}.jpg" for name in part],
            "member": pa.nulls(len(part), pa.string()),
            "offset": pa.nulls(len(part), pa.int64()),
            "width": [500] * len(part),
            "height": [375] * len(part),
            "bytes": [100_000] * len(part),
            "sha256": [f"{name:>064}" for name in part],
            "status": ["ok"] * len(part),
            "error_message": pa.nulls(len(part), pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(values.ravel()), embeddings.shape[1]
            ),
        }
        path = folder / "embeddings" / SOURCE / f"{start // SHARD_ROWS:05d}.parquet"
        write_table(path, pa.table(columns, schema=schema))
    # One storage a tensor, as embeddings have that come off a GPU one by one.
    tensors = {
        name: torch.from_numpy(row.astype(np.float32))
        for name, row in zip(names, embeddings, strict=True)
    }
    with (folder / "embeddings.pkl").open("wb") as file:
        pickle.dump(tensors, file)
    return names


def _prepare(folder: Path, quick: bool) -> Pair:
    num_images, num_categories, dim, k = (500, 4, 64, 10) if quick else (200_000, 80, 768, 500)
    categories = [f"category {number}" for number in range(num_categories)]
    encoder = write_clip(folder, embed_dim=dim, vision=TINY_VISION)
    embeddings = np.random.default_rng(0).standard_normal((num_images, dim), dtype=np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    _write_embeddings(folder, embeddings.astype(np.float16), encoder)
    del embeddings
    clip = load_clip(encoder.model, encoder.pretrained, torch.device("cpu"))
    text = text_embeddings(clip, categories, ["{}"])

    def published() -> Ranked:
        pickle_path, out_path = folder / "embeddings.pkl", folder / "ranked.json"
        return published_retrieve(pickle_path, out_path, text, categories, k)

    def ours() -> Path:
        out_path = folder / "archives.parquet"
        retrieve.run(
            embeddings_dir=folder / "embeddings",
            sources=[SOURCE],
            out_path=out_path,
            categories=categories,
            background=["background"],
            k=k,
            params=RetrieveParams(templates="name", overlap="all"),
            encoder=encoder,
            runtime=cpu_runtime(folder / "cache"),
            stats_path=folder / "stats.json",
        )
        return out_path

    def check(published: Ranked, archives_path: Path) -> str:
        ours: dict[str, dict[str, float]] = {category: {} for category in categories}
        for row in read_archives(archives_path):
            ours[row.category][row.key] = row.similarity
        for category, names in published.items():
            similarities = ours[category]
            assert len(similarities) == len(names) == k, f"{category}: {len(similarities)} images"
            least = min(similarities.values())
            strangers = [name for name in similarities if name not in set(names)]
            assert all(similarities[name] <= least + TIE for name in strangers), category
            ranked = [similarities[name] for name in names if name in similarities]
            assert np.all(np.diff(ranked) <= TIE), f"{category}: another order"
        return f"same images in the same order, but for similarities closer than {TIE:.0e}"

    return Pair(published, ours, check)


BENCHES = [
    Bench(
        name="retrieve",
        title="retrieve from disk: 200,000 x 768 embeddings, 80 names, top 500",
        target=25.0,
        stretch=60.0,
        prepare=_prepare,
        memory_target_mb=150.0,
    )
]
