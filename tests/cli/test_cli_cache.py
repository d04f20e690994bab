"""`pipeline cache`: its table, its JSON and what `gc` prints."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline.cli.cache import cache_app
from pipeline.engine.cache import BlobCache
from pipeline.errors import PipelineError

DAY_S = 86400
ENCODER = "ab" * 32
SETTINGS = {
    "version": 1,
    "encoder": ENCODER,
    "precision": "None",
    "categories": ["cat", "dog"],
    "architecture": {"dim": 16},
}


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def filled(cache_dir: Path) -> Path:
    """A folder of 3 masks, last used 40 days ago, beside weights and a leftover."""
    with BlobCache(cache_dir / "masks", SETTINGS) as cache:
        for key in "abc":
            cache.put(key, bytes(1000))
    (cache_dir / "weights").mkdir()
    (cache_dir / "weights" / "clip_tiny.safetensors").write_bytes(bytes(2_500_000))
    left = cache.dir / ".settings.json.abcd1234.tmp"
    left.write_bytes(bytes(10))
    past = time.time() - 40 * DAY_S
    for path in (cache.dir / "in_use.lock", cache_dir / "weights" / "clip_tiny.safetensors", left):
        os.utime(path, (past, past))
    return cache.dir


def cache(*args: str) -> Result:
    return CliRunner().invoke(cache_app, list(args))


def test_status_of_no_cache_shows_where_it_would_be(cache_dir: Path) -> None:
    result = cache("status")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == str(cache_dir)
    assert re.search(r"^total +0 B$", result.stdout, flags=re.MULTILINE)
    assert cache("gc").stdout == f"{cache_dir}: 0 B freed\n"
    assert not cache_dir.exists()


def test_status_has_a_narrow_row_for_each_entry(cache_dir: Path, filled: Path) -> None:
    lines = cache("status").stdout.splitlines()
    assert lines[0] == str(cache_dir)
    assert lines[1].split() == ["kind", "name", "entries", "size", "last", "used", "settings"]
    assert re.fullmatch(
        rf"masks +{filled.name[:8]} +3 +\d\.\d kB  40 days ago   "
        r"encoder=abababab precision=None version=1 num_categories=2",
        lines[2],
    )
    assert re.fullmatch(r"weights +clip_tiny +- +2\.5 MB  40 days ago", lines[3])
    assert re.fullmatch(r"total +2\.5 MB", lines[4])
    assert lines[5].startswith("left by killed runs: 1, 10 B; `pipeline cache gc` removes")
    assert all(len(line) <= 135 for line in lines[1:])


def test_status_as_json_has_everything(cache_dir: Path, filled: Path) -> None:
    content = json.loads(cache("status", "--json").stdout)
    assert content["path"] == str(cache_dir)
    masks, leftover, weights = content["entries"]
    assert (masks["kind"], masks["name"], masks["num_rows"]) == ("masks", filled.name, 3)
    assert masks["settings"] == SETTINGS
    assert masks["paths"] == [str(filled)]
    assert (leftover["is_leftover"], leftover["num_bytes"]) == (True, 10)
    assert (weights["name"], weights["num_bytes"]) == ("clip_tiny", 2_500_000)
    assert content["bytes"] == sum(entry["num_bytes"] for entry in content["entries"])


def test_gc_says_what_it_removed_and_how_much_that_was(cache_dir: Path, filled: Path) -> None:
    expected = (
        r"{0} masks/\.settings\.json\.abcd1234\.tmp \(10 B\): left by a killed run\n"
        rf"{{0}} masks/{filled.name} \((\d\.\d kB)\): not used for 40 days\n"
        rf"{re.escape(str(cache_dir))}: \d\.\d kB {{1}}\n"
    )
    dry = cache("gc", "--dry-run").stdout
    assert re.fullmatch(expected.format("would remove", "would be freed"), dry)
    assert filled.is_dir()
    assert re.fullmatch(expected.format("removed", "freed"), cache("gc").stdout)
    assert not filled.exists()
    assert (cache_dir / "weights" / "clip_tiny.safetensors").is_file()


def test_gc_by_age_size_and_kind(cache_dir: Path, filled: Path) -> None:
    assert "masks/" + filled.name not in cache("gc", "--unused-days", "41").stdout
    assert "masks/" + filled.name not in cache("gc", "--unused-days", "41", "--max-gb", "1").stdout
    assert filled.is_dir()
    removed = cache("gc", "--unused-days", "41", "--max-gb", "0.000001").stdout
    assert f"removed masks/{filled.name}" in removed
    assert "least recently used" in removed
    assert "removed weights/clip_tiny.safetensors" in cache("gc", "--kind", "weights").stdout
    assert list((cache_dir / "weights").iterdir()) == []


def test_gc_keeps_to_any_size(filled: Path) -> None:
    assert cache("gc", "--unused-days", "41", "--max-gb", "1e300").exit_code == 0
    assert filled.is_dir()


def test_gc_says_what_is_in_use(filled: Path) -> None:
    with BlobCache(filled.parent, SETTINGS):
        printed = cache("gc", "--unused-days", "0").stdout
    assert f"kept masks/{filled.name}" in printed
    assert "in use by a running stage" in printed
    assert filled.is_dir()


def test_gc_of_an_unknown_kind_is_a_mistake(cache_dir: Path, filled: Path) -> None:
    result = cache("gc", "--kind", "mask")
    assert isinstance(result.exception, PipelineError)
    assert str(result.exception) == f"{cache_dir}: has no 'mask'; there are: masks, weights"
    assert filled.is_dir()
