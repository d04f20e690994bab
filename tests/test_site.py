"""The documentation's site: it builds strictly, names all commands and params, loads nothing."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline.cli import app
from pipeline.methods.dense import DENSE_LABELLERS
from pipeline.methods.masks import MASK_SOURCES
from pipeline.methods.students import STUDENTS
from pipeline.params.benches import FORMATS
from pipeline.params.sections import Params
from pipeline.presets import list_presets
from tests.paths import ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    logging.getLogger("mkdocs").setLevel(logging.WARNING)
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


def text_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return html.unescape(re.sub(r"<[^>]+>", "", text))


def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        yield f"{path} {name}", command
        yield from commands(command, f"{path} {name}") if hasattr(command, "commands") else []


def test_every_command_has_its_heading_and_its_options(site: Path) -> None:
    text = text_of(site / "commands.html")
    found = dict(commands(typer.main.get_command(app), "pipeline"))
    assert len(found) > 30
    sections = re.split(r"^(pipeline[\w -]*)¶", text, flags=re.MULTILINE)
    shown = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert {*found} <= {*shown}
    for path, command in found.items():
        for param in command.params:
            if param.name != "help":
                assert max(param.opts) in shown[path] or param.metavar in shown[path], path


def test_every_key_of_the_params_is_there_with_the_methods_behind_its_doors(site: Path) -> None:
    page = (site / "params.html").read_text(encoding="utf-8")
    keys = set(re.findall(r"<td><code>(\w+)</code></td>", page))
    sections = [Params]
    for door in (MASK_SOURCES, DENSE_LABELLERS, STUDENTS):
        sections += [method.params for method in door.values()]  # type: ignore[attr-defined]
    sections += FORMATS.values()
    tags = {"source", "method", "student", "format"}
    for section in sections:
        assert {*section.model_fields} - tags <= keys, section
    text = text_of(site / "params.html")
    for name in (*MASK_SOURCES, *DENSE_LABELLERS, *STUDENTS, *FORMATS):
        assert re.search(rf"^\w+\.\w+: {name}¶", text, flags=re.MULTILINE), name
    assert re.search(r"max_error_rate\s+number, ≥ 0, ≤ 1\s+0\.01", text)
    assert re.search(r"min_margin\s+number, ≥ -2, ≤ 2 or null\s+null", text)


def test_every_preset_is_there_in_full(site: Path) -> None:
    text = text_of(site / "presets.html")
    for name, _ in list_presets():
        assert f"\n{name}¶" in text


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = [*site.rglob("*.html")]
    assert len(pages) > 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=[\"']?([^\"' >]+)", text)
        loaded += re.findall(r"<link[^>]* href=[\"']?([^\"' >]+)", text)
        assert not [url for url in loaded if "//" in url], page


def test_links_out_of_docs_lead_to_pages_of_the_site(site: Path) -> None:
    index = (site / "index.html").read_text(encoding="utf-8")
    for name in ("contributing.html", "security.html", "results.html#on-photographs"):
        assert f'href="{name}"' in index
    assert 'href="contributing.html"' in (site / "api.html").read_text(encoding="utf-8")
    assert 'src="demo.png"' in index


def test_the_notebook_is_a_page(site: Path) -> None:
    text = text_of(site / "start.html")
    assert "pipeline new demo --demo" in text
    assert "!pipeline" not in text
    assert (site / "start.ipynb").is_file()
