"""The commands that import what others have computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.formats.tables import encoder_name, read_archives
from pipeline.params.base import EncoderParams
from pipeline.params.sources import SourceParams
from tests.importers.helpers import (
    CATEGORIES,
    C,
    places,
    random_tensors,
    write_clip_retrieval,
    write_pickle,
)


@pytest.fixture
def pool(make_image_folder: Callable[..., Path]) -> SourceParams:
    """Eight images 0.jpg to 7.jpg."""
    return SourceParams(root=make_image_folder())


def test_the_commands_write_where_the_stages_do(
    tmp_path: Path, pool: SourceParams, encoder: EncoderParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {
        "categories": CATEGORIES,
        "index": {"pool": {"root": str(pool.root)}},
        "embed": {"encoder": encoder.model_dump(), "workers": 1},
        "k": 1,
        "retrieve": {"overlap": "all"},
    }
    Path("params.yaml").write_text(json.dumps(settings))
    Path("published.json").write_text(json.dumps({"dog": ["/a/1.jpg", "/b/2.jpg"], "cat": []}))
    write_pickle(Path("emb.pkl"), random_tensors(["0.jpg"]))
    parts = [(np.ones((1, C), np.float16), {"image_path": ["1.jpg"]})]
    write_clip_retrieval(Path("theirs"), parts, ["0"])

    def run(*words: str) -> None:
        result = CliRunner().invoke(app, ["import", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    prefixes = ["--prefix", f"/a={pool.root}", "--prefix", f"/b={pool.root}"]
    run("archives", "--from", "published.json", *prefixes)
    assert places(read_archives(Path("data/archives.parquet"))) == [("dog", 1, "1.jpg")]
    assert Path("reports/stats/retrieve.json").is_file()

    made_by = ["--source", "pool", "--encoder", encoder_name(encoder.model, encoder.pretrained)]
    shard = Path("data/embeddings/pool/00000.parquet")
    run("embeddings", "--from", "emb.pkl", *made_by)
    assert pq.read_table(shard)["path"].to_pylist() == [str(pool.root / "0.jpg")]
    run("clip-retrieval", "--from", "theirs", *made_by)
    assert pq.read_table(shard)["path"].to_pylist() == [str(pool.root / "1.jpg")]
    assert Path("reports/stats/embed-pool.json").is_file()
