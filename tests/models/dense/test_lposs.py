"""LPOSS against a plain reading of its equations, with dense matrices and loops."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from scipy.sparse.linalg import cg
from torch import Tensor

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.methods.dense import (
    DENSE_LABELLERS,
    DenseClipParams,
    DenseLabeller,
    load_dense_labeller,
)
from pipeline.models.clip import load_clip
from pipeline.models.dense.pixel_graph import lab_of_rgb
from pipeline.models.layers import dino
from pipeline.models.layers.dino import build_dino, load_dino
from pipeline.models.layers.vit import SelfMaskConfig
from pipeline.params.base import EncoderParams
from pipeline.vocabulary.categories import Names

NAMES = Names(["boat", "car"], ["background"])
CPU = torch.device("cpu")
SIZES = [(24, 40), (27, 13), (8, 8), (5, 3)]
Array = NDArray[np.float64]


def images_of(size: tuple[int, int], count: int = 1) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(sum(size)))


@pytest.fixture
def load(encoder: EncoderParams, runtime: Runtime) -> Any:
    def loaded(method: str = "lposs", **options: Any) -> Any:
        params = DENSE_LABELLERS[method].params
        values = {"encoder": encoder, "templates": "name", **options}
        return load_dense_labeller(params.model_validate(values), NAMES, runtime)

    return loaded


@pytest.fixture
def graph_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EncoderParams:
    """A tiny DINO whose patches are half as large as CLIP's."""
    config = SelfMaskConfig(patch_size=4, grid=4, dim=24, depth=2, num_heads=3)
    monkeypatch.setitem(dino.DINO_MODELS, "tiny_dino", config)
    save_file(build_dino("tiny_dino").state_dict(), tmp_path / "dino.safetensors")
    return EncoderParams(model="tiny_dino", pretrained=str(tmp_path / "dino.safetensors"))


def normalised(weights: Array) -> Array:
    degrees = weights.sum(axis=1)
    scale = np.array([1 / np.sqrt(degree) if degree > 0 else 0.0 for degree in degrees])
    result: Array = weights * scale[:, None] * scale
    return result


def solved(weights: Array, start: Array) -> Array:
    """(1 - a) (I - a W)^-1 Y, column by column, ten steps at most."""
    matrix = np.eye(len(weights)) - 0.95 * weights
    columns = [cg(matrix, column, rtol=1e-6, maxiter=10)[0] for column in start.T]
    return 0.05 * np.stack(columns, axis=1)


def plain_patches(
    scores: list[Tensor],
    values: list[Tensor],
    places: list[tuple[int, int]],
    step: tuple[float, float],
    k: int,
) -> Array:
    """Scores (N, K) of the patches of windows, from maps (C, h, w), after they were spread."""
    nodes = []
    for own, seen, (top, left) in zip(scores, values, places, strict=True):
        for y, x in itertools.product(*map(range, own.shape[1:])):
            place = (top + (y + 0.5) * step[0], left + (x + 0.5) * step[1])
            nodes.append((own[:, y, x].double().numpy(), seen[:, y, x].double().numpy(), place))
    count = len(nodes)
    weights = np.zeros((count, count))
    for i, (_, value, place) in enumerate(nodes):
        cosines = [
            -np.inf if j == i else value @ other / np.linalg.norm(value) / np.linalg.norm(other)
            for j, (_, other, _) in enumerate(nodes)
        ]
        for j in sorted(range(count), key=lambda j: -cosines[j])[: min(k, count - 1)]:
            distance = np.hypot(place[0] - nodes[j][2][0], place[1] - nodes[j][2][1])
            weights[i, j] = max(cosines[j], 0) ** 3 * np.exp(-0.01 * distance)
    start = np.stack([own for own, _, _ in nodes])
    return solved(normalised((weights + weights.T) / 2), start)


@pytest.mark.parametrize("neighbours", [3, 400])
@pytest.mark.parametrize("size", SIZES)
def test_scores_spread_between_patches_of_like_values(
    size: tuple[int, int], neighbours: int, load: Any, encoder: EncoderParams
) -> None:
    images = images_of(size, 2)
    model = load(neighbours=neighbours)
    grid = [-(-side // 8) for side in size]
    clip = load_clip(encoder, CPU)
    scores = model.scores(images)
    assert scores.shape == (2, 3, *grid)
    for number in range(2):
        image = images[number : number + 1]
        base = load("denseclip").scores(image)[0]
        values = clip.patch_features(image, facet="value")[0]
        # Patches lie as their scores are upsampled: over the image, without its padding.
        step = (size[0] / grid[0], size[1] / grid[1])
        expected = plain_patches([base], [values], [(0, 0)], step, neighbours)
        found = scores[number].flatten(1).T.numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(model.scores(image)[0], scores[number])
    if size in ((8, 8), (5, 3)):  # one patch, whom nobody tells anything
        torch.testing.assert_close(scores, 0.05 * load("denseclip").scores(images))


def test_patches_of_all_windows_share_a_graph(
    load: Any, graph_encoder: EncoderParams, tmp_path: Path
) -> None:
    image = images_of((24, 40))
    network = load_dino(graph_encoder, CPU, cache_dir=tmp_path)
    places = [(0, 0), (0, 12), (0, 16)]
    crops = [image[..., left : left + 24] for _, left in places]
    scores = [load("denseclip").scores(crop)[0] for crop in crops]
    values = [F.avg_pool2d(network.patch_features(crop, facet="value"), 2)[0] for crop in crops]
    spread = plain_patches(scores, values, places, (8, 8), 7)
    total, count = np.zeros((3, 24, 40)), np.zeros(40)
    for (_, left), own in zip(places, spread.reshape(3, 9, 3), strict=True):
        patches = torch.from_numpy(own.T.reshape(1, 3, 3, 3))
        upsampled = F.interpolate(patches, (24, 24), mode="bilinear")[0].numpy()
        total[..., left : left + 24] += upsampled
        count[left : left + 24] += 1
    model = load(graph_encoder=graph_encoder, neighbours=7, windows={"side": 24, "stride": 12})
    found, features = model.scores_and_features(image)
    np.testing.assert_allclose(found[0].numpy(), total / count, rtol=0, atol=2e-5)
    assert features.shape == (1, 16, 3, 5)
    apart = load("denseclip", windows={"side": 24, "stride": 12}).scores(image)
    assert (found - apart).abs().max() > 1e-3


def plain_lab(pixel: Array) -> Array:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in pixel]
    matrix = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    relative = matrix @ linear / [0.95047, 1.0, 1.08883]
    d = 6 / 29
    x, y, z = (v ** (1 / 3) if v > d**3 else v / (3 * d * d) + 4 / 29 for v in relative)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_colours_in_lab() -> None:
    """Of black, white and the three primaries, as tables have them."""
    rgb = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    found = lab_of_rgb(rgb.T[:, None])[:, 0].T
    known = [
        [0, 0, 0],
        [100, 0, 0],
        [53.24, 80.09, 67.2],
        [87.73, -86.18, 83.18],
        [32.3, 79.19, -107.86],
    ]
    np.testing.assert_allclose(found.numpy(), known, rtol=0, atol=0.02)


@pytest.mark.parametrize("size", [(16, 9), (5, 3), (1, 1)])
def test_scores_spread_between_pixels_of_like_colour(size: tuple[int, int], load: Any) -> None:
    image = images_of(size)
    image = (0.5 + 0.05 * image).contiguous()  # colours near enough to join pixels
    image[..., 0] = 0.9
    height, width = size
    lab = (
        np.array(
            [
                plain_lab(image[0, :, y, x].double().numpy())
                for y in range(height)
                for x in range(width)
            ]
        )
        / 100
    )
    weights = np.zeros((height * width,) * 2)
    for i, j in itertools.product(range(height * width), repeat=2):
        near = max(abs(i // width - j // width), abs(i % width - j % width)) <= 6
        if i != j and near:
            weights[i, j] = np.exp(-np.linalg.norm(lab[i] - lab[j]) / 0.01)
    patches = load().scores(image)
    start = F.interpolate(patches, size, mode="bilinear")[0].flatten(1).T.double().numpy()
    expected = solved(normalised(weights), start).T.reshape(1, 3, height, width)
    model = load("lposs_plus")
    np.testing.assert_allclose(model.scores(image).numpy(), expected, rtol=0, atol=2e-5)
    batch = torch.cat((torch.rand(1, 3, *size), image))
    torch.testing.assert_close(model.scores(batch)[1:], model.scores(image))


def test_labels_and_their_confidence(load: Any) -> None:
    images = images_of((24, 40), 2)
    for method in ("lposs", "lposs_plus"):
        model: DenseLabeller = load(method, logit_scale=40.0)
        labels, confidence = model.label(images)
        scores = F.interpolate(model.scores(images), (24, 40), mode="bilinear")
        assert labels.equal(scores.argmax(dim=1))
        torch.testing.assert_close(confidence, (40 * scores).softmax(dim=1).amax(dim=1))
        few = model.select([2, 0])
        torch.testing.assert_close(few.scores(images), model.scores(images)[:, [2, 0]])


def test_settings_name_the_graph(load: Any, graph_encoder: EncoderParams) -> None:
    settings = [
        load().settings,
        load("lposs_plus").settings,
        load(neighbours=10).settings,
        load(graph_encoder=graph_encoder).settings,
        load("denseclip").settings,
    ]
    assert all(one != other for one, other in itertools.combinations(settings, 2))
    assert load("denseclip").settings.keys() == {
        "method",
        "weights",
        *DenseClipParams().recipe(),
    }


def test_a_graph_encoder_that_is_not_there_is_named(load: Any) -> None:
    missing = EncoderParams(model="dino_vits16", pretrained={"tag": "a", "file": "b"})  # type: ignore[arg-type]
    with pytest.raises(
        PipelineError, match=r"pseudo_label\.graph_encoder\.pretrained: dino_vits16"
    ):
        load(graph_encoder=missing)


def test_values_are_the_last_third_of_the_projection(
    graph_encoder: EncoderParams, tmp_path: Path
) -> None:
    network = load_dino(graph_encoder, CPU, cache_dir=tmp_path)
    seen: list[Tensor] = []
    block = network.vit.get_submodule("blocks.1.attn.qkv")
    handle = block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    images = torch.rand(2, 3, 8, 16)
    network.vit((images - network.mean) / network.std)
    handle.remove()
    values = network.patch_features(images, facet="value")
    torch.testing.assert_close(values.flatten(2).transpose(1, 2), seen[0][:, 1:, 48:])
