"""Options of all dense labellers against plain readings of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.methods.dense import (
    DENSE_LABELLERS,
    DenseClipParams,
    DenseLabeller,
    ObjectLabeller,
    PseudoLabelParams,
    load_dense_labeller,
)
from pipeline.models.clip import load_clip
from pipeline.models.clip.labels import label_embeddings
from pipeline.models.layers.pamr import refine
from pipeline.params.base import EncoderParams
from pipeline.params.reading import parse_params
from pipeline.vocabulary.categories import Names
from pipeline.vocabulary.prompts import templates
from tests.conftest import encoded_image, noise_image
from tests.formats.shard_folders import write_shards

NAMES = Names(["boat", "car", "dog"], ["background", "sky"])
SIZES = [(40, 27), (20, 33), (8, 8), (5, 3)]  # of tokens of 8 pixels: the last two are one
WINDOWS = {"side": 20, "stride": 13}


def images_of(size: tuple[int, int], count: int = 1) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(sum(size)))


@pytest.fixture
def load(encoder: EncoderParams, runtime: Runtime) -> Any:
    """Function that loads a labeller by its options."""

    def loaded(names: Names = NAMES, method: str = "denseclip", **options: Any) -> Any:
        params = DENSE_LABELLERS[method].params
        return load_dense_labeller(
            params.model_validate({"encoder": encoder, "templates": "name", **options}),
            names,
            runtime,
        )

    return loaded


# -- windows ---------------------------------------------------------------------------------------


def plain_windows(model: ObjectLabeller, image: Tensor, side: int, stride: int) -> Tensor:
    """Scores (K, H, W) of a loop over the windows of one image."""
    height, width = image.shape[-2:]
    starts = []
    for length in (height, width):
        places = [0]
        while places[-1] + side < length:
            places.append(min(places[-1] + stride, length - side))
        starts.append(places)
    total, count = np.zeros((model.text.shape[0], height, width)), np.zeros((height, width))
    for top, left in itertools.product(*starts):
        crop = image[..., top : top + side, left : left + side]
        scores = F.interpolate(model.scores(crop), crop.shape[-2:], mode="bilinear")[0].numpy()
        total[:, top : top + side, left : left + side] += scores
        count[top : top + side, left : left + side] += 1
    return torch.from_numpy(total / count).float()


@pytest.mark.parametrize("size", SIZES)
def test_windows_are_averaged_where_they_overlap(size: tuple[int, int], load: Any) -> None:
    image = images_of(size)
    scores = load(windows=WINDOWS).scores(image)
    expected = plain_windows(load(), image, **WINDOWS)
    torch.testing.assert_close(scores[0], expected, rtol=0, atol=1e-5)
    if max(size) > 20:
        whole = F.interpolate(load().scores(image), size, mode="bilinear")
        assert (scores - whole).abs().max() > 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_a_window_as_large_as_the_image_changes_nothing(size: tuple[int, int], load: Any) -> None:
    images = images_of(size, 2)
    labels, confidence = load(windows={"side": 40, "stride": 1}).label(images)
    expected, sure = load().label(images)
    assert labels.equal(expected)
    torch.testing.assert_close(confidence, sure)


def test_features_of_windows_lie_on_the_grid_of_patches(load: Any) -> None:
    image = images_of((24, 40))
    model = load(windows={"side": 24, "stride": 8})
    scores, features = model.scores_and_features(image)
    assert scores.equal(model.scores(image))
    assert features.shape == (1, 16, 3, 5)
    crops = [image[..., left : left + 24] for left in (0, 8, 16)]
    _, own = load().scores_and_features(torch.cat(crops))
    whole = torch.zeros(16, 24, 40)
    for number, one in enumerate(own):
        whole[..., 8 * number : 8 * number + 24] += F.interpolate(
            one[None], (24, 24), mode="bilinear"
        )[0]
    whole /= torch.tensor([1.0, 2, 3, 2, 1]).repeat_interleave(8)
    torch.testing.assert_close(features[0], F.avg_pool2d(whole, 8), rtol=0, atol=1e-5)


# -- refinement ------------------------------------------------------------------------------------


def plain_pamr(scores: Tensor, image: Tensor, dilations: list[int], steps: int) -> Tensor:
    """One image, pixel by pixel: scores (K, H, W), image (3, H, W)."""
    pixels, values = image.double().numpy(), scores.double().numpy()
    height, width = pixels.shape[1:]

    def near(y: int, x: int) -> tuple[int, int]:
        return min(max(y, 0), height - 1), min(max(x, 0), width - 1)

    weights = np.zeros((height, width, 8 * len(dilations)))
    places = np.zeros((height, width, 8 * len(dilations), 2), int)
    for y, x in itertools.product(range(height), range(width)):
        squares = [
            (a, b, near(y + a * d, x + b * d))
            for d in dilations
            for a in (-1, 0, 1)
            for b in (-1, 0, 1)
        ]
        around = [place for a, b, place in squares if (a, b) != (0, 0)]
        logits = np.zeros(len(around))
        for channel in pixels:
            std = np.std([channel[place] for _, _, place in squares], ddof=1)
            differences = np.array([abs(channel[place] - channel[y, x]) for place in around])
            logits -= differences / (1e-8 + 0.1 * std) / 3
        weights[y, x] = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        places[y, x] = around
    for _ in range(steps):
        rows, columns = places[..., 0], places[..., 1]
        values = (values[:, rows, columns] * weights).sum(axis=-1)
    return torch.from_numpy(values).float()


@pytest.mark.parametrize("size", [(11, 7), (6, 13), (1, 1)])
def test_scores_flow_between_pixels_of_like_colour(size: tuple[int, int]) -> None:
    images, scores = images_of(size, 2), torch.randn(2, 3, *size)
    images[0, :, : size[0] // 2] = 0.25  # a place without any difference
    refined = refine(scores, images, dilations=[1, 4], steps=3)
    for number in range(2):
        expected = plain_pamr(scores[number], images[number], [1, 4], 3)
        torch.testing.assert_close(refined[number], expected, rtol=0, atol=1e-4)
        alone = slice(number, number + 1)
        own = refine(scores[alone], images[alone], dilations=[1, 4], steps=3)
        torch.testing.assert_close(refined[alone], own)


def test_pamr_stops_at_an_edge() -> None:
    image = torch.zeros(1, 3, 40, 40)
    image[..., 20:] = 1
    scores = torch.zeros(1, 2, 40, 40)
    scores[:, 1, :, 19:] = 1  # beyond the edge by a column
    scores[:, 0] = 1 - scores[:, 1]
    labels = refine(scores, image, dilations=[8, 16], steps=10).argmax(dim=1)
    assert (labels[..., :19] == 0).all()
    assert (labels[..., 20:] == 1).all()


@pytest.mark.parametrize("size", SIZES)
def test_pamr_refines_the_scores_of_windows(size: tuple[int, int], load: Any) -> None:
    image = images_of(size)
    scores = load(windows=WINDOWS, pamr={"dilations": [2], "steps": 2}).scores(image)
    expected = plain_pamr(plain_windows(load(), image, **WINDOWS), image[0], [2], 2)
    torch.testing.assert_close(scores[0], expected, rtol=0, atol=1e-4)


# -- synonyms and threshold ------------------------------------------------------------------------

SYNONYMS = {"boat": ["canoe", "kayak"], "dog": ["puppy"], "train": ["tram"]}


def test_each_name_of_the_background_stands_for_itself(load: Any) -> None:
    names = Names(NAMES.categories, ["background", "sky", "grass"])
    image = images_of((40, 27))
    own = load(names, background_names="each").scores(image)
    plain = load(names).scores(image)
    alone = [
        load(Names(names.categories, [name])).scores(image)[:, :1] for name in names.background
    ]
    torch.testing.assert_close(own[:, 1:], plain[:, 1:])
    torch.testing.assert_close(own[:, :1], torch.cat(alone, dim=1).amax(dim=1, keepdim=True))
    assert not torch.allclose(own[:, 0], plain[:, 0])
    chosen = load(names, background_names="each").select([2, 0])
    torch.testing.assert_close(chosen.scores(image), own[:, [2, 0]])


def test_a_label_has_the_score_of_its_best_name(load: Any) -> None:
    image = images_of((24, 40))
    names = Names(["boat", "car", "dog", "canoe", "kayak", "puppy"], NAMES.background)
    apart = load(names).scores(image)
    model = load(synonyms=SYNONYMS)
    rows = [[0], [1, 4, 5], [2], [3, 6]]
    expected = torch.stack([apart[:, own].amax(dim=1) for own in rows], dim=1)
    torch.testing.assert_close(model.scores(image), expected)
    assert (expected != apart[:, :4]).any()
    few = model.select([0, 3, 1])
    torch.testing.assert_close(few.scores(image), expected[:, [0, 3, 1]])
    assert few.text.equal(model.text[[0, 3, 1]])
    torch.testing.assert_close(model.text, load().text)
    labels, _ = model.label(image)
    assert labels.max() <= 3


def test_a_synonym_that_is_asked_for_stands_for_itself(load: Any) -> None:
    image = images_of((24, 40))
    names = Names(["Canoe", "boat"], ["kayak"])
    torch.testing.assert_close(
        load(names, synonyms=SYNONYMS).scores(image), load(names).scores(image)
    )


@pytest.mark.parametrize("key_smoothing", [None, 0.5])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_what_no_category_reaches_is_background(
    threshold: float, key_smoothing: float | None, load: Any
) -> None:
    options = {"logit_scale": 20.0, "key_smoothing": key_smoothing, "key_affinity": "cosine"}
    images = images_of((24, 40), 2)
    plain = load(**options)
    scores = F.interpolate(plain.scores(images), (24, 40), mode="bilinear")
    logits = scores if plain.logit_scale is None else (20 * scores).softmax(dim=1)
    probabilities = logits / logits.sum(dim=1, keepdim=True)
    expected = probabilities.argmax(dim=1)
    expected[probabilities[:, 1:].amax(dim=1) < threshold] = 0
    model = load(**options, background_threshold=threshold)
    labels, confidence = model.label(images)
    assert labels.equal(expected)
    if threshold in (0.3, 0.5):
        assert 0 < (labels == 0).float().mean() < 1
    assert ((confidence >= 0) & (confidence <= 1)).all()
    foreground = labels > 0
    if threshold == 0:
        own = probabilities.gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(confidence, own)
    assert (confidence[foreground] >= threshold - 1e-6).all()
    # Where no pixel may be background there is no threshold.
    categories = model.select([1, 2, 3])
    chosen, _ = categories.label(images)
    assert chosen.equal(plain.select([1, 2, 3]).label(images)[0])
    back = model.select([2, 0]).label(images)[0]
    two = F.interpolate(plain.select([2, 0]).scores(images), (24, 40), mode="bilinear")
    two = two if plain.logit_scale is None else (20 * two).softmax(dim=1)
    own = two[:, 0] / two.sum(dim=1)
    assert (back[own < threshold] == 1).all()


# -- templates -------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos/deep").mkdir(parents=True)
    for number, (width, height) in enumerate([(24, 40), (33, 20), (8, 8), (16, 24)]):
        path = tmp_path / "photos" / ("deep/" if number % 2 else "") / f"{number}.png"
        path.write_bytes(encoded_image(noise_image(number, width, height)))
    return tmp_path / "photos"


def plain_experts(
    features: list[Tensor], classifiers: Tensor, scale: float, keep: int
) -> list[Tensor]:
    """For each label the classifier (K, C) of its expert, from the features (n, C) of images."""
    experts = []
    for label in range(classifiers.shape[1]):
        entropies = {}
        for number, classifier in enumerate(classifiers):
            found = []
            for row in torch.cat(features):
                p = (scale * classifier @ row).softmax(dim=0)
                if p.argmax() == label:
                    found.append(float(-(p * p.log()).sum()))
            if found:
                entropies[number] = sum(found) / len(found)
        chosen = sorted(entropies, key=lambda number: entropies[number])[:keep]
        experts.append(classifiers[chosen or list(range(len(classifiers)))].mean(dim=0))
    return [F.normalize(expert, dim=1) for expert in experts]


def plain_fusion(features: Tensor, experts: list[Tensor], mean: Tensor, scale: float) -> Tensor:
    """Probabilities (n, K) at features (n, C)."""
    rows = []
    for row in features:
        claims = []
        for label, expert in enumerate(experts):
            p = (scale * expert @ row).softmax(dim=0)
            if p.argmax() == label:
                claims.append(p)
        fallback = (scale * mean @ row).softmax(dim=0)
        rows.append(max(claims, key=lambda p: float(p.max())) if claims else fallback)
    return torch.stack(rows)


@pytest.mark.parametrize("keep", [1, 4])
def test_the_experts_of_certain_templates_decide(
    keep: int, photos: Path, load: Any, encoder: EncoderParams
) -> None:
    options = {"templates": "prompts85", "logit_scale": 60.0}
    model = load(**options, template_choice={"images": str(photos), "num_images": 3, "keep": keep})
    clip = load_clip(encoder, torch.device("cpu"))
    classifiers = torch.stack(
        [label_embeddings(clip, NAMES, [one]) for one in templates("prompts85")]
    )
    single = load(**options)

    def unit_features(image: Tensor) -> Tensor:
        return F.normalize(single.scores_and_features(image)[1][0].flatten(1).T, dim=1)

    # Three of the four, evenly spaced in the order of their paths.
    files = sorted(photos.rglob("*.png"))
    chosen = [files[number * 4 // 3] for number in range(3)]
    seen = [
        torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255 for path in chosen
    ]
    experts = plain_experts([unit_features(image) for image in seen], classifiers, 60.0, keep)
    for size in SIZES:
        images = images_of(size, 2)
        scores = model.scores(images)
        assert model.logit_scale is None
        for number in range(2):
            own = unit_features(images[number : number + 1])
            expected = plain_fusion(own, experts, single.text, 60.0)
            torch.testing.assert_close(scores[number].flatten(1).T, expected, rtol=0, atol=1e-4)
    some = plain_fusion(
        own, [expert[[0, 2]] for expert in (experts[0], experts[2])], single.text[[0, 2]], 60.0
    )
    found = model.select([0, 2]).scores(images[1:])[0].flatten(1).T
    torch.testing.assert_close(found, some, rtol=0, atol=1e-4)


def test_archives_and_files_give_the_same_experts(photos: Path, load: Any, tmp_path: Path) -> None:
    files = sorted(photos.rglob("*.png"))
    samples = (
        {"__key__": f"{number:020d}_1", "jpg": path.read_bytes()}
        for number, path in enumerate(files)
    )
    write_shards(samples, tmp_path / "masks", shard_size=3)
    by_files, by_shards = (
        load(templates="prompts85", template_choice={"images": str(folder)})
        for folder in (photos, tmp_path / "masks")
    )
    assert by_files.settings["experts"] == by_shards.settings["experts"]
    image = images_of((24, 40))
    assert by_files.scores(image).equal(by_shards.scores(image))


def test_images_that_cannot_be_sampled_are_named(photos: Path, load: Any, tmp_path: Path) -> None:
    field = "pseudo_label.template_choice.images"
    with pytest.raises(PipelineError, match=rf"{field}: .*/none: no such folder"):
        load(template_choice={"images": str(tmp_path / "none")})
    (tmp_path / "empty").mkdir()
    with pytest.raises(PipelineError, match=rf"{field}: .*/empty: no images in it"):
        load(template_choice={"images": str(tmp_path / "empty")})
    (photos / "0.png").write_bytes(b"no image")
    with pytest.raises(PipelineError, match=rf"{field}: .*/0\.png: not an image; remove it"):
        load(template_choice={"images": str(photos)})
    write_shards([{"__key__": "0_1", "jpg": b"no image"}], tmp_path / "masks", shard_size=1)
    with pytest.raises(PipelineError, match=rf"{field}: sample 0_1 of .*/masks: not an image; run"):
        load(template_choice={"images": str(tmp_path / "masks")})


# -- all of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", DENSE_LABELLERS)
@pytest.mark.parametrize("size", SIZES)
def test_every_method_has_every_option(
    method: str, size: tuple[int, int], photos: Path, load: Any
) -> None:
    model: DenseLabeller = load(
        method=method,
        templates="prompts85",
        windows=WINDOWS,
        pamr={"dilations": [1, 2], "steps": 2},
        synonyms={"boat": ["canoe"]},
        template_choice={"images": str(photos), "num_images": 2},
        background_names="each",
        background_threshold=0.2,
        **({"dino": None} if method == "proxyclip" else {}),
    )
    images = images_of(size, 3)
    labels, confidence = model.label(images)
    assert labels.shape == confidence.shape == (3, *size)
    for number in range(3):
        alone, sure = model.label(images[number : number + 1])
        assert (alone[0] == labels[number]).float().mean() > 0.99
        torch.testing.assert_close(sure[0], confidence[number], rtol=0, atol=1e-4)
    teller = cast("ObjectLabeller", model)
    _, features = teller.scores_and_features(images)
    torch.testing.assert_close(teller.features(images), features, rtol=0, atol=1e-5)
    options = {
        *("windows", "pamr", "synonyms", "template_choice"),
        *("background_names", "background_threshold"),
    }
    assert options | {"experts"} <= set(model.settings)


def section(**values: Any) -> PseudoLabelParams:
    return parse_params(
        {"categories": ["a"], "index": {"a": {"root": "a"}}, "pseudo_label": values}
    ).pseudo_label


def test_options_at_their_default_leave_the_recipe_as_it_was() -> None:
    assert set(DenseClipParams().recipe()) == {
        *("templates", "prompt_denoising", "key_smoothing", "key_affinity"),
        *("published_activation", "dense_attention", "normalisation", "position_resize"),
        "logit_scale",
    }
    chosen = section(pamr={}, synonyms={"boat": ["canoe"]}, background_threshold=0.0).recipe()
    assert chosen["pamr"] == {"dilations": [8, 16], "steps": 10}
    assert chosen["synonyms"] == {"boat": ["canoe"]}
    assert chosen["background_threshold"] == 0
    assert "windows" not in chosen


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"windows": {"side": 8, "stride": 9}}, r"pseudo_label\.windows: stride: 9 leaves gaps"),
        ({"windows": {"side": 8}}, r"key 'pseudo_label\.windows\.stride' is missing"),
        ({"windows": {"side": 0, "stride": 1}}, r"pseudo_label\.windows\.side: .*, got 0"),
        ({"windows": {"side": 8, "strid": 8}}, r"unknown key 'pseudo_label\.windows\.strid'; did"),
        ({"pamr": {"dilations": []}}, r"pseudo_label\.pamr\.dilations: "),
        ({"synonyms": {"boat": []}}, r"pseudo_label\.synonyms\.boat: "),
        ({"synonyms": {"boat": ["Boat"]}}, r"pseudo_label: synonyms\.boat: 'Boat' is listed twice"),
        ({"synonyms": {"a": ["c"], "b": ["c"]}}, r"synonyms\.b: 'c' is listed twice; remove one"),
        ({"background_threshold": 1.5}, r"pseudo_label\.background_threshold: .*, got 1\.5"),
        ({"template_choice": {}, "key_smoothing": 0.5}, r"pseudo_label: key_smoothing: it weighs"),
        (
            {"method": "naclip", "template_choice": {}, "prompt_denoising": 0.5},
            r"pseudo_label: prompt_denoising: it weighs",
        ),
        (
            {
                "method": "lposs",
                "windows": {"side": 8, "stride": 8},
                "prompt_denoising": 0.5,
            },
            r"pseudo_label: prompt_denoising: what it removes from one window .* or windows to",
        ),
        (
            {"windows": {"side": 8, "stride": 4}, "prompt_denoising": 0.5},
            r"pseudo_label: prompt_denoising: what it removes from one window .* or windows to",
        ),
        ({"template_choice": {"keep": 0}}, r"pseudo_label\.template_choice\.keep: .*, got 0"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        section(**values)
