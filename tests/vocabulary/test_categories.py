from __future__ import annotations

import pytest

from pipeline.errors import PipelineError
from pipeline.vocabulary.categories import category_set_names, load_category_set, unasked_names


@pytest.mark.parametrize(
    ("name", "size", "first", "last"),
    [
        ("voc", 20, "aeroplane", "tv/monitor"),
        ("voc_denseclip", 20, "airplane", "tv monitor"),
        ("demo", 16, "airplane", "tv"),
        ("coco", 80, "person", "toothbrush"),
        ("coca", 80, "Accordion", "whisk"),
        ("context", 59, "airplane", "wood"),
        ("cub", 200, "Black footed Albatross", "Common Yellowthroat"),
        ("imagenet_s50", 50, "goldfish", "agaric"),
        ("imagenet_s300", 300, "tench", "bolete"),
        ("imagenet_s919", 919, "tench", "toilet tissue"),
    ],
)
def test_a_shipped_set_passes_the_check_of_user_lists(
    name: str, size: int, first: str, last: str
) -> None:
    names = load_category_set(name)
    assert (len(names), names[0], names[-1]) == (size, first, last)
    assert load_category_set(names) == names


def test_smaller_imagenet_s_sets_are_parts_of_the_largest_in_its_order() -> None:
    position = {name: index for index, name in enumerate(load_category_set("imagenet_s919"))}
    for name in ("imagenet_s50", "imagenet_s300"):
        positions = [position[category] for category in load_category_set(name)]
        assert positions == sorted(positions)


def test_every_file_is_a_known_set() -> None:
    assert category_set_names() == [
        "coca",
        "coco",
        "coco_seen65",
        "coco_stuff",
        "concepts_car_brands",
        "concepts_car_colours",
        "concepts_celebrities",
        "concepts_characters",
        "concepts_sharpness",
        "concepts_sports",
        "context",
        "cub",
        "demo",
        "imagenet_s300",
        "imagenet_s50",
        "imagenet_s919",
        "voc",
        "voc_denseclip",
    ]


def test_denseclips_names_of_voc_are_those_of_zutis_but_for_two() -> None:
    pairs = zip(load_category_set("voc"), load_category_set("voc_denseclip"), strict=True)
    differing = [pair for pair in pairs if pair[0] != pair[1]]
    assert differing == [("aeroplane", "airplane"), ("tv/monitor", "tv monitor")]


def test_own_names_keep_their_order_and_lose_blanks_around_them() -> None:
    assert load_category_set(["zebra ", "polar bear", " ant"]) == ["zebra", "polar bear", "ant"]


@pytest.mark.parametrize(
    ("categories", "words"),
    [
        ([], ["empty", "voc"]),
        ([f"name {number}" for number in range(40_000)], ["40000 names", "at most 32767"]),
        (["cat", "  "], ["name 2 of 2", "empty"]),
        (["cat", "dog", "Cat"], ["'Cat'", "1 and 3"]),
        (["cat", "Background"], ["'Background'", "label id 0"]),
        ("Coco-80", ["'Coco-80'", "'coco'"]),
        ("cat", ["unknown category set 'cat'", "[cat]"]),
        ("../voc", ["unknown"]),
    ],
)
def test_a_bad_list_is_refused_by_name(categories: str | list[str], words: list[str]) -> None:
    with pytest.raises(PipelineError, match=r"^categories: ") as error:
        load_category_set(categories)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "other",
    ["\uff44\uff4f\uff47 & cat", "dog &amp; cat", "dog\u00a0& cat", "\ufeffDog &amp;amp; cat"],
)
def test_spellings_that_encoders_do_not_tell_apart_are_one(other: str) -> None:
    message = f"'bird', 'dog & cat', {other!r}"
    with pytest.raises(PipelineError, match=r"^x: .* and .* are the same to the encoder") as error:
        load_category_set(["bird", "dog & cat", other], field="x")
    assert all(name in str(error.value) for name in message.split(", ")[1:])
    with pytest.raises(PipelineError, match="is the background"):
        load_category_set([other], background=["Dog & Cat"])
    assert unasked_names(["dog & cat", "sky"], [other]) == ["sky"]


def test_a_background_that_is_all_asked_for_becomes_the_word() -> None:
    assert unasked_names(["sky"], ["Sky"]) == ["background"]


def test_a_background_name_is_no_category() -> None:
    with pytest.raises(PipelineError, match="'sky'"):
        load_category_set(["cat", "sky"], background=["sky", "grass"])


def test_messages_name_the_field() -> None:
    with pytest.raises(PipelineError, match=r"^benches\.voc\.categories: 'cat' is listed twice"):
        load_category_set(["cat", "cat"], field="benches.voc.categories")


def test_the_concepts_of_denseclip_are_shipped() -> None:
    concepts = {
        name: load_category_set(name)
        for name in category_set_names()
        if name.startswith("concepts_")
    }
    assert concepts["concepts_characters"] == [
        *("Batman", "Joker", "Mickey Mouse", "Donald Duck", "Mario", "Luigi")
    ]
    assert concepts["concepts_celebrities"] == ["Bill Gates", "Steve Jobs"]
    assert {"red car", "yellow car"} <= set(concepts["concepts_car_colours"])
    for names in concepts.values():
        assert load_category_set(names) == names
