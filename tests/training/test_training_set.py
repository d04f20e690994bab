from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.formats.corrections import CorrectedObject, Correction, Corrections, write_corrections
from pipeline.formats.decisions import Decisions
from pipeline.formats.images import encode_jpeg, encode_label, encode_png
from pipeline.formats.review import Decision, Reviewed
from pipeline.formats.rle import encode_mask
from pipeline.training.settings import Composition, TargetSettings
from pipeline.training.training_set import Archives, TrainingSet, collate
from pipeline.training.transforms import bounding_box
from tests.formats.shard_folders import write_shards

CATEGORIES = ["cat", "dog", "bus"]
BOUNDS = ("sample_bytes", "mask_bytes")
COMPOSITION = Composition(
    crop_size=32,
    scale_range=[0.8, 1.2],
    flip=0.5,
    colour_jitter=0.5,
    greyscale=0.0,
    blur=0.0,
    max_paste=4,
)


def shard_sample(
    key: str, label_id: int, mask: np.ndarray, *, category: str = "", dense: int = 0
) -> dict[str, Any]:
    """A label-shard sample whose image is a flat colour of its label id."""
    height, width = mask.shape
    colour = (60 * label_id, 255 - 60 * label_id, 90)
    names = ["background", *CATEGORIES]
    return {
        "__key__": f"{key}_{label_id}",
        "jpg": encode_jpeg(Image.new("RGB", (width, height), colour)),
        "mask.png": encode_png(mask),
        "label.png": encode_label(np.full(mask.shape, dense), len(CATEGORIES)),
        "confidence.png": encode_png(np.full(mask.shape, 204, dtype=np.uint8)),
        "json": {"category": category or names[label_id], "label_id": label_id},
    }


def box_mask(*boxes: tuple[int, int, int, int], shape: tuple[int, int] = (40, 30)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    for top, left, height, width in boxes:
        mask[top : top + height, left : left + width] = True
    return mask


def all_samples() -> Iterator[dict[str, Any]]:
    yield shard_sample("empty", 1, box_mask())
    for label_id in (1, 2, 3):
        for number in range(3):
            mask = box_mask((5 + number, 4, 20, 16))
            yield shard_sample(f"plain{number}", label_id, mask)
    yield shard_sample("negative", 0, box_mask((0, 0, 10, 10), shape=(25, 33)))


def archives(folder: Path, samples: Any = None, **settings: Any) -> Archives:
    write_shards(
        all_samples() if samples is None else samples,
        folder,
        shard_size=5,
        settings={"pseudo_label": {"categories": CATEGORIES}},
    )
    memory = {name: settings.pop(name) for name in BOUNDS if name in settings}
    categories = settings.pop("categories", CATEGORIES)
    said = {name: settings.pop(name) for name in ("corrections", "review") if name in settings}
    target, decisions = TargetSettings(**settings), Decisions(**said)
    return Archives(
        folder, folder, categories=categories, settings=target, decisions=decisions, **memory
    )


def training_set(source: Archives, composition: Composition = COMPOSITION) -> TrainingSet:
    return TrainingSet(source, composition, seed=3, length=40)


def test_samples_are_sorted_into_objects_negatives_and_empty(tmp_path: Path) -> None:
    source = archives(tmp_path)
    assert {label_id: len(part) for label_id, part in source.objects.items()} == {1: 3, 2: 3, 3: 3}
    assert len(source.negatives) == 1
    assert source.num_empty == 1
    sample = source[source.objects[2][0]]
    assert sample.image.size == (30, 40)
    assert sample.num_instances == 1
    np.testing.assert_array_equal(sample.semantic, box_mask((5, 4, 20, 16)) * 2)
    negative = source[source.negatives[0]]
    assert negative.num_instances == 0
    assert not negative.semantic.any()
    assert not negative.instances.any()


def test_composed_images_are_consistent(tmp_path: Path) -> None:
    counts = set()
    for image, semantic, masks in training_set(archives(tmp_path)):
        assert image.shape == (32, 32, 3)
        assert image.dtype == np.uint8
        assert semantic.shape == (32, 32)
        assert masks.shape[1:] == (32, 32)
        assert masks.dtype == bool
        assert (masks.sum(0) <= 1).all()
        np.testing.assert_array_equal(masks.any(0), semantic > 0)
        assert all(len(np.unique(semantic[mask])) <= 1 for mask in masks)
        counts.add(len(masks))
    assert counts == {1, 2, 3, 4}


def test_image_is_a_pure_function_of_seed_and_number(tmp_path: Path) -> None:
    source = archives(tmp_path)
    first, second = training_set(source), training_set(source)
    expected = [first[number] for number in range(8)]
    for number in reversed(range(8)):
        for array, other in zip(second[number], expected[number], strict=True):
            np.testing.assert_array_equal(array, other)
    other_seed = TrainingSet(source, COMPOSITION, seed=4, length=8)
    assert any((other_seed[i][0] != expected[i][0]).any() for i in range(8))


@pytest.mark.parametrize(("sample_bytes", "mask_bytes"), [(20_000, 10**6), (20_000, 100), (0, 0)])
def test_samples_beyond_the_memory_are_read_again(
    tmp_path: Path, sample_bytes: int, mask_bytes: int
) -> None:
    kept = training_set(archives(tmp_path))
    read = training_set(archives(tmp_path, sample_bytes=sample_bytes, mask_bytes=mask_bytes))
    for number in range(8):
        for array, other in zip(kept[number], read[number], strict=True):
            np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize("mask_bytes", [0, 10**6])
@pytest.mark.parametrize("split_components", [False, True])
def test_objects_lie_in_the_occupied_box(
    tmp_path: Path, mask_bytes: int, split_components: bool
) -> None:
    mask = box_mask((1, 2, 9, 7), (30, 20, 6, 8), (39, 0, 1, 1))
    source = archives(
        tmp_path,
        [shard_sample("a", 1, mask)],
        split_components=split_components,
        mask_bytes=mask_bytes,
    )
    sample = source[0]
    assert sample.occupied == bounding_box(mask)
    assert sample.num_instances == (2 if split_components else 1)
    outside = sample.instances.copy()
    outside[sample.occupied.slices] = 0
    assert sample.instances.any()
    assert not outside.any()


def test_same_archive_always_or_never(tmp_path: Path) -> None:
    source = archives(tmp_path)

    def most_categories(probability: float) -> int:
        images = training_set(source, COMPOSITION.model_copy(update={"same_archive": probability}))
        return max(len(set(np.unique(semantic)) - {-1, 0}) for _, semantic, _ in images)

    assert most_categories(1.0) == 1
    assert most_categories(0.0) > 1


def test_negative_canvas_is_background_below_pasted_objects(tmp_path: Path) -> None:
    changes = {"scale_range": [1.0, 1.0], "colour_jitter": 0.0, "crop_size": 24}
    composition = COMPOSITION.model_copy(update={"negative_canvas": 1.0, **changes})
    counts = set()
    for image, semantic, masks in training_set(archives(tmp_path), composition):
        counts.add(len(masks))
        background = semantic == 0
        assert not (semantic == -1).any()
        np.testing.assert_array_equal(masks.any(0), ~background)
        assert (image[background][:, 1] > 245).all()
    assert counts == {1, 2, 3, 4}


def test_negative_canvas_needs_negatives(tmp_path: Path) -> None:
    source = archives(tmp_path, [shard_sample("a", 1, box_mask((0, 0, 9, 9)))])
    with pytest.raises(PipelineError, match=r"negative_canvas: 0\.5.*retrieve\.num_negatives"):
        training_set(source, COMPOSITION.model_copy(update={"negative_canvas": 0.5}))


def test_components_become_instances_and_specks_none(tmp_path: Path) -> None:
    mask = box_mask((0, 0, 8, 8), (20, 3, 10, 5), (35, 20, 2, 2))
    speck = box_mask((3, 3, 3, 3))
    source = archives(
        tmp_path,
        [shard_sample("two", 1, mask), shard_sample("speck", 1, speck)],
        split_components=True,
    )
    assert source.objects == {1: [0]}
    assert source.num_empty == 1
    sample = source[0]
    assert sample.num_instances == 2
    assert np.bincount(sample.instances.ravel()).tolist() == [1200 - 114, 64, 50]
    assert sample.semantic.sum() == 118
    composition = COMPOSITION.model_copy(
        update={"crop_size": 40, "scale_range": [1.0, 1.0], "max_paste": 3}
    )
    areas = {len(masks): masks for _, _, masks in training_set(source, composition)}
    assert sorted(areas) == [2, 3, 4]


def test_one_component_is_one_instance_without_splitting(tmp_path: Path) -> None:
    mask = box_mask((0, 0, 8, 8), (20, 3, 10, 5))
    sample = archives(tmp_path, [shard_sample("two", 1, mask)])[0]
    assert sample.num_instances == 1
    assert sample.instances.sum() == 114


def test_dense_labels_reach_the_target(tmp_path: Path) -> None:
    samples = [shard_sample("a", 1, box_mask((0, 0, 9, 9)), dense=2)]
    assert (archives(tmp_path, samples, target="denseclip")[0].semantic == 2).all()
    fused = archives(tmp_path, samples, target="fused")[0]
    np.testing.assert_array_equal(fused.semantic, box_mask((0, 0, 9, 9)) * -1)
    assert fused.instances.sum() == 81
    weak = archives(tmp_path, samples, target="fused", confidence_threshold=0.9)[0]
    assert weak.semantic.sum() == 81


def test_saliency_looks_at_no_dense_labels(tmp_path: Path) -> None:
    damaged = [{**sample, "label.png": b"", "confidence.png": b""} for sample in all_samples()]
    whole, without = (
        training_set(archives(tmp_path / name, samples))
        for name, samples in (("whole", None), ("damaged", damaged))
    )
    for number in range(8):
        for array, other in zip(whole[number], without[number], strict=True):
            np.testing.assert_array_equal(array, other)
    for target in ("fused", "denseclip"):
        with pytest.raises(PipelineError, match=r"plain0_1: not an image|plain0_1: damaged"):
            archives(tmp_path / target, damaged, target=target)


@pytest.mark.parametrize("memory", [20_000, 10**9])
def test_a_pickled_copy_gives_the_same_images(tmp_path: Path, memory: int) -> None:
    images = training_set(archives(tmp_path, sample_bytes=memory))
    expected = [images[number] for number in range(6)]
    copy = pickle.loads(pickle.dumps(images))
    for number in range(6):
        for array, other in zip(copy[number], expected[number], strict=True):
            np.testing.assert_array_equal(array, other)


def test_one_pixel_images_and_more_than_a_byte_of_categories(tmp_path: Path) -> None:
    categories = [f"category {number}" for number in range(1, 301)]
    sample = shard_sample("a", 1, np.ones((1, 1), dtype=bool))
    sample["json"] = {"category": "category 300", "label_id": 300}
    source = archives(tmp_path, [sample], categories=categories)
    composition = COMPOSITION.model_copy(update={"scale_range": [0.1, 3.0]})
    for _, semantic, masks in training_set(source, composition):
        assert set(np.unique(semantic)) <= {-1, 300}
        assert masks[0].any()


def test_other_categories_are_refused(tmp_path: Path) -> None:
    mask = box_mask((0, 0, 9, 9))
    with pytest.raises(PipelineError, match=r"b_2: .*'horse', label id 2.*'dog'.*dvc repro"):
        archives(tmp_path / "1", [shard_sample("b", 2, mask, category="horse")])
    with pytest.raises(PipelineError, match=r"'bus', label id 3.*2 categories"):
        archives(tmp_path / "2", [shard_sample("b", 3, mask)], categories=["cat", "dog"])


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="none of 2 samples has an object"):
        archives(
            tmp_path,
            [shard_sample("a", 1, box_mask()), shard_sample("b", 0, box_mask((0, 0, 5, 5)))],
        )


def test_image_of_another_size_than_its_mask_is_named(tmp_path: Path) -> None:
    sample = shard_sample("odd", 1, box_mask((0, 0, 9, 9)))
    sample["jpg"] = encode_jpeg(Image.new("RGB", (10, 10)))
    with pytest.raises(PipelineError, match=r"odd_1.*\(10, 10\).*\(40, 30\)"):
        archives(tmp_path, [sample])


def test_collate_stacks_and_counts(tmp_path: Path) -> None:
    composed = [training_set(archives(tmp_path))[number] for number in range(5)]
    batch = collate(composed)
    assert batch.images.shape == (5, 32, 32, 3)
    assert batch.semantic_masks.shape == (5, 32, 32)
    assert batch.num_instances == [len(masks) for _, _, masks in composed]
    parts = batch.instance_masks.split(batch.num_instances)
    for part, (_, _, masks) in zip(parts, composed, strict=True):
        np.testing.assert_array_equal(part.numpy(), masks)


def test_labels_that_do_not_fit_the_masks_are_refused(tmp_path: Path) -> None:
    masks, settings = tmp_path / "masks", TargetSettings(target="fused")
    write_shards(all_samples(), masks, shard_size=5)

    def labelled(name: str, samples: list[dict[str, Any]], categories: list[str]) -> Path:
        noted = {"pseudo_label": {"categories": categories}}
        write_shards(samples, tmp_path / name, shard_size=5, settings=noted)
        return tmp_path / name

    every = list(all_samples())
    for labels, complaint in (
        (labelled("others", every, ["cat", "dog", "car"]), r"other categories.*car; run `pipeline"),
        (labelled("fewer", every[1:], CATEGORIES), r"no labels of 1 of \d+ masks, such as empty_1"),
        (masks, r"names no categories.*train\.labels, which target fused reads"),
        (None, r"train\.labels: the target needs dense labels"),
    ):
        with pytest.raises(PipelineError, match=complaint):
            Archives(masks, labels, categories=CATEGORIES, settings=settings)
    assert Archives(masks, None, categories=CATEGORIES, settings=TargetSettings()).objects


def several_objects() -> np.ndarray:
    """Two objects, the second one in two parts."""
    objects = np.zeros((40, 30), np.uint8)
    objects[2:12, 3:13] = 1
    objects[20:28, 2:12] = 2
    objects[30:38, 18:28] = 2
    return objects


@pytest.mark.parametrize("mask_bytes", [0, 10**6])
@pytest.mark.parametrize("split_components", [False, True])
def test_objects_of_a_mask_are_instances_of_their_own(
    tmp_path: Path, mask_bytes: int, split_components: bool
) -> None:
    objects = several_objects()
    sample = shard_sample("several", 2, objects)
    source = archives(tmp_path, [sample], split_components=split_components, mask_bytes=mask_bytes)
    sample = source[0]
    expected = objects.copy()
    if split_components:
        expected[30:38, 18:28] = 3
    np.testing.assert_array_equal(sample.instances, expected)
    assert sample.num_instances == expected.max()
    np.testing.assert_array_equal(sample.semantic, (objects > 0) * 2)
    assert sample.occupied == bounding_box(objects)


def test_objects_of_a_mask_are_pasted_one_at_a_time(tmp_path: Path) -> None:
    source = archives(tmp_path, [shard_sample("several", 2, several_objects())])
    unchanged = {"crop_size": 40, "scale_range": [1.0, 1.0], "max_paste": 2, "flip": 0.0}
    composition = COMPOSITION.model_copy(update={**unchanged, "keep_last_row_column": True})
    areas = set()
    for _, semantic, masks in training_set(source, composition):
        assert len(masks) in (2, 3)  # those of the canvas, and what is pasted onto it
        np.testing.assert_array_equal(masks.any(0), semantic == 2)
        areas |= {int(mask.sum()) for mask in masks[2:]}
    assert areas == {100, 160}


def half_labelled() -> Iterator[dict[str, Any]]:
    """Masks of 4 x 10 pixels, of which dense labels give the category 0, 10, 20, 30 and 40."""
    for label_id in (1, 2):
        for number in range(5):
            sample = shard_sample(f"s{number}", label_id, box_mask((3, 5, 4, 10)))
            labels = np.zeros((40, 30), dtype=np.uint8)
            labels[3 : 3 + number, 5:15] = label_id if number < 4 or label_id == 1 else 3
            labels[20:] = label_id  # outside of the mask, where it does not matter
            yield sample | {"label.png": encode_label(labels, len(CATEGORIES))}
    yield shard_sample("empty", 2, box_mask())
    yield shard_sample("negative", 0, box_mask())


@pytest.mark.parametrize(
    ("least", "kept"),
    [(None, (5, 5)), (0.0, (5, 5)), (0.5, (3, 2)), (0.75, (2, 1)), (1.0, (1, 0))],
)
@pytest.mark.parametrize("target", ["saliency", "fused"])
def test_masks_that_dense_labels_do_not_agree_with_are_left_out(
    tmp_path: Path, least: float | None, kept: tuple[int, int], target: str
) -> None:
    source = archives(tmp_path, half_labelled(), target=target, min_agreement=least)
    assert [len(source.objects.get(label_id, [])) for label_id in (1, 2)] == list(kept)
    assert (source.num_empty, len(source.negatives)) == (1, 1)
    data = training_set(source)
    assert data.counts.get("disagreeing", 0) == 10 - sum(kept)
    said = [text for text in data.warnings if "train.min_agreement" in text]
    assert bool(said) == (sum(kept) < 10)
    if least == 1.0:
        assert "cat 1 of 5, dog 0 of 5" in said[0]
        assert "no image shows dog" in str(data.warnings)
    if target == "saliency":
        sample = source[source.objects[1][-1]]
        np.testing.assert_array_equal(sample.semantic, box_mask((3, 5, 4, 10)) * 1)


def test_agreement_that_no_image_has_is_named_and_so_are_missing_labels(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"train\.min_agreement: 0\.1 leaves none of 9 images"):
        archives(tmp_path / "a", min_agreement=0.1)
    write_shards(all_samples(), tmp_path / "masks", shard_size=5)
    settings = TargetSettings(min_agreement=0.1)
    for labels, complaint in (
        (None, r"train\.labels: .*min_agreement"),
        (tmp_path / "masks", r"train\.labels, which min_agreement reads"),
    ):
        with pytest.raises(PipelineError, match=complaint):
            Archives(tmp_path / "masks", labels, categories=CATEGORIES, settings=settings)


def corrected(sha256: str, *objects: tuple[str, np.ndarray], shape: Any = (40, 30)) -> Correction:
    found = [CorrectedObject(name, encode_mask(mask)) for name, mask in objects]
    return Correction(sha256, sha256, shape, found)


def correctable(*names: tuple[str, int]) -> Iterator[dict[str, Any]]:
    """Samples (image, label id) with a mask of their category, and the hash of each image."""
    for name, label_id in names:
        sample = shard_sample(name, label_id, box_mask((5, 4, 20, 16)))
        sample["json"]["sha256"] = name * 64
        yield sample


def corrected_archives(folder: Path, *corrections: Correction, **settings: Any) -> Archives:
    """Image a in two archives, b and c in one each, e a negative."""
    write_corrections(folder / "corrections", corrections)
    samples = correctable(("a", 1), ("a", 2), ("b", 1), ("c", 3), ("e", 0))
    settings["corrections"] = Corrections(folder / "corrections")
    return archives(folder / "masks", samples, **settings)


LARGE, SMALL = box_mask((2, 2, 20, 20)), box_mask((30, 10, 5, 4))


class TestCorrected:
    def test_an_image_is_what_a_person_says_of_it(self, tmp_path: Path) -> None:
        truth = corrected("a" * 64, ("bus", LARGE), ("cat", SMALL), ("bus", box_mask((0, 0, 1, 1))))
        source = corrected_archives(tmp_path, truth)
        assert source.objects == {1: [0, 2], 3: [0, 3]}
        sample = source[0]
        np.testing.assert_array_equal(
            sample.semantic, 3 * LARGE + SMALL + 3 * box_mask((0, 0, 1, 1))
        )
        assert sample.num_instances == 3
        assert sorted(np.unique(sample.instances)) == [0, 1, 2, 3]
        np.testing.assert_array_equal(source[1].semantic, sample.semantic)
        np.testing.assert_array_equal(source[2].semantic, box_mask((5, 4, 20, 16)))
        assert source.num_corrected_empty == 0
        counts = training_set(source).counts
        assert counts["archive_images"] == 3  # a once, whatever it shows
        assert (counts["corrected"], counts["unused_corrections"]) == (1, 0)

    def test_it_stands_in_place_of_labels_that_were_rejected(self, tmp_path: Path) -> None:
        review = {Reviewed("cat", name): Decision("reject") for name in ("b", "c")}
        truth = corrected("b" * 64, ("dog", LARGE))
        source = corrected_archives(tmp_path, truth, review=review)
        assert 2 in source.objects[2]
        np.testing.assert_array_equal(source[2].semantic, 2 * LARGE)

    def test_one_without_an_object_is_a_negative_and_one_with_is_none(self, tmp_path: Path) -> None:
        truths = [corrected("b" * 64), corrected("e" * 64, ("dog", LARGE)), corrected("f" * 64)]
        source = corrected_archives(tmp_path, *truths)
        assert source.objects == {1: [0], 2: [1, 4], 3: [3]}
        assert source.negatives == [2]
        assert source[2].num_instances == 0
        assert not source[2].semantic.any()
        counts = training_set(source).counts
        assert {name: counts[name] for name in counts if "correct" in name} == {
            "corrected": 2,
            "corrected_empty": 1,
            "unused_corrections": 1,
        }

    def test_masks_are_resized_and_unknown_names_void(self, tmp_path: Path) -> None:
        double = np.kron(LARGE, np.ones((2, 2), bool)).astype(bool)
        tree = np.kron(SMALL, np.ones((2, 2), bool)).astype(bool)
        truth = corrected("b" * 64, ("dog", double), ("tree", tree), shape=(80, 60))
        sample = corrected_archives(tmp_path, truth, split_components=True)[2]
        np.testing.assert_array_equal(sample.semantic, 2 * LARGE - SMALL.astype(int))
        np.testing.assert_array_equal(sample.instances, LARGE)

    def test_dense_labels_and_agreement_do_not_overrule_it(self, tmp_path: Path) -> None:
        truth = corrected("b" * 64, ("dog", LARGE))
        for settings in ({"target": "denseclip"}, {"target": "fused"}):
            source = corrected_archives(tmp_path, truth, **settings)
            np.testing.assert_array_equal(source[2].semantic, 2 * LARGE)
        source = corrected_archives(tmp_path, truth, min_agreement=0.5)
        assert source.objects == {2: [2]}  # nothing else agrees with its labels

    def test_training_images_show_it_and_are_consistent(self, tmp_path: Path) -> None:
        truth = corrected(
            "a" * 64, ("bus", LARGE), ("cat", SMALL), ("tree", box_mask((38, 0, 2, 9)))
        )
        source = corrected_archives(tmp_path, truth, corrected("c" * 64))
        seen = set()
        for image, semantic, masks in training_set(
            source, COMPOSITION.model_copy(update={"negative_canvas": 0.5})
        ):
            assert image.shape == (32, 32, 3)
            np.testing.assert_array_equal(masks.any(0), semantic > 0)
            assert all(len(np.unique(semantic[mask])) <= 1 for mask in masks)
            seen |= set(np.unique(semantic).tolist())
        assert seen == {-1, 0, 1, 3}

    def test_those_that_are_used_are_part_of_the_fingerprint(self, tmp_path: Path) -> None:
        plain = corrected_archives(tmp_path / "0").fingerprint
        elsewhere = corrected_archives(tmp_path / "1", corrected("f" * 64)).fingerprint
        first = corrected_archives(tmp_path / "2", corrected("b" * 64)).fingerprint
        second = corrected_archives(tmp_path / "3", corrected("b" * 64, ("dog", LARGE))).fingerprint
        assert plain == elsewhere
        assert len({str(plain), str(first), str(second)}) == 3


def test_rejected_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    review = {
        Reviewed("cat", "plain0"): Decision("reject"),
        Reviewed("dog", "plain0"): Decision("accept"),
        Reviewed("background", "negative"): Decision("reject"),
        Reviewed("bus", "gone"): Decision("reject"),
    }
    whole = archives(tmp_path / "shards")
    found = archives(tmp_path / "shards", review=review)
    assert whole.objects[1][0] not in found.objects[1]
    assert found.objects[1] == whole.objects[1][1:]
    assert found.objects[2] == whole.objects[2]
    assert found.negatives == []
    assert found.fingerprint != whole.fingerprint
    composition = COMPOSITION.model_copy(update={"negative_canvas": 0.0})
    data = training_set(found, composition)
    assert data.counts == {
        "archive_images": 8,
        "negatives": 0,
        "empty_masks": 1,
        "rejected": 2,
        "unknown_reviews": 1,
    }
    assert [text for text in data.warnings if "bus gone" in text]


def test_accepted_samples_change_nothing_that_is_trained(tmp_path: Path) -> None:
    review = {Reviewed("cat", "plain0"): Decision("accept")}
    whole, found = archives(tmp_path / "a"), archives(tmp_path / "b", review=review)
    assert (found.objects, found.fingerprint) == (whole.objects, whole.fingerprint)


def test_rejecting_everything_is_an_error_that_says_so(tmp_path: Path) -> None:
    samples = [shard_sample("one", 1, box_mask((2, 2, 20, 20)))]
    with pytest.raises(PipelineError, match="none of 1 samples, 1 rejected ones aside, has"):
        archives(tmp_path / "a", samples, review={Reviewed("cat", "one"): Decision("reject")})
