from __future__ import annotations

import pytest

from pipeline.errors import PipelineError
from pipeline.vocabulary.categories import category_set_names, load_category_set


@pytest.mark.parametrize(
    ("name", "size", "first", "last"),
    [
        ("voc", 20, "aeroplane", "tv/monitor"),
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
        "context",
        "cub",
        "demo",
        "imagenet_s300",
        "imagenet_s50",
        "imagenet_s919",
        "voc",
    ]


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


def test_a_background_name_is_no_category() -> None:
    with pytest.raises(PipelineError, match="'sky'"):
        load_category_set(["cat", "sky"], background=["sky", "grass"])


def test_messages_name_the_field() -> None:
    with pytest.raises(PipelineError, match=r"^benches\.voc\.categories: 'cat' is listed twice"):
        load_category_set(["cat", "cat"], field="benches.voc.categories")
