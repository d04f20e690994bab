"""Regions, their means and the labels mixed from them, against plain readings by loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.methods.bank import load_region_encoder
from pipeline.methods.dense import (
    ClearClipParams,
    DenseClipParams,
    NaClipParams,
    ScClipParams,
    SclipParams,
    load_dense_labeller,
)
from pipeline.models.bank.labelling import BankLabeller, RegionBank
from pipeline.models.bank.regions import RegionEncoder, numbered_components, region_means
from pipeline.params.base import EncoderParams
from pipeline.params.sections import BankParams
from pipeline.vocabulary.categories import Names

NAMES = Names(["cat", "dog", "car"])
SIZES = [(24, 40), (40, 24), (32, 32), (8, 8), (5, 3), (17, 33)]


def components(parts: NDArray[np.int_], min_share: float) -> NDArray[np.int_]:
    """By a flood from every pixel."""
    numbers = np.zeros(parts.shape, int)
    seen = np.zeros(parts.shape, bool)
    count = 0
    for value in sorted(set(parts.ravel().tolist()), reverse=True):
        for start in zip(*np.nonzero(parts == value), strict=True):
            if seen[start]:
                continue
            waiting, found = [start], []
            seen[start] = True
            while waiting:
                y, x = waiting.pop()
                found.append((y, x))
                for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                    inside = 0 <= place[0] < parts.shape[0] and 0 <= place[1] < parts.shape[1]
                    if inside and not seen[place] and parts[place] == value:
                        seen[place] = True
                        waiting.append(place)
            if len(found) >= min_share * parts.size:
                count += 1
                for place in found:
                    numbers[place] = count
    return numbers


def means(features: torch.Tensor, numbers: NDArray[np.int_]) -> NDArray[np.float64]:
    """Of what is upsampled, pixel by pixel."""
    unit = features / features.norm(dim=0)
    pixels = F.interpolate(unit[None], size=numbers.shape, mode="bilinear")[0].double().numpy()
    rows = []
    for number in range(1, numbers.max() + 1):
        inside = [pixels[:, y, x] for y, x in zip(*np.nonzero(numbers == number), strict=True)]
        mean = np.mean(inside, axis=0)
        rows.append(mean / np.linalg.norm(mean))
    return np.array(rows)


@pytest.mark.parametrize("seed", range(8))
def test_components_and_means_are_those_of_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = SIZES[seed % len(SIZES)]
    parts = rng.integers(0, 2 + seed % 3, size)
    for min_share in (0.0, 0.02):
        numbers = numbered_components(parts, min_share=min_share)
        np.testing.assert_array_equal(numbers, components(parts, min_share))
    numbers = numbered_components(parts)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(5, 1 + seed % 4, 3, generator=generator)
    found = region_means(features, numbers)
    np.testing.assert_allclose(found.numpy(), means(features, numbers), atol=1e-5)


def test_a_whole_mask_is_one_region_and_one_pixel_too() -> None:
    assert numbered_components(np.ones((3, 4), int)).tolist() == [[1] * 4] * 3
    assert numbered_components(np.zeros((1, 1), int)).tolist() == [[1]]
    none = numbered_components(np.eye(4, dtype=int), min_share=1.0)
    assert none.max() == 0
    assert region_means(torch.ones(2, 1, 1), none).shape == (0, 2)


def unit_rows(rng: np.random.Generator, count: int, dim: int) -> NDArray[np.float32]:
    rows = rng.standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 3, 50])
def test_the_nearest_are_those_of_other_images(count: int) -> None:
    rng = np.random.default_rng(count)
    images = [str(number) for number in rng.integers(0, 6, 30)]
    keys, values = unit_rows(rng, 30, 7), unit_rows(rng, 30, 4)
    queries = unit_rows(rng, 25, 7)
    found = RegionBank(images, keys, values).nearest_values(queries, count, without="3")
    for query, mean in zip(queries, found, strict=True):
        order = [place for place in np.argsort(-(keys @ query)) if images[place] != "3"]
        np.testing.assert_allclose(mean, values[order[:count]].mean(axis=0), atol=1e-6)
    alone = RegionBank(["a", "a"], keys[:2], values[:2])
    assert not alone.nearest_values(queries, 5, without="a").any()


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime(device=torch.device("cpu"), amp_dtype=None, seed=0, cache_dir=tmp_path)


def make_encoder(
    encoder: EncoderParams, runtime: Runtime, labeller: dict[str, Any] | None = None, **bank: Any
) -> RegionEncoder:
    params = DenseClipParams(encoder=encoder, templates="name", **(labeller or {}))
    return load_region_encoder(BankParams(**bank), params, NAMES, runtime)


def softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    values = np.exp(values - values.max())
    return values / values.sum()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("labeller", [{}, {"key_smoothing": 1.0, "key_affinity": "cosine"}])
def test_labels_are_those_of_a_plain_reading(
    encoder: EncoderParams, runtime: Runtime, size: tuple[int, int], labeller: dict[str, Any]
) -> None:
    rng = np.random.default_rng(size[0])
    images = torch.from_numpy(rng.random((2, 3, *size), dtype=np.float32))
    masks = [rng.random(size) > 0.5, np.ones(size, bool)]
    regions = make_encoder(encoder, runtime, labeller, min_share=0.0)
    own, found = regions.encode(images, masks)
    bank_images = ["a", "a", "b", "c", "d"]
    keys = unit_rows(rng, 5, found[0].keys.shape[1])
    values = unit_rows(rng, 5, found[0].values.shape[1])
    bank = RegionBank(bank_images, keys, values)
    names = ["a", "new"]
    mixed = BankLabeller(regions, bank, weight=0.3, nearest=2)
    labels, confidence = mixed.label(images, masks, names)
    assert labels.shape == confidence.shape == (2, *size)

    text = regions.labeller.text.numpy()
    scale = regions.labeller.logit_scale
    upsampled = F.interpolate(own, size=size, mode="bilinear").double().numpy()
    for number, (mask, name) in enumerate(zip(masks, names, strict=True)):
        numbers = components(mask.astype(int), 0.0)
        np.testing.assert_array_equal(found[number].numbers, numbers)
        for y, x in np.ndindex(*size):
            key = found[number].keys[numbers[y, x] - 1].numpy()
            order = [place for place in np.argsort(-(keys @ key)) if bank_images[place] != name]
            mean = values[order[:2]].mean(axis=0)
            cosines = text @ (mean / np.linalg.norm(mean))
            theirs = cosines if scale else softmax(100 * cosines.astype(np.float64))
            scores = 0.7 * upsampled[number, :, y, x] + 0.3 * theirs
            label = labels[number, y, x].item()
            assert scores[label] == pytest.approx(scores.max(), abs=1e-5)
            share = softmax(100 * scores)[label] if scale else scores[label] / scores.sum()
            assert confidence[number, y, x].item() == pytest.approx(share, abs=2e-3)


def test_a_batch_is_its_images_one_by_one(encoder: EncoderParams, runtime: Runtime) -> None:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.random((3, 3, 24, 40), dtype=np.float32))
    masks = [rng.random((24, 40)) > 0.5, np.zeros((24, 40), bool), np.ones((24, 40), bool)]
    regions = make_encoder(encoder, runtime)
    _, together = regions.encode(images, masks)
    for number, one in enumerate(together):
        _, [alone] = regions.encode(images[number : number + 1], masks[number : number + 1])
        np.testing.assert_array_equal(one.numbers, alone.numbers)
        np.testing.assert_allclose(one.keys.numpy(), alone.keys.numpy(), atol=1e-5)
        np.testing.assert_allclose(one.values.numpy(), alone.values.numpy(), atol=1e-5)
        assert one.shares.sum() == pytest.approx(1, abs=0.3)


def test_objects_that_touch_are_regions_of_their_own(
    encoder: EncoderParams, runtime: Runtime
) -> None:
    rng = np.random.default_rng(2)
    image = torch.from_numpy(rng.random((1, 3, 24, 40), dtype=np.float32))
    objects = np.zeros((24, 40), np.uint8)
    objects[4:20, 8:20], objects[4:20, 20:32] = 1, 2
    regions = make_encoder(encoder, runtime)
    _, [found] = regions.encode(image, [objects])
    assert [found.numbers[8, column] for column in (30, 10, 0)] == [1, 2, 3]
    [alone] = regions.regions(image, [objects])
    np.testing.assert_array_equal(alone.numbers, found.numbers)
    torch.testing.assert_close(alone.values, found.values)
    torch.testing.assert_close(alone.keys, found.keys)


def test_an_image_without_a_mask_is_cut_into_clusters(
    encoder: EncoderParams, runtime: Runtime
) -> None:
    image = torch.zeros(1, 3, 32, 64)
    image[..., 32:] = 1
    regions = make_encoder(encoder, runtime, clusters=2)
    _, [found] = regions.encode(image, [np.zeros((32, 64), bool)])
    assert len(np.unique(found.numbers[:, :16])) == 1
    assert found.numbers[0, 0] != found.numbers[0, -1]
    one = torch.zeros(1, 3, 8, 8)  # one patch
    _, [found] = regions.encode(one, [np.zeros((8, 8), bool)])
    assert found.numbers.tolist() == [[1] * 8] * 8


def test_weight_zero_and_an_image_alone_in_its_bank_keep_the_labellers_own(
    encoder: EncoderParams, runtime: Runtime
) -> None:
    rng = np.random.default_rng(1)
    images = torch.from_numpy(rng.random((1, 3, 24, 40), dtype=np.float32))
    masks = [rng.random((24, 40)) > 0.5]
    regions = make_encoder(encoder, runtime)
    _, [found] = regions.encode(images, masks)
    bank = RegionBank(["me"] * len(found.keys), found.keys.numpy(), found.values.numpy())
    params = DenseClipParams(encoder=encoder, templates="name")
    expected, confidence = load_dense_labeller(params, NAMES, runtime).label(images)
    for weight, name in ((0.0, "other"), (1.0, "me")):
        labels, sure = BankLabeller(regions, bank, weight=weight, nearest=3).label(
            images, masks, [name]
        )
        assert torch.equal(labels, expected)
        torch.testing.assert_close(sure, confidence)


def test_settings_tell_what_regions_depend_on(encoder: EncoderParams, runtime: Runtime) -> None:
    usual = make_encoder(encoder, runtime).settings
    assert make_encoder(encoder, runtime, weight=0.1, nearest=3, sample=0).settings == usual
    for other in ({"facet": "token"}, {"clusters": 3}, {"min_share": 0.5}):
        assert make_encoder(encoder, runtime, **other).settings != usual
    methods = [SclipParams, ClearClipParams, NaClipParams, ScClipParams]
    labellers = [method(encoder=encoder, templates="name") for method in methods]
    found = [load_region_encoder(BankParams(), one, NAMES, runtime).settings for one in labellers]
    assert all(one not in found[:number] for number, one in enumerate(found))


def test_a_labeller_without_features_is_refused(
    encoder: EncoderParams, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.methods.dense import DENSE_LABELLERS, DenseMethod

    monkeypatch.setitem(
        DENSE_LABELLERS,
        "mute",
        DenseMethod(DenseClipParams, DENSE_LABELLERS["denseclip"].load),
    )
    params = DenseClipParams.model_construct(method="mute", encoder=encoder)
    with pytest.raises(PipelineError, match=r"pseudo_label\.method mute .* denseclip"):
        load_region_encoder(BankParams(), params, NAMES, runtime)
