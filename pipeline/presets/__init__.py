"""Presets: complete params files, from the embedded default to the papers' settings, and entries of
`benches:` for the benchmarks that they report on.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from io import StringIO
from pathlib import Path
from string import Template
from textwrap import indent
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from pipeline.errors import PipelineError
from pipeline.files import given_path, utf8_text, write_bytes

_FOLDER = Path(__file__).parent
_BENCHES = _FOLDER / "benches"
_PAPERS = _FOLDER / "papers"
# Keys of a benchmark that say how it is scored.
_OF_SCORES = (
    *("background", "metrics", "unseen", "groups"),
    *("resize_to", "max_side", "rounding", "corruption_channels"),
)
OWN_IMAGES = ("folder", "best", "folder-selfmask", "folder-plus", "folder-offline")


def list_presets() -> list[tuple[str, str]]:
    """Names of the presets and the first line of each file's comment."""
    papers = [(name, fields["summary"]) for name, fields in _differences().items()]
    return sorted(_summaries(_FOLDER) + papers)


def list_benches() -> list[tuple[str, str]]:
    """Names of the shipped benchmarks and the first line of each file's comment."""
    return _summaries(_BENCHES)


def bench_text(name: str) -> str:
    """Content of a shipped benchmark's file: what stands below `benches: NAME:`, with comments.

    Raises:
        PipelineError: no shipped benchmark has this name.
    """
    names = [known for known, _ in list_benches()]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise PipelineError(f"no benchmark {name!r} is shipped; {hint}known: {', '.join(names)}")
    return (_BENCHES / f"{name}.yaml").read_text(encoding="utf-8")


def preset_text(name: str) -> str:
    """Content of a preset's params file.

    Raises:
        PipelineError: no preset has this name.
    """
    names = [known for known, _ in list_presets()]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise PipelineError(f"--preset: {name!r} is unknown; {hint}known: {', '.join(names)}")
    if name in _differences():
        return _paper_text(_differences()[name])
    return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def write_preset(
    name: str,
    out: Path,
    *,
    images: Path | None = None,
    categories: list[str] | None = None,
    force: bool = False,
) -> None:
    """Write a preset to `out`; `images` and `categories` fill in the presets of own photos.

    Raises:
        PipelineError: as `filled_preset`, or `out` exists and `force` is off.
    """
    text = filled_preset(name, images=images, categories=categories)
    if out.is_dir():
        raise PipelineError(f"{out}: is a folder; name the file, such as {out / 'params.yaml'}")
    if out.exists() and not force:
        raise PipelineError(f"{out}: exists already; add --force to overwrite it")
    write_bytes(out, text.encode())


def filled_preset(
    name: str, *, images: Path | None = None, categories: list[str] | None = None
) -> str:
    """Content of a preset's params file, with `images` and `categories` in the place of its own.

    Raises:
        PipelineError: unknown preset, `images` is no folder, or `images` or `categories` given with
            another preset than one of own photos.
    """
    text = preset_text(name)
    if (images or categories) and name not in OWN_IMAGES:
        own = ", ".join(OWN_IMAGES)
        raise PipelineError(f"--images and --categories belong to the presets {own}, not {name}")
    if images is not None:
        images = given_path(images)
        if not images.is_dir():
            raise PipelineError(f"--images: {images}: no such folder")
    return _filled_in(text, images, categories)


def _summaries(folder: Path) -> list[tuple[str, str]]:
    return [
        (path.stem, path.read_text(encoding="utf-8").splitlines()[0].lstrip("# "))
        for path in sorted(folder.glob("*.yaml"))
    ]


@cache
def _differences() -> dict[str, dict[str, Any]]:
    """What the papers' presets put into their common base, by preset."""
    content: dict[str, dict[str, Any]] = YAML(typ="safe", pure=True).load(
        (_PAPERS / "differences.yaml").read_text(encoding="utf-8")
    )
    return content


def _paper_text(fields: dict[str, Any]) -> str:
    template = fields.get("template", "base")
    base = Template((_PAPERS / f"{template}.yaml").read_text(encoding="utf-8"))
    return base.substitute(_PAPER_FIELDS[template](fields))


def _zutis_fields(fields: dict[str, Any]) -> dict[str, Any]:
    benches = "".join(_bench_entry(name) for name in fields["benches"])
    return {"upsampling": "direct", **fields, "benches": benches}


def _plus_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Data, unseen categories and benchmark of DenseCLIP+ are those of one shipped benchmark."""
    text = bench_text(fields["bench"])
    bench = YAML(typ="safe", pure=True).load(text)
    settings = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    blocks = re.split(r"\n(?=[a-z])", settings)
    layout = "\n".join(block for block in blocks if block.partition(":")[0] not in _OF_SCORES)
    data = layout.replace(f"split: {bench['split']}", f"split: {fields['split']}")
    return {
        **fields,
        "root": bench["root"],
        "data": indent(data, "    "),
        "unseen": "[" + ", ".join(bench.get("unseen", [])) + "]",
        "benches": _bench_entry(fields["bench"]),
        "plus_bench": indent(settings, "      "),
    }


_PAPER_FIELDS = {"base": _zutis_fields, "plus": _plus_fields}


def _bench_entry(name: str) -> str:
    return f"  {name}:\n{indent(bench_text(name), '    ')}"


class _Representer(RoundTripRepresenter):
    """Writes null as `null`, not as nothing."""


_Representer.add_representer(
    type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null")
)


def _filled_in(text: str, images: Path | None, categories: list[str] | None) -> str:
    """Set the index folder and the category list, keeping comments and order."""
    if images is None and categories is None:
        return text
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.width = 100
    content = yaml.load(text)
    if images is not None:
        content["index"]["photos"]["root"] = utf8_text(str(images), images)
    if categories is not None:
        content["categories"] = categories
    buffer = StringIO()
    yaml.dump(content, buffer)
    return buffer.getvalue()
