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

from pipeline.formats.tables import (
    embedding_bytes,
    embedding_schema,
    encoder_name,
    read_archives,
    write_table,
)
from pipeline.models.clip import load_clip, text_embeddings
from pipeline.params.base import EncoderParams
from pipeline.params.sections import RetrieveParams
from pipeline.stages import retrieve
from speed.harness import Bench, Curve, Pair
from speed.inputs import TINY_VISION, cpu_runtime, write_clip

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


def _write_shard(
    folder: Path, number: int, embeddings: NDArray[np.float16], encoder: EncoderParams
) -> list[str]:
    """The shard of that number, as the embed stage writes it; the names of its images."""
    count, dim = embeddings.shape
    names = [f"{number * SHARD_ROWS + row:020d}" for row in range(count)]
    columns = {
        "key": names,
        "source": [SOURCE] * count,
        "path": [f"data/raw/index/{name}.jpg" for name in names],
        "member": pa.nulls(count, pa.string()),
        "offset": pa.nulls(count, pa.int64()),
        "width": [500] * count,
        "height": [375] * count,
        "bytes": [100_000] * count,
        "sha256": [f"{name:>064}" for name in names],
        "status": ["ok"] * count,
        "error_message": pa.nulls(count, pa.string()),
        "embedding": [embedding_bytes(row) for row in embeddings],
    }
    schema = embedding_schema(dim, encoder_name(encoder.model, encoder.pretrained))
    path = folder / "embeddings" / SOURCE / f"{number:05d}.parquet"
    write_table(path, pa.table(columns, schema=schema))
    return names


def _write_embeddings(
    folder: Path, embeddings: NDArray[np.float16], encoder: EncoderParams
) -> None:
    """Shards of the embed stage, and the published dictionary."""
    names: list[str] = []
    for number, start in enumerate(range(0, len(embeddings), SHARD_ROWS)):
        names += _write_shard(folder, number, embeddings[start : start + SHARD_ROWS], encoder)
    # One storage a tensor, as embeddings have that come off a GPU one by one.
    tensors = {
        name: torch.from_numpy(row.astype(np.float32))
        for name, row in zip(names, embeddings, strict=True)
    }
    with (folder / "embeddings.pkl").open("wb") as file:
        pickle.dump(tensors, file)


def _unit_rows(count: int, dim: int) -> NDArray[np.float16]:
    rows = np.random.default_rng(0).standard_normal((count, dim), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float16)


def _retrieve(folder: Path, encoder: EncoderParams, categories: list[str], k: int) -> Path:
    """Run the stage on the shards in a folder; the archives."""
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


def _prepare(folder: Path, quick: bool) -> Pair:
    num_images, num_categories, dim, k = (500, 4, 64, 10) if quick else (200_000, 80, 768, 500)
    categories = _categories(num_categories)
    encoder = write_clip(folder, embed_dim=dim, vision=TINY_VISION)
    _write_embeddings(folder, _unit_rows(num_images, dim), encoder)
    clip = load_clip(encoder, torch.device("cpu"))
    text = text_embeddings(clip, categories, ["{}"])

    def published() -> Ranked:
        pickle_path, out_path = folder / "embeddings.pkl", folder / "ranked.json"
        return published_retrieve(pickle_path, out_path, text, categories, k)

    def ours() -> Path:
        return _retrieve(folder, encoder, categories, k)

    def check(published: Ranked, archives_path: Path) -> str:
        ours: dict[str, dict[str, float]] = {category: {} for category in categories}
        for row in read_archives(archives_path):
            ours[row.category][row.key] = row.similarity
        for category, names in published.items():
            similarities = ours[category]
            assert len(similarities) == len(names) == k, f"{category}: {len(similarities)} images"
            least = min(similarities.values())
            others = [name for name in similarities if name not in set(names)]
            assert all(similarities[name] <= least + TIE for name in others), category
            ranked = [similarities[name] for name in names if name in similarities]
            assert np.all(np.diff(ranked) <= TIE), f"{category}: another order"
        return f"same images in the same order, but for similarities closer than {TIE:.0e}"

    return Pair(published, ours, check)


def _categories(count: int) -> list[str]:
    return [f"category {number}" for number in range(count)]


def _prepare_pool(folder: Path, num_images: int, dim: int) -> None:
    """A pool of any size, fast: the shards have the same numbers, turned round by one place each.

    Up to `dim` shards no two images are then alike.
    """
    encoder = write_clip(folder, embed_dim=dim, vision=TINY_VISION)
    embeddings = _unit_rows(min(num_images, SHARD_ROWS), dim)
    for number, start in enumerate(range(0, num_images, SHARD_ROWS)):
        rows = np.roll(embeddings[: num_images - start], number, axis=1)
        _write_shard(folder, number, rows, encoder)


def _retrieve_pool(folder: Path) -> Path:
    encoder = EncoderParams(
        model=str(folder / "clip.json"), pretrained=str(folder / "clip.safetensors")
    )
    return _retrieve(folder, encoder, _categories(80), 500)


CURVE = Curve(
    name="retrieve",
    title="retrieve: images, 80 names, top 500",
    sizes=(10_000, 100_000, 1_000_000, 5_000_000),
    bytes_of_item=lambda dim: 2 * dim + 100,
    prepare=_prepare_pool,
    run=_retrieve_pool,
)

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
