"""The table of names: ImageNet's own, and everyday names for groups of its classes."""

from __future__ import annotations

import re
from pathlib import Path

import open_clip
from ruamel.yaml import YAML
from timm.data import ImageNetInfo

from pipeline.errors import PipelineError
from pipeline.models.clip.names import normalise_name

GROUPS_PATH = Path(__file__).with_name("groups.yaml")
NUM_CLASSES = 1000
LATIN = re.compile(r"[A-Z][a-z]+( [a-z]+){1,2}")
LATIN_ENDING = re.compile(r"(us|a|is|um|i|ns|es|or|ax|yx|ar|os|on|er|as|ops|e|ni|ulo)")
PARENTHESES = re.compile(r" \(.*\)")


def name_table() -> dict[str, list[int]]:
    """Every known name, normalised, to the classes it stands for, sorted by name."""
    groups, left_out = read_groups()
    own: dict[str, list[int]] = {}
    for index, names in enumerate(imagenet_names()):
        for name in names - left_out:
            own.setdefault(name, []).append(index)
    return dict(sorted({**own, **groups}.items()))


def read_groups(path: Path = GROUPS_PATH) -> tuple[dict[str, list[int]], set[str]]:
    """The everyday names with their classes, and words of ImageNet that are left out.

    Raises:
        PipelineError: a name is there twice, or its classes are not numbers from 0 to 999.
    """
    content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    groups: dict[str, list[int]] = {}
    for key, classes in content["names"].items():
        for name in map(normalise_name, key.split(" / ")):
            if name in groups:
                raise PipelineError(f"{path}: {name!r} is there twice; remove one")
            groups[name] = parse_classes(str(classes), f"{path}: {name}")
    return groups, {normalise_name(name) for name in content["left_out"]}


def parse_classes(text: str, source: str) -> list[int]:
    """`281-285, 383` -> [281, 282, 283, 284, 285, 383], sorted and without repeats.

    Raises:
        PipelineError: it is no such list, or a number is none of ImageNet's classes.
    """
    classes: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < NUM_CLASSES:
            raise PipelineError(f"{source}: {part!r} is no class or range of classes (0 to 999)")
        classes |= set(range(first, last + 1))
    return sorted(classes)


def imagenet_names() -> list[set[str]]:
    """Normalised names of each class: CLIP's list, and WordNet's lemmas without the Latin ones."""
    info = ImageNetInfo()
    names = []
    for index, curated in enumerate(open_clip.IMAGENET_CLASSNAMES):
        first, *others = info.index_to_description(index).split(", ")
        lemmas = [first, *(other for other in others if not _is_latin(other))]
        parts = [part for name in (curated, *lemmas) for part in _alternatives(name)]
        names.append({normalise_name(part) for part in parts})
    return names


def _alternatives(name: str) -> list[str]:
    """`sunglasses / shades (dark)` -> both names, without the remark."""
    return re.split(r" / | or ", PARENTHESES.sub("", name))


def _is_latin(name: str) -> bool:
    """Whether a lemma looks like a species' name: `Canis lupus`."""
    return bool(LATIN.fullmatch(name) and LATIN_ENDING.search(name[-3:]))
