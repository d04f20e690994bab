"""Predictions of benchmarks and masks of archives, in what is exported of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.benchmarks.voc import VocBenchmark, VocWriter
from pipeline.errors import PipelineError
from pipeline.exporters import export
from pipeline.exporters.sources import ArchiveMasks, BenchPredictions, Found, Source
from pipeline.formats.images import encode_label, encode_png
from pipeline.formats.labels import IGNORE_INDEX
from pipeline.formats.objects import encode_objects
from pipeline.formats.predictions import StoredPrediction
from pipeline.formats.rle import RleObject, encode_mask
from tests.conftest import encoded_image, noise_image
from tests.formats.shard_folders import write_predictions, write_shards

NAMES = ["cat", "dog"]
H, W = 16, 24
LEFT, RIGHT = np.zeros((H, W), bool), np.zeros((H, W), bool)
LEFT[:, :5] = True
RIGHT[2:, 20:] = True
LABELS = np.where(RIGHT, 2, np.where(LEFT, 1, 0)).astype(np.int16)
LABELS[0, 10] = IGNORE_INDEX
OBJECTS = [RleObject(1, encode_mask(LEFT), 0.4), RleObject(2, encode_mask(RIGHT), 0.9)]


@dataclass
class Example:
    """An image of a benchmark that asks for names of its own."""

    image_id: str
    image_path: Path
    vocabulary: Sequence[str] | None = None


@dataclass
class SmallBenchmark:
    """A benchmark of examples at hand."""

    examples: list[Example]
    categories: Sequence[str] = tuple(NAMES)

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Any:
        return iter(self.examples)


def read_all(source: Source) -> dict[str, Found]:
    """What a source finds, by stem."""
    assert len(source) == len(list(source))
    return {entry.stem: entry.read() for entry in source}


def settings(categories: Sequence[str] = NAMES) -> dict[str, Any]:
    return {"predict_bench": {"categories": list(categories), "protocol": ["checkpoint: abc"]}}


def test_a_benchmarks_predictions_come_with_its_images_and_truth(tmp_path: Path) -> None:
    writer = VocWriter(tmp_path / "voc")
    numbers = np.where(RIGHT, 1, 0)
    jpeg = encoded_image(noise_image(0), "JPEG")
    for image_id in ("x", "y"):
        writer.add(image_id, jpeg, np.where(RIGHT, 2, 0), numbers)
    writer.write_split("val", ["x", "y"])
    benchmark = VocBenchmark(tmp_path / "voc", split="val", categories=NAMES, groups={})
    found = [(0, StoredPrediction("x", LABELS, objects=OBJECTS))]
    write_predictions(tmp_path / "shards", found, settings=settings())
    source = BenchPredictions(tmp_path / "shards", benchmark, name="voc", truth=True)
    out = tmp_path / "out"
    export.run(source=source, format_name="coco", out_dir=out)
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["source"]["protocol"] == ["checkpoint: abc"]
    assert manifest["skipped"] == [
        {"item": (tmp_path / "voc/JPEGImages/y.jpg").as_posix(), "reason": "no prediction of it"}
    ]
    content = json.loads((out / "annotations/instances_train.json").read_text(encoding="utf-8"))
    scores = [(item["category_id"], item["score"]) for item in content["annotations"]]
    assert scores == [(2, 0.9), (1, 0.4)]
    assert (out / "images/x.jpg").read_bytes() == jpeg
    first = next(iter(source)).read()
    np.testing.assert_array_equal(first.labels, LABELS)
    assert [(item.category, item.score) for item in first.truth or ()] == [(2, None)]
    np.testing.assert_array_equal((first.truth or ())[0].mask, RIGHT)


def test_masks_of_a_benchmark_are_those_of_the_pixels_as_stored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded_image(noise_image(0), "JPEG", exif=exif))
    found = [(0, StoredPrediction("x", LABELS, objects=OBJECTS))]
    write_predictions(tmp_path / "shards", found, settings=settings())
    benchmark: Any = SmallBenchmark([Example("x", path)])
    source = BenchPredictions(tmp_path / "shards", benchmark, name="own", truth=False)
    export.run(source=source, format_name="png16", out_dir=tmp_path / "out")
    with Image.open(tmp_path / "out/images/x.jpg") as image:
        assert image.size == (W, H)
        assert 0x0112 not in image.getexif()
    semantic = np.asarray(Image.open(tmp_path / "out/semantic/x.png"))
    np.testing.assert_array_equal(semantic, LABELS.astype(int) % 65536)


def test_names_of_single_images_get_ids_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded_image(noise_image(0), "JPEG"))
    found = [(0, StoredPrediction("x", LABELS, objects=OBJECTS))]
    write_predictions(tmp_path / "shards", found, settings=settings())
    benchmark: Any = SmallBenchmark([Example("x", path, ["owl", "cat"])])
    source = BenchPredictions(tmp_path / "shards", benchmark, name="own", truth=False)
    assert source.categories == ["cat", "dog", "owl"]
    image = read_all(source)["x"]
    assert [item.category for item in image.objects] == [3, 1]
    np.testing.assert_array_equal(
        image.labels, np.select([LABELS == 1, LABELS == 2, LABELS < 0], [3, 1, -1], 0)
    )


def test_without_objects_the_categories_of_the_label_map_are_those(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded_image(noise_image(0), "JPEG"))
    found = [(0, StoredPrediction("x", LABELS))]
    write_predictions(tmp_path / "shards", found, settings=settings())
    benchmark: Any = SmallBenchmark([Example("x", path)])
    source = BenchPredictions(tmp_path / "shards", benchmark, name="own", truth=False)
    cat, dog = read_all(source)["x"].objects
    assert (cat.category, cat.score, dog.category) == (1, None, 2)
    np.testing.assert_array_equal(cat.mask, LEFT)


def test_predictions_of_other_categories_are_refused(tmp_path: Path) -> None:
    write_predictions(
        tmp_path / "shards", [(0, StoredPrediction("x", LABELS))], settings=settings(["cat", "owl"])
    )
    benchmark: Any = SmallBenchmark([])
    with pytest.raises(PipelineError, match=r"not predictions of the categories of benches\.own"):
        BenchPredictions(tmp_path / "shards", benchmark, name="own", truth=False)


def sample(key: str, label_id: int, *, similarity: float, masks: Any) -> dict[str, Any]:
    """A sample as the stage mask writes it."""
    described = {
        "category": ["background", *NAMES][label_id],
        "label_id": label_id,
        "rank": 1 + label_id,
        "similarity": similarity,
        "key": key,
        "source": "pool",
        "path": f"photos/{key}.tar" if key == "packed" else f"photos/{key}.jpg",
        "member": "in/it.jpg" if key == "packed" else None,
        "sha256": f"{len(key):08x}",
        "original_width": 2 * W,
        "original_height": 2 * H,
    }
    return {
        "__key__": f"{key}_{label_id}",
        "jpg": encoded_image(noise_image(len(key)), "JPEG"),
        "mask.png": masks,
        "json": described,
    }


def archive_masks(folder: Path) -> Path:
    """Shards with an image of two archives, one of a tar with two objects, and a negative."""
    both = np.stack([LEFT, RIGHT])
    empty = encode_png(np.zeros((H, W), bool))
    samples = [
        sample("nothing", 0, similarity=0.5, masks=empty),
        sample("twice", 1, similarity=0.2, masks=encode_objects(LEFT[None])),
        sample("twice", 2, similarity=0.3, masks=encode_objects(LEFT[None])),
        sample("packed", 2, similarity=0.1, masks=encode_objects(both)),
    ]
    write_shards(samples, folder, shard_size=3, settings={"mask": {"source": "selfmask"}})
    return folder


def test_an_image_of_several_archives_comes_once(tmp_path: Path) -> None:
    source = ArchiveMasks(archive_masks(tmp_path / "masks"), NAMES)
    images = read_all(source)
    assert list(images) == ["nothing", "twice", "packed"]
    assert [item.category for item in images["twice"].objects] == [1, 2]
    assert images["twice"].facts["category"] == "dog"
    assert images["twice"].facts["rank"] == 3
    assert [row["category"] for row in images["twice"].facts["archives"]] == ["dog", "cat"]
    assert images["nothing"].objects == []
    left, right = images["packed"].objects
    np.testing.assert_array_equal(left.mask, LEFT)
    np.testing.assert_array_equal(right.mask, RIGHT)
    assert {left.category, right.category} == {2}


def test_the_archives_are_written_with_rank_and_similarity(tmp_path: Path) -> None:
    source = ArchiveMasks(archive_masks(tmp_path / "masks"), NAMES)
    export.run(source=source, format_name="yolo-seg", out_dir=tmp_path / "out", val_share=0)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))
    assert manifest["source"]["mask"] == {"source": "selfmask"}
    assert manifest["counts"] == {"objects": 4}
    packed = manifest["files"][2]
    assert packed["source"] == "photos/packed.tar:in/it.jpg"
    assert (packed["rank"], packed["similarity"], packed["sha256"]) == (3, 0.1, "00000006")
    assert (tmp_path / "out/labels/train/nothing.txt").read_text(encoding="utf-8") == ""


def test_dense_labels_are_label_maps_of_the_archives(tmp_path: Path) -> None:
    masks = archive_masks(tmp_path / "masks")
    keys = ["nothing_0", "twice_1", "twice_2", "packed_2"]
    confidence = encode_png(np.zeros((H, W), np.uint8))
    label = {"label.png": encode_label(LABELS, 2), "confidence.png": confidence}
    named = {"pseudo_label": {"categories": NAMES}}
    samples = [{"__key__": key, **label} for key in keys]
    write_shards(samples, tmp_path / "labels", shard_size=9, settings=named)
    images = read_all(ArchiveMasks(masks, NAMES, labels_dir=tmp_path / "labels"))
    np.testing.assert_array_equal(images["packed"].labels, LABELS)
    write_shards(samples[1:], tmp_path / "fewer", shard_size=9, settings=named)
    with pytest.raises(PipelineError, match="no labels of 1 of 4 masks"):
        ArchiveMasks(masks, NAMES, labels_dir=tmp_path / "fewer")


def test_masks_of_other_categories_are_refused(tmp_path: Path) -> None:
    masks = archive_masks(tmp_path / "masks")
    with pytest.raises(PipelineError, match="is of 'cat' as label id 1, which is not so"):
        ArchiveMasks(masks, ["dog", "cat"])
    with pytest.raises(PipelineError, match="is of 'dog' as label id 2, which is not so"):
        ArchiveMasks(masks, ["cat"])
