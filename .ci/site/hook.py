"""What mkdocs asks of this project: pages made from the code, and links that work in both places.

A page of docs/ links to files as they lie in the repository. On the site, links to files outside of
docs/ lead to the pages that are made of these.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from site_commands import commands_page
from site_notebook import notebook_page
from site_params import params_page, presets_page

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs"
NOTEBOOK = "start.ipynb"
OUTSIDE = {  # file of the repository -> page of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.md",
    "data/raw/README.md": "raw.md",
    "models/demo/README.md": "demo_networks.md",
    "pipeline/models/clip/photo_clip/README.md": "photo_clip_weights.md",
}
GENERATED = {
    "commands.md": commands_page,
    "params.md": params_page,
    "presets.md": presets_page,
    "start.md": lambda: notebook_page(ROOT / DOCS / NOTEBOOK),
}
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave entries of `nav` out that have no file, and sections without entries."""
    known = {path.name for path in (ROOT / DOCS).glob("*.md")} | {*GENERATED, *OUTSIDE.values()}
    sections = {
        title: entries for section in config.nav or [] for title, entries in section.items()
    }
    found = {
        title: [entry for entry in entries if _file(entry) in known]
        for title, entries in sections.items()
    }
    config.nav = [{title: entries} for title, entries in found.items() if entries]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        folder = posixpath.dirname(source)
        files.append(File.generated(config, page, content=_relinked(text, folder)))
    for page, make in GENERATED.items():
        files.append(File.generated(config, page, content=make()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mend the links of a page of docs/."""
    del config, files
    return markdown if page.file.generated_by else _relinked(markdown, DOCS)


def _file(entry: str | dict[str, str]) -> str:
    return entry if isinstance(entry, str) else next(iter(entry.values()))


def _relinked(markdown: str, folder: str) -> str:
    """Links of a file in `folder` of the repository, as they are on the site."""

    def mended(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[1]))
        target = OUTSIDE.get(target, target.removeprefix(f"{DOCS}/"))
        return f"]({target}{link[2] or ''})"

    return LINK.sub(mended, markdown)
