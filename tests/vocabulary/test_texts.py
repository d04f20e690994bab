"""Categories that are asked for in other words than their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.methods.dense import DenseClipParams, check_synonyms, load_dense_labeller
from pipeline.models.clip import category_embeddings, load_clip, text_embeddings
from pipeline.models.clip.labels import label_embeddings
from pipeline.params.base import EncoderParams
from pipeline.params.reading import parse_params
from pipeline.vocabulary.categories import Names, all_texts, check_texts, texts_for
from pipeline.vocabulary.prompts import NAME_ONLY

INDEX = {"demo": {"root": "images"}}
BOAT = {"name": "boat", "texts": ["boat", "canoe", "kayak"]}
NAMES = Names(["cat", "boat"], ["background"], {"boat": ["boat", "canoe", "kayak"]})


def parsed(categories: Any, **sections: Any) -> Any:
    return parse_params({"categories": categories, "index": INDEX, **sections})


@pytest.fixture
def encoder(tiny_clip: tuple[Path, Path]) -> EncoderParams:
    model, weights = map(str, tiny_clip)
    return EncoderParams(model=model, pretrained=weights)


def test_an_entry_has_a_name_and_texts() -> None:
    params = parsed(["cat", BOAT])
    assert params.category_names == ["cat", "boat"]
    assert params.texts == {"boat": ["boat", "canoe", "kayak"]}
    assert all_texts(["cat", "boat"], params.texts) == ["cat", "boat", "canoe", "kayak"]
    assert texts_for(["Boat", "dog"], params.texts) == {"Boat": ["boat", "canoe", "kayak"]}
    for plain in (["cat", "boat"], "voc"):
        assert parsed(plain).texts == {}
        assert parsed(plain).category_names == plain


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "boat", "txts": ["canoe"]}, r"unknown key 'categories\.1\.txts'; did you mean"),
        ({"name": "boat"}, r"key 'categories\.1\.texts' is missing"),
        ({"name": "boat", "texts": []}, r"categories\.1\.texts: .* at least 1 item"),
        ({"name": "boat", "texts": " "}, r"categories\.1\.texts: .* list"),
        (3, r"categories\.1: Input should be a valid string, got 3"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said_in_one_line(entry: Any, message: str) -> None:
    with pytest.raises(PipelineError, match=message) as caught:
        parsed(["cat", entry])
    lines = str(caught.value).splitlines()
    assert all("union" not in line and "CategoryParams" not in line for line in lines)


def test_texts_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(PipelineError, match=r"categories: texts: 'Cat' is listed twice"):
        check_texts(["cat", "pet"], {"pet": ["Cat", "dog"]})
    with pytest.raises(PipelineError, match="'sky' is the background"):
        check_texts(["cat"], {"cat": ["sky"]}, background=["sky"])
    check_texts(["cat", "pet"], {"pet": ["dog"]})
    with pytest.raises(PipelineError, match="'boat' has `texts` under categories"):
        check_synonyms(DenseClipParams(synonyms={"boat": ["ship"]}), NAMES)


def test_the_embedding_of_a_category_is_the_mean_of_its_texts(encoder: EncoderParams) -> None:
    clip = load_clip(encoder, torch.device("cpu"))
    rows = text_embeddings(clip, ["cat", "boat", "canoe", "kayak"], NAME_ONLY)
    found = category_embeddings(clip, NAMES.categories, NAME_ONLY, NAMES.texts)
    torch.testing.assert_close(found[0], rows[0])
    torch.testing.assert_close(found[1], F.normalize(rows[1:].mean(dim=0), dim=-1))
    # The name is no text unless it says so.
    renamed = category_embeddings(clip, ["x1"], NAME_ONLY, {"x1": ["canoe"]})
    torch.testing.assert_close(renamed[0], rows[2])
    plain = label_embeddings(clip, Names(["cat"]), NAME_ONLY)
    torch.testing.assert_close(plain[1], rows[0])


def test_of_dense_labels_the_best_text_counts(encoder: EncoderParams, runtime: Runtime) -> None:
    params = DenseClipParams(encoder=encoder, templates="name")
    image = torch.rand(1, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    labeller = load_dense_labeller(params, NAMES, runtime)
    flat = load_dense_labeller(params, Names(["cat", "boat", "canoe", "kayak"]), runtime)
    expected = flat.scores(image)
    best = torch.cat([expected[:, :2], expected[:, 2:].amax(dim=1, keepdim=True)], dim=1)
    torch.testing.assert_close(labeller.scores(image), best)
    assert labeller.settings == {**flat.settings, "texts": dict(NAMES.texts)}
