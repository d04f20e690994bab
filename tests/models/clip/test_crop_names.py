"""Names of regions by their crops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.engine.runtime import Runtime
from pipeline.models.clip import ClipEncoder, load_clip
from pipeline.models.clip.crop_names import CropNamer, crop, no_encoder
from pipeline.params.base import CropNamesParams, EncoderParams

SIDE = 8


@pytest.fixture
def clip(encoder: EncoderParams, runtime: Runtime) -> ClipEncoder:
    return load_clip(encoder, runtime.device)


def plain_crop(image: Tensor, top: int, left: int, bottom: int, right: int, side: int) -> Tensor:
    """By its pixels, resized alone."""
    part = image[:, top:bottom, left:right][None]
    resized = F.interpolate(part, (side, side), mode="bicubic", antialias=True)
    return resized.clamp(0, 1)[0]


class TestCrop:
    @pytest.mark.parametrize(
        ("box", "margin", "pixels"),
        [
            ((0.25, 0.25, 0.5, 0.3), 0.0, (10, 17, 20, 27)),
            ((0.0, 0.0, 0.25, 0.125), 0.0, (0, 0, 10, 10)),  # moved inside
            ((0.75, 0.875, 1.0, 1.0), 0.0, (30, 70, 40, 80)),
            ((0.5, 0.5, 0.6, 0.55), 0.5, (18, 38, 26, 46)),
            ((0.0, 0.0, 1.0, 1.0), 0.0, (0, 0, 40, 80)),  # squeezed
            ((0.4, 0.1, 0.6, 0.9), 1.0, (0, 0, 40, 80)),
        ],
    )
    def test_a_square_inside_the_image(
        self, box: tuple[float, ...], margin: float, pixels: tuple[int, int, int, int]
    ) -> None:
        image = torch.rand(3, 40, 80)
        expected = plain_crop(image, *pixels, SIDE)
        torch.testing.assert_close(crop(image, box, margin, SIDE), expected)

    @pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 1)])
    def test_a_pixel_wide(self, size: tuple[int, int]) -> None:
        image = torch.full((3, *size), 0.5)
        for box in ((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.01, 0.01), (0.99, 0.99, 1.0, 1.0)):
            torch.testing.assert_close(crop(image, box, 0.0, SIDE), torch.full((3, 8, 8), 0.5))


def brightness(images: Tensor) -> Tensor:
    """Scores (N, 3, 2, 2) of background and two categories: darkness, red and green."""
    quarters = F.adaptive_avg_pool2d(images, 2)
    return torch.cat((1 - quarters.mean(dim=1, keepdim=True), quarters[:, :2]), dim=1)


class TestCropNamer:
    @pytest.fixture
    def halves(self) -> Tensor:
        """An image (3, 32, 64) with another picture in either half."""
        return torch.rand(3, 32, 64).round()

    @pytest.fixture
    def namer(self, clip: ClipEncoder, halves: Tensor) -> Callable[..., CropNamer]:
        """Category 1 is what CLIP sees in the right half, 2 what it sees in the left one."""
        right, left = (
            plain_crop(halves, 0, start, 32, start + 32, clip.image_size) for start in (32, 0)
        )
        text = clip.encode_images(torch.stack((right, left)))

        def make(weight: float, student_weight: float = 0.0) -> CropNamer:
            params = CropNamesParams(weight=weight, student_weight=student_weight)
            return CropNamer(lambda: clip, brightness, text, 2.0, params)

        return make

    def test_crops_and_pixels_by_their_weight(
        self, namer: Callable[..., CropNamer], halves: Tensor, clip: ClipEncoder
    ) -> None:
        boxes = torch.tensor([[0.0, 0.0, 1.0, 0.5], [0.0, 0.5, 1.0, 1.0]])
        scores = torch.tensor([[0.9, 0.1], [0.2, 0.6]])
        assert namer(0.0).label_ids(halves, boxes, scores).tolist() == [1, 2]
        assert namer(1.0).label_ids(halves, boxes, scores).tolist() == [2, 1]
        names = namer(0.3)
        seen = names.text[[1, 0]] @ names.text.T * clip.logit_scale
        both = 0.7 * (2 * scores).log_softmax(1) + 0.3 * seen.log_softmax(1)
        found = names.label_ids(halves, boxes, scores)
        assert found.tolist() == (1 + both.argmax(1)).tolist()

    def test_the_network_looks_at_crops_where_they_are_objects(
        self, namer: Callable[..., CropNamer], clip: ClipEncoder
    ) -> None:
        image = torch.zeros(3, 8, 16)
        image[0, :, :3] = image[1, 4:, 4:7] = 1.0  # red at the left, less green beside it
        image[1, :, 8:] = 0.5
        boxes = torch.tensor([[0.0, 0.0, 1.0, 0.5], [0.0, 0.5, 1.0, 1.0]])
        even, odd = torch.zeros(2, 2), torch.tensor([[0.0, 0.3], [0.3, 0.0]])
        assert namer(0.0, 1.0).label_ids(image, boxes, odd).tolist() == [1, 2]
        expected = []
        for start in (0, 8):
            scores = brightness(plain_crop(image, 0, start, 8, start + 8, clip.image_size)[None])[0]
            votes, total = torch.zeros(2), 0.0
            for row in range(2):
                for column in range(2):
                    at = 2 * scores[:, row, column]
                    weight = 1 - at.softmax(0)[0]
                    votes += weight * at[1:].log_softmax(0)
                    total += float(weight)
            expected.append((votes / total).log_softmax(0))
        names = namer(0.0, 0.5)
        for advantage in (0.9, 1.1):  # of the other name by the pixels
            differences = torch.stack([vote[0] - vote[1] for vote in expected])
            pixels = torch.stack((-differences, differences), dim=1) * advantage / 4
            won = [1, 2] if advantage < 1 else [2, 1]
            assert names.label_ids(image, boxes, pixels).tolist() == won
        assert names.label_ids(image, boxes[:0], even[:0]).tolist() == []

    def test_many_crops_are_seen_in_batches(
        self, namer: Callable[..., CropNamer], halves: Tensor
    ) -> None:
        boxes = torch.tensor([[0.0, 0.0, 1.0, 0.5], [0.0, 0.5, 1.0, 1.0]]).repeat(40, 1)
        names = namer(0.5, 0.5)
        once = names.label_ids(halves, boxes[:2], torch.zeros(2, 2))
        assert torch.equal(names.label_ids(halves, boxes, torch.zeros(80, 2)), once.repeat(40))

    @pytest.mark.parametrize(("weight", "student_weight"), [(0.7, 0.4), (1.0, 0.01)])
    def test_shares_are_of_one(self, weight: float, student_weight: float) -> None:
        with pytest.raises(ValueError, match=r"student_weight: .* more than 1"):
            CropNamesParams(weight=weight, student_weight=student_weight)
        assert CropNamesParams(weight=weight, student_weight=1 - weight).weight == weight

    def test_connected_regions_are_named_and_small_ones_keep_theirs(
        self, namer: Callable[..., CropNamer], halves: Tensor
    ) -> None:
        labels = np.zeros((32, 64), dtype=np.int16)
        labels[:, :32] = labels[:, 32:] = 1  # one region that fills the image ...
        labels[:, 31:33] = 0  # ... is two
        labels[0, 31] = 2
        before = labels.copy()
        named = namer(1.0).relabelled(labels, torch.zeros(2, 4, 8), halves)
        expected = before.copy()
        expected[:, :31] = 2
        np.testing.assert_array_equal(named, expected)
        np.testing.assert_array_equal(labels, before)

    def test_what_the_pixels_of_a_region_say(
        self, namer: Callable[..., CropNamer], halves: Tensor
    ) -> None:
        labels = np.zeros((8, 16), dtype=np.int16)
        labels[2:6, 1:7] = labels[2:6, 9:15] = 1
        scores = torch.zeros(2, 4, 8)
        scores[1, 1:3, 1:3] = 1.0  # inside the left region
        scores[0, :, 4:] = 0.1
        named = namer(0.0).relabelled(labels, scores, halves)
        assert set(named[:, :8].ravel()) == {0, 2}
        assert set(named[:, 8:].ravel()) == {0, 1}

    @pytest.mark.parametrize("shape", [(1, 1), (5, 3)])
    def test_without_a_region_no_encoder_is_asked_for(self, shape: tuple[int, int]) -> None:
        namer = CropNamer(no_encoder, brightness, torch.eye(2), 1.0, CropNamesParams())
        labels = np.zeros(shape, dtype=np.int16)
        scores, image = torch.zeros(2, 1, 1), torch.zeros(3, *shape)
        np.testing.assert_array_equal(namer.relabelled(labels, scores, image), labels)
        labels += 1
        with pytest.raises(ValueError, match="crop_names"):
            namer.relabelled(labels, scores, image)
