"""FiftyOne and Hugging Face: samples with all that is known of them, found again."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.exporters.fiftyone import Fiftyone
from pipeline.exporters.hf import Hf
from pipeline.exporters.open_fiftyone import relative_box
from pipeline.formats.images import decode_label, decode_png
from tests.exporters.hard_images import CATEGORIES, HEIGHT, WIDTH, written

VOID = -1


def test_fiftyone_samples_hold_objects_label_maps_and_facts(tmp_path: Path) -> None:
    images, line = written(Fiftyone, tmp_path)
    assert line == f"python {tmp_path}/open_fiftyone.py"
    samples = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))
    for sample, image in zip(samples, images, strict=True):
        assert (tmp_path / sample["image"]).read_bytes() == image.data
        assert sample["size"] == [image.width, image.height]
        assert sample["split"] == image.split
        for found, expected in zip(sample["objects"]["instances"], image.objects, strict=True):
            left, top, width, height = found["box"]
            mask = np.zeros((image.height, image.width), dtype=bool)
            crop = decode_png(base64.b64decode(found["mask"])) > 0
            mask[top : top + height, left : left + width] = crop
            assert np.array_equal(mask, expected.mask)
            assert found["label"] == CATEGORIES[expected.category - 1]
            assert found["score"] == expected.score
    first = samples[0]
    assert first["facts"] == {"source": "photos/IMG 1.jpg", **images[0].facts}
    assert [found["label"] for found in first["objects"]["truth"]] == ["cat"]
    assert "truth" not in samples[1]["objects"]
    labels = decode_label((tmp_path / first["semantic"]).read_bytes())
    assert np.array_equal(labels, images[0].semantic.astype(np.int16))
    assert (labels[0] == VOID).all()
    assert samples[2]["semantic"] is None
    assert json.loads((tmp_path / "categories.json").read_text(encoding="utf-8")) == list(
        CATEGORIES
    )


def test_fiftyone_itself_opens_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("fiftyone")
    images, _ = written(Fiftyone, tmp_path / "export")
    script = tmp_path / "export" / "open_fiftyone.py"
    look = tmp_path / "look.py"
    look.write_text(LOOK, encoding="utf-8")
    environment = {**os.environ, "FIFTYONE_DATABASE_DIR": str(tmp_path / "database")}
    for command in ([script, "--no-app", "--name", "hard"], [look]):
        run = subprocess.run(
            [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    assert [sample["masks"] for sample in seen] == [
        [np.packbits(found.mask).tolist() for found in image.objects] for image in images
    ]
    assert seen[0]["rank"] == 3


LOOK = """
import json
import fiftyone as fo, numpy as np
seen = []
dataset = fo.load_dataset("hard")
dataset.compute_metadata()
for sample in dataset:
    size = (sample.metadata.width, sample.metadata.height)
    masks = [
        np.packbits(found.to_segmentation(frame_size=size).mask > 0).tolist()
        for found in sample.instances.detections
    ]
    seen.append({"masks": masks, "rank": sample["rank"]})
print(json.dumps(seen))
"""


@pytest.mark.parametrize("side", [1, 7, 41, 96, 333])
def test_boxes_for_fiftyone_begin_and_end_at_their_pixels(side: int) -> None:
    for start in range(side):
        for extent in range(1, side - start + 1):
            x, _, width, _ = relative_box([start, 0, extent, 1], [side, 1])
            ends = int(side * x), int(side * min(x + width, 1))  # as FiftyOne computes them
            assert ends == (start, start + extent)


def test_hf_has_typed_parquet_files_a_split(tmp_path: Path) -> None:
    images, _ = written(Hf, tmp_path)
    files = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert files == ["train-00000.parquet", "validation-00000.parquet"]
    table = pq.read_table(tmp_path / "data" / files[0])
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    names = features["objects"][0]["category"]["names"]
    rows = [*table.to_pylist(), *pq.read_table(tmp_path / "data" / files[1]).to_pylist()]
    for row, image in zip(rows, images, strict=True):
        assert (row["name"], row["image"]["bytes"]) == (image.name, image.data)
        for found, expected in zip(row["objects"], image.objects, strict=True):
            assert np.array_equal(decode_png(found["mask"]["bytes"]) > 0, expected.mask)
            assert names[found["category"]] == CATEGORIES[expected.category - 1]
            assert found["score"] == expected.score
    assert np.array_equal(
        decode_label(rows[0]["semantic"]["bytes"]), images[0].semantic.astype(np.int16)
    )
    assert rows[2]["semantic"] is None
    assert json.loads(rows[0]["facts"])["rank"] == 3


def test_datasets_itself_loads_the_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images, _ = written(Hf, tmp_path / "export")
    loaded = datasets.load_dataset(str(tmp_path / "export"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 2, "validation": 1}
    row: dict[str, Any] = loaded["train"][0]
    assert row["image"].size == (WIDTH, HEIGHT)
    assert np.array_equal(np.array(row["image"]), np.array(Image.open(io.BytesIO(images[0].data))))
    for found, expected in zip(row["objects"], images[0].objects, strict=True):
        assert np.array_equal(np.array(found["mask"]) > 0, expected.mask)
        assert found["score"] == expected.score
    assert np.array(row["semantic"])[5, 4] == 1
    assert loaded["train"][1]["objects"] == []
    assert loaded["validation"][0]["semantic"] is None
    category = loaded["train"].features["objects"].feature["category"]
    assert category.names == ["background", *CATEGORIES]
