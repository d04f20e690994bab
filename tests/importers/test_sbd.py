"""SBD's label maps beside VOC's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from typer.testing import CliRunner

from pipeline.benchmarks.opening import open_truth
from pipeline.benchmarks.voc import VocWriter, read_index_png, voc_palette
from pipeline.cli import app
from pipeline.errors import PipelineError
from pipeline.importers import sbd
from pipeline.params.benches import VocBench
from tests.benchmarks.fixtures import jpeg, save_text

OWN = np.array([[1, 0, 255], [0, 0, 0]])


def write_mat(path: Path, labels: Any) -> None:
    """A file of one struct GTcls, as SBD's are: Segmentation among other fields."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {"Boundaries": np.zeros((2, 2)), "Segmentation": labels, "CategoriesPresent": [1]}
    savemat(path, {"GTcls": fields}, do_compression=True)


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """VOC of two images for training and one for validation, and three more without masks."""
    root = tmp_path / "VOC2012"
    writer = VocWriter(root)
    for image_id in ("t1", "t2", "v1"):
        writer.add(image_id, jpeg((2, 3)), OWN, OWN)
    for image_id in ("a", "b", "c"):
        (root / f"JPEGImages/{image_id}.jpg").write_bytes(jpeg((2, 3)))
    writer.write_split("train", ["t2", "t1"])
    writer.write_split("val", ["v1"])
    return root


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """SBD of three further images, one of VOC's train and one of its val."""
    root = tmp_path / "benchmark_RELEASE" / "dataset"
    for number, image_id in enumerate(("a", "b", "c", "t1", "v1")):
        write_mat(root / f"cls/{image_id}.mat", np.full((2, 3), number, np.uint8))
    save_text(root / "train.txt", "c", "v1", "a")
    save_text(root / "val.txt", "t1", "b")
    return root


def run(dataset: Path, voc: Path) -> dict[str, Any]:
    stats_path = voc.parent / "stats.json"
    sbd.run(sbd_dir=dataset, voc_dir=voc, stats_path=stats_path)
    return json.loads(stats_path.read_text())


def labels_of(voc: Path, image_id: str) -> list[list[int]]:
    return read_index_png(voc / f"SegmentationClass/{image_id}.png").tolist()


def trainaug(voc: Path) -> list[str]:
    return (voc / "ImageSets/Segmentation/trainaug.txt").read_text().split()


def test_maps_of_images_that_voc_has_no_masks_of_are_written(dataset: Path, voc: Path) -> None:
    stats = run(dataset, voc)
    assert [labels_of(voc, image_id) for image_id in "abc"] == [[[n] * 3] * 2 for n in range(3)]
    assert labels_of(voc, "t1") == labels_of(voc, "v1") == OWN.tolist()
    assert trainaug(voc) == ["t2", "t1", "a", "b", "c"]
    assert (stats["items"], stats["skipped"]) == (3, 0)
    assert stats["warnings"] == ["trainaug has 5 images, the published one 10,582"]
    with Image.open(voc / "SegmentationClass/b.png") as image:
        assert image.mode == "P"
        assert image.getpalette() == voc_palette().ravel().tolist()


def test_the_list_is_read_as_a_benchmark(dataset: Path, voc: Path) -> None:
    run(dataset, voc)
    bench = VocBench(format="voc", root=voc, split="trainaug")
    maps = {e.image_id: e.semantic().tolist() for e in open_truth(bench, [], field="train.data")}
    assert list(maps) == ["t2", "t1", "a", "b", "c"]
    assert maps["t2"] == [[1, 0, -1], [0, 0, 0]]
    assert maps["c"] == [[2] * 3] * 2


def test_the_published_count_has_no_warning(
    dataset: Path, voc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sbd, "NUM_TRAINAUG", 5)
    assert "warnings" not in run(dataset, voc)


@pytest.mark.parametrize("parts", [0, 1, 2])
def test_the_folder_may_be_one_that_it_was_unpacked_in(
    dataset: Path, voc: Path, parts: int
) -> None:
    run([dataset, dataset.parent, dataset.parent.parent][parts], voc)
    assert len(trainaug(voc)) == 5


def test_a_second_run_changes_no_byte(dataset: Path, voc: Path) -> None:
    first = run(dataset, voc)
    files = {path: path.read_bytes() for path in voc.rglob("*") if path.is_file()}
    times = {path: path.stat().st_mtime_ns for path in (voc / "SegmentationClass").iterdir()}
    second = run(dataset, voc)
    assert {path: path.read_bytes() for path in voc.rglob("*") if path.is_file()} == files
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert (first["items"], second["items"]) == (3, 3)


def test_a_run_that_was_cut_off_goes_on(dataset: Path, voc: Path) -> None:
    run(dataset, voc)
    whole = {path: path.read_bytes() for path in voc.rglob("*") if path.is_file()}
    for name in ("SegmentationClass/b.png", "ImageSets/Segmentation/trainaug.txt"):
        (voc / name).unlink()
    run(dataset, voc)
    assert {path: path.read_bytes() for path in voc.rglob("*") if path.is_file()} == whole


def test_a_map_in_a_cell_is_read_too(tmp_path: Path) -> None:
    cell = np.empty((1, 1), dtype=object)
    cell[0, 0] = np.array([[3, 0]], np.uint8)
    write_mat(tmp_path / "a.mat", cell)
    assert sbd.read_map(tmp_path / "a.mat").tolist() == [[3, 0]]


def hostile_mats() -> dict[str, Any]:
    return {
        "empty": b"",
        "text": b"<html>",
        "no struct": {"GTcls": np.zeros((2, 3))},
        "other variable": {"GTinst": {"Segmentation": np.zeros((2, 3), np.uint8)}},
        "no field": {"GTcls": {"Boundaries": np.zeros((2, 3))}},
        "floats": {"GTcls": {"Segmentation": np.full((2, 3), 0.5)}},
        "letters": {"GTcls": {"Segmentation": "cat"}},
        "three axes": {"GTcls": {"Segmentation": np.zeros((2, 3, 2), np.uint8)}},
        "no pixel": {"GTcls": {"Segmentation": np.zeros((0, 0), np.uint8)}},
        "beyond VOC": {"GTcls": {"Segmentation": np.full((2, 3), 21, np.uint8)}},
        "negative": {"GTcls": {"Segmentation": np.full((2, 3), -1, np.int16)}},
        "other size": {"GTcls": {"Segmentation": np.zeros((3, 2), np.uint8)}},
    }


@pytest.mark.parametrize("name", hostile_mats())
def test_a_file_that_cannot_be_used_is_skipped_with_its_image(
    dataset: Path, voc: Path, name: str
) -> None:
    content, path = hostile_mats()[name], dataset / "cls/b.mat"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        savemat(path, content)
    stats = run(dataset, voc)
    assert trainaug(voc) == ["t2", "t1", "a", "c"]
    assert not (voc / "SegmentationClass/b.png").exists()
    assert [entry["item"] for entry in stats["skipped_items"]] == [str(path)]
    assert "\n" not in stats["skipped_items"][0]["reason"]


def test_a_file_that_is_cut_off_anywhere_is_skipped(dataset: Path, voc: Path) -> None:
    path = dataset / "cls/b.mat"
    content = path.read_bytes()
    for length in range(0, len(content), 13):
        path.write_bytes(content[:length])
        stats = run(dataset, voc)
        assert (stats["skipped"], "b" in trainaug(voc)) == (1, False)


@pytest.mark.parametrize(
    "name",
    [
        "benchmark_RELEASE/dataset/cls/a.mat",
        "benchmark_RELEASE/dataset/train.txt",
        "benchmark_RELEASE/dataset/val.txt",
        "VOC2012/ImageSets/Segmentation/train.txt",
        "VOC2012/ImageSets/Segmentation/val.txt",
        "VOC2012/JPEGImages/a.jpg",
        "VOC2012/JPEGImages/t1.jpg",
        "VOC2012/SegmentationClass/t1.png",
    ],
)
def test_a_missing_file_is_named_and_nothing_is_written(
    tmp_path: Path, dataset: Path, voc: Path, name: str
) -> None:
    (tmp_path / name).unlink()
    with pytest.raises(PipelineError, match=rf"{name}: no such file"):
        run(dataset, voc)
    assert not (voc / "SegmentationClass/b.png").exists()
    assert not (voc / "ImageSets/Segmentation/trainaug.txt").exists()


def test_a_folder_that_is_not_sbd_is_refused(tmp_path: Path, voc: Path) -> None:
    with pytest.raises(PipelineError, match=r"expected that of SBD, with cls/ID\.mat"):
        run(tmp_path / "elsewhere", voc)


def test_the_command_needs_no_params(
    dataset: Path, voc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(voc.parent)
    words = ["import", "sbd", "--from", str(dataset), "--voc", "VOC2012"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "import sbd: 3 images, 0 skipped" in result.output
    assert len(trainaug(voc)) == 5
    assert Path("reports/stats/import-sbd.json").is_file()
