"""A pool of images, and functions that import embeddings and archives of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.formats.tables import ArchiveRow, encoder_name, read_archives
from pipeline.importers import archives, embeddings
from pipeline.importers.images import parse_prefixes
from pipeline.params.base import EncoderParams
from pipeline.params.sections import EmbedParams
from pipeline.params.sources import SourceParams
from tests.importers.helpers import CATEGORIES


@pytest.fixture
def params(encoder: EncoderParams) -> EmbedParams:
    return EmbedParams(encoder=encoder, batch_size=4, shard_size=5, workers=2)


@pytest.fixture
def pool(make_image_folder: Callable[..., Path]) -> SourceParams:
    """Eight images 0.jpg to 7.jpg."""
    return SourceParams(root=make_image_folder())


@pytest.fixture
def import_embeddings(
    tmp_path: Path, params: EmbedParams, pool: SourceParams
) -> Callable[..., tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Function that imports a pickle or folder and returns all rows and the stats."""

    def run(path: Path, form: str = "pickle", **changes: Any) -> Any:
        encoder = encoder_name(params.encoder.model, params.encoder.pretrained)
        prefixes = parse_prefixes(changes.pop("prefixes", []))
        arguments = {"name": "pool", "source": pool, "encoder": encoder, "params": params}
        arguments["out_dir"] = tmp_path / "embeddings" / "pool"
        embeddings.run(
            path=path,
            read=embeddings.READERS[form],
            prefixes=prefixes,
            stats_path=tmp_path / "stats.json",
            **(arguments | changes),
        )
        shards = sorted((tmp_path / "embeddings" / "pool").glob("*.parquet"))
        rows = [row for path in shards for row in pq.read_table(path).to_pylist()]
        return rows, json.loads((tmp_path / "stats.json").read_text())

    return run


@pytest.fixture
def import_archives(
    tmp_path: Path, pool: SourceParams
) -> Callable[..., tuple[list[ArchiveRow], dict[str, Any]]]:
    """Function that imports a dict as archives JSON and returns all rows and the stats."""

    def run(content: Any, **changes: Any) -> Any:
        json_path = tmp_path / "category_to_p_images.json"
        json_path.write_text(json.dumps(content))
        prefixes = parse_prefixes(changes.pop("prefixes", []))
        arguments = {
            "categories": CATEGORIES,
            "sources": {"pool": pool},
            "k": 500,
            "overlap": "all",
            "max_pixels": 10_000,
            "workers": 2,
        }
        archives.run(
            json_path=json_path,
            out_path=tmp_path / "archives.parquet",
            prefixes=prefixes,
            stats_path=tmp_path / "stats.json",
            **(arguments | changes),
        )
        stats = json.loads((tmp_path / "stats.json").read_text())
        return read_archives(tmp_path / "archives.parquet"), stats

    return run
