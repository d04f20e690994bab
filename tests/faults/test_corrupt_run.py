"""Whole stages over folders with damaged images, and over tars with evil names."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.cli import main
from pipeline.engine.runtime import Runtime
from pipeline.formats.shards import MANIFEST
from pipeline.formats.tables import read_archives
from pipeline.methods.masks import SelfMaskParams
from pipeline.models.masks.selfmask import SelfMask, SelfMaskConfig, save_selfmask
from pipeline.params.base import EncoderParams
from pipeline.params.sections import EmbedParams, RetrieveParams
from pipeline.params.sources import SourceParams
from pipeline.stages import embed, mask, retrieve
from tests.conftest import encoded_image, noise_image
from tests.faults.hostile import (
    TAR_END,
    gray_tiff,
    many_scans,
    pax_header,
    png,
    samples,
    tar_member,
    wide_gif,
    wide_webp,
)
from tests.formats.shard_folders import read_shards

NUM_IMAGES = 200
K = 40
CATEGORIES = ["cat", "dog"]


def corrupt_files() -> list[bytes]:
    """Ten files that are no images, each of another kind."""
    whole = samples()
    flipped = bytearray(whole["png"])
    flipped[len(flipped) // 2] ^= 1
    return [
        b"",
        b"<html>404</html>",
        whole["jpeg"][: len(whole["jpeg"]) // 2],
        whole["webp"][:40],
        bytes(flipped),
        png(20_000, 10_000),
        gray_tiff(10, 10, tile=(30_000, 30_000)),
        wide_gif(2000, 8),
        wide_webp(16_383, 10_900),
        many_scans(64, 1000),
    ]


@dataclass(frozen=True)
class World:
    """Folders `mixed` and `healthy` of tiny images; the second one lacks the corrupt files."""

    root: Path
    encoder: EncoderParams
    corrupt: set[str]

    def runtime(self, cache: str) -> Runtime:
        return Runtime(
            device=torch.device("cpu"), amp_dtype=None, seed=0, cache_dir=self.root / cache
        )

    def stats(self, name: str) -> dict[str, Any]:
        return json.loads((self.root / f"{name}.json").read_text())

    def embed(self, folder: str, out: str, workers: int) -> list[dict[str, Any]]:
        """The rows of all shards, after a run with a cache of its own."""
        embed.run(
            name="pool",
            source=SourceParams(root=self.root / folder),
            out_dir=self.root / out / "pool",
            params=EmbedParams(
                encoder=self.encoder,
                batch_size=16,
                shard_size=64,
                workers=workers,
                max_error_rate=0.1,
            ),
            runtime=self.runtime(f"cache of {out}"),
            stats_path=self.root / f"{out}.json",
        )
        shards = sorted((self.root / out / "pool").glob("*.parquet"))
        return pa.concat_tables([pq.read_table(path) for path in shards]).to_pylist()

    def retrieve(self, embeddings: str) -> None:
        retrieve.run(
            embeddings_dir=self.root / embeddings,
            sources=["pool"],
            out_path=self.root / "archives.parquet",
            categories=CATEGORIES,
            background=["background"],
            k=K,
            params=RetrieveParams(templates="name", overlap="all"),
            encoder=self.encoder,
            runtime=self.runtime("cache"),
            stats_path=self.root / "retrieve.json",
        )

    def mask(self, out: str, workers: int) -> None:
        weights = self.root / "selfmask.safetensors"
        config = SelfMaskConfig(
            dim=16, depth=1, num_heads=2, num_queries=3, decoder_layers=1, mlp_ratio=2, grid=4
        )
        torch.manual_seed(0)
        save_selfmask(SelfMask(config), weights)
        mask.run(
            archives_path=self.root / "archives.parquet",
            out_dir=self.root / out,
            params=SelfMaskParams(
                weights=weights, short_side=32, batch_size=8, workers=workers, max_error_rate=0.1
            ),
            runtime=self.runtime(f"cache of {out}"),
            stats_path=self.root / f"{out}.json",
        )


@pytest.fixture
def world(tmp_path: Path, tiny_clip: tuple[Path, Path]) -> World:
    model, weights = map(str, tiny_clip)
    suffixes = [".jpg", ".png", ".webp"]
    places = random.Random(0).sample(range(NUM_IMAGES), len(corrupt_files()))
    bad = dict(zip(places, corrupt_files(), strict=True))
    for folder in ("mixed", "healthy"):
        (tmp_path / folder).mkdir()
    corrupt = set()
    for number in range(NUM_IMAGES):
        name = f"{number:03d}{suffixes[number % 3]}"
        if number in bad:
            corrupt.add(name)
            (tmp_path / "mixed" / name).write_bytes(bad[number])
            continue
        kind = ("JPEG", "PNG", "WEBP")[number % 3]
        data = encoded_image(noise_image(number, width=16 + number % 5), kind)
        for folder in ("mixed", "healthy"):
            (tmp_path / folder / name).write_bytes(data)
    return World(tmp_path, EncoderParams(model=model, pretrained=weights), corrupt)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_corrupt_files_cost_themselves_and_nothing_else(world: World) -> None:
    """Every other image has the very bytes it has without them, for any number of workers."""
    rows = world.embed("mixed", "one", workers=0)
    stats = world.stats("one")
    assert (stats["items"], stats["skipped"]) == (NUM_IMAGES - 10, 10)
    assert {Path(entry["item"]).name for entry in stats["skipped_items"]} == world.corrupt
    assert all(entry["reason"] for entry in stats["skipped_items"])
    skipped = {Path(row["path"]).name for row in rows if row["status"] == "skipped"}
    assert (len(rows), skipped) == (NUM_IMAGES, world.corrupt)
    assert all(bool(row["error_message"]) == (row["embedding"] is None) for row in rows)

    healthy = world.embed("healthy", "healthy shards", workers=0)
    mixed = {row["key"]: row for row in rows if row["status"] == "ok"}
    assert mixed.keys() == {row["key"] for row in healthy}
    for row in healthy:
        for name in ("embedding", "sha256", "width", "height", "bytes"):
            assert mixed[row["key"]][name] == row[name]

    world.embed("mixed", "three", workers=3)
    assert contents(world.root / "one/pool") == contents(world.root / "three/pool")


def test_later_stages_never_see_them(world: World) -> None:
    world.embed("mixed", "embeddings", workers=2)
    world.retrieve("embeddings")
    rows = read_archives(world.root / "archives.parquet")
    stats = world.stats("retrieve")
    assert (len(rows), stats["items"], stats["skipped"]) == (2 * K, NUM_IMAGES - 10, 0)
    assert not {Path(row.path).name for row in rows} & world.corrupt

    changed = sorted({row.path for row in rows})[:4]
    Path(changed[0]).write_bytes(encoded_image(noise_image(999), "JPEG"))
    Path(changed[1]).write_bytes(b"")
    Path(changed[2]).unlink()
    Path(changed[3]).unlink()
    os.mkfifo(changed[3])
    expected = [row for row in rows if row.path not in changed]
    for workers in (0, 3):
        world.mask(f"masks {workers}", workers)
        stats = world.stats(f"masks {workers}")
        assert (stats["items"], stats["skipped"]) == (len(expected), len(rows) - len(expected))
        reasons = {entry["item"]: entry["reason"] for entry in stats["skipped_items"]}
        assert [reasons[path] for path in changed] == [
            "changed since it was embedded",
            "changed since it was embedded",
            "file is missing",
            "cannot be read: not a regular file",
        ]
        keys = [sample["__key__"] for sample in read_shards(world.root / f"masks {workers}")]
        assert keys == [f"{row.key}_{row.label_id}" for row in expected]
    assert contents(world.root / "masks 0") == contents(world.root / "masks 3")


def test_embeddings_that_are_not_finite_are_never_retrieved(world: World) -> None:
    world.embed("healthy", "embeddings", workers=0)
    path = world.root / "embeddings/pool/00000.parquet"
    table = pq.read_table(path)
    spoilt = {1: np.nan, 5: np.inf, 9: -np.inf}
    cells = table["embedding"].to_pylist()
    for row, value in spoilt.items():
        vector = np.frombuffer(cells[row], "<f2").copy()
        vector[row] = value
        cells[row] = vector.tobytes()
    place = table.schema.get_field_index("embedding")
    field = table.schema.field("embedding")
    pq.write_table(table.set_column(place, field, pa.array(cells, field.type)), path)
    (path.parent / MANIFEST).unlink()
    world.retrieve("embeddings")
    keys = {table["key"][row].as_py() for row in spoilt}
    assert {entry["item"] for entry in world.stats("retrieve")["skipped_items"]} == keys
    assert not keys & {row.key for row in read_archives(world.root / "archives.parquet")}


PARAMS = """\
categories: [cat]
k: 3
index: {{evil: {{format: webdataset, root: tars}}}}
embed: {{encoder: {{model: {model}, pretrained: {weights}}}, workers: 0, max_error_rate: 0.3}}
retrieve: {{templates: name, overlap: all}}
"""


def listing(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash, every link with its target."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Function that runs `pipeline ARGS` in a folder."""

    def run(folder: Path, *args: str) -> None:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PIPELINE_CACHE", str(folder / "cache"))
        monkeypatch.setattr(sys, "argv", ["pipeline", *args])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code in (0, None)

    return run


def test_evil_names_write_nothing_outside(
    tmp_path: Path, tiny_clip: tuple[Path, Path], command: Callable[..., None]
) -> None:
    work, outside = tmp_path / "work", tmp_path / "outside"
    for folder in (work / "tars", outside):
        folder.mkdir(parents=True)
    (outside / "precious.jpg").write_bytes(b"mine")
    Image.new("RGB", (9, 9)).save(outside / "precious.png")
    evil = [b"../../outside/x.jpg", b"../outside/precious.jpg", b"%b/y.jpg" % bytes(outside),
            b"C:\\x.jpg", b"a\nb.jpg", b"%b/precious.jpg" % bytes(outside)[:80]]  # fmt: skip
    tar = b"".join(
        tar_member(name[-99:], encoded_image(noise_image(number), "JPEG"))
        for number, name in enumerate(evil)
    )
    tar += pax_header(b"path", bytes(outside / "z.jpg")) + tar_member(b"z.jpg", b"no image")
    tar += tar_member(b"link.jpg", b"", kind=b"2", link=bytes(outside / "precious.png"))
    (work / "tars/0.tar").write_bytes(tar + TAR_END)
    model, weights = tiny_clip
    (work / "params.yaml").write_text(PARAMS.format(model=model, weights=weights))
    before = listing(tmp_path)
    command(work, "embed", "--source", "evil")
    command(work, "retrieve")
    after = listing(tmp_path)
    assert {name: after[name] for name in before} == before
    written = {Path(name).parts[:3] for name in after.keys() - before.keys()}
    assert {parts[0] for parts in written} == {"work"}
    assert {parts[1] for parts in written} == {"data", "reports", "cache"}
    stats = json.loads((work / "reports/stats/embed-evil.json").read_text())
    assert (stats["items"], stats["skipped"]) == (len(evil), 2)
