"""Images that files of others name, found among ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.formats.sources import sample_key
from pipeline.importers.images import parse_prefixes
from pipeline.params.sources import SourceParams
from tests.importers.helpers import places, random_tensors, write_pickle


def test_bare_names_are_found_in_subfolders_unless_two_have_them(
    tmp_path: Path, pool: SourceParams, import_embeddings: Callable
) -> None:
    for folder in ("n01", "n02"):
        (pool.root / folder).mkdir()
    (pool.root / "0.jpg").rename(pool.root / "n01" / "n01_0.JPEG")
    (pool.root / "1.jpg").rename(pool.root / "n01" / "same.jpg")
    (pool.root / "2.jpg").rename(pool.root / "n02" / "same.jpg")
    tensors = random_tensors(["n01_0.JPEG", "same.jpg"])
    rows, stats = import_embeddings(write_pickle(tmp_path / "emb.pkl", tensors))
    assert [row["key"] for row in rows] == [sample_key("pool", "n01/n01_0.JPEG")]
    assert stats["skipped_items"] == [{"item": "same.jpg", "reason": "2 images have this name"}]


def test_several_sources_and_the_longest_prefix(
    pool: SourceParams, make_image_folder: Callable[..., Path], import_archives: Callable
) -> None:
    other = SourceParams(root=make_image_folder("other/images"))
    rows, _ = import_archives(
        {"cat": ["/data/pool/1.jpg"], "dog": ["/data/pass/images/1.jpg"]},
        sources={"pool": pool, "other": other},
        prefixes=["/data=/nowhere", f"/data/pool={pool.root}", f"/data/pass={other.root.parent}"],
    )
    assert [(row.category, row.source) for row in rows] == [("cat", "pool"), ("dog", "other")]


def test_nothing_outside_the_sources_is_opened(
    tmp_path: Path, pool: SourceParams, import_archives: Callable
) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    hostile = [
        "../secret.png",
        f"{pool.root}/../secret.png",
        f"{tmp_path}/secret.png",
        "/old/../secret.png",
        "/etc/passwd",
        f"{pool.root}",
        "",
        "nul\0.jpg",
        "\ud800.jpg",
    ]
    rows, stats = import_archives(
        {"cat": ["0.jpg", *hostile], "dog": []}, prefixes=[f"/old={pool.root}"]
    )
    assert places(rows) == [("cat", 1, "0.jpg")]
    assert stats["skipped"] == len(hostile)
    assert {item["reason"] for item in stats["skipped_items"]} == {"no such image"}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_the_size_is_that_of_the_upright_image(
    pool: SourceParams, import_archives: Callable, suffix: str
) -> None:
    image = Image.new("RGB", (60, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(pool.root / f"turned{suffix}", exif=exif)
    rows, _ = import_archives({"cat": [f"turned{suffix}"], "dog": []})
    assert (rows[0].width, rows[0].height) == (20, 60)


def test_damaged_and_large_images_are_skipped_with_their_reason(
    pool: SourceParams, import_archives: Callable
) -> None:
    (pool.root / "1.jpg").write_bytes(b"")
    (pool.root / "2.jpg").write_bytes(b"plain text")
    Image.new("RGB", (200, 100)).save(pool.root / "3.jpg")
    rows, stats = import_archives({"cat": [f"{n}.jpg" for n in range(4)], "dog": []})
    assert places(rows) == [("cat", 1, "0.jpg")]
    reasons = {Path(item["item"]).name: item["reason"] for item in stats["skipped_items"]}
    assert reasons == {
        "1.jpg": "empty file",
        "2.jpg": "not an image",
        "3.jpg": "too large: 200x100",
    }


@pytest.mark.parametrize("prefix", ["/data", "=/data", ""])
def test_a_prefix_without_both_parts_is_refused(prefix: str) -> None:
    with pytest.raises(PipelineError, match="expected OLD=NEW"):
        parse_prefixes([prefix])


def test_a_prefix_given_twice_is_refused() -> None:
    with pytest.raises(PipelineError, match="'/data' is given twice"):
        parse_prefixes(["/data=a", "/data/=b"])


def test_sources_of_parquet_files_are_refused(
    pool: SourceParams, import_archives: Callable
) -> None:
    source = SourceParams(format="parquet", root=pool.root)
    with pytest.raises(PipelineError, match=r"index\.pool\.format: .* no names"):
        import_archives({"cat": ["0.jpg"], "dog": []}, sources={"pool": source})
