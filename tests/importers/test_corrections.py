"""What a person has corrected in another tool, as COCO and as Label Studio write it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline.benchmarks.voc import VocBenchmark
from pipeline.cli import app
from pipeline.errors import PipelineError
from pipeline.formats.corrections import Corrections
from pipeline.formats.images import encode_jpeg, encode_png
from pipeline.formats.rle import encode_mask
from pipeline.importers import corrections as importer
from pipeline.params.reading import read_params
from pipeline.vocabulary.categories import Names
from tests.formats.shard_folders import write_shards
from tests.formats.test_brush_rle import encode

CATEGORIES = ["cat", "dog"]
NAMES = Names(CATEGORIES, ["background", "grass"])
HEIGHT, WIDTH = 20, 30
# Path below the source -> colour. The two boats differ in content.
IMAGES = {"a/boat.jpg": 10, "b/boat.jpg": 20, "c/cat.jpg": 30, "dog.jpg": 40, "wide.jpg": 50}


def photo(level: int) -> bytes:
    return encode_jpeg(Image.new("RGB", (WIDTH, HEIGHT), (level, 200, 90)))


def sha256(name: str) -> str:
    return hashlib.sha256(photo(IMAGES[name])).hexdigest()


def box(top: int, left: int, height: int, width: int, size: Any = (HEIGHT, WIDTH)) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Photos, and masks of them; the last one is stored at half its size, in two archives."""
    samples = []
    for number, name in enumerate([*IMAGES, "wide.jpg"]):
        data, label_id = photo(IMAGES[name]), 1 + number % 2
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        stored = data
        if name == "wide.jpg":
            stored = encode_jpeg(Image.open(path).resize((WIDTH // 2, HEIGHT // 2)))
        fields = {"key": f"k{min(number, 4)}", "path": f"index/{name}", "member": None}
        if name == "dog.jpg":
            fields |= {"path": "index/0.tar", "member": "dog.jpg"}
        samples.append(
            {
                "__key__": f"{fields['key']}_{label_id}",
                "jpg": stored,
                "mask.png": encode_png(np.ones((2, 2), bool)),
                "json": fields
                | {"sha256": sha256(name), "category": CATEGORIES[label_id - 1]}
                | {"label_id": label_id, "original_height": HEIGHT, "original_width": WIDTH},
            }
        )
    write_shards(samples, tmp_path / "masks", shard_size=4)
    return tmp_path


def coco(
    images: list[str],
    objects: list[tuple[int, str, Any]],
    *,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    **changes: Any,
) -> dict[str, Any]:
    """COCO's JSON: objects are (image from 0, category, mask or polygons)."""
    categories = list(dict.fromkeys(["cat", "dog", *(name for _, name, _ in objects)]))
    return {
        "images": [
            {"id": i, "file_name": name, "height": size[0], "width": size[1], **changes}
            for i, name in enumerate(images)
        ],
        "categories": [{"id": 7 + i, "name": name} for i, name in enumerate(categories)],
        "annotations": [
            {
                "id": i,
                "image_id": image,
                "category_id": 7 + categories.index(name),
                "segmentation": encode_mask(shape) if isinstance(shape, np.ndarray) else shape,
                "iscrowd": 1,
            }
            for i, (image, name, shape) in enumerate(objects, start=1)
        ],
    }


def region(kind: str, label: str, size: tuple[int, int] = (HEIGHT, WIDTH), **value: Any) -> Any:
    return {
        "type": f"{kind}labels",
        "original_height": size[0],
        "original_width": size[1],
        "value": {**value, f"{kind}labels": [label]},
    }


def brush(mask: np.ndarray, label: str) -> Any:
    return region("brush", label, mask.shape, format="rle", rle=encode(mask))


def write_bench(world: Path, content: Any = None) -> None:
    """Write the folder `bench` of what was corrected; without it, of one image."""
    path = world / "corrected.json"
    path.write_text(json.dumps(content or coco(["dog.jpg"], [(0, "dog", box(1, 1, 9, 9))])))
    importer.write_benchmark(
        path=path,
        images_dir=world / "photos",
        corrections_dir=world / "corrections",
        out_dir=world / "bench",
        names=NAMES,
        stats_path=world / "stats.json",
    )


def task(image: str, *annotations: Any, **fields: Any) -> dict[str, Any]:
    done = [it if isinstance(it, dict) else {"result": it} for it in annotations]
    return {
        "data": {"image": image},
        "annotations": done,
        "predictions": [{"result": []}],
        **fields,
    }


def run(world: Path, content: Any, *, images: bool = False, **changes: Any) -> dict[str, Any]:
    """Import a file; returns the stats."""
    path = world / "corrected.json"
    path.write_text(json.dumps(content))
    arguments: dict[str, Any] = {
        "path": path,
        "images_dir": world / "photos" if images else None,
        "masks_dir": world / "masks",
        "out_dir": world / "corrections",
        "names": NAMES,
        "stats_path": world / "stats.json",
    }
    importer.run(**(arguments | changes))
    stats: dict[str, Any] = json.loads((world / "stats.json").read_text())
    return stats


def maps(world: Path, name: str) -> tuple[Any, Any]:
    """Label ids and object numbers of a corrected image."""
    found = Corrections(world / "corrections").get(sha256(name))
    assert found is not None
    return found.maps({"cat": 1, "dog": 2})


def reasons(stats: dict[str, Any]) -> dict[str, str]:
    return {entry["item"]: entry["reason"] for entry in stats["skipped_items"]}


class TestCoco:
    def test_masks_and_polygons_become_objects_whatever_iscrowd_says(self, world: Path) -> None:
        polygon = [[2, 3, 10, 3, 10, 9, 2, 9]]
        content = coco(["x/c/cat.jpg"], [(0, "cat", polygon), (0, "DOG ", box(0, 20, 5, 4))])
        stats = run(world, content)
        semantic, numbers = maps(world, "c/cat.jpg")
        np.testing.assert_array_equal(semantic, box(3, 2, 6, 8) + 2 * box(0, 20, 5, 4))
        assert numbers.max() == 2
        assert stats["counts"] == {"negatives": 0, "new": 1, "objects": 2}

    def test_an_image_without_an_object_is_a_negative_or_left_out(self, world: Path) -> None:
        content = coco(["c/cat.jpg", "dog.jpg"], [(1, "dog", box(1, 1, 3, 3))])
        stats = run(world, content, skip_empty=True)
        assert reasons(stats) == {"c/cat.jpg": "has no object"}
        stats = run(world, content)
        assert stats["counts"] == {"negatives": 1, "new": 1, "objects": 1, "unchanged": 1}
        assert not maps(world, "c/cat.jpg")[0].any()

    def test_void_is_void_and_background_is_none(self, world: Path) -> None:
        objects = [(0, "cat", box(0, 0, 9, 9)), (0, "Ignore", box(0, 0, 9, 3))]
        objects += [(0, "grass", box(0, 5, 2, 2))]
        run(world, coco(["c/cat.jpg"], objects))
        expected = box(0, 0, 9, 9).astype(int)
        expected[box(0, 5, 2, 2)], expected[box(0, 0, 9, 3)] = 0, -1
        np.testing.assert_array_equal(maps(world, "c/cat.jpg")[0], expected)

    def test_a_category_may_be_called_void(self, world: Path) -> None:
        names = Names(["void", "cat"], ["background"])
        stats = run(world, coco(["c/cat.jpg"], [(0, "void", box(0, 0, 3, 3))]), names=names)
        assert stats["counts"]["objects"] == 1

    def test_unknown_names_are_counted_and_listed(self, world: Path) -> None:
        objects = [(0, "kat", box(0, 0, 3, 3)), (1, "kat", box(0, 0, 3, 3))]
        objects += [(1, "dog", box(9, 9, 3, 3))]
        stats = run(world, coco(["c/cat.jpg", "dog.jpg"], objects))
        assert reasons(stats) == {"c/cat.jpg": "all of its objects are of unknown names: kat"}
        assert stats["counts"]["unknown_objects"] == 2
        assert "2 kat" in stats["warnings"][0]
        semantic, _ = maps(world, "dog.jpg")
        np.testing.assert_array_equal(semantic, 2 * box(9, 9, 3, 3).astype(int) - box(0, 0, 3, 3))

    def test_boxes_and_masks_of_nothing_are_left_out(self, world: Path) -> None:
        objects = [(0, "cat", []), (0, "cat", [[1, 1, 5, 5]]), (0, "cat", box(2, 2, 1, 1))]
        stats = run(world, coco(["c/cat.jpg"], objects))
        assert stats["left_out"] == {"box without a mask": 1, "mask without a pixel": 1}
        assert stats["counts"]["objects"] == 1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"annotations": [{"image_id": 5, "category_id": 7}]}, r"annotations\[0\]: image_id 5"),
            ({"annotations": [{"image_id": 0, "category_id": 1}]}, "category_id 1 is not among"),
            ({"annotations": [{"category_id": 7}]}, r"annotations\[0\]: no 'image_id'"),
            ({"images": [{"id": 0, "file_name": "../x.jpg", "height": 2, "width": 2}]}, "below"),
            ({"categories": [{"id": "a", "name": "cat"}]}, r"categories\[0\]: id is 'a'"),
        ],
    )
    def test_a_damaged_file_is_an_error_that_names_the_place(
        self, world: Path, change: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(PipelineError, match=f"corrected.json: .*{message}"):
            run(world, coco(["c/cat.jpg"], []) | change)


class TestLabelStudio:
    def test_brushes_polygons_and_rectangles_become_objects(self, world: Path) -> None:
        points = [[10, 15], [100 / 3, 15], [100 / 3, 45], [10, 45]]
        square = {"x": 50.0, "y": 50.0, "width": 20.0, "height": 30.0}
        results = [
            brush(box(0, 20, 5, 4), "cat"),
            region("polygon", "dog", points=points),
            region("rectangle", "cat", **square, rotation=0),
        ]
        stats = run(world, [task("/data/local-files/?d=images/c/cat.jpg", results)])
        semantic, numbers = maps(world, "c/cat.jpg")
        expected = box(0, 20, 5, 4) + 2 * box(3, 3, 6, 7) + box(10, 15, 6, 6)
        np.testing.assert_array_equal(semantic, expected)
        assert (numbers.max(), stats["counts"]["objects"]) == (3, 3)

    def test_a_rectangle_turns_about_its_corner(self, world: Path) -> None:
        turned = {"x": 50.0, "y": 10.0, "width": 20.0, "height": 15.0, "rotation": 90}
        run(world, [task("dog.jpg", [region("rectangle", "dog", **turned)])])
        np.testing.assert_array_equal(maps(world, "dog.jpg")[0], 2 * box(2, 12, 6, 3))

    def test_the_last_annotation_that_was_not_cancelled_counts(self, world: Path) -> None:
        first = {"id": 5, "updated_at": "2026-01-03", "result": [brush(box(0, 0, 2, 2), "cat")]}
        last = {"id": 4, "updated_at": "2026-01-04", "result": [brush(box(5, 5, 2, 2), "dog")]}
        cancelled = {"id": 9, "updated_at": "2026-02-01", "was_cancelled": True, "result": []}
        run(world, [task("dog.jpg", last, first, cancelled)])
        np.testing.assert_array_equal(maps(world, "dog.jpg")[0], 2 * box(5, 5, 2, 2))

    def test_a_task_that_nobody_has_looked_at_is_skipped_and_an_empty_one_a_negative(
        self, world: Path
    ) -> None:
        stats = run(world, [task("dog.jpg"), task("c/cat.jpg", [])])
        assert reasons(stats) == {"dog.jpg": "has no annotation"}
        assert stats["counts"] == {"negatives": 1, "new": 1, "objects": 0}

    def test_a_label_of_its_own_belongs_to_the_shape_of_its_id(self, world: Path) -> None:
        shape = brush(box(4, 4, 2, 3), "-") | {"type": "brush", "id": "r1"}
        del shape["value"]["brushlabels"]
        label = {**shape, "type": "labels", "value": {**shape["value"], "labels": ["dog"]}}
        for results in ([shape, label], [label, shape]):
            run(world, [task("dog.jpg", results)], force=True)
            np.testing.assert_array_equal(maps(world, "dog.jpg")[0], 2 * box(4, 4, 2, 3))

    def test_what_is_no_mask_is_left_out_and_counted(self, world: Path) -> None:
        results = [
            {"type": "choices", "value": {"choices": ["good"]}},
            {"type": "relation", "from_id": "r1", "to_id": "r2", "direction": "right"},
            region("ellipse", "dog", x=1.0, y=1.0, radiusX=2.0, radiusY=2.0),
            brush(box(0, 0, 0, 0), "dog"),
            brush(box(4, 4, 2, 3), "dog"),
        ]
        stats = run(world, [task("dog.jpg", results)])
        kinds = ("choices", "ellipse", "mask without a pixel", "relation")
        assert stats["left_out"] == dict.fromkeys(kinds, 1)
        assert stats["counts"]["objects"] == 1

    @pytest.mark.parametrize(
        "image",
        [
            "/data/upload/3/0a1b2c3d-cat.jpg",
            "https://host:1/x%20y/c/cat.jpg?sig=1",
            "s3://bucket/c/cat.jpg",
            "/data/local-files/?d=some%20where/c/cat.jpg",
            "D:\\c\\cat.jpg",
        ],
    )
    def test_images_are_found_wherever_they_were_served_from(self, world: Path, image: str) -> None:
        run(world, [task(image, [brush(box(1, 1, 2, 2), "cat")])])
        assert maps(world, "c/cat.jpg")[0].any()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([{"image": "a.jpg", "brush": []}], "task 1: not a task .*export the project as JSON"),
            ([{"data": {"image": "a.jpg"}}], "no `annotations`.*not as JSON-MIN"),
            ([5], "task 1: not a task"),
            ("text", "neither COCO's annotations .* nor Label Studio's"),
        ],
    )
    def test_another_file_is_refused(self, world: Path, content: Any, message: str) -> None:
        with pytest.raises(PipelineError, match=message):
            run(world, content)

    @pytest.mark.parametrize(
        "damaged",
        [
            region("polygon", "cat", points=[[1, None], [2, 3], [4, 5]]),
            region("polygon", "cat", points=5),
            region("rectangle", "cat", x="left", y=1, width=2, height=3),
        ],
    )
    def test_a_damaged_shape_costs_its_image_alone(self, world: Path, damaged: Any) -> None:
        good = task("dog.jpg", [brush(box(4, 4, 2, 3), "dog")])
        stats = run(world, [task("c/cat.jpg", [damaged]), good])
        assert list(reasons(stats)) == ["c/cat.jpg"]
        assert maps(world, "dog.jpg")[0].any()

    def test_a_damaged_brush_costs_its_image_alone(self, world: Path) -> None:
        broken = brush(box(1, 1, 2, 2), "cat")
        broken["value"]["rle"] = broken["value"]["rle"][:12]
        two = brush(box(1, 1, 2, 2), "cat")
        two["value"]["brushlabels"] = ["cat", "dog"]
        stats = run(
            world,
            [task("c/cat.jpg", [broken]), task("wide.jpg", [two]), task("dog.jpg", [])],
        )
        assert reasons(stats) == {
            "c/cat.jpg": "its brush is cut short",
            "wide.jpg": "a brush has not one label but ['cat', 'dog']",
        }


class TestImages:
    def test_names_that_two_images_have_need_a_folder_or_the_images(self, world: Path) -> None:
        content = coco(["boat.jpg"], [(0, "cat", box(1, 1, 3, 3))])
        with pytest.raises(PipelineError, match="2 images of this name in the archives"):
            run(world, content)
        run(world, coco(["b/boat.jpg"], [(0, "cat", box(1, 1, 3, 3))]))
        assert Corrections(world / "corrections").get(sha256("a/boat.jpg")) is None
        assert maps(world, "b/boat.jpg")[0].any()

    def test_content_tells_whatever_the_images_are_called_now(self, world: Path) -> None:
        (world / "photos/renamed.jpg").write_bytes(photo(IMAGES["a/boat.jpg"]))
        (world / "photos/strange.jpg").write_bytes(photo(99))
        content = coco(["renamed.jpg", "strange.jpg", "gone.jpg"], [(0, "cat", box(1, 1, 3, 3))])
        stats = run(world, content, images=True)
        assert maps(world, "a/boat.jpg")[0].any()
        assert "no image of this content" in reasons(stats)["strange.jpg"]
        assert "no image of this name in" in reasons(stats)["gone.jpg"]

    def test_a_hash_that_the_tool_has_kept_tells_too(self, world: Path) -> None:
        content = coco(["boat.jpg"], [], sha256=sha256("a/boat.jpg"))
        assert run(world, content)["counts"]["negatives"] == 1
        assert maps(world, "a/boat.jpg")
        other = task("boat_2.jpg", [])
        other["data"]["sha256"] = sha256("b/boat.jpg")
        assert run(world, [other])["counts"]["new"] == 1

    def test_the_key_of_a_sample_is_a_name(self, world: Path) -> None:
        run(world, coco(["images/k3.png"], [(0, "dog", box(1, 1, 3, 3))]))
        assert maps(world, "dog.jpg")[0].any()

    def test_masks_may_be_of_the_image_as_the_shards_have_it(self, world: Path) -> None:
        half = (HEIGHT // 2, WIDTH // 2)
        mask = box(2, 3, 4, 5, half)
        run(world, coco(["wide.jpg"], [(0, "cat", mask)], size=half))
        assert maps(world, "wide.jpg")[0].shape == half

    def test_masks_of_another_size_are_skipped(self, world: Path) -> None:
        content = coco(["dog.jpg"], [(0, "cat", box(2, 3, 4, 5, (9, 9)))], size=(9, 9))
        with pytest.raises(PipelineError, match=r"none of its 1 images.*are of 9x9 pixels.*30x20"):
            run(world, content)
        assert not (world / "corrections").exists()

    def test_an_image_counts_once(self, world: Path) -> None:
        stats = run(world, coco(["c/cat.jpg", "x/cat.jpg"], [(0, "cat", box(2, 3, 4, 5))]))
        assert reasons(stats) == {"x/cat.jpg": "is index/c/cat.jpg once more"}

    def test_a_file_without_images_is_refused(self, world: Path) -> None:
        with pytest.raises(PipelineError, match="has no images"):
            run(world, [])


def test_a_correction_is_not_overwritten_without_force(world: Path) -> None:
    first = coco(["c/cat.jpg", "dog.jpg"], [(0, "cat", box(1, 1, 3, 3))])
    second = coco(["c/cat.jpg", "wide.jpg"], [(0, "dog", box(5, 5, 3, 3))])
    assert run(world, first)["counts"]["new"] == 2
    assert run(world, first)["counts"]["unchanged"] == 2
    stats = run(world, second)
    assert reasons(stats) == {"c/cat.jpg": "has another correction already; --force replaces it"}
    np.testing.assert_array_equal(maps(world, "c/cat.jpg")[0], box(1, 1, 3, 3))
    stats = run(world, second, force=True)
    assert stats["counts"] == {"negatives": 1, "objects": 1, "replaced": 1, "unchanged": 1}
    np.testing.assert_array_equal(maps(world, "c/cat.jpg")[0], 2 * box(5, 5, 3, 3))
    assert len(Corrections(world / "corrections")) == 3


class TestBenchmark:
    def test_its_reader_reads_it(self, world: Path) -> None:
        Image.new("RGB", (WIDTH, HEIGHT)).save(world / "photos/b/boat.png")
        objects = [(0, "dog", box(1, 1, 9, 9)), (0, "cat", box(2, 2, 3, 3))]
        objects += [(0, "void", box(0, 0, 1, 30)), (1, "cat", box(19, 29, 1, 1))]
        content = coco(["a/boat.jpg", "b/boat.png", "dog.jpg", "gone.jpg"], objects)
        run(world, coco(["dog.jpg"], []))
        write_bench(world, content)
        stats = json.loads((world / "stats.json").read_text())
        assert stats["counts"] == {"objects": 3, "reencoded": 1, "trained_on": 1}
        assert list(reasons(stats)) == ["gone.jpg"]
        assert "training sees their truth" in stats["warnings"][0]
        bench = VocBenchmark(world / "bench", split="val", categories=CATEGORIES, groups={})
        first, second, third = bench
        assert [it.image_id for it in bench] == ["a_boat", "b_boat", "dog"]
        assert first.image_path.read_bytes() == photo(IMAGES["a/boat.jpg"])
        expected = 2 * box(1, 1, 9, 9).astype(int) - box(2, 2, 3, 3)
        expected[0] = -1
        np.testing.assert_array_equal(first.semantic(), expected)
        assert [it.label_id for it in first.instances()] == [2, 1]
        np.testing.assert_array_equal(second.instances()[0].mask, box(19, 29, 1, 1))
        assert third.instances() == []

    @pytest.mark.parametrize(
        ("theirs", "message"),
        [
            ("holiday.jpg", "holds other things too, such as holiday.jpg"),
            ("JPEGImages/holiday.jpg", "has no ImageSets/Segmentation/val.txt"),
            ("ImageSets/Segmentation/train.txt", "has no ImageSets/Segmentation/val.txt"),
        ],
    )
    def test_a_folder_that_is_no_benchmark_of_ours_is_not_replaced(
        self, world: Path, theirs: str, message: str
    ) -> None:
        (world / "bench" / theirs).parent.mkdir(parents=True)
        (world / "bench" / theirs).write_text("theirs")
        message = f"bench: would be replaced as a whole, .*{message}"
        with pytest.raises(PipelineError, match=message):
            write_bench(world)
        assert (world / "bench" / theirs).read_text() == "theirs"

    def test_an_earlier_benchmark_and_an_empty_folder_are_replaced(self, world: Path) -> None:
        (world / "bench").mkdir()
        for _ in range(2):
            write_bench(world)
        (world / "bench/ImageSets/Segmentation/train.txt").write_text("theirs")
        with pytest.raises(PipelineError, match=r"Segmentation: .* such as train\.txt"):
            write_bench(world)

    def test_more_categories_than_its_layout_has_room_for_are_refused(self, world: Path) -> None:
        names = Names([f"c{i}" for i in range(255)], ["background"])
        with pytest.raises(PipelineError, match="room for 254"):
            importer.write_benchmark(
                path=world / "none.json",
                images_dir=world / "photos",
                corrections_dir=world / "corrections",
                out_dir=world / "bench",
                names=names,
                stats_path=world / "stats.json",
            )


def command(*words: str) -> str:
    done = CliRunner().invoke(app, ["import", "corrections", *words])
    return done.output if done.exit_code == 0 else f"error: {done.exception}"


def test_the_command_writes_what_training_and_params_read(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    (world / "data").mkdir()
    (world / "masks").rename("data/masks")
    names = ["cat", "red car, old"]
    params = {"categories": names, "index": {"pool": {"root": "photos"}}, "device": "cpu"}
    Path("params.yaml").write_text(json.dumps(params))
    Path("c.json").write_text(json.dumps(coco(["c/cat.jpg"], [(0, "cat", box(1, 1, 3, 3))])))
    assert "1 images, 0 skipped" in command("c.json", "--images", "photos")
    assert len(Corrections(Path("data/review/corrections"))) == 1
    assert "name their folder" in command("c.json", "--bench", "mine")
    output = command("c.json", "--bench", "mine", "--images", "photos")
    lines = output[output.index("benches:") :]
    Path("own.yaml").write_text(
        f"categories: {json.dumps(names)}\nindex: {{p: {{root: photos}}}}\n{lines}"
    )
    bench = read_params(Path("own.yaml")).benches["mine"]
    assert (bench.root, bench.split, bench.categories) == (Path("data/raw/mine"), "val", names)
    assert "is there already" in command("c.json", "--bench", "mine", "--images", "photos")
    assert "--force" not in command("c.json", "--bench", "mine", "--images", "photos", "--force")
    for name in ("../up", "plus", "a/b"):
        assert "cannot be the name" in command("c.json", "--bench", name, "--images", "photos")
