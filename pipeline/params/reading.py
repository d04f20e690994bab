"""The only reader of params.yaml, and of every other typed YAML file."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, SerializeAsAny, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from pipeline.errors import PipelineError
from pipeline.methods.dense import DENSE_LABELLERS
from pipeline.methods.masks import MASK_SOURCES
from pipeline.methods.students import STUDENTS
from pipeline.params.base import CategoryParams, EntryName, Section
from pipeline.params.benches import ARCHIVES, DATA_FORMATS, FORMATS, BenchParams, TrainingDataParams
from pipeline.params.sections import Params

AnySection = TypeVar("AnySection", bound=Section)
Location = tuple[str | int, ...]
CATEGORY_BRANCH = "CategoryParams"
SECTION_BRANCHES = ("TaggedFile", CATEGORY_BRANCH)  # of a union with a text
DATA, BENCH = "data", "bench"  # the keys of `TrainingDataParams`, `BenchParams` in a section
UNIONS = (BenchParams, get_args(BenchParams)[0], get_args(TrainingDataParams)[0])


@dataclass(frozen=True)
class Door:
    """A section whose keys depend on the method that it names.

    Attributes:
        tag: the key that names the method.
        default: the method of a section that does not say.
        methods: entries by name, each with the class of its `params`.
    """

    tag: str
    default: str
    methods: Mapping[str, Any]


DOORS = {
    "mask": Door("source", "selfmask", MASK_SOURCES),
    "pseudo_label": Door("method", "denseclip", DENSE_LABELLERS),
    "train": Door("student", "zutis", STUDENTS),
}


def read_params(path: Path) -> Params:
    """Read and check a params file (YAML 1.2, as DVC reads it).

    Raises:
        PipelineError: no such file, not YAML, or a key that is unknown, missing or has a value of
            the wrong type or range; every offending key is named.
    """
    if not Path(path).exists():
        raise PipelineError(f"{path}: no such file; `pipeline init --preset folder` writes one")
    return parse_params(_read_yaml(path), name=str(path))


def parse_params(content: Any, *, name: str = "params.yaml") -> Params:
    """Check the parsed content of a params file; `name` heads the error messages."""
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise PipelineError(f"{name}: expected `key: value` lines, found {found}")
    messages: list[str] = []
    sections = dict(content)
    for key, door in DOORS.items():
        if isinstance(section := sections.pop(key, {}), dict):
            try:
                sections[key] = _parse_method(name, key, door, section)
            except PipelineError as error:
                messages.append(str(error))
        else:
            sections[key] = section  # no section at all, as the check below says
    try:
        params = Params.model_validate(sections)
    except ValidationError as error:
        messages = [*_messages(name, error, Params), *messages]
    if messages:
        raise PipelineError("\n".join(messages))
    return params


def _parse_method(name: str, key: str, door: Door, section: Mapping[str, Any]) -> Section:
    """The section of a door, by the class of the method that it names."""
    method = section.get(door.tag, door.default)
    if not isinstance(method, str) or method not in door.methods:
        raise PipelineError(
            f"{name}: {key}.{door.tag}: expected one of {', '.join(door.methods)}, got {method!r}"
        )
    model: type[Section] = door.methods[method].params
    try:
        return model.model_validate(section)
    except ValidationError as error:
        raise PipelineError("\n".join(_messages(name, error, model, (key,)))) from None


class _BenchTable(Section):
    benches: dict[EntryName, BenchParams]


def parse_bench(content: Any, bench_name: str, *, name: str) -> BenchParams:
    """Check an entry of `benches` that stands in a file of its own; `name` is the file's."""
    table = parse_section({"benches": {bench_name: content}}, _BenchTable, name=name)
    return table.benches[bench_name]


def read_section(path: Path, model: type[AnySection]) -> AnySection:
    """Read and check a data file in YAML 1.2; see `parse_section`.

    Raises:
        PipelineError: also if the file cannot be read or is not YAML.
    """
    return parse_section(_read_yaml(path), model, name=str(path))


def parse_section(content: Any, model: type[AnySection], *, name: str) -> AnySection:
    """Check parsed content against a typed model.

    Args:
        content: of a file.
        model: what it should be.
        name: heads the error messages.

    Raises:
        PipelineError: a key is unknown, missing or has a value of the wrong type; every offending
            place is named, one a line.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise PipelineError("\n".join(_messages(name, error, model))) from None


class _Constructor(SafeConstructor):
    """Makes values; says where one stands that looks like a date or number and is none."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError) as error:
            problem = f"a date or number that is none ({error}); a text needs quotes"
            raise ConstructorError(problem=problem, problem_mark=node.start_mark) from None


def load_yaml(content: str | bytes) -> Any:
    """The plain values of a document in YAML 1.2.

    Raises:
        YAMLError: it is none.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        return yaml.load(content)
    except RecursionError:
        raise YAMLError("nested too deeply; close the brackets that are open") from None


def _read_yaml(path: Path) -> Any:
    try:
        return load_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read: {error.strerror}") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise PipelineError(f"{path}: not valid YAML: {where}{error.problem}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path}: not valid YAML: {error}") from None


def _messages(
    name: str, error: ValidationError, model: type[BaseModel], prefix: Location = ()
) -> Iterator[str]:
    """A line for each offending place; `model` is checked, `prefix` where it stands."""
    for item in error.errors():
        if _is_other_branch(item["loc"], item["input"]):
            continue
        location = [part for part in (*prefix, *item["loc"]) if not _is_union_branch(part)]
        location = [part for place, part in enumerate(location) if not _is_format(location, place)]
        key = ".".join(str(part) for part in location)
        head = f"{name}: {key}: " if key else f"{name}: "
        if item["type"] == "extra_forbidden":
            yield f"{name}: unknown key {key!r}{_suggestion(model, item['loc'])}"
        elif item["type"] == "missing":
            yield f"{name}: key {key!r} is missing"
        elif item["type"] in ("union_tag_not_found", "union_tag_invalid"):
            yield _wrong_format(name, key, item["input"], is_data=location[-1] == DATA)
        elif location and location[-1] == "[key]":
            yield (
                f"{name}: {'.'.join(map(str, location[:-2]))}: {item['input']!r} is no name for an "
                "entry; use letters, digits and _, after the first one also - and ."
            )
        elif item["type"] == "string_pattern_mismatch":
            yield f"{head}the name is empty; write one or remove it"
        elif item["type"] in ("model_type", "model_attributes_type"):
            yield f"{head}expected `key: value` lines, got {item['input']!r}"
        else:
            got = "" if isinstance(item["input"], dict) else f", got {item['input']!r}"
            yield f"{head}{item['msg'].removeprefix('Value error, ')}{got}"


def _is_format(location: Sequence[str | int], place: int) -> bool:
    """Whether a part of a location is the format that chose the section, and no key."""
    part = location[place]
    if location[0] == "benches" and place == 2:
        return part in FORMATS
    chosen = place > 0 and location[place - 1] in (DATA, BENCH)
    return chosen and (part in DATA_FORMATS or part == ARCHIVES)


def _wrong_format(name: str, key: str, value: Any, *, is_data: bool) -> str:
    """What to say of a value that has none of the formats that choose a section."""
    formats = ", ".join(DATA_FORMATS if is_data else FORMATS)
    if not isinstance(value, dict):
        expected = f"{ARCHIVES}, or a section with a format of {formats}"
        return f"{name}: {key}: expected {expected}, got {value!r}"
    if "format" not in value:
        return f"{name}: key '{key}.format' is missing; expected one of {formats}"
    return f"{name}: {key}.format: expected one of {formats}, got {value['format']!r}"


def _is_union_branch(part: str | int) -> bool:
    return part in (*SECTION_BRANCHES, "str", "list[str]", "list[union[str,CategoryParams]]")


def _is_other_branch(location: Location, value: Any) -> bool:
    """Whether a union judged a value as what it is not; another branch has the message."""
    branch = location[-1] if location else ""
    if branch == "str":
        return isinstance(value, list | dict)
    return branch in SECTION_BRANCHES and not isinstance(value, list | dict)


def _suggestion(model: Any, location: Location) -> str:
    """Name the closest known key of the section that holds the unknown one."""
    section, path = model, location[:-1]
    if CATEGORY_BRANCH in path:
        section, path = CategoryParams, path[path.index(CATEGORY_BRANCH) + 1 :]
    for part in path:
        if _is_union_branch(part):
            continue
        if section in UNIONS:
            section = DATA_FORMATS[str(part)]
        elif get_origin(section) in (dict, list):
            section = get_args(section)[-1]
        else:
            section = section.model_fields[part].annotation
            if (
                isinstance(section, UnionType) and section not in UNIONS
            ):  # a section, or null or a text
                section, _ = get_args(section)
            elif get_origin(section) is SerializeAsAny:
                (section,) = get_args(section)
    known = sorted(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}"
