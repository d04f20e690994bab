"""The drawn world on disk: plain photos, a hidden truth, and two benchmarks in VOC's layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.benchmarks import open_bench
from pipeline.benchmarks.voc import read_index_png
from pipeline.demo.glyphs import KNOWN_FAMILIES, UNSEEN_FAMILY, glyph_names, load_glyphs
from pipeline.demo.scene import BENCH_BACKGROUNDS, OUTLINED, Scene, Style, choose_names, draw_scene
from pipeline.demo.world import (
    BENCH_COUNTS,
    BENCH_STREAMS,
    CATEGORY_SHARE,
    INDEX_OTHERS,
    draw_world,
)
from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.params.reading import read_params
from pipeline.params.sections import WorldParams
from pipeline.vocabulary.categories import load_category_set
from tests.paths import ROOT

TINY = WorldParams(index_images=6, bench_images=4, size=48)
CATEGORIES, OTHERS = glyph_names()


def draw(folder: Path, *, params: WorldParams = TINY, seed: int = 0) -> Path:
    draw_world(folder / "world", params=params, seed=seed, stats_path=folder / "stats.json")
    return folder / "world"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("seed0"))


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of many small images, in which empty scenes are to be expected."""
    params = WorldParams(index_images=60, bench_images=20, size=32)
    return draw(tmp_path_factory.mktemp("crowd"), params=params)


def test_a_world_has_photos_a_truth_and_two_benchmarks(world: Path) -> None:
    photos = [f"{number:05d}" for number in range(6)]
    known, unseen = ([f"{part}_{number:04d}" for number in (0, 1)] for part in ("known", "unseen"))
    expected = {f"index/{stem}.jpg" for stem in photos}
    for part in ("SegmentationClass", "SegmentationObject"):
        expected |= {f"index_truth/{part}/{stem}.png" for stem in photos}
    for bench in ("dev", "voc"):
        for part in ("SegmentationClass", "SegmentationObject"):
            expected |= {f"{bench}/{part}/{stem}.png" for stem in known + unseen}
        expected |= {f"{bench}/JPEGImages/{stem}.jpg" for stem in known + unseen}
        splits = ("known", "unseen", "val")
        expected |= {f"{bench}/ImageSets/Segmentation/{split}.txt" for split in splits}
    assert set(contents(world)) == expected
    stats = read_json(world.parent / "stats.json")
    assert (stats["stage"], stats["items"], stats["skipped"]) == ("world", 14, 0)


def test_the_same_seed_draws_the_same_bytes(world: Path, tmp_path: Path) -> None:
    assert contents(draw(tmp_path)) == contents(world)


def test_another_seed_draws_other_images(world: Path, tmp_path: Path) -> None:
    first, second = contents(world), contents(draw(tmp_path, seed=1))
    assert set(first) == set(second)
    assert all(first[name] != second[name] for name in first if name.endswith(".jpg"))


def test_no_two_images_of_a_world_are_equal(world: Path) -> None:
    images = [data for name, data in contents(world).items() if name.endswith(".jpg")]
    assert len(set(images)) == len(images) == 14


def test_a_larger_world_holds_the_smaller_one(world: Path, tmp_path: Path) -> None:
    params = WorldParams(index_images=8, bench_images=6, size=48)
    larger = contents(draw(tmp_path, params=params))
    for name, data in contents(world).items():
        if not name.endswith(".txt"):
            assert larger[name] == data


def test_a_world_replaces_the_one_before(tmp_path: Path) -> None:
    draw(tmp_path, params=WorldParams(index_images=3, bench_images=2, size=32))
    folder = draw(tmp_path, params=WorldParams(index_images=1, bench_images=2, size=32))
    assert [path.name for path in (folder / "index").iterdir()] == ["00000.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stats.json", "world"]


@pytest.mark.parametrize("theirs", ["thesis.tex", "voc/JPEGImages/cat.jpg"])
def test_a_folder_that_is_no_world_is_not_replaced(tmp_path: Path, theirs: str) -> None:
    path = tmp_path / "world" / theirs
    path.parent.mkdir(parents=True)
    path.write_text("years of work")
    with pytest.raises(PipelineError, match="world: would be replaced as a whole, but h"):
        draw(tmp_path)
    assert path.read_text() == "years of work"


def test_an_empty_folder_becomes_a_world(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    assert (draw(tmp_path) / "index").is_dir()


def test_the_benchmark_is_read_as_any_voc_folder(world: Path) -> None:
    bench = open_bench(
        format="voc",
        root=world / "voc",
        split="val",
        categories=CATEGORIES,
        groups={"known": "known", "unseen": "unseen"},
    )
    assert [example.image_id for example in bench] == [
        "known_0000",
        "known_0001",
        "unseen_0000",
        "unseen_0001",
    ]
    assert {name: len(ids) for name, ids in bench.groups.items()} == {"known": 2, "unseen": 2}
    for example in bench:
        with Image.open(example.image_path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (48, 48))
        semantic = example.semantic()
        assert semantic.shape == (48, 48)
        assert not example.void().any()
        painted = np.zeros_like(semantic)
        for instance in example.instances():
            assert not painted[instance.mask].any()
            painted[instance.mask] = instance.label_id
        np.testing.assert_array_equal(painted, semantic)


def test_benchmark_scenes_are_never_empty_but_may_show_no_category(crowd: Path) -> None:
    bench = open_bench(format="voc", root=crowd / "voc", split="val", categories=CATEGORIES)
    counts = [len(example.instances()) for example in bench]
    assert len(counts) == 20
    assert max(counts) <= 3
    assert sum(counts) > 20


def test_instance_ids_of_the_index_agree_with_its_semantic_masks(crowd: Path) -> None:
    seen = set()
    for path in sorted((crowd / "index_truth" / "SegmentationClass").iterdir()):
        semantic = read_index_png(path)
        instances = read_index_png(crowd / "index_truth" / "SegmentationObject" / path.name)
        assert instances.max() <= 3
        assert (semantic[instances == 0] == 0).all()
        for number in np.unique(instances[instances > 0]):
            label_ids = np.unique(semantic[instances == number])
            assert len(label_ids) == 1
            seen.update(label_ids.tolist())
    assert 0 in seen, "no object is without a category"
    assert max(seen) <= len(CATEGORIES)
    assert len(seen) > 8


def test_some_photos_of_the_index_are_empty_and_so_is_their_truth(crowd: Path) -> None:
    truth = crowd / "index_truth"
    empty = [
        path.name
        for path in (truth / "SegmentationObject").iterdir()
        if not read_index_png(path).any()
    ]
    assert 1 <= len(empty) <= 15
    assert not any(read_index_png(truth / "SegmentationClass" / name).any() for name in empty)


def expected_scene(
    stream: int, families: tuple[str, ...], number: int, *, outlined: float
) -> Scene:
    """A benchmark scene of seed 0, drawn by hand from the given families alone."""
    glyphs = load_glyphs(families)
    others = [name for name in OTHERS[:INDEX_OTHERS] if name in glyphs]
    rng = np.random.default_rng([0, stream, number])
    count = int(rng.choice(len(BENCH_COUNTS), p=BENCH_COUNTS))
    names = choose_names(rng, count, CATEGORIES, others, CATEGORY_SHARE)
    style = Style(glyphs, 48, outlined=outlined, backgrounds=BENCH_BACKGROUNDS)
    return draw_scene(rng, names, style)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("bench", ["dev", "voc"])
@pytest.mark.parametrize(
    ("part", "families", "outlined"),
    [("known", KNOWN_FAMILIES, OUTLINED), ("unseen", (UNSEEN_FAMILY,), 0.0)],
)
def test_each_part_of_a_benchmark_is_drawn_from_its_families_alone(
    world: Path, bench: str, part: str, families: tuple[str, ...], outlined: float, number: int
) -> None:
    stream = dict(zip(("known", "unseen"), BENCH_STREAMS[bench], strict=True))[part]
    scene = expected_scene(stream, families, number, outlined=outlined)
    label_ids = [CATEGORIES.index(n) + 1 if n in CATEGORIES else 0 for n in scene.names]
    drawn = read_index_png(world / bench / "SegmentationClass" / f"{part}_{number:04d}.png")
    np.testing.assert_array_equal(drawn, np.array([0, *label_ids])[scene.instances])
    with Image.open(world / bench / "JPEGImages" / f"{part}_{number:04d}.jpg") as image:
        difference = np.asarray(image).astype(float) - scene.image
    assert np.abs(difference).mean() < 12


def test_settings_are_chosen_on_what_they_were_always_chosen_on() -> None:
    assert BENCH_STREAMS["dev"] == (2, 3)
    params = read_params(ROOT / "params.yaml")
    assert {name: bench.development for name, bench in params.benches.items()} == {
        "voc": False,
        "dev": True,
    }
    fields = [bench.model_dump(exclude={"root"}) for bench in params.benches.values()]
    assert fields[0] == fields[1]


def test_the_demos_params_name_the_worlds_categories() -> None:
    params = read_params(ROOT / "params.yaml")
    for part in (params, *params.benches.values(), *params.audits.values()):
        assert load_category_set(part.categories) == CATEGORIES
    assert len(CATEGORIES) >= 12
