"""The pages of all params and presets, made from the typed params."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SerializeAsAny
from pydantic.fields import FieldInfo

from pipeline.params.base import Section
from pipeline.params.benches import FORMATS, BenchParams, BenchSection, TrainingDataParams
from pipeline.params.reading import DOORS
from pipeline.params.sections import Params
from pipeline.presets import list_benches, list_presets, preset_text

FIDELITY = Path(__file__).resolve().parents[2] / "docs" / "fidelity.md"
ENTRIES = "benches"
LARGE = 1e15
PAGE = re.compile(r"docs/(\w+)\.md")
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
NAMES = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
PLAIN = {"Path": "path", "Any": "path or URL"}
HEAD = """\
# Params

Made from the sections of `params.yaml` as they are checked: an unknown key, a wrong type or a value
out of range is an error that names the key. What has a default may be left out. Defaults are the
papers'; where the published code, which is the default, does other than the text of the paper, or
the text is silent, the column *paper* has the text ([fidelity](fidelity.md)).
"""
PRESETS_HEAD = """\
# Presets

Complete params files, `pipeline init --preset NAME`. Those of the papers have a common base.
"""


def params_page() -> str:
    """Every section with its text and its keys."""
    parts: dict[type[Section], None] = {}
    lines = [HEAD, "## Top level\n", _text(Params), *_table("", Params, _keys(Params), parts)]
    for key, field in Params.model_fields.items():
        if key in DOORS:
            lines += _door(key, parts)
        elif key == ENTRIES:
            lines += _benches(parts)
        elif section := _section(field.annotation):
            lines += [f"## {key}\n", _text(section), *_table(key, section, _keys(section), parts)]
    lines.append("## Parts of sections\n")
    lines += _parts(parts)
    return "\n".join(lines)


def presets_page() -> str:
    """Every preset in full."""
    lines = [PRESETS_HEAD]
    for name, summary in list_presets():
        lines += [f"## {name}\n", f"{summary}\n", '??? note "params.yaml"\n', "    ```yaml"]
        lines += [f"    {line}".rstrip() for line in preset_text(name).splitlines()]
        lines.append("    ```\n")
    lines.append("## Benchmarks\n\n`pipeline benches NAME` says where the data come from.\n")
    lines += [f"- `{name}`: {summary}" for name, summary in list_benches()]
    return "\n".join(lines)


def _door(key: str, parts: dict[type[Section], None]) -> Iterator[str]:
    """A section whose keys depend on the method: those of all methods, then those of each."""
    door, base = DOORS[key], _base(key)
    yield f"## {key}\n"
    yield _text(base)
    yield f"`{door.tag}` is one of {_listed(door.methods)}; `{door.default}` if it is not there.\n"
    yield from _table(key, base, [name for name in _keys(base) if name != door.tag], parts)
    for name, method in door.methods.items():
        yield f"### {key}.{door.tag}: {name}\n"
        for kind in _between(method.params, base):
            yield _text(kind)
        yield from _table(key, method.params, _new(method.params, base, door.tag), parts)


def _benches(parts: dict[type[Section], None]) -> Iterator[str]:
    yield f"## {ENTRIES}\n"
    yield _text(BenchSection)
    yield f"`format` is one of {_listed(FORMATS)}.\n"
    yield from _table(ENTRIES, BenchSection, _keys(BenchSection), parts)
    for name, section in FORMATS.items():
        yield f"### {ENTRIES}.format: {name}\n"
        yield _text(section)
        yield from _table(ENTRIES, section, _new(section, BenchSection, "format"), parts)


def _parts(parts: dict[type[Section], None]) -> Iterator[str]:
    """Sections inside of sections, each once; they may bring others."""
    done: set[type[Section]] = set()
    while waiting := [part for part in parts if part not in done]:
        for part in waiting:
            done.add(part)
            yield f"### {part.__name__}\n"
            yield _text(part)
            yield from _table("", part, _keys(part), parts)


def _base(key: str) -> type[Section]:
    """The nearest section that all methods of a door are made from."""
    kinds = [method.params for method in DOORS[key].methods.values()]
    return next(base for base in kinds[0].__mro__ if all(issubclass(kind, base) for kind in kinds))


def _between(kind: type[Section], base: type[Section]) -> list[type[BaseModel]]:
    """A kind and the sections between it and the base."""
    added = [other for other in kind.__mro__ if issubclass(other, BaseModel) and other is not base]
    return [other for other in added if not issubclass(base, other)]


def _keys(section: type[BaseModel]) -> list[str]:
    return list(section.model_fields)


def _new(kind: type[Section], base: type[Section], tag: str) -> list[str]:
    """Keys that the base lacks or has with another default, the one that names the kind aside."""
    known = base.model_fields
    return [
        key
        for key, field in kind.model_fields.items()
        if key != tag and (key not in known or repr(field) != repr(known[key]))
    ]


def _text(section: type[BaseModel]) -> str:
    """A section's docstring as Markdown."""
    lines = (section.__doc__ or "").strip().splitlines()
    text = "\n".join(line.strip() for line in lines)
    return PAGE.sub(r"[\1](\1.md)", text) + "\n"


def _table(
    place: str, section: type[BaseModel], keys: Sequence[str], parts: dict[type[Section], None]
) -> Iterator[str]:
    if not keys:
        return
    papers = [_paper(f"{place}.{key}") for key in keys]
    with_paper = any(papers)
    yield f"| key | value | default |{' paper |' if with_paper else ''}"
    yield f"|---|---|---|{'---|' if with_paper else ''}"
    for key, paper in zip(keys, papers, strict=True):
        field = section.model_fields[key]
        value = _bounded(_type(field.annotation, parts), field.metadata)
        yield f"| `{key}` | {value} | {_default(field)} |{f' {paper} |' if with_paper else ''}"
    yield ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*must be given*"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        changed = value.model_dump(mode="json", exclude_unset=True)
        return f"`{json.dumps(changed)}`" if changed else "*its own defaults*"
    if isinstance(value, Path):
        value = str(value)
    return f"`{value if isinstance(value, str) and value else json.dumps(value)}`"


def _bounded(text: str, metadata: Sequence[Any]) -> str:
    """A type with the range that its constraints give."""
    inner = [part for item in metadata for part in getattr(item, "metadata", [item])]
    limits = [
        f"{sign} {_number(getattr(item, name))}"
        for item in inner
        for name, sign in BOUNDS.items()
        if getattr(item, name, None) is not None
    ]
    if any(getattr(item, "min_length", None) for item in inner):
        limits.append("not empty")
    return f"{text}, {', '.join(limits)}" if limits else text


def _number(value: float) -> str:
    return f"{value:g}" if value < LARGE else f"2^{round(math.log2(value))}"


def _type(annotation: Any, parts: dict[type[Section], None]) -> str:
    """An annotation in words; sections that it names are put into `parts`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (BenchParams, get_args(BenchParams)[0]):
        return f"as an entry of [{ENTRIES}](#{ENTRIES})"
    if annotation in (TrainingDataParams, get_args(TrainingDataParams)[0]):
        return f"`archives`, a source, or as an entry of [{ENTRIES}](#{ENTRIES})"
    if origin in (Annotated, SerializeAsAny):
        return _bounded(_type(arguments[0], parts), arguments[1:])
    if origin is Literal:
        return _listed(arguments)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type(argument, parts) for argument in arguments))
    if origin is list:
        return f"list of: {_type(arguments[0], parts)}"
    if origin is dict:
        return f"table of: {_type(arguments[1], parts)}"
    if annotation is NoneType:
        return "`null`"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return _link(annotation, parts)
    name = getattr(annotation, "__name__", str(annotation))
    return NAMES.get(name) or PLAIN.get(name) or name


def _link(section: type[Section], parts: dict[type[Section], None]) -> str:
    """Where the keys of a section are listed."""
    for key, field in Params.model_fields.items():
        if key in DOORS and issubclass(section, _base(key)):
            return f"as section [{key}](#{key})"
        if _section(field.annotation) is section:
            return f"[{key}](#{key})"
    parts.setdefault(section)
    return f"[{section.__name__}](#{section.__name__.lower()})"


def _section(annotation: Any) -> type[Section] | None:
    """The section that an annotation is about, alone or in a table or a union with null."""
    for inner in (annotation, *get_args(annotation)):
        if isinstance(inner, type) and issubclass(inner, Section):
            return inner
    return None


def _listed(values: Any) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _paper(key: str) -> str:
    """What the page on fidelity says of the paper, for a key that a row of it names."""
    for line in FIDELITY.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 5 and re.search(rf"`{re.escape(key)}\b", cells[3]):
            return cells[1]
    return ""
