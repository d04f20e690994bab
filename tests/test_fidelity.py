"""docs/fidelity.md: every param that it offers exists, and differs from its default."""

from __future__ import annotations

import re

import pytest
from ruamel.yaml import YAML

from pipeline.methods.students import DenseClipPlusParams
from pipeline.params.base import Section
from pipeline.params.reading import parse_params
from pipeline.params.sections import Params
from tests.paths import ROOT

PAGE = ROOT / "docs" / "fidelity.md"
PARAM = re.compile(r"`(\w+)\.(\w+)(?:: ([\w.]+))?`(?: or `([\w.]+)`)?")
SECTIONS = {
    name: type(field.default)
    for name, field in Params.model_fields.items()
    if isinstance(field.default, Section)
}
OF_PLUS = re.compile(r"\| `(\w+): ([\w.]+)`")
OFFERED = [match.groups() for match in PARAM.finditer(PAGE.read_text(encoding="utf-8"))]


def test_the_page_offers_params() -> None:
    assert len(OFFERED) >= 18
    assert {section for section, *_ in OFFERED} <= set(SECTIONS)


@pytest.mark.parametrize(("section", "key", "value", "other"), OFFERED)
def test_what_the_page_offers_is_no_default(
    section: str, key: str, value: str | None, other: str | None
) -> None:
    default = SECTIONS[section].model_fields[key].default
    for text in filter(None, (value, other)):
        setting = YAML(typ="safe", pure=True).load(text)
        params = parse_params(
            {"categories": "voc", "index": {"a": {"root": "a"}}, section: {key: setting}}
        )
        assert getattr(getattr(params, section), key) == setting
        assert setting != default


def test_what_the_page_offers_of_denseclip_plus_is_no_default() -> None:
    page = PAGE.read_text(encoding="utf-8")
    part = page[page.index("## DenseCLIP+") : page.index("## Differences without a param")]
    offered = OF_PLUS.findall(part)
    assert len(offered) >= 3
    for key, text in offered:
        setting = YAML(typ="safe", pure=True).load(text)
        params = DenseClipPlusParams.model_validate({key: setting})
        assert getattr(params, key) == setting
        assert DenseClipPlusParams.model_fields[key].default != setting
