"""Scores of archives, pseudo-masks and pseudo-labels on two images worked out by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.benchmarks.voc import encode_index_png
from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.formats.images import encode_jpeg, encode_label, encode_png
from pipeline.formats.labels import IGNORE_INDEX, encode_confidence
from pipeline.formats.tables import ArchiveRow, write_archives
from pipeline.params.sections import AuditParams
from pipeline.stages import audit
from pipeline.training.settings import TargetSettings
from tests.formats.shard_folders import write_shards

CATEGORIES = ["dog", "cat"]
TRUE_CATEGORIES = ["cat", "horse", "dog"]  # other ids than those of the archives


@dataclass
class Found:
    """An archive image, 4 x 8 pixels, and what the pipeline made of it."""

    path: str
    label_id: int
    mask: np.ndarray
    labels: np.ndarray
    confidence: float = 0.0
    scale: int = 1


def columns(values: str) -> np.ndarray:
    """4 x 8 map whose columns hold the digits of `values`; v is void."""
    row = [IGNORE_INDEX if value == "v" else int(value) for value in values]
    return np.tile(row, (4, 1))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Truth of three images: a cat and a thing of no category; a dog and void; a horse."""
    root = tmp_path / "truth"
    for part, maps in {
        "SegmentationClass": {"cat": "11000000", "dog": "3333vv00", "none": "00222200"},
        "SegmentationObject": {"cat": "11220000", "dog": "1111vv00", "none": "00111100"},
    }.items():
        (root / part).mkdir(parents=True)
        for stem, values in maps.items():
            (root / part / f"{stem}.png").write_bytes(encode_index_png(columns(values)))
    return root


CAT = Found("index/deep/cat.jpg", 2, columns("11100000") > 0, columns("22000000"))
DOG = Found("index/dog.png", 1, columns("11001100") > 0, columns("00000022"))


def write_inputs(folder: Path, found: list[Found]) -> None:
    rows, samples = [], []
    for rank, item in enumerate(found, start=1):
        fields = {
            "category": ["", *CATEGORIES][item.label_id],
            "label_id": item.label_id,
            "rank": rank,
            "key": f"{rank:020d}",
            "similarity": 0.5,
            "source": "photos",
            "path": item.path,
            "member": None,
            "sha256": "0" * 64,
        }
        size = {"width": 8, "height": 4}
        rows.append(ArchiveRow(**fields, **size, offset=None))
        small = slice(None, None, item.scale)
        mask, labels = item.mask[small, small], item.labels[small, small]
        samples.append(
            {
                "__key__": f"{fields['key']}_{item.label_id}",
                "jpg": encode_jpeg(Image.new("RGB", mask.shape[::-1])),
                "mask.png": encode_png(mask),
                "label.png": encode_label(labels, 2),
                "confidence.png": encode_png(
                    encode_confidence(np.full(mask.shape, item.confidence))
                ),
                "json": {**fields, "original_width": 8, "original_height": 4},
            }
        )
    write_archives(folder / "archives.parquet", rows)
    write_shards(
        samples,
        folder / "labels",
        shard_size=2,
        settings={"pseudo_label": {"categories": CATEGORIES}},
    )


def run(
    tmp_path: Path, root: Path, runtime: Runtime, found: list[Found], **changes: object
) -> dict:
    write_inputs(tmp_path, found)
    params = AuditParams(**({"root": root, "categories": TRUE_CATEGORIES} | changes))
    audit.run(
        name="demo",
        audit=params,
        archives_path=tmp_path / "archives.parquet",
        masks_dir=tmp_path / "labels",
        labels_dir=tmp_path / "labels",
        metrics_path=tmp_path / "metrics.json",
        params=TargetSettings(confidence_threshold=0.5, conflict="category"),
        runtime=runtime,
        stats_path=tmp_path / "stats.json",
    )
    return json.loads((tmp_path / "metrics.json").read_text())


def test_scores_by_hand(tmp_path: Path, root: Path, runtime: Runtime) -> None:
    metrics = run(tmp_path, root, runtime, [CAT, DOG])
    assert metrics["archive_precision"] == 100
    assert metrics["negative_precision"] is None
    # Cat: 3 columns of 4 true ones. Dog: 2 of 4, the mask's other two lie on void.
    assert metrics["mask_iou"] == pytest.approx(100 * (3 / 4 + 2 / 4) / 2)
    # Cat alone: 2 columns of the mask's 3.
    assert metrics["mask_iou_category"] == pytest.approx(100 * (2 / 3 + 2 / 4) / 2, abs=0.01)
    # Columns right, of 8 + 6: background 5 + 2 of 5 + 2 + 1 + 2, dog 2 of 4, cat 2 of 3.
    saliency = (7 / 10 + 2 / 4 + 2 / 3) / 3
    assert metrics["label_miou_saliency"] == pytest.approx(100 * saliency, abs=0.01)
    # Dense labels: background 6 of 6 + 2 + 4, dog 0 of 4, cat 2 of 4.
    dense = (6 / 12 + 0 + 2 / 4) / 3
    assert metrics["label_miou_denseclip"] == pytest.approx(100 * dense, abs=0.01)
    # Without confidence `fused` is `saliency`.
    assert metrics["label_miou_fused"] == metrics["label_miou_saliency"]
    assert metrics["label_ignored_fused"] == 0
    assert (metrics["n_archive_images"], metrics["n_masks"]) == (2, 2)
    assert all(not isinstance(value, dict | list) for value in metrics.values())


def test_ignored_pixels_of_a_target_are_not_scored(
    tmp_path: Path, root: Path, runtime: Runtime
) -> None:
    sure = Found(CAT.path, 2, columns("10000000") > 0, columns("22220000"), confidence=1.0)
    metrics = run(tmp_path, root, runtime, [sure])
    # Of 8 columns 3 are ignored: one cat and two of background.
    assert metrics["label_ignored_fused"] == pytest.approx(100 * 3 / 8)
    assert metrics["label_miou_fused"] == 100
    assert metrics["label_miou_saliency"] < 100


def test_wrong_finds_and_negatives(tmp_path: Path, root: Path, runtime: Runtime) -> None:
    horse_as_cat = Found("index/none.jpg", 2, columns("00111100") > 0, columns("00000000"))
    negatives = [
        Found("index/none.jpg", 0, columns("00111100") > 0, columns("00000000")),
        Found(CAT.path, 0, columns("11000000") > 0, columns("00000000")),
    ]
    metrics = run(tmp_path, root, runtime, [CAT, horse_as_cat, *negatives])
    assert metrics["archive_precision"] == 50
    # A horse is nothing that the archives name.
    assert metrics["negative_precision"] == 50
    assert metrics["mask_iou"] == pytest.approx(100 * (3 / 4 + 1) / 2)
    assert metrics["mask_iou_category"] == pytest.approx(100 * (2 / 3 + 0) / 2, abs=0.01)
    assert metrics["n_masks"] == 2


def test_masks_return_to_the_original_size(tmp_path: Path, root: Path, runtime: Runtime) -> None:
    halved = Found(CAT.path, 2, columns("11110000") > 0, columns("22000000"), scale=2)
    metrics = run(tmp_path, root, runtime, [halved])
    assert metrics["mask_iou"] == 100
    assert metrics["label_miou_denseclip"] == 100


def test_images_without_truth_are_skipped_and_listed(
    tmp_path: Path, root: Path, runtime: Runtime
) -> None:
    stranger = Found("index/elsewhere.jpg", 1, columns("11110000") > 0, columns("00000000"))
    metrics = run(tmp_path, root, runtime, [CAT, stranger])
    assert (metrics["archive_precision"], metrics["n_archive_images"]) == (100, 1)
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["skipped_items"] == [{"item": "index/elsewhere.jpg", "reason": "no true mask"}]
    assert stats["items"] == 2


def test_without_masks_of_objects_the_pixels_of_any_category_are_objects(
    tmp_path: Path, root: Path, runtime: Runtime
) -> None:
    before = run(tmp_path, root, runtime, [CAT, DOG])
    (root / "SegmentationObject").rename(root / "unused")
    after = run(tmp_path, root, runtime, [CAT, DOG])
    # The mask of the cat: 3 columns, of which 2 are the cat's; the thing beside it is none now.
    assert after["mask_iou"] == after["mask_iou_category"] == before["mask_iou_category"]
    assert before["mask_iou"] != after["mask_iou"]
    assert {**after, "mask_iou": 0} == {**before, "mask_iou": 0}


def test_bad_truth_is_named(tmp_path: Path, root: Path, runtime: Runtime) -> None:
    stranger = Found("index/elsewhere.jpg", 1, columns("11110000") > 0, columns("00000000"))
    with pytest.raises(PipelineError, match=r"audits\.demo\.root: .*none of the 1 archive images"):
        run(tmp_path, root, runtime, [stranger])
    with pytest.raises(PipelineError, match=r"audits\.demo\.categories: the archives' dog is not"):
        run(tmp_path, root, runtime, [CAT], categories=["cat", "horse", "sheep"])
    with pytest.raises(PipelineError, match=r"nowhere/SegmentationClass: no such folder"):
        run(tmp_path, tmp_path / "nowhere", runtime, [CAT])
    with pytest.raises(PipelineError, match=r"dog\.png: label id 3"):
        run(tmp_path, root, runtime, [DOG], categories=["cat", "dog"])
    for part in ("SegmentationClass", "SegmentationObject"):
        (root / part / "cat.png").write_bytes(encode_index_png(np.zeros((5, 8), int)))
    with pytest.raises(PipelineError, match=r"cat\.png: 8x5 pixels, but .*cat\.jpg has 8x4"):
        run(tmp_path, root, runtime, [CAT])
    assert not (tmp_path / "metrics.json").exists()
