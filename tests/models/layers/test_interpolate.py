"""Upsampled parts of maps against torch's upsampling of whole ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import PipelineError
from pipeline.models.layers import bilinear
from pipeline.models.layers.interpolate import (
    bilinear_taps,
    interpolate,
    joint_foreground_labels,
    upsample,
    upsampled_labels,
)
from pipeline.models.layers.pixels import check_joint_foreground

SIZES = [
    ((48, 48), (384, 384)),
    ((47, 63), (375, 500)),
    ((31, 42), (500, 375)),
    ((1, 5), (17, 33)),
    ((6, 6), (6, 6)),
]


def upsampled(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    columns = interpolate(maps, bilinear_taps(maps.shape[2], size[1]), dim=2)
    return interpolate(columns, bilinear_taps(maps.shape[1], size[0]), dim=1)


@pytest.mark.parametrize(("grid", "size"), SIZES)
def test_values_are_those_of_torch(grid: tuple[int, int], size: tuple[int, int]) -> None:
    # Not three maps: torch takes those for colours and rounds otherwise.
    maps = torch.rand(4, *grid, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(maps[None], size=size, mode="bilinear")[0]
    torch.testing.assert_close(upsampled(maps, size), expected, rtol=0, atol=2**-22)
    # Torch has another kernel for small maps, and others on other processors.
    if size[0] > 100 and torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert torch.equal(upsampled(maps, size), expected)


def test_saturated_maps_stay_saturated() -> None:
    for value in (0.0, 1.0):
        maps = torch.full((1, 7, 9), value)
        assert torch.equal(upsampled(maps, (53, 61)), torch.full((1, 53, 61), value))


def test_the_first_axis_gives_what_any_other_gives() -> None:
    maps = torch.rand(5, 4, 3)
    taps = bilinear_taps(5, 13)
    expected = interpolate(maps.transpose(0, 1).contiguous(), taps, dim=1).transpose(0, 1)
    assert torch.equal(interpolate(maps, taps, dim=0), expected)


@pytest.mark.parametrize("cells", [slice(10, 40), torch.tensor([3, 3, 52, 0])])
def test_a_part_has_the_values_of_the_whole(cells: slice | torch.Tensor) -> None:
    maps = torch.rand(2, 7, 9)
    taps = bilinear_taps(7, 53)
    whole = interpolate(maps, taps, dim=1)
    assert torch.equal(interpolate(maps, taps.at(cells), dim=1), whole[:, cells])


def test_a_map_that_shrinks_samples_its_cells() -> None:
    maps = torch.rand(2, 12, 10)
    expected = F.interpolate(maps[None], size=(5, 3), mode="bilinear")[0]
    torch.testing.assert_close(upsampled(maps, (5, 3)), expected)


@pytest.mark.parametrize("max_elements", [1, 2 * 21 * 34 * 4, 1 << 26])
@pytest.mark.parametrize("sizes", [[(17, 30)], [(21, 34), (17, 30)], [(5, 6), (17, 30)]])
def test_labels_are_those_of_all_scores_at_once(
    sizes: list[tuple[int, int]], max_elements: int
) -> None:
    scores = torch.randn(2, 11, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = scores
    for size in sizes:
        expected = F.interpolate(expected, size=size, mode="bilinear")
    labels = upsampled_labels(scores, *sizes, max_elements=max_elements)
    assert torch.equal(labels, expected.argmax(dim=1))


def test_of_equal_labels_the_first_wins() -> None:
    assert (upsampled_labels(torch.ones(1, 4, 1, 1), (2, 3), max_elements=1) == 0).all()


class TestJointForeground:
    @pytest.mark.parametrize("sizes", [[(3, 5)], [(13, 9)], [(6, 10), (13, 9)], [(1, 1)]])
    @pytest.mark.parametrize("categories", [1, 2, 7])
    def test_labels_are_those_of_a_softmax(
        self, categories: int, sizes: list[tuple[int, int]]
    ) -> None:
        scores = torch.randn(2, 1 + categories, 3, 5, generator=torch.Generator().manual_seed(3))
        whole = scores
        for size in sizes:
            whole = upsample(whole, size)
        probabilities = (2 * whole).softmax(dim=1)
        is_object = probabilities[:, 1:].sum(dim=1) > probabilities[:, 0]
        expected = torch.where(is_object, 1 + probabilities[:, 1:].argmax(dim=1), 0)
        found = joint_foreground_labels(scores, *sizes, scale=2.0)
        assert torch.equal(found, expected)
        apart = upsampled_labels(scores, *sizes)
        assert not (found == 0)[apart > 0].any()
        assert categories > 1 or torch.equal(found, apart)
        for own, numbers in zip(scores, found, strict=True):
            labels = bilinear.joint_foreground_labels(own.numpy(), *sizes, scale=2.0)
            assert (labels == numbers.numpy()).all()
        halves = [joint_foreground_labels(one[None], *sizes, scale=2.0)[0] for one in scores]
        assert torch.equal(found, torch.stack(halves))

    def test_what_is_as_likely_is_background(self) -> None:
        even = torch.tensor([0.5, 0.25, 0.25])[None, :, None, None]
        assert joint_foreground_labels(even, (2, 2), scale=None).eq(0).all()
        less = torch.tensor([0.4, 0.3, 0.3])[None, :, None, None]
        assert joint_foreground_labels(less, (2, 2), scale=None).eq(1).all()
        assert upsampled_labels(less, (2, 2)).eq(0).all()

    def test_scores_far_apart_overflow_to_the_right_label(self) -> None:
        far = torch.tensor([[0.0, 500.0], [0.0, -500.0]])[:, :, None, None]
        assert joint_foreground_labels(far, (1, 1), scale=100.0).flatten().tolist() == [1, 0]


@pytest.mark.parametrize(("scale", "is_refused"), [(1.0, True), (20.0, False)])
def test_a_joint_foreground_that_leaves_no_background_is_refused(
    scale: float, is_refused: bool
) -> None:
    """Five categories at equal angles: the best of tokens is as far from all of them as it can."""
    text = torch.eye(6)
    token = F.normalize(text[0] - text[1:].mean(dim=0), dim=0)
    labels = joint_foreground_labels((text @ token)[None, :, None, None], (1, 1), scale=scale)
    assert (labels.item() == 0) is not is_refused
    if is_refused:
        with pytest.raises(
            PipelineError, match=r"joint_foreground: with 5 .* times 1 .* train with"
        ):
            check_joint_foreground(text, scale)
    else:
        check_joint_foreground(text, scale)
    check_joint_foreground(text[:2], 1e-6)  # one category is likelier than the background or not
