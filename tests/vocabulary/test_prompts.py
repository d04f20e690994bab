from __future__ import annotations

from pipeline.vocabulary.prompts import NAME_ONLY, PROMPTS_85, PURE, templates


def test_there_are_85_distinct_templates_with_one_slot_each() -> None:
    assert len(PROMPTS_85) == len(set(PROMPTS_85)) == 85
    assert all(template.count("{}") == 1 for template in PROMPTS_85)


def test_the_name_is_inserted_as_it_is() -> None:
    name = "Yorkshire {terrier}"
    assert all(name in template.format(name) for template in PROMPTS_85)
    assert [template.format(name) for template in NAME_ONLY] == [name]


def test_template_sets_have_the_names_of_the_params() -> None:
    assert templates("prompts85") == PROMPTS_85
    assert templates("name") == NAME_ONLY
    assert templates("pure") == PURE


def test_pure_templates_speak_of_one_thing() -> None:
    assert PURE[0].format("cat") == "a photo of a single cat."
    assert len(set(PURE)) == len(PURE)
    assert all(template.count("{}") == 1 for template in PURE)
