"""Attention labellers beside plain readings of their formulas, in NumPy and loops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from scipy.special import erf, softmax
from sklearn.neighbors import LocalOutlierFactor
from torch import Tensor

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.inference.labeller import Labeller
from pipeline.inference.protocol import labeller_protocol
from pipeline.methods.dense import (
    DENSE_LABELLERS,
    DenseClipParams,
    ObjectLabeller,
    PseudoLabelParams,
    load_dense_labeller,
)
from pipeline.models.clip import load_clip
from pipeline.models.dense import affinity
from pipeline.models.dense.scclip import local_outlier_factors
from pipeline.models.layers.dino import build_dino
from pipeline.models.weights.weights import save_tensors
from pipeline.params.base import EncoderParams, PredictionSettings
from pipeline.vocabulary.categories import Names
from tests.conftest import noise_image
from tests.tiny_encoders import KINDS, write_encoder

Array = NDArray[np.float64]

CPU = torch.device("cpu")
PATCH = 8
METHODS = ["sclip", "clearclip", "naclip", "proxyclip", "scclip"]
NAMES = Names(["cat", "dog", "boat"], ["background"])
SIZES = [(24, 40), (8, 8), (5, 7), (56, 48), (61, 35)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attentions")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> EncoderParams:
    (folder / "deep").mkdir()
    return write_encoder(folder / "deep", "clip_vit", layers=12)


@pytest.fixture(scope="module")
def proxy(folder: Path) -> EncoderParams:
    """Another network with a finer grid."""
    (folder / "fine").mkdir()
    return write_encoder(folder / "fine", "clip_vit", patch_size=4)


@pytest.fixture(scope="module")
def runtime(folder: Path) -> Runtime:
    return Runtime(device=CPU, amp_dtype=None, seed=0, cache_dir=folder / "cache")


def params_of(method: str, encoder: EncoderParams, **options: Any) -> PseudoLabelParams:
    if method == "proxyclip":
        options = {"dino": None, **options}
    return DENSE_LABELLERS[method].params(
        method=method, encoder=encoder, templates="name", **options
    )


def load(params: PseudoLabelParams, runtime: Runtime) -> ObjectLabeller:
    return load_dense_labeller(params, NAMES, runtime)  # type: ignore[return-value]


def pictures(height: int, width: int, *, count: int = 2) -> Tensor:
    """Noise, whose first image has a plain corner."""
    images = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(height))
    images[0, :, : height // 2, : width // 2] = 0.25
    return images


def alike(features: Array) -> Array:
    """Cosines of all pairs of rows."""
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    return units @ units.T


def softmax_of_positive(logits: Array) -> Array:
    rows = []
    for number, row in enumerate(logits):
        if (row < 0).all():
            rows.append(np.eye(len(row))[number])
        else:
            rows.append(softmax(np.where(row < 0, -np.inf, row)))
    return np.stack(rows)


def share_of_alike(features: Array) -> Array:
    kept = np.where(alike(features) < 0.4, 0, alike(features))
    return kept / kept.sum(axis=1, keepdims=True)


class Plain:
    """CLIP's ViT of one image in float64."""

    def __init__(self, encoder: EncoderParams) -> None:
        clip = load_clip(encoder, CPU)
        self.mean, self.std = (x.numpy().astype(float)[0] for x in (clip.mean, clip.std))
        self.state = {name: x.double().numpy() for name, x in clip.visual.state_dict().items()}
        self.depth = len(clip.visual.transformer.resblocks)  # type: ignore[arg-type]
        self.num_heads = clip.visual.transformer.resblocks[0].attn.num_heads  # type: ignore[index]
        self.patch = clip.patch_size

    def of(self, name: str, tokens: Array) -> Array:
        """A linear layer."""
        return tokens @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, tokens: Array) -> Array:
        centred = tokens - tokens.mean(axis=-1, keepdims=True)
        units = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
        return units * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def mlp(self, block: str, tokens: Array) -> Array:
        hidden = self.of(f"{block}.mlp.c_fc", self.norm(f"{block}.ln_2", tokens))
        return self.of(f"{block}.mlp.c_proj", hidden * (1 + erf(hidden / np.sqrt(2))) / 2)

    def heads(self, block: str, normed: Array) -> Iterator[tuple[Array, Array, Array]]:
        weight = self.state[f"{block}.attn.in_proj_weight"]
        projected = normed @ weight.T + self.state[f"{block}.attn.in_proj_bias"]
        queries, keys, values = np.split(projected, 3, axis=1)
        width = queries.shape[1] // self.num_heads
        for head in range(self.num_heads):
            part = slice(head * width, (head + 1) * width)
            yield queries[:, part], keys[:, part], values[:, part]

    def tokens(self, image: Array) -> tuple[list[Array], tuple[int, int]]:
        """The state before the first block and after each, and the grid."""
        image = (image - self.mean) / self.std
        rows, columns = (-(-side // self.patch) for side in image.shape[1:])
        padded = np.zeros((3, rows * self.patch, columns * self.patch))
        padded[:, : image.shape[1], : image.shape[2]] = image
        patches = []
        for row in range(rows):
            for column in range(columns):
                top, left = row * self.patch, column * self.patch
                crop = padded[:, top : top + self.patch, left : left + self.patch]
                patches.append(np.einsum("oihw,ihw->o", self.state["conv1.weight"], crop))
        positions = torch.from_numpy(self.state["positional_embedding"])
        side = round((len(positions) - 1) ** 0.5)
        grid = positions[1:].T.reshape(1, -1, side, side)
        grid = F.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False)
        tokens = np.stack([self.state["class_embedding"], *patches])
        tokens[0] += positions[0].numpy()
        tokens[1:] += grid[0].flatten(1).T.numpy()
        states = [self.norm("ln_pre", tokens)]
        for number in range(self.depth):
            states.append(self.block(f"transformer.resblocks.{number}", states[-1]))
        return states, (rows, columns)

    def block(self, block: str, tokens: Array) -> Array:
        attended = [
            softmax(q @ k.T / np.sqrt(q.shape[1]), axis=1) @ v
            for q, k, v in self.heads(block, self.norm(f"{block}.ln_1", tokens))
        ]
        tokens = tokens + self.of(f"{block}.attn.out_proj", np.concatenate(attended, axis=1))
        return tokens + self.mlp(block, tokens)

    @property
    def last(self) -> str:
        return f"transformer.resblocks.{self.depth - 1}"

    def out(self, heads: list[Array]) -> Array:
        return self.of(f"{self.last}.attn.out_proj", np.concatenate(heads, axis=1))

    def joint(self, tokens: Array, grid: tuple[int, ...]) -> Array:
        """Patches (h w, D) -> (C, h, w)."""
        return (self.norm("ln_post", tokens) @ self.state["proj"]).T.reshape(-1, *grid)

    def sclip(self, image: Array) -> Array:
        states, grid = self.tokens(image)
        x = states[-2]
        heads = []
        for q, k, v in self.heads(self.last, self.norm(f"{self.last}.ln_1", x)):
            s = q.shape[1] ** -0.5
            heads.append((softmax(s * q @ q.T, axis=1) + softmax(s * k @ k.T, axis=1)) @ v)
        x = x + self.out(heads)
        return self.joint((x + self.mlp(self.last, x))[1:], grid)

    def clearclip(self, image: Array) -> Array:
        states, grid = self.tokens(image)
        heads = [
            softmax(q @ q.T * q.shape[1] ** -0.5, axis=1) @ v
            for q, _, v in self.heads(self.last, self.norm(f"{self.last}.ln_1", states[-2]))
        ]
        return self.joint(self.out(heads)[1:], grid)

    def naclip(self, image: Array) -> Array:
        states, grid = self.tokens(image)
        places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
        near = np.zeros((1 + len(places), 1 + len(places)))
        for i, (top, left) in enumerate(places):
            for j, (row, column) in enumerate(places):
                squared = (top - row) ** 2 + (left - column) ** 2
                near[1 + i, 1 + j] = np.exp(-squared / (2 * 5**2))
        heads = [
            softmax(k @ k.T * k.shape[1] ** -0.5 + near, axis=1) @ v
            for _, k, v in self.heads(self.last, self.norm(f"{self.last}.ln_1", states[-2]))
        ]
        return self.joint(self.out(heads)[1:], grid)

    def proxyclip(self, image: Array, features: Array | None = None) -> Array:
        """Of features (C', h', w') of another network, or CLIP's own keys."""
        states, grid = self.tokens(image)
        heads = list(self.heads(self.last, self.norm(f"{self.last}.ln_1", states[-2])))
        if features is None:
            features = np.concatenate([k for _, k, _ in heads], axis=1)[1:].T.reshape(-1, *grid)
        cosines = alike(features.reshape(len(features), -1).T)
        attention = softmax_of_positive(3 * (cosines - 1.2 * cosines.mean()))
        values = np.concatenate([v for _, _, v in heads], axis=1)[1:].T.reshape(1, -1, *grid)
        size = features.shape[1:]
        resized = F.interpolate(torch.from_numpy(values), size, mode="bilinear")[0].flatten(1)
        return self.joint(self.out([attention @ resized.T.numpy()]), size)

    def scclip(self, image: Array) -> Array:
        states, grid = self.tokens(image)
        after = states[1:]
        middle, shallow = after[8][1:], after[3][1:]
        x = after[10].copy()
        x[1:] = repaired(x[1:], grid)
        first = self.calibrated(x, middle, shallow)
        second = self.calibrated(np.sum(after[3:10], axis=0), middle, shallow)
        return self.joint(first + second, grid)

    def calibrated(self, x: Array, middle: Array, shallow: Array) -> Array:
        x = np.concatenate([x[:1], share_of_alike(middle) @ x[1:]])
        coherent = softmax_of_positive(3 * (alike(middle) - alike(middle).mean()))
        heads = []
        for _, k, v in self.heads(self.last, self.norm(f"{self.last}.ln_1", x)):
            own = softmax(k[1:] @ k[1:].T * k.shape[1] ** -0.5, axis=1)
            heads.append((coherent + own) / 2 @ v[1:] + 0.3 * v[:1])
        return share_of_alike(shallow) @ self.out(heads)


def repaired(patches: Array, grid: tuple[int, int]) -> Array:
    count = len(patches) // 20
    if count == 0:
        return patches
    factors = -LocalOutlierFactor(min(30, len(patches) - 1)).fit(patches).negative_outlier_factor_
    outliers = set(np.argsort(-factors)[:count].tolist())
    fixed = patches.copy()
    for number in outliers:
        row, column = divmod(number, grid[1])
        near = [
            patches[r * grid[1] + c]
            for r in range(max(0, row - 1), min(grid[0], row + 2))
            for c in range(max(0, column - 1), min(grid[1], column + 2))
            if r * grid[1] + c not in outliers
        ]
        if near:
            fixed[number] = np.mean(near, axis=0)
    return fixed


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_features_are_those_of_a_plain_reading(
    encoder: EncoderParams, runtime: Runtime, method: str, size: tuple[int, int]
) -> None:
    images = pictures(*size)
    model = load(params_of(method, encoder), runtime)
    scores, features = model.scores_and_features(images)
    plain = Plain(encoder)
    for image, found, cosines in zip(images, features, scores, strict=True):
        expected = torch.from_numpy(getattr(plain, method)(image.double().numpy()))
        torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=1e-3)
        units = F.normalize(expected, dim=0)
        named = torch.einsum("kc,chw->khw", model.text.double(), units)
        torch.testing.assert_close(cosines.double(), named, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_proxyclip_attends_on_the_grid_of_the_other_network(
    encoder: EncoderParams, proxy: EncoderParams, runtime: Runtime, size: tuple[int, int]
) -> None:
    images = pictures(*size)
    other = load_clip(proxy, CPU)
    plain = Plain(encoder)
    for facet in ("token", "key"):
        model = load(params_of("proxyclip", encoder, dino=proxy, facet=facet), runtime)
        _, features = model.scores_and_features(images)
        seen = other.patch_features(images, facet=facet).double().numpy()  # type: ignore[arg-type]
        assert features.shape[-2:] == seen.shape[-2:] == tuple(-(-side // 4) for side in size)
        for image, found, maps in zip(images, features, seen, strict=True):
            expected = plain.proxyclip(image.double().numpy(), maps)
            torch.testing.assert_close(
                found.double(), torch.from_numpy(expected), atol=2e-4, rtol=1e-3
            )


def test_proxyclip_takes_dino(encoder: EncoderParams, runtime: Runtime, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "dino.safetensors"
    save_tensors(build_dino("dino_vits8").state_dict(), weights)
    dino = EncoderParams(model="dino_vits8", pretrained=str(weights))
    params = params_of("proxyclip", encoder, dino=dino)
    assert load(params, runtime).scores(pictures(20, 33)).shape == (2, 4, 3, 5)
    assert params.recipe()["dino"] == "dino_vits8/dino.safetensors"
    with pytest.raises(PipelineError, match=r"pseudo_label\.dino"):
        load(params_of("proxyclip", encoder, dino=EncoderParams(model="none.json")), runtime)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_one_image_at_a_time(
    encoder: EncoderParams, runtime: Runtime, method: str
) -> None:
    images = pictures(40, 72, count=3)
    model = load(params_of(method, encoder), runtime)
    alone = torch.cat([model.scores(image[None]) for image in images])
    torch.testing.assert_close(model.scores(images), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_plain_images_and_shallow_networks_have_labels(
    folder: Path, runtime: Runtime, method: str, layers: int
) -> None:
    place = folder / f"shallow{layers}"
    place.mkdir(exist_ok=True)
    model = load(params_of(method, write_encoder(place, "clip_vit", layers=layers)), runtime)
    for size in [(1, 1), (40, 64)]:
        labels, confidence = model.label(torch.full((1, 3, *size), 0.5))
        assert labels.shape == confidence.shape == (1, *size)
        assert torch.isfinite(confidence).all()


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_changes_little(
    encoder: EncoderParams, runtime: Runtime, method: str
) -> None:
    model = load(params_of(method, encoder), runtime)
    images = pictures(40, 72)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, features = model.scores_and_features(images)
    assert scores.dtype == features.dtype == torch.float32
    torch.testing.assert_close(scores, model.scores(images), atol=0.1, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_rows_in_parts_are_the_rows(
    encoder: EncoderParams, runtime: Runtime, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(params_of(method, encoder), runtime)
    images = pictures(56, 48)
    whole = model.scores(images)
    monkeypatch.setattr(affinity, "MAX_ELEMENTS", 200)
    torch.testing.assert_close(model.scores(images), whole, atol=1e-5, rtol=1e-4)


def test_local_outlier_factors_are_those_of_scikit_learn() -> None:
    for count in (2, 7, 60):
        points = torch.randn(count, 5, generator=torch.Generator().manual_seed(count))
        known = LocalOutlierFactor(min(30, count - 1)).fit(points.numpy()).negative_outlier_factor_
        np.testing.assert_allclose(local_outlier_factors(points), -known, rtol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "clip_vit"])
def test_other_towers_are_refused_with_what_to_do(
    tmp_path: Path, runtime: Runtime, kind: str
) -> None:
    other = write_encoder(tmp_path, kind)
    for method in METHODS:
        with pytest.raises(PipelineError, match=rf"pseudo_label\.method: {method} .* denseclip"):
            load(params_of(method, other), runtime)
    stitch = {"side": 64, "stride": 32}
    with pytest.raises(PipelineError, match=r"pseudo_label\.stitch: .* set it to null"):
        load(DenseClipParams(encoder=other, templates="name", stitch=stitch), runtime)


class TestStitching:
    SIDE, STRIDE = 32, 16

    def stitched(self, method: str, encoder: EncoderParams, **options: Any) -> PseudoLabelParams:
        stitch = {"side": self.SIDE, "stride": self.STRIDE}
        return params_of(method, encoder, stitch=stitch, **options)

    @pytest.mark.parametrize("method", ["denseclip", *METHODS])
    def test_one_window_is_the_whole_image(
        self, encoder: EncoderParams, runtime: Runtime, method: str
    ) -> None:
        images = pictures(29, 24)
        whole = load(params_of(method, encoder), runtime).scores_and_features(images)
        stitched = load(self.stitched(method, encoder), runtime).scores_and_features(images)
        torch.testing.assert_close(stitched, whole, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("size", [(56, 72), (40, 16), (32, 43)])
    @pytest.mark.parametrize("method", METHODS)
    def test_what_enters_the_last_block_is_the_mean_of_the_windows(
        self, encoder: EncoderParams, runtime: Runtime, method: str, size: tuple[int, int]
    ) -> None:
        images = pictures(*size)
        _, features = load(self.stitched(method, encoder), runtime).scores_and_features(images)
        plain = StitchedPlain(encoder, self.SIDE // PATCH, self.STRIDE // PATCH)
        for image, found in zip(images, features, strict=True):
            expected = torch.from_numpy(getattr(plain, method)(image.double().numpy()))
            torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=1e-3)

    @pytest.mark.parametrize("dense_attention", ["maskclip", "value_only"])
    def test_denseclip_averages_values(
        self, encoder: EncoderParams, runtime: Runtime, dense_attention: str
    ) -> None:
        own = {"published_activation": False, "normalisation": "clip", "position_resize": "grid"}
        params = self.stitched("denseclip", encoder, dense_attention=dense_attention, **own)
        images = pictures(56, 72)
        _, features = load(params, runtime).scores_and_features(images)
        plain = StitchedPlain(encoder, self.SIDE // PATCH, self.STRIDE // PATCH)
        for image, found in zip(images, features, strict=True):
            states, grid = plain.tokens(image.double().numpy())
            x = states[-2]
            heads = plain.heads(plain.last, plain.norm(f"{plain.last}.ln_1", x))
            values = plain.out([v for _, _, v in heads])
            if dense_attention == "maskclip":
                values = x + values
                values = values + plain.mlp(plain.last, values)
            expected = torch.from_numpy(plain.joint(values[1:], grid))
            torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=1e-3)

    def test_windows_are_of_whole_patches_without_gaps(
        self, encoder: EncoderParams, runtime: Runtime
    ) -> None:
        for stitch, message in [
            ({"side": 30, "stride": 16}, r"stitch\.side: 30 is no multiple .* use 32"),
            ({"side": 32, "stride": 9}, r"stitch\.stride: 9 is no multiple .* use 16"),
        ]:
            with pytest.raises(PipelineError, match=message):
                load(params_of("sclip", encoder, stitch=stitch), runtime)
        with pytest.raises(ValidationError, match=r"stride: 40 leaves gaps"):
            params_of("sclip", encoder, stitch={"side": 32, "stride": 40})

    @pytest.mark.parametrize("method", ["denseclip", *METHODS])
    def test_it_is_named_only_where_it_is_on(
        self, encoder: EncoderParams, runtime: Runtime, method: str
    ) -> None:
        off, on = params_of(method, encoder), self.stitched(method, encoder)
        assert "stitch" not in off.recipe()
        assert on.recipe() == {**off.recipe(), "stitch": {"side": 32, "stride": 16}}
        assert load(on, runtime).settings != load(off, runtime).settings


class StitchedPlain(Plain):
    """What enters the last block, from windows: the norm of the last block is of each of them."""

    def __init__(self, encoder: EncoderParams, side: int, stride: int) -> None:
        super().__init__(encoder)
        self.side, self.stride = side, stride
        self.averaged: tuple[Array, Array] | None = None  # a state, and the mean of its norms

    def tokens(self, image: Array) -> tuple[list[Array], tuple[int, int]]:
        rows, columns = (-(-length // PATCH) for length in image.shape[1:])
        normalised = np.zeros((3, rows * PATCH, columns * PATCH)) + self.mean
        normalised[:, : image.shape[1], : image.shape[2]] = image
        parts = []
        for top in self.starts(rows):
            for left in self.starts(columns):
                bottom, right = min(rows, top + self.side), min(columns, left + self.side)
                crop = normalised[:, top * PATCH : bottom * PATCH, left * PATCH : right * PATCH]
                states, _ = super().tokens(crop)
                places = [
                    1 + r * columns + c for r in range(top, bottom) for c in range(left, right)
                ]
                parts.append(([0, *places], states))
        depth = len(parts[0][1])
        whole = [
            averaged([(places, states[number]) for places, states in parts], rows * columns)
            for number in range(depth)
        ]
        before = [
            (places, super(StitchedPlain, self).norm(f"{self.last}.ln_1", states[-2]))
            for places, states in parts
        ]
        self.averaged = whole[-2], averaged(before, rows * columns)
        return whole, (rows, columns)

    def starts(self, length: int) -> list[int]:
        if length <= self.side:
            return [0]
        found = list(range(0, length - self.side + 1, self.stride))
        return found if found[-1] == length - self.side else [*found, length - self.side]

    def norm(self, name: str, tokens: Array) -> Array:
        if self.averaged and tokens is self.averaged[0] and name == f"{self.last}.ln_1":
            return self.averaged[1]
        return super().norm(name, tokens)


def averaged(parts: list[tuple[list[int], Array]], patches: int) -> Array:
    total = np.zeros((1 + patches, parts[0][1].shape[1]))
    count = np.zeros((1 + patches, 1))
    for places, tokens in parts:
        for place, token in zip(places, tokens, strict=True):
            total[place] += token
            count[place] += 1
    return total / count


@pytest.mark.parametrize("method", METHODS)
def test_alone_it_predicts_labels_and_objects(
    encoder: EncoderParams, runtime: Runtime, method: str
) -> None:
    params = params_of(method, encoder, logit_scale=20.0)
    labeller = Labeller.load(
        params,
        categories=NAMES.categories,
        background=NAMES.background,
        settings=PredictionSettings(background=False),
        runtime=runtime,
    )
    found = labeller.predict(noise_image(0, 50, 37))
    assert found.semantic.shape == (37, 50)
    assert found.instances
    lines = labeller_protocol(labeller)
    assert lines["model"] == method
    assert "stitch" not in lines
    assert labeller.select(["dog"]).predict(Image.new("RGB", (9, 70))).semantic.shape == (70, 9)
