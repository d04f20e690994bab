"""Pools of whole images, with truth and without, and training images of them."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pipeline.benchmarks.opening import open_truth
from pipeline.errors import PipelineError
from pipeline.formats.corrections import CorrectedObject, Correction, Corrections, write_corrections
from pipeline.formats.decisions import Decisions
from pipeline.formats.images import ImageError, encode_jpeg, encode_label, encode_png
from pipeline.formats.labels import IGNORE_INDEX, LABEL_TYPE, UNLABELLED
from pipeline.formats.review import Decision, Reviewed
from pipeline.formats.rle import encode_mask
from pipeline.params.benches import CubBench, IndexPngBench, VocBench
from pipeline.params.sources import SourceParams
from pipeline.training.images import (
    MAX_IN_A_ROW,
    AnnotatedPool,
    ArchivePool,
    JointPool,
    PlusSet,
    SourcePool,
)
from pipeline.training.settings import Augmentation
from pipeline.training.training_set import collate
from tests.benchmarks.fixtures import (
    CONTEXT_CATEGORIES,
    VOC_CATEGORIES,
    jpeg,
    save_jpeg,
    save_png,
    save_text,
    write_context,
    write_cub,
    write_voc,
)
from tests.formats.shard_folders import write_shards

CATEGORIES = ["cat", "dog"]
V, U = IGNORE_INDEX, UNLABELLED
AUGMENTATION = Augmentation(crop_size=24, base_size=[48, 32])


def write_archives(folder: Path, *keys: str, categories: list[str] = CATEGORIES) -> Path:
    """Mask and label shards in one: three pixels of background, cat and dog, of confidence 0.6."""
    samples = [
        {
            "__key__": key,
            "jpg": encode_jpeg(Image.new("RGB", (3, 1), (number, 0, 0))),
            "mask.png": encode_png(np.zeros((1, 3), bool)),
            "label.png": encode_label(np.array([[0, 1, 2]]), 2),
            "confidence.png": encode_png(np.array([[153, 153, 51]], np.uint8)),
            "json": {"category": "cat", "label_id": 1, "sha256": key[0] * 64},
        }
        for number, key in enumerate(keys)
    ]
    noted = {"pseudo_label": {"categories": categories}}
    write_shards(samples, folder, shard_size=2, settings=noted)
    return folder


class TestArchivePool:
    def test_every_image_is_there_once_and_unlabelled(self, tmp_path: Path) -> None:
        folder = write_archives(tmp_path / "masks", "b_1", "a_1", "b_2", "c_0")
        pool = ArchivePool(folder, categories=CATEGORIES)
        assert [pool.name(index) for index in range(len(pool))] == ["b_1", "a_1", "c_0"]
        image, labels = pool[1]
        assert (image.mode, image.size) == ("RGB", (3, 1))
        assert labels.dtype == LABEL_TYPE
        assert labels.tolist() == [[U, U, U]]

    @pytest.mark.parametrize(
        ("background", "threshold", "expected"),
        [
            (True, 0.0, [0, 1, 2]),
            (False, 0.0, [V, 1, 2]),
            (True, 0.6, [0, 1, V]),
            (True, 0.7, [V] * 3),
        ],
    )
    def test_stored_labels_are_those_of_a_teacher(
        self, tmp_path: Path, background: bool, threshold: float, expected: list[int]
    ) -> None:
        folder = write_archives(tmp_path / "masks", "a_1", "a_2", "b_2")
        pool = ArchivePool(
            folder,
            folder,
            categories=CATEGORIES,
            background=background,
            confidence_threshold=threshold,
        )
        assert len(pool) == 2
        assert [pool[index][1].tolist() for index in range(2)] == [[expected]] * 2

    def test_labels_of_other_categories_or_without_an_image_are_refused(
        self, tmp_path: Path
    ) -> None:
        folder = write_archives(tmp_path / "masks", "a_1", "b_2")
        others = write_archives(tmp_path / "others", "a_1", "b_2", categories=["cat", "bus"])
        with pytest.raises(PipelineError, match=r"other categories than .*: cat, bus; run"):
            ArchivePool(folder, others, categories=CATEGORIES)
        few = write_archives(tmp_path / "few", "a_1")
        with pytest.raises(PipelineError, match="no labels of 1 of 2 masks, such as b_2"):
            ArchivePool(folder, few, categories=CATEGORIES)

    @pytest.mark.parametrize("stored", [False, True])
    @pytest.mark.parametrize(("background", "expected"), [(True, [0, 2, 2]), (False, [V, 2, 2])])
    def test_a_corrected_image_is_labelled_by_a_person(
        self, tmp_path: Path, stored: bool, background: bool, expected: list[int]
    ) -> None:
        folder = write_archives(tmp_path / "masks", "a_1", "b_1", "b_2")
        plain = ArchivePool(folder, categories=CATEGORIES)
        mask = encode_mask(np.array([[0, 1, 1]], dtype=bool))
        truths = [
            Correction("b" * 64, "b.jpg", (1, 3), [CorrectedObject(CATEGORIES[1], mask)]),
            Correction("c" * 64, "c.jpg", (1, 3)),
        ]
        write_corrections(tmp_path / "corrections", truths)
        pool = ArchivePool(
            folder,
            folder if stored else None,
            categories=CATEGORIES,
            background=background,
            decisions=Decisions(Corrections(tmp_path / "corrections")),
        )
        assert pool[1][1].tolist() == [expected]
        assert pool[0][1].tolist() != [expected]
        assert pool.counts == {"corrected": 1, "unused_corrections": 1}
        assert (plain.counts, len(pool)) == ({}, 2)
        assert pool.fingerprint != plain.fingerprint

    def test_an_image_rejected_in_any_archive_is_left_out(self, tmp_path: Path) -> None:
        folder = write_archives(tmp_path / "masks", "b_1", "a_1", "b_2", "c_0")
        review = {
            Reviewed("dog", "b"): Decision("reject"),
            Reviewed("cat", "a"): Decision("accept"),
            Reviewed("cat", "z"): Decision("reject"),
        }
        whole = ArchivePool(folder, categories=CATEGORIES)
        pool = ArchivePool(folder, categories=CATEGORIES, decisions=Decisions(review=review))
        assert [pool.name(index) for index in range(len(pool))] == ["a_1", "c_0"]
        assert pool.counts == {"rejected": 1, "unknown_reviews": 1}
        assert whole.counts == {}
        assert pool.fingerprint != whole.fingerprint

    def test_an_empty_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(PipelineError, match="no samples; run the mask stage again"):
            ArchivePool(write_archives(tmp_path / "masks"), categories=CATEGORIES)


def write_tar(root: Path, images: dict[str, bytes]) -> SourceParams:
    root.mkdir()
    with tarfile.open(root / "0.tar", "w") as tar:
        for name, content in images.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return SourceParams(format="webdataset", root=root)


def write_parquet(root: Path, images: dict[str, bytes]) -> SourceParams:
    root.mkdir()
    pq.write_table(pa.table({"jpg": list(images.values())}), root / "0.parquet")
    return SourceParams(format="parquet", root=root)


def write_folder(root: Path, images: dict[str, bytes]) -> SourceParams:
    root.mkdir()
    for name, content in images.items():
        (root / name).write_bytes(content)
    return SourceParams(root=root)


class TestSourcePool:
    @pytest.mark.parametrize("write", [write_folder, write_tar, write_parquet])
    def test_images_of_any_source_are_unlabelled(
        self, tmp_path: Path, write: Callable[..., SourceParams]
    ) -> None:
        images = {"a.jpg": jpeg((2, 3), "L"), "b.jpg": b"", "c.jpg": jpeg((1, 1))}
        pool = SourcePool("photos", write(tmp_path / "photos", images), max_pixels=6)
        assert len(pool) == 3
        image, labels = pool[0]
        assert (image.mode, image.size, labels.dtype) == ("RGB", (3, 2), LABEL_TYPE)
        assert labels.tolist() == [[U] * 3] * 2
        assert pool[2][1].tolist() == [[U]]
        with pytest.raises(ImageError, match="empty file"):
            pool[1]
        assert str(tmp_path / "photos") in pool.name(1)

    def test_an_image_that_is_too_large_cannot_be_read(self, tmp_path: Path) -> None:
        pool = SourcePool("a", write_folder(tmp_path / "a", {"a.jpg": jpeg((2, 3))}), max_pixels=5)
        with pytest.raises(ImageError, match="too large: 3x2"):
            pool[0]

    def test_a_missing_folder_is_named_with_its_field(self, tmp_path: Path) -> None:
        source = SourceParams(root=tmp_path / "none")
        with pytest.raises(PipelineError, match=r"train\.data\.root: .*none: no such folder"):
            SourcePool("data", source, field="train.data")


def voc_pool(root: Path, **changes: Any) -> AnnotatedPool:
    """The pool of three images of cat (1), dog (2), void and background."""
    write_voc(root)
    bench = VocBench(format="voc", root=root, split="val", categories=VOC_CATEGORIES)
    arguments: dict[str, Any] = {"categories": CATEGORIES, "background": False} | changes
    return AnnotatedPool(open_truth(bench, [], field="train.data"), **arguments)


class TestAnnotatedPool:
    @pytest.mark.parametrize(
        ("truth", "background", "cat", "dog", "rest"),
        [
            ("zero_shot", False, 1, U, V),
            ("zero_shot", True, 1, U, 0),
            ("annotation_free", False, U, U, V),
            ("annotation_free", True, U, U, U),
            ("supervised", False, 1, 2, V),
            ("supervised", True, 1, 2, 0),
            ("adapted", False, 1, V, V),
            ("adapted", True, 1, V, 0),
        ],
    )
    def test_truth_by_setting(
        self, tmp_path: Path, truth: Any, background: bool, cat: int, dog: int, rest: int
    ) -> None:
        pool = voc_pool(tmp_path, truth=truth, background=background, unseen=["dog"])
        image, labels = pool[0]
        assert (image.mode, image.size, labels.dtype) == ("RGB", (6, 4), LABEL_TYPE)
        d, r = dog, rest
        assert labels.tolist() == [[cat, V, d, d, d, d], [V, V, d, d, d, d], [r] * 6, [r] * 6]
        assert pool[1][1].tolist() == [[r] * 6] * 4
        assert pool[2][1].tolist() == [[d], [r], [r]]
        assert pool.warnings == []

    def test_label_ids_go_by_name(self, tmp_path: Path) -> None:
        pool = voc_pool(
            tmp_path, categories=["Dog ", "bus", "CAT"], unseen=["cat"], background=True
        )
        assert pool[0][1].tolist() == [[U, V, 1, 1, 1, 1], [V, V, 1, 1, 1, 1], [0] * 6, [0] * 6]
        (warning,) = pool.warnings
        assert warning.startswith("the labelled set has no truth of bus: is its list of categories")

    @pytest.mark.parametrize(
        ("truth", "background", "other"),
        [
            ("zero_shot", True, 0),
            ("zero_shot", False, V),
            ("annotation_free", True, U),
            ("annotation_free", False, V),
        ],
    )
    def test_names_that_are_not_trained_are_background_where_it_is_trained(
        self, tmp_path: Path, truth: Any, background: bool, other: int
    ) -> None:
        pool = voc_pool(tmp_path, categories=["cat"], truth=truth, background=background)
        cat = U if truth == "annotation_free" else 1
        assert pool[0][1][0].tolist() == [cat, V, other, other, other, other]

    def test_other_layouts_are_read(self, tmp_path: Path) -> None:
        write_context(tmp_path / "context")
        bench = IndexPngBench(
            format="index_png",
            root=tmp_path / "context",
            images="JPEGImages",
            labels="SegmentationClassContext",
            image_list="ImageSets/SegmentationContext/{split}.txt",
            categories=CONTEXT_CATEGORIES,
        )
        pool = AnnotatedPool(
            open_truth(bench, [], field="train.data"), categories=["wood", "sky"], unseen=["sky"]
        )
        assert pool[0][1].tolist() == [[0, U, U, 0], [0, U, 1, V]]

    def test_names_of_single_images_are_looked_up(self, tmp_path: Path) -> None:
        write_cub(tmp_path)
        bench = CubBench(format="cub", root=tmp_path, names="breed")
        benchmark = open_truth(bench, [], field="train.data")
        pool = AnnotatedPool(benchmark, categories=["Laysan Albatross", "Black footed Albatross"])
        seen = {pool.name(index).split("/")[-2]: pool[index][1].max() for index in range(3)}
        assert seen == {"001.Black_footed_Albatross": 2, "002.Laysan_Albatross": 1}

    def test_other_truth_is_another_fingerprint(self, tmp_path: Path) -> None:
        """By which a training that was cut off knows whether it may go on."""

        def fingerprint(names: list[str]) -> Any:
            bench = VocBench(format="voc", root=tmp_path, split="val", categories=names)
            truth = open_truth(bench, [], field="train.data")
            return AnnotatedPool(truth, categories=CATEGORIES).fingerprint

        plain = voc_pool(tmp_path).fingerprint
        assert fingerprint(VOC_CATEGORIES) == plain
        assert fingerprint(VOC_CATEGORIES[::-1]) != plain
        for mask in (tmp_path / "SegmentationClass").iterdir():
            os.utime(mask, (0, 0))  # as one that was written again
        assert fingerprint(VOC_CATEGORIES) != plain

    def test_a_set_without_any_of_the_categories_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(PipelineError, match=r"none of the categories: it has cat, dog, .* bus"):
            voc_pool(tmp_path, categories=["bus"])

    def test_an_unseen_name_must_be_a_category(self, tmp_path: Path) -> None:
        with pytest.raises(PipelineError, match=r"unseen: 'dgo' is not .*; did you mean dog"):
            voc_pool(tmp_path, unseen=["dgo"])

    def test_image_and_labels_of_different_size_are_named(self, tmp_path: Path) -> None:
        pool = voc_pool(tmp_path)
        (tmp_path / "JPEGImages/2007_000001.jpg").write_bytes(jpeg((4, 7)))
        with pytest.raises(
            PipelineError, match=r"2007_000001\.jpg: 7x4 pixels, .* labels have 6x4"
        ):
            pool[0]

    def test_a_list_without_masks_of_objects_will_do(self, tmp_path: Path) -> None:
        write_voc(tmp_path)
        for path in (tmp_path / "SegmentationObject").iterdir():
            path.unlink()
        (tmp_path / "SegmentationObject").rmdir()
        bench = VocBench(format="voc", root=tmp_path, categories=VOC_CATEGORIES)
        assert len(open_truth(bench, [], field="train.data")) == 3

    def test_a_missing_list_is_named_with_its_field(self, tmp_path: Path) -> None:
        bench = VocBench(format="voc", root=tmp_path, categories="vox")
        with pytest.raises(PipelineError, match=r"train\.data\.categories: unknown category set"):
            open_truth(bench, [], field="train.data")


class Coloured:
    """A pool of images that are their number; those of `broken` cannot be read."""

    warnings = ()
    counts: ClassVar[dict[str, int]] = {}
    fingerprint = "coloured"

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        self._count, self._broken = count, broken

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        if index in self._broken:
            raise ImageError("truncated")
        labels = np.full((5, 7), index, dtype=LABEL_TYPE)
        return Image.new("RGB", (7, 5), (index, 0, 0)), labels

    def name(self, index: int) -> str:
        return f"image {index}"


def numbers_of(dataset: PlusSet) -> list[int]:
    """Which image of `Coloured` each training image shows."""
    return [int(dataset[number][1].max()) for number in range(len(dataset))]


def plus_set(pool: Any, *, length: int, seed: int = 5) -> PlusSet:
    return PlusSet(pool, AUGMENTATION, seed=seed, length=length)


def test_pools_are_joined_in_their_order() -> None:
    pool = JointPool([Coloured(2), Coloured(0), Coloured(3)])
    assert len(pool) == 5
    assert [int(pool[index][1][0, 0]) for index in range(5)] == [0, 1, 0, 1, 2]
    assert [pool.name(index) for index in (1, 2)] == ["image 1", "image 0"]
    assert len(JointPool([])) == 0


class TestPlusSet:
    def test_every_image_is_drawn_once_an_epoch_in_an_order_of_its_own(self) -> None:
        drawn = numbers_of(plus_set(Coloured(9), length=36))
        epochs = [tuple(drawn[start : start + 9]) for start in range(0, 36, 9)]
        assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
        assert len(set(epochs)) == 4
        assert numbers_of(plus_set(Coloured(9), length=36, seed=6)) != drawn

    def test_a_training_image_is_a_function_of_seed_and_number(self) -> None:
        pool = Coloured(4)
        forward = plus_set(pool, length=20)
        images = [forward[number] for number in range(20)]
        backward = pickle.loads(pickle.dumps(plus_set(pool, length=30)))
        for number in reversed(range(20)):
            for one, other in zip(images[number], backward[number], strict=True):
                assert (one.dtype, one.shape) == (other.dtype, other.shape)
                assert (one == other).all()

    def test_its_images_make_batches(self) -> None:
        dataset = plus_set(Coloured(3), length=4)
        batch = collate([dataset[number] for number in range(4)])
        assert (batch.images.shape, batch.images.dtype) == ((4, 24, 24, 3), torch.uint8)
        assert (batch.semantic_masks.shape, batch.semantic_masks.dtype) == (
            (4, 24, 24),
            torch.int16,
        )
        assert batch.instance_masks.shape == (0, 24, 24)
        assert batch.num_instances == [0] * 4

    @pytest.mark.parametrize("workers", [1, 2])
    def test_workers_change_no_byte_and_tell_what_they_skipped(self, workers: int) -> None:
        alone, shared = (plus_set(Coloured(7, broken=(2, 3)), length=21) for _ in range(2))
        expected = collate([alone[number] for number in range(21)])
        batches = list(DataLoader(shared, batch_size=4, num_workers=workers, collate_fn=collate))
        assert (torch.cat([batch.images for batch in batches]) == expected.images).all()
        masks = torch.cat([batch.semantic_masks for batch in batches])
        assert (masks == expected.semantic_masks).all()
        skipped = [("image 2", "truncated"), ("image 3", "truncated")]
        assert list(alone.skipped()) == list(shared.skipped()) == skipped

    def test_an_unreadable_image_is_replaced_by_the_next_one_of_the_order(self) -> None:
        whole = numbers_of(plus_set(Coloured(6), length=12))
        dataset = plus_set(Coloured(6, broken=(4,)), length=12)
        drawn = numbers_of(dataset)
        for start in (0, 6):
            epoch = whole[start : start + 6]
            place = epoch.index(4)
            epoch[place] = epoch[(place + 1) % 6]
            assert drawn[start : start + 6] == epoch
        assert list(dataset.skipped()) == [("image 4", "truncated")]

    def test_nothing_is_skipped_before_it_is_drawn(self) -> None:
        assert list(plus_set(Coloured(6, broken=(4,)), length=12).skipped()) == []

    def test_an_image_that_was_mended_since_is_still_listed(self, tmp_path: Path) -> None:
        source = write_folder(tmp_path / "a", {"a.jpg": b"", "b.jpg": jpeg((9, 9))})
        dataset = plus_set(SourcePool("a", source), length=2)
        numbers_of(dataset)
        (tmp_path / "a/a.jpg").write_bytes(jpeg((9, 9)))
        assert [reason for _, reason in dataset.skipped()] == ["could not be read, but can be now"]

    @pytest.mark.parametrize("count", [1, 3, MAX_IN_A_ROW + 50])
    def test_a_pool_of_nothing_readable_is_an_error_that_ends(self, count: int) -> None:
        dataset = plus_set(Coloured(count, broken=tuple(range(count))), length=1)
        tries = min(count, MAX_IN_A_ROW)
        with pytest.raises(
            PipelineError, match=rf"{tries} images in a row .* image \d+: truncated"
        ):
            dataset[0]

    def test_an_empty_pool_is_refused(self) -> None:
        with pytest.raises(PipelineError, match="no images to train on"):
            plus_set(JointPool([]), length=1)

    @pytest.mark.parametrize("number", [-1, 3])
    def test_numbers_beyond_its_length_are_refused(self, number: int) -> None:
        with pytest.raises(IndexError):
            plus_set(Coloured(2), length=3)[number]

    def test_no_unseen_label_and_no_other_void_comes_out_of_resizing(self, tmp_path: Path) -> None:
        labels = np.random.default_rng(0).integers(0, 3, (40, 50)).astype(np.uint8)
        labels[:, 20] = 255
        save_jpeg(tmp_path / "images/0.jpg", (40, 50), "RGB")
        save_png(tmp_path / "labels/0.png", labels)
        save_text(tmp_path / "val.txt", "0")
        bench = IndexPngBench(
            format="index_png",
            root=tmp_path,
            images="images",
            labels="labels",
            image_list="{split}.txt",
            categories=CATEGORIES,
        )
        pool = AnnotatedPool(
            open_truth(bench, [], field="train.data"), categories=CATEGORIES, unseen=["dog"]
        )
        dataset = plus_set(pool, length=40)
        seen = np.concatenate([dataset[number][1].ravel() for number in range(40)])
        assert set(seen.tolist()) == {V, U, 0, 1}
