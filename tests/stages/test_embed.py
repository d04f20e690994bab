"""The embed stage on real files of the three formats, with a tiny random CLIP."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.formats.sources import list_images
from pipeline.formats.tables import list_embedding_shards
from pipeline.models.clip import load_clip
from pipeline.params.base import EncoderParams
from pipeline.params.sections import EmbedParams
from pipeline.params.sources import SourceParams
from pipeline.stages import embed
from tests.locales import LOCALES, run_in_locale
from tests.processes import Fork
from tests.stages.tiny_checkpoint import write_checkpoint

KILLED_IMAGES = 800


@pytest.fixture
def params(tiny_clip: tuple[Path, Path]) -> EmbedParams:
    model, weights = (str(path) for path in tiny_clip)
    encoder = EncoderParams(model=model, pretrained=weights)
    return EmbedParams(encoder=encoder, batch_size=3, shard_size=5, workers=0, max_error_rate=1)


@pytest.fixture
def run(
    tmp_path: Path, params: EmbedParams, runtime: Runtime
) -> Callable[..., tuple[pa.Table, dict[str, Any]]]:
    """Function that embeds a source and returns all rows and the stats."""

    def run_embed(
        source: SourceParams, out: str = "embeddings/pool", **changes: Any
    ) -> tuple[pa.Table, dict[str, Any]]:
        cache = changes.pop("cache", "cache")
        embed.run(
            name="pool",
            source=source,
            out_dir=tmp_path / out,
            params=params.model_copy(update=changes),
            runtime=replace(runtime, cache_dir=tmp_path / cache),
            stats_path=tmp_path / "stats.json",
        )
        tables = [pq.read_table(path) for path in sorted((tmp_path / out).glob("*.parquet"))]
        return pa.concat_tables(tables), json.loads((tmp_path / "stats.json").read_text())

    return run_embed


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_of_a_folder(
    run: Callable, make_image_folder: Callable, params: EmbedParams, tmp_path: Path
) -> None:
    root = make_image_folder()
    source = SourceParams(root=root)
    table, stats = run(source)
    refs = list(list_images("pool", source))
    rows = table.to_pylist()
    assert [row["key"] for row in rows] == [ref.key for ref in refs]
    assert [(row["width"], row["height"]) for row in rows] == [(20 + n, 30 - n) for n in range(8)]
    assert [row["bytes"] for row in rows] == [Path(ref.path).stat().st_size for ref in refs]
    assert {row["source"] for row in rows} == {"pool"}
    assert {(row["status"], row["error_message"]) for row in rows} == {("ok", None)}
    assert [path.name for path in sorted((tmp_path / "embeddings/pool").iterdir())] == [
        "00000.parquet",
        "00001.parquet",
        "_manifest.json",
    ]
    assert (stats["items"], stats["skipped"], stats["counts"]) == (8, 0, {"cached": 0})

    encoder = load_clip(params.encoder, torch.device("cpu"))
    for row, ref in zip(rows, refs, strict=True):
        pixels = encoder.preprocess(Image.open(ref.path).convert("RGB"))
        expected = encoder.encode_images(pixels.unsqueeze(0))[0].numpy()
        embedding = np.frombuffer(row["embedding"], "<f2").astype(np.float32)
        np.testing.assert_allclose(embedding, expected, atol=1e-3)
        assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-3)


def test_unreadable_images_are_rows_and_listed(run: Callable, make_image_folder: Callable) -> None:
    root = make_image_folder(count=4)
    whole = (root / "0.jpg").read_bytes()
    (root / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "2.jpg").write_bytes(b"")
    (root / "x.png").write_bytes(b"<html>")
    table, stats = run(SourceParams(root=root))
    rows = table.to_pylist()
    assert [row["status"] for row in rows] == ["ok", "skipped", "skipped", "ok", "skipped"]
    assert [row["error_message"] for row in rows][1:3] == ["truncated", "empty file"]
    assert rows[1]["embedding"] is None
    assert rows[1]["sha256"] is not None
    assert rows[2]["bytes"] == 0
    assert (stats["items"], stats["skipped"]) == (2, 3)
    assert stats["skipped_items"] == [
        {"item": f"{root}/1.jpg", "reason": "truncated"},
        {"item": f"{root}/2.jpg", "reason": "empty file"},
        {"item": f"{root}/x.png", "reason": "not an image"},
    ]


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_nothing_readable_is_an_error_that_leaves_nothing(
    run: Callable, tmp_path: Path, content: bytes
) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for number in range(3):
        (root / f"{number}.jpg").write_bytes(content)
    with pytest.raises(PipelineError, match=r"none of the 3 images .*0\.jpg: .*index\.pool\.root"):
        run(SourceParams(root=root))
    assert not (tmp_path / "stats.json").exists()
    assert not (tmp_path / "embeddings").exists()


def test_empty_index_keeps_the_old_output(
    run: Callable, make_image_folder: Callable, tmp_path: Path
) -> None:
    run(SourceParams(root=make_image_folder(count=2)))
    before = shard_bytes(tmp_path / "embeddings/pool")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PipelineError, match="no images below"):
        run(SourceParams(root=tmp_path / "empty"))
    assert shard_bytes(tmp_path / "embeddings/pool") == before


def test_workers_do_not_change_a_byte(
    run: Callable, make_image_folder: Callable, tmp_path: Path
) -> None:
    root = make_image_folder(count=8)
    (root / "3.jpg").write_bytes(b"broken")
    shutil.copy(root / "0.jpg", root / "9.jpg")
    outputs = []
    for workers in (0, 2):
        run(
            SourceParams(root=root),
            out=f"out/{workers}",
            workers=workers,
            cache=f"cache{workers}",
        )
        outputs.append(shard_bytes(tmp_path / f"out/{workers}"))
    assert outputs[0] == outputs[1]


def test_cached_images_are_not_embedded_again(
    run: Callable, make_image_folder: Callable, tmp_path: Path
) -> None:
    root = make_image_folder(count=6)
    run(SourceParams(root=root))
    first = shard_bytes(tmp_path / "embeddings/pool")
    _, stats = run(SourceParams(root=root))
    assert stats["counts"]["cached"] == 6
    assert shard_bytes(tmp_path / "embeddings/pool") == first

    shutil.rmtree(tmp_path / "embeddings")
    (root / "new.jpg").write_bytes((root / "0.jpg").read_bytes() + b"tail")
    (root / "0.jpg").rename(root / "moved.jpg")
    table, stats = run(SourceParams(root=root), workers=2)
    assert (stats["items"], stats["counts"]["cached"]) == (7, 6)
    by_name = {Path(row["path"]).name: row for row in table.to_pylist()}
    assert by_name["moved.jpg"]["embedding"] == by_name["new.jpg"]["embedding"]
    assert (by_name["moved.jpg"]["width"], by_name["moved.jpg"]["height"]) == (20, 30)


def test_cache_is_of_one_encoder(
    run: Callable, make_image_folder: Callable, params: EmbedParams, tmp_path: Path
) -> None:
    source = SourceParams(root=make_image_folder(count=3))
    before, _ = run(source)
    encoder = load_clip(params.encoder, torch.device("cpu"))
    state = {name: tensor + 0.1 for name, tensor in encoder.clip.state_dict().items()}
    torch.save(state, tmp_path / "other.pt")
    other = EncoderParams(model=params.encoder.model, pretrained=str(tmp_path / "other.pt"))
    after, stats = run(source, encoder=other)
    assert stats["counts"]["cached"] == 0
    assert before["embedding"] != after["embedding"]


def test_lower_size_limit_applies_to_cached_images(
    run: Callable, make_image_folder: Callable
) -> None:
    source = SourceParams(root=make_image_folder(count=2))  # 20 x 30 and 21 x 29
    run(source)
    table, _ = run(source, max_pixels=605)
    assert table["status"].to_pylist() == ["ok", "skipped"]
    assert table["error_message"].to_pylist() == [None, "too large: 21x29"]


def test_a_killed_run_continues(run: Callable, runtime: Runtime, tmp_path: Path) -> None:
    """SIGKILL once the first results are on disk; then the rest only, and the very same bytes."""
    root = tmp_path / "images"
    root.mkdir()
    generator = np.random.default_rng(0)
    for number in range(KILLED_IMAGES):
        pixels = generator.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{number:04d}.bmp")
    source = SourceParams(root=root)
    process = Fork(lambda: run(source, batch_size=32, shard_size=300))
    process.wait_until(lambda: any(runtime.cache_dir.rglob("*.parquet")))
    process.kill()
    assert not (tmp_path / "embeddings/pool").exists()

    settings = {"batch_size": 32, "shard_size": 300}
    _, stats = run(source, **settings)
    assert 256 <= stats["counts"]["cached"] < KILLED_IMAGES
    run(source, out="fresh/pool", cache="fresh_cache", **settings)
    assert shard_bytes(tmp_path / "embeddings/pool") == shard_bytes(tmp_path / "fresh/pool")


def test_tar_and_parquet_give_the_folder_s_embeddings(
    run: Callable, make_image_folder: Callable, tmp_path: Path
) -> None:
    root = make_image_folder(count=4)
    files = [(path.name, path.read_bytes()) for path in sorted(root.iterdir())]
    for name in ("tars", "tables"):
        (tmp_path / name).mkdir()
    with tarfile.open(tmp_path / "tars/00000.tar", "w") as tar:
        for name, data in files:
            for suffix, content in ((".jpg", data), (".json", b"{}")):
                info = tarfile.TarInfo(Path(name).stem + suffix)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    images = pa.array([{"bytes": data, "path": name} for name, data in files])
    pq.write_table(pa.table({"image": images}), tmp_path / "tables/0.parquet")
    expected, _ = run(SourceParams(root=root))
    sources = [
        SourceParams(root=tmp_path / "tars", format="webdataset", pattern="{00000..00000}.tar"),
        SourceParams(root=tmp_path / "tables", format="parquet"),
    ]
    for source, members in zip(sources, (["0.jpg", "3.jpg"], ["0", "3"]), strict=True):
        table, _ = run(source, cache=source.format)
        assert table["embedding"].to_pylist() == expected["embedding"].to_pylist()
        assert table["sha256"] == expected["sha256"]
        assert [table["member"][0].as_py(), table["member"][3].as_py()] == members
        assert not set(table["key"].to_pylist()) & set(expected["key"].to_pylist())
    offsets = pq.read_table(tmp_path / "embeddings/pool/00000.parquet")["offset"].to_pylist()
    assert offsets == [None] * 4


def test_broken_tar_stops_the_stage_with_its_name(run: Callable, tmp_path: Path) -> None:
    root = tmp_path / "tars"
    root.mkdir()
    (root / "0.tar").write_bytes(b"")
    with pytest.raises(PipelineError, match=r"0\.tar: broken"):
        run(SourceParams(root=root, format="webdataset"))


@pytest.mark.parametrize("damage", ["missing", "cut", "swapped", "strange"])
def test_retrieve_finds_shards_that_are_not_those_of_the_manifest(
    run: Callable, make_image_folder: Callable, tmp_path: Path, damage: str
) -> None:
    run(SourceParams(root=make_image_folder(count=8)))
    first, second = sorted((tmp_path / "embeddings/pool").glob("*.parquet"))
    assert list_embedding_shards([first.parent]) == [first, second]
    if damage == "missing":
        first.unlink()
    elif damage == "cut":
        first.write_bytes(first.read_bytes()[:-1])
    elif damage == "swapped":
        first.rename(tmp_path / "aside")
        second.rename(first)
        (tmp_path / "aside").rename(second)
    else:
        shutil.copy(first, first.with_name("00002.parquet"))
    with pytest.raises(PipelineError, match=r"0000.\.parquet: .* bytes, _manifest\.json says"):
        list_embedding_shards([first.parent])


def test_files_that_are_no_images_are_counted_by_kind(
    run: Callable, make_image_folder: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_image_folder(count=3)
    (root / "0.jpg").rename(root / "0")
    (root / "gone.jpg").symlink_to("nowhere")
    for name in ("a.heic", "b.heic", "README", "notes.txt"):
        (root / name).write_bytes(b"text")
    _, stats = run(SourceParams(root=root))
    assert (stats["items"], stats["skipped"]) == (3, 1)
    assert stats["skipped_items"] == [{"item": f"{root}/gone.jpg", "reason": "file is missing"}]
    assert stats["left_out"] == {".heic": 2, "without extension": 1}
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith(", left out: 2 .heic, 1 without extension")


def test_every_member_of_a_foreign_tar_is_read_or_listed(
    run: Callable, make_image_folder: Callable, tmp_path: Path
) -> None:
    pictures = make_image_folder(count=4)
    for number in (0, 2):
        with tarfile.open(tmp_path / f"{number}.part", "w") as tar:
            for name in (f"{number}.jpg", f"{number + 1}.jpg"):
                tar.add(pictures / name, name)
            link = tarfile.TarInfo(f"link{number}.jpg")
            link.type, link.linkname = tarfile.LNKTYPE, f"{number}.jpg"
            tar.addfile(link)
            link = tarfile.TarInfo(f"out{number}.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    (tmp_path / "tars").mkdir()
    parts = [(tmp_path / f"{number}.part").read_bytes() for number in (0, 2)]
    (tmp_path / "tars/0.tar").write_bytes(b"".join(parts))
    table, stats = run(SourceParams(format="webdataset", root=tmp_path / "tars"))
    rows = {row["member"]: row for row in table.to_pylist()}
    assert (len(rows), stats["items"], stats["skipped"]) == (8, 6, 2)
    assert rows["link2.jpg"]["embedding"] == rows["2.jpg"]["embedding"]
    assert rows["out0.jpg"]["error_message"] == "link to /etc/passwd, which is not in the tar"


IN_C = """
import os, sys, torch
from pathlib import Path
from pipeline.engine.runtime import Runtime
from pipeline.params.base import EncoderParams
from pipeline.params.sections import EmbedParams, EvaluateParams
from pipeline.params.sources import SourceParams
from pipeline.stages import embed, predict
model, weights, checkpoint, work = sys.argv[1:]
work, folder = Path(work), chr(0x72AC)
runtime = Runtime(torch.device("cpu"), None, 0, work / "cache")
encoder = EncoderParams(model=model, pretrained=weights)
for format in ("folder", "webdataset"):
    embed.run(
        name="pool", source=SourceParams(format=format, root=folder), out_dir=work / format,
        params=EmbedParams(encoder=encoder, workers=0), runtime=runtime,
        stats_path=work / f"{format}.json",
    )
predict.run(
    inputs=[Path(os.fsdecode(folder.encode()))], categories=None,
    checkpoint_dir=Path(checkpoint), out_dir=work / "predict", params=EvaluateParams(),
    runtime=runtime,
)
"""


def test_names_are_the_same_under_a_locale_without_their_letters(
    tmp_path: Path, tiny_clip: tuple[Path, Path], make_image_folder: Callable
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_clip)
    root = make_image_folder("犬", count=1)
    (root / "0.jpg").rename(root / "Müller 犬.jpg")
    with tarfile.open(root / "ß.tar", "w") as tar:
        tar.add(root / "Müller 犬.jpg", "Müller/犬.jpg")
    (root / "gone ü.jpg").symlink_to("nowhere")
    made = []
    for name in LOCALES:
        work = tmp_path / name
        run_in_locale(name, IN_C, *tiny_clip, checkpoint, work, cwd=tmp_path)
        rows = [
            (row["key"], row["path"], row["member"], row["status"])
            for format in ("folder", "webdataset")
            for row in pq.read_table(work / format / "00000.parquet").to_pylist()
        ]
        predicted = json.loads((work / "predict/predictions.json").read_text("utf-8"))
        overlays = sorted(path.name for path in (work / "predict/overlays").iterdir())
        made.append((rows, predicted["images"], predicted["skipped"], overlays))
    assert made[0] == made[1]
    rows, images, skipped, _ = made[1]
    assert rows[0][1:] == ("犬/Müller 犬.jpg", None, "ok")
    assert rows[2][1:] == ("犬/ß.tar", "Müller/犬.jpg", "ok")
    assert images[0]["file_name"] == "犬/Müller 犬.jpg"
    assert [Path(item["item"]).name for item in skipped] == ["gone ü.jpg"]


def test_a_share_of_lost_images_above_the_limit_fails_however_few(
    run: Callable, make_image_folder: Callable
) -> None:
    root = make_image_folder(count=5)
    (root / "1.jpg").write_bytes(b"")
    run(SourceParams(root=root), max_error_rate=0.01)
    (root / "2.jpg").write_bytes(b"")
    with pytest.raises(PipelineError, match=r"2 of 5 images .*embed\.max_error_rate: 0\.01 allows"):
        run(SourceParams(root=root), max_error_rate=0.01)
