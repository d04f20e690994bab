"""The only reader of params.yaml."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from pipeline.errors import PipelineError
from pipeline.params.base import EntryName, Section
from pipeline.params.benches import FORMATS, BenchParams
from pipeline.params.sections import Params


def read_params(path: Path) -> Params:
    """Read and check a params file (YAML 1.2, as DVC reads it).

    Raises:
        PipelineError: no such file, not YAML, or a key that is unknown, missing or has a value of
            the wrong type or range; every offending key is named.
    """
    try:
        content = YAML(typ="safe", pure=True).load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PipelineError(
            f"{path}: no such file; `pipeline init --preset folder` writes one"
        ) from None
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read: {error.strerror}") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise PipelineError(f"{path}: not valid YAML: {where}{error.problem}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path}: not valid YAML: {error}") from None
    return parse_params(content, name=str(path))


def parse_params(content: Any, *, name: str = "params.yaml") -> Params:
    """Check the parsed content of a params file; `name` heads the error messages."""
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise PipelineError(f"{name}: expected `key: value` lines, found {found}")
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise PipelineError("\n".join(_complaints(name, error))) from None


class _BenchTable(Section):
    benches: dict[EntryName, BenchParams]


def parse_bench(content: Any, bench_name: str, *, name: str) -> BenchParams:
    """Check an entry of `benches` that stands in a file of its own; `name` is the file's."""
    try:
        return _BenchTable.model_validate({"benches": {bench_name: content}}).benches[bench_name]
    except ValidationError as error:
        raise PipelineError("\n".join(_complaints(name, error))) from None


def _complaints(name: str, error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        if item["loc"][-1] == "str" and isinstance(item["input"], list):
            continue  # a list of names is judged as a list
        location = [part for part in item["loc"] if not _is_union_branch(part)]
        if location[0] == "benches" and len(location) > 2 and location[2] in FORMATS:
            del location[2]  # the format chose the section
        key = ".".join(str(part) for part in location)
        if item["type"] == "extra_forbidden":
            yield f"{name}: unknown key {key!r}{_suggestion(item['loc'])}"
        elif item["type"] == "missing":
            yield f"{name}: key {key!r} is missing"
        elif item["type"] == "union_tag_not_found":
            yield f"{name}: key '{key}.format' is missing; expected one of {', '.join(FORMATS)}"
        elif item["type"] == "union_tag_invalid":
            yield (
                f"{name}: {key}.format: expected one of {', '.join(FORMATS)}, "
                f"got {item['input']['format']!r}"
            )
        elif location[-1] == "[key]":
            yield (
                f"{name}: {'.'.join(map(str, location[:-2]))}: {item['input']!r} is no name for an "
                "entry; use letters, digits and _, after the first one also - and ."
            )
        elif item["type"] == "string_pattern_mismatch":
            yield f"{name}: {key}: the name is empty; write one or remove it"
        elif item["type"] in ("model_type", "model_attributes_type"):
            yield f"{name}: {key}: expected `key: value` lines, got {item['input']!r}"
        else:
            problem = item["msg"].removeprefix("Value error, ")
            yield f"{name}: {key}: {problem}, got {item['input']!r}"


def _is_union_branch(part: str | int) -> bool:
    return part in ("str", "list[str]")


def _suggestion(location: tuple[str | int, ...]) -> str:
    """Name the closest known key of the section that holds the unknown one."""
    section: Any = Params
    for part in location[:-1]:
        if section is BenchParams:
            section = FORMATS[str(part)]
        elif get_origin(section) is dict:
            _, section = get_args(section)
        else:
            section = section.model_fields[part].annotation
            if isinstance(section, UnionType):  # a section or null
                section, _ = get_args(section)
    known = sorted(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}"
