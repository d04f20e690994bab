"""Licences of the code, weights, fonts and data that a run is made of, and what forbids selling it.

Packages are asked for what they declare; for the rest this file and the manifest of the published
weights say what their authors do. Where nothing is known it says so. No legal advice.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel

from pipeline.errors import PipelineError
from pipeline.models.weights.zoo import PublishedWeights, manifest, published_clip
from pipeline.params.base import EncoderParams
from pipeline.params.sections import Params
from pipeline.workspace.terms import (
    NVIDIA,
    RESEARCH_ONLY,
    UNKNOWN,
    Verdict,
    commercial_use,
    is_copyleft,
    package_licence,
)

Kind = Literal["code", "weights", "font", "data"]
PACKAGE = "zutis-pipeline"
OWN = "MIT"
DEMO_FOLDER = "models/demo"
OF_DEVELOPERS = {"dev", "docs"}  # extras
WEIGHTS_KEYS = ("weights", "backbone_weights")

FONTS = {
    "Font Awesome 6 Free": ("OFL-1.1", "qtawesome"),
    "Material Design Icons 6": ("Apache-2.0", "qtawesome"),
    "Phosphor": ("MIT", "qtawesome"),
    "Remix Icon 2": ("Apache-2.0", "qtawesome"),
    "Noto Emoji": ("OFL-1.1", "manimgx-fonts"),
}
IMAGENET = "learned from ImageNet, whose images are for non-commercial research"
OF_WEIGHTS = {  # by kind
    "clip": "its model card calls any deployed use out of scope",
    "zutis": IMAGENET,
    "dino": IMAGENET,
    "photo_clip": IMAGENET,
    "backbone": IMAGENET,
}
YOURS = "you know whose it is"
OF_FORMATS = {  # licence and note of what a benchmark's layout is that of
    "imagenet_s": (RESEARCH_ONLY, "ImageNet's images: non-commercial research"),
    "cub": (RESEARCH_ONLY, "CUB-200-2011: non-commercial research"),
    "coca": (UNKNOWN, "CoCA names no licence"),
    "coco": (UNKNOWN, "COCO itself: annotations CC BY 4.0, images under Flickr's terms"),
    "voc": (UNKNOWN, "VOC itself: images under Flickr's terms"),
    "index_png": (UNKNOWN, YOURS),
}
OF_LICENCES = {
    NVIDIA: "NVIDIA's own terms, which limit what is passed on",
    "LicenseRef-apple-amlr": "Apple: research only",
}


@dataclass(frozen=True)
class Component:
    """One part of a run.

    Attributes:
        kind: code, weights, font or data.
        name: of the package, the published weights, the font, or the key of the params.
        licence: SPDX expression, `LicenseRef-NAME` where it has none, or `unknown`.
        source: version, page or folder.
        used: whether this run is made with it.
        note: what else to know; may be empty.
    """

    kind: Kind
    name: str
    licence: str
    source: str
    used: bool = True
    note: str = ""

    @property
    def commercial(self) -> Verdict:
        """Whether its licence allows commercial use."""
        return commercial_use(self.licence)

    def as_json(self) -> dict[str, Any]:
        """All of it, for `json.dumps`."""
        return {**asdict(self), "commercial": self.commercial}


def components(params: Params | None, *, worlds: Path) -> list[Component]:
    """All parts: code, weights, fonts, data.

    Args:
        params: of the run; None: every published weight counts as used, and there are no data.
        worlds: folder of the drawn worlds.

    Raises:
        PipelineError: as `packages`.
    """
    drawn = [worlds / name for name in params.worlds] if params else []
    weights, data = _of_params(params, drawn) if params else ([], [])
    found = [*packages(), *_zoo(weights, all_used=params is None), *weights]
    found += [_font(name, used=params is None or bool(drawn)) for name in FONTS]
    return [_noted(component) for component in _once([*found, *data])]


def packages() -> Iterator[Component]:
    """This package, what it needs, and what of its extras is installed, by name.

    Raises:
        PipelineError: this package is not installed.
    """
    try:
        offered = importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        raise PipelineError(f"{PACKAGE} is not installed, so nothing says what it needs") from None
    extras = ",".join(sorted({*offered} - OF_DEVELOPERS))
    for name, distribution in sorted(_installed(f"{PACKAGE}[{extras}]").items()):
        licence = package_licence(name, distribution.metadata)  # type: ignore[arg-type]
        yield Component("code", name, licence, distribution.version)


def refuse_commercial(found: Iterable[Component], accepted: Sequence[str] = ()) -> None:
    """Stop if a part that is used forbids commercial use, or does not say.

    Args:
        found: parts of the run.
        accepted: names whose terms the user knows.

    Raises:
        PipelineError: with all of them and why, or a name that is none.
    """
    used = {component.name: component for component in found if component.used}
    if strangers := [name for name in accepted if name not in used]:
        raise PipelineError(f"--accept: {strangers[0]!r} is no part of this run")
    open_ones = [
        component
        for name, component in used.items()
        if name not in accepted and component.commercial != "yes"
    ]
    if open_ones:
        reasons = "; ".join(_reason(component) for component in open_ones)
        raise PipelineError(
            f"not cleared for commercial use, {len(open_ones)} of {len(used)}: {reasons}. "
            "`--accept NAME` for what you hold the rights of"
        )


def _reason(component: Component) -> str:
    verb = "forbidden by" if component.commercial == "no" else "unknown:"
    note = f" ({component.note})" if component.note else ""
    return f"{component.name}: {verb} {component.licence}{note}".replace(
        "unknown: unknown", UNKNOWN
    )


@cache
def _installed(root: str) -> dict[str, importlib.metadata.Distribution]:
    """Installed packages that a requirement needs, itself among them, by canonical name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [Requirement(root)]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        extras = {"", *requirement.extras}
        for text in found[name].requires or []:
            needed = Requirement(text)
            marker = needed.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return found


def _zoo(used: Sequence[Component], *, all_used: bool) -> Iterator[Component]:
    """Published weights, and the demo's."""
    names = {component.name for component in used}
    for entry in manifest().values():
        yield _published(entry, used=all_used or entry.name in names)
    yield _demo_networks(used=all_used or DEMO_FOLDER in names)


def _published(entry: PublishedWeights, *, used: bool) -> Component:
    note = OF_WEIGHTS.get(entry.kind, "")
    return Component("weights", entry.name, entry.licence, entry.page, used, note)


def _demo_networks(*, used: bool) -> Component:
    note = "trained on drawings of this project"
    return Component("weights", DEMO_FOLDER, OWN, "shipped", used, note)


def _font(name: str, *, used: bool) -> Component:
    licence, package = FONTS[name]
    return Component("font", name, licence, package, used, "drawn in the demo's world")


def _of_params(params: Params, drawn: Sequence[Path]) -> tuple[list[Component], list[Component]]:
    """Weights and data that params name."""
    weights, data = [], []
    for place, section in _sections(params, ()):
        if isinstance(section, EncoderParams):
            weights.append(_encoder(section))
        for key in WEIGHTS_KEYS:
            if value := getattr(section, key, None):
                weights.append(_weights(str(value)))
        if hasattr(section, "root"):
            data.append(_data(".".join(place), section, drawn))
    return weights, data


def _sections(value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], BaseModel]]:
    """All sections below a value with their keys, itself first."""
    if isinstance(value, BaseModel):
        yield place, value
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _sections(item, (*place, str(key)))
    elif isinstance(value, list):
        for item in value:
            yield from _sections(item, place)


def _encoder(encoder: EncoderParams) -> Component:
    model, tag = encoder.published_as()
    if entry := published_clip(model, tag):
        return _published(entry, used=True)
    return _weights(tag or model, fallback=encoder.tag)


def _weights(value: str, *, fallback: str | None = None) -> Component:
    """Published weights by name, the demo's, or a file or name of which nothing is known."""
    if entry := manifest().get(value):
        return _published(entry, used=True)
    if Path(value).is_relative_to(DEMO_FOLDER):
        return _demo_networks(used=True)
    note = "a file of yours" if Path(value).suffix else "look at its model card"
    return Component("weights", fallback or value, UNKNOWN, value, note=note)


def _data(name: str, section: Any, drawn: Sequence[Path]) -> Component:
    root = str(section.root)
    if any(Path(root).is_relative_to(folder) for folder in drawn):
        return Component("data", name, OWN, root, note="drawn by this project")
    licence, note = OF_FORMATS.get(getattr(section, "format", ""), (UNKNOWN, YOURS))
    return Component("data", name, licence, root, note=note)


def _noted(component: Component) -> Component:
    note = OF_LICENCES.get(component.licence) or component.note
    if not note and is_copyleft(component.licence):
        note = "copyleft: what you pass on of it stays under its terms"
    return replace(component, note=note)


def _once(found: Iterable[Component]) -> list[Component]:
    return list({(item.kind, item.name): item for item in found}.values())
