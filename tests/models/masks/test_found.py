"""The convolution that learns from votes, beside a plain reading of what it is and does."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.methods.masks import FoundParams, MaskLearner, load_mask_learner, load_mask_source
from pipeline.models.masks.features import FeatureEncoder
from pipeline.models.masks.making import coarse_masks, coarse_objects
from pipeline.params.base import EncoderParams


def photos(count: int, width: int = 50, height: int = 37) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    found = []
    for number in range(count):
        pixels = rng.integers(0, 40, (height, width, 3), dtype=np.uint8)
        pixels[6 + number : 24, 10:30] += np.array([180, 40, 20], np.uint8)
        found.append(Image.fromarray(pixels))
    return found


def learner(params: FoundParams, runtime: Runtime) -> MaskLearner:
    found = load_mask_learner(params, runtime)
    assert found is not None
    return found


@pytest.fixture
def params(encoder: EncoderParams) -> FoundParams:
    return FoundParams(encoder=encoder, refine=False)


def voted_patches(
    params: FoundParams, runtime: Runtime, images: list[Image.Image]
) -> Iterator[tuple[Tensor, bool]]:
    """Unit features of every patch of 8 pixels, and whether votes have most of it."""
    encode, teacher = FeatureEncoder(params, runtime), load_mask_source(params.votes(), runtime)
    for image, vote in zip(images, coarse_masks(images, source=teacher), strict=True):
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
        [features] = encode(pixels).double()
        for row, column in np.ndindex(*features.shape[1:]):
            patch = np.zeros((8, 8), bool)
            seen = vote[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            patch[: seen.shape[0], : seen.shape[1]] = seen
            yield features[:, row, column] / features[:, row, column].norm(), patch.mean() > 0.5


def test_it_is_the_logistic_regression_of_the_votes(params: FoundParams, runtime: Runtime) -> None:
    """At the optimum the gradient of 1/2 |w|^2 + 10 times the sum of log losses is zero."""
    images = photos(3)
    weight = load(learner(params, runtime).learn(images))["weight"].double().flatten()
    patches = list(voted_patches(params, runtime, images))
    assert len(patches) == 3 * 5 * 7
    units = torch.stack([unit for unit, _ in patches])
    salient = torch.tensor([float(voted) for _, voted in patches]).double()
    low, high = -100.0, 100.0  # the bias before it is moved, where the errors add up to nothing
    for _ in range(80):
        bias = (low + high) / 2
        errors = torch.sigmoid(units @ weight + bias) - salient
        low, high = (bias, high) if errors.sum() < 0 else (low, bias)
    assert (weight + 10 * errors @ units).abs().max() < 0.1


def test_it_calls_as_many_patches_salient_as_are_voted_for(
    params: FoundParams, runtime: Runtime
) -> None:
    """Also in noise, where the votes are as good as drawn."""
    rng = np.random.default_rng(3)
    noise = [Image.fromarray(rng.integers(0, 255, (37, 50, 3), dtype=np.uint8)) for _ in range(4)]
    for some in (noise, photos(3)):
        weights = load(learner(params, runtime).learn(some))
        weight, bias = weights["weight"].double().flatten(), weights["bias"].double()
        patches = list(voted_patches(params, runtime, some))
        salient = sum(bool(weight @ unit + bias > 0) for unit, _ in patches)
        assert salient == sum(voted for _, voted in patches) > 0


def test_what_is_learned_depends_on_the_images_alone(params: FoundParams, runtime: Runtime) -> None:
    images = photos(3)
    first = learner(params, runtime).learn(images)
    torch.manual_seed(9)
    assert learner(params, runtime).learn(iter(images)) == first
    assert learner(params, runtime).learn(images[1:]) != first
    other = params.model_copy(update={"clusters": [2]})
    assert learner(other, runtime).settings != learner(params, runtime).settings


def test_it_makes_masks_like_the_votes(params: FoundParams, runtime: Runtime) -> None:
    images = photos(6)
    learned = learner(params, runtime).learn(images[:4])
    source = load_mask_source(params, runtime, learned)
    votes = coarse_masks(images[4:], source=load_mask_source(params.votes(), runtime))
    masks = coarse_masks(images[4:], source=source)
    assert (masks & votes).sum() / (masks | votes).sum() > 0.5


def test_its_masks_are_one_convolution(params: FoundParams, runtime: Runtime) -> None:
    """Also of an image that is no whole number of patches, and whatever else is in the batch."""
    generator = torch.Generator().manual_seed(2)
    head = nn.Conv2d(64, 1, 1)
    learned = save({name: value.contiguous() for name, value in head.state_dict().items()})
    source = load_mask_source(params, runtime, learned)
    images = torch.rand(3, 3, 21, 34, generator=generator)
    probs = source.predict(images)
    features = FeatureEncoder(params, runtime)(images)
    assert features.shape[2:] == (3, 5)
    for number in range(3):
        norm = features[number].norm(dim=0, keepdim=True)
        logits = head(features[number] / norm)[None]
        full = nn.functional.interpolate(logits, (24, 40), mode="bilinear")[0, 0, :21, :34]
        torch.testing.assert_close(probs[number], full.sigmoid())
        torch.testing.assert_close(source.predict(images[number : number + 1])[0], probs[number])


def test_several_objects_and_settings(params: FoundParams, runtime: Runtime) -> None:
    images = photos(3)
    learned = learner(params, runtime).learn(images)
    three = params.model_copy(update={"objects": 3, "tau": 0.7})
    sources = [load_mask_source(one, runtime, learned) for one in (params, three)]
    single, several = (coarse_objects(images, source=source) for source in sources)
    assert single.shape == (3, 1, 37, 50)
    assert several.shape == (3, 3, 37, 50)
    np.testing.assert_array_equal(several[:, 0], single[:, 0])
    assert "objects" not in sources[0].settings
    assert sources[1].settings["objects"] == 3


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_tell_apart_is_an_error(
    params: FoundParams, runtime: Runtime, count: int
) -> None:
    """A single patch is either voted for or not."""
    images = photos(count, width=8, height=8) if count == 0 else [Image.new("RGB", (8, 8))]
    with pytest.raises(PipelineError, match=rf"found: nothing to tell apart: .* {count} images"):
        learner(params, runtime).learn(images)
