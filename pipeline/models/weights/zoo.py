"""Published weights by name: the manifest `zoo.yaml`, and where their copies are in the cache.

`acquire` makes the copies: safetensors, and beside each a card (JSON) with the
hashes of the published file and of the copy. Everything here works without a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.errors import PipelineError, did_you_mean
from pipeline.files import file_sha256, read_json

MANIFEST = Path(__file__).with_name("zoo.yaml")
FOLDER = "weights"  # inside the cache folder
QUICK_GELU_SUFFIX = "-quickgelu"
CLIP_KINDS = ("clip", "open_clip")


@dataclass(frozen=True)
class PublishedWeights:
    """One entry of the manifest.

    Attributes:
        name: what users call it.
        kind: clip (OpenAI's), open_clip, selfmask, zutis, dino, photo_clip or backbone: which
            network reads it.
        url: where its authors put it; for photo_clip the page of the package that has the file.
        sha256: of that file; None where none is published: recorded at the first fetch.
        size: of that file in bytes; None where unknown.
        approximate_mb: the authors' own rounded figure; None where there is none.
        hub_mb: of OpenAI's CLIPs, MB of the hub's copy, in single precision, which open_clip
            downloads by itself; None for the others, whose file is the same everywhere.
        licence: SPDX identifier, or `LicenseRef-NAME` where it has none.
        page: web page that documents it.
        architecture: settings of the network, as its kind understands them.
        categories: name of the category set it was trained with, or None.
        training: published facts about its training.
    """

    name: str
    kind: str
    url: str
    sha256: str | None
    size: int | None
    licence: str
    page: str
    architecture: Mapping[str, Any]
    approximate_mb: float | None = None
    hub_mb: float | None = None
    categories: str | None = None
    training: Mapping[str, Any] | None = None

    def describe_architecture(self) -> str:
        """The architecture in a few words."""
        if "model" in self.architecture:
            return str(self.architecture["model"])
        if "encoder" in self.architecture:
            return f"ZUTIS on {self.architecture['encoder']['model']}"
        return f"SelfMask, {self.architecture['num_queries']} queries"

    def describe_size(self) -> str:
        """The size of the published file in MB, or `unknown`."""
        if self.size is not None:
            return f"{self.size / 1e6:.1f} MB"
        return "unknown" if self.approximate_mb is None else f"~{self.approximate_mb} MB"

    def describe_hub_size(self) -> str:
        """The size of what open_clip downloads when a CLIP is first used, or `unknown`."""
        return self.describe_size() if self.hub_mb is None else f"~{self.hub_mb} MB"


@cache
def manifest(path: Path = MANIFEST) -> dict[str, PublishedWeights]:
    """All published weights by name, in the order of the file."""
    content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    return {name: PublishedWeights(name=name, **fields) for name, fields in content.items()}


def published(name: str) -> PublishedWeights:
    """Look a name up.

    Raises:
        PipelineError: there is no such name; the message lists those there are.
    """
    entries = manifest()
    if name not in entries:
        message = f"{name!r} is not among the published weights: {', '.join(entries)}"
        raise PipelineError(f"{message}; {did_you_mean(name, list(entries))}".rstrip("; "))
    return entries[name]


def card_path(entry: PublishedWeights, cache_dir: Path) -> Path:
    """The JSON beside the copy; written last, so without it there is no copy."""
    return Path(cache_dir) / FOLDER / f"{entry.name}.json"


def cached_path(entry: PublishedWeights, cache_dir: Path) -> Path:
    """Where the copy is, or would be: a checkpoint folder for ZUTIS, else a safetensors file."""
    suffix = "" if entry.kind == "zutis" else ".safetensors"
    return Path(cache_dir) / FOLDER / f"{entry.name}{suffix}"


def is_cached(entry: PublishedWeights, cache_dir: Path) -> bool:
    """Whether there is a copy; says nothing about its bytes."""
    return card_path(entry, cache_dir).is_file() and cached_path(entry, cache_dir).exists()


def resolve_weights(value: Path | str, cache_dir: Path) -> Path:
    """The path that a user's `value` stands for: an existing path, a published name, else itself.

    Args:
        value: path, or name of the manifest.
        cache_dir: cache folder with the copies.

    Raises:
        PipelineError: a published name without a copy; the message says how to get one.
    """
    entry = manifest().get(str(value))
    if entry is None or Path(value).exists():
        return Path(value)
    if not is_cached(entry, cache_dir):
        raise PipelineError(
            f"{entry.name}: these weights are not in the cache; run `pipeline weights fetch "
            f"{entry.name}`, or `pipeline weights add {entry.name} FILE` with a file downloaded "
            f"from {entry.page}"
        )
    return cached_path(entry, cache_dir)


def published_clip(model: str, tag: str) -> PublishedWeights | None:
    """The published CLIP that open_clip calls `model` and `tag`, with or without `-quickgelu`."""
    wanted = (model.removesuffix(QUICK_GELU_SUFFIX), tag)
    for entry in manifest().values():
        if entry.kind in CLIP_KINDS:
            known = entry.architecture["model"].removesuffix(QUICK_GELU_SUFFIX)
            if (known, entry.architecture["tag"]) == wanted:
                return entry
    return None


def cached_clip(model: str, tag: str, cache_dir: Path) -> Path | None:
    """The copy of `published_clip`, if there is one."""
    entry = published_clip(model, tag)
    if entry is None or not is_cached(entry, cache_dir):
        return None
    return cached_path(entry, cache_dir)


def copied_entry(path: Path, cache_dir: Path) -> PublishedWeights | None:
    """The entry whose copy `path` is, if it is one."""
    for entry in manifest().values():
        if cached_path(entry, cache_dir).resolve() == path.resolve():
            return entry
    return None


def damage(entry: PublishedWeights, cache_dir: Path) -> str | None:
    """What is wrong with the bytes of a copy, or None; reads all of them."""
    try:
        card = read_json(card_path(entry, cache_dir))
        files = dict(card["files"])
    except (PipelineError, KeyError, TypeError, ValueError):
        return f"{card_path(entry, cache_dir)} cannot be read"
    for name, sha256 in files.items():
        path = Path(cache_dir) / FOLDER / name
        if not path.is_file():
            return f"{path} is missing"
        found = file_sha256(path)
        if found != sha256:
            return f"{path} has SHA-256 {found}, recorded was {sha256}"
    return None
