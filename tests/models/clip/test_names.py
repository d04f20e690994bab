"""Names as an encoder sees them: which are one, which are cut, which are none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.models.clip import ClipEncoder, check_distinct, text_embeddings
from pipeline.models.clip.labels import label_embeddings
from pipeline.models.clip.loading import build_from_config
from pipeline.models.clip.photo_clip import CONFIG_PATH
from pipeline.models.clip.tokenizer import Tokenizer, load_tokenizer
from pipeline.vocabulary.categories import Names, category_set_names, load_category_set
from pipeline.vocabulary.prompts import NAME_ONLY, PROMPTS_85
from tests.tiny_encoders import TEXT, VIT

CONFIG: dict[str, Any] = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}
PHOTO_CLIP: dict[str, Any] = json.loads(CONFIG_PATH.read_text(encoding="utf-8"))


def encoder_of(config: dict[str, Any], tokenizer: Tokenizer | None = None) -> ClipEncoder:
    return ClipEncoder(
        build_from_config(config, source="test"),
        config=config,
        preprocess=open_clip.transform.PreprocessCfg(size=config["vision_cfg"]["image_size"]),
        tokenizer=tokenizer or load_tokenizer(config, name="", source="test"),
        source="the test",
    )


@pytest.fixture(scope="module")
def encoder() -> ClipEncoder:
    return encoder_of(CONFIG)


@pytest.fixture(scope="module")
def photo_clip() -> ClipEncoder:
    return encoder_of(PHOTO_CLIP)


def embed(
    encoder: ClipEncoder, categories: Sequence[str], background: Sequence[str] = ("background",)
) -> Tensor:
    return label_embeddings(encoder, Names(categories, background), NAME_ONLY)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("dog", "\uff44\uff4f\uff47"),  # full width
        ("dog & cat", "dog &amp;amp; cat"),
        ("caf\u00e9", "cafe\u0301"),
        ("caf\u00e9", "caf\u00c3\u00a9"),  # UTF-8 read as Latin-1
        ("dog's toy", "dog\u2019s toy"),
        ("fish", "\ufb01sh"),
        ("fire truck", "fire\u00a0\u2003 truck"),
        ("dog", "\ufeffDOG"),
        ("hot-dog", "hot - dog"),
        ("boeing 747", "boeing 7 47"),
    ],
)
def test_spellings_of_the_same_tokens_are_refused(
    encoder: ClipEncoder, first: str, second: str
) -> None:
    assert torch.equal(encoder.tokenize([first]), encoder.tokenize([second]))
    with pytest.raises(PipelineError) as error:
        embed(encoder, ["bird", first, second])
    expected = f"categories: {first!r} and {second!r} are the same to the encoder; remove one"
    assert str(error.value) == expected
    with pytest.raises(PipelineError, match=r"^categories: .* \(background\) and .* are the same"):
        embed(encoder, [second], background=["sky", first])
    with pytest.raises(PipelineError, match=r"^background: .* are the same"):
        embed(encoder, ["bird"], background=[second, first])


@pytest.mark.parametrize(
    ("first", "second"),
    [("stra\u00dfe", "strasse"), ("x\u00b2", "x2"), ("\u0130", "i"), ("dog", "d\u00f6g")],
)
def test_spellings_of_other_tokens_pass(encoder: ClipEncoder, first: str, second: str) -> None:
    assert load_category_set([first, second]) == [first, second]
    assert len(embed(encoder, [first, second])) == 3


@pytest.mark.parametrize("name", ["&nbsp;", "\ufeff", "\u0007"])
def test_a_name_without_tokens_is_refused(encoder: ClipEncoder, name: str) -> None:
    with pytest.raises(PipelineError, match=r"^categories: .* is empty to the encoder"):
        embed(encoder, ["dog", name])


def test_names_of_a_closed_list_that_mean_one_are_refused(photo_clip: ClipEncoder) -> None:
    for categories in (["dog", "Dogs"], ["golden-retriever", "golden retriever"]):
        with pytest.raises(PipelineError, match="are the same to the encoder"):
            embed(photo_clip, categories)


@pytest.mark.parametrize("name", category_set_names())
def test_shipped_sets_are_distinct_and_whole(encoder: ClipEncoder, name: str) -> None:
    names = load_category_set(name)
    check_distinct(encoder, background=["background"], categories=names)
    longest = max(names, key=len)
    text_embeddings(encoder, [longest], PROMPTS_85)


def test_every_name_of_the_closed_list_is_distinct_and_whole(photo_clip: ClipEncoder) -> None:
    names = PHOTO_CLIP["names"]
    check_distinct(photo_clip, background=[], categories=names)
    text_embeddings(photo_clip, sorted(names, key=len)[-20:], PROMPTS_85)


@pytest.mark.parametrize("field", ["categories", "background"])
def test_a_name_that_would_be_cut_is_refused(encoder: ClipEncoder, field: str) -> None:
    lists = {"categories": ["dog"], "background": ["background"]}
    # "a jpeg corrupted photo of the {}.", its start and its end are 11 of 77 tokens.
    longest = " ".join(["cat"] * 66)
    lists[field].append(longest)
    whole = label_embeddings(encoder, Names(**lists), PROMPTS_85)
    assert whole.isfinite().all()
    lists[field][-1] = f"{longest} cat"
    message = rf"^{field}: 'cat cat[ cat]*\.\.\.' takes 78 tokens in its longest prompt; .* 77"
    with pytest.raises(PipelineError, match=message):
        label_embeddings(encoder, Names(**lists), PROMPTS_85)
    assert label_embeddings(encoder, Names(**lists), NAME_ONLY).isfinite().all()


def test_the_length_is_that_of_the_encoder() -> None:
    short = encoder_of({**CONFIG, "text_cfg": {**TEXT, "context_length": 12}})
    assert embed(short, ["cat " * 10]).isfinite().all()
    with pytest.raises(PipelineError, match=r"takes 13 tokens .* reads 12"):
        embed(short, ["cat " * 11])


class _Words:
    """Tokens by word, in the form of open_clip's wrapper of transformers' tokenizers."""

    context_length = 8

    def clean_fn(self, text: str) -> str:
        return " ".join(text.split())

    def tokenizer(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[*(hash(word) % 1000 + 2 for word in text.split()), 1])

    def __call__(self, texts: list[str]) -> Tensor:
        rows = torch.ones(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = self.tokenizer(self.clean_fn(text)).input_ids[: self.context_length]
            row[: len(ids)] = torch.tensor(ids)
        return rows


def test_tokenizers_of_another_kind_are_counted_by_themselves() -> None:
    config = {**CONFIG, "text_cfg": {**TEXT, "context_length": 8}}
    encoder = encoder_of(config, Tokenizer(_Words()))
    assert len(embed(encoder, ["Dog", "dog", "one two three four five six seven"])) == 4
    with pytest.raises(PipelineError, match=r"takes 9 tokens .* reads 8"):
        embed(encoder, ["one two three four five six seven eight"])
    with pytest.raises(PipelineError, match="are the same to the encoder"):
        embed(encoder, ["a dog", "a  dog"])
