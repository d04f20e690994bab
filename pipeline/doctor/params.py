"""What a params file asks for: data, weights, extras, and the hubs that have what is missing."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pipeline.doctor.finding import Finding
from pipeline.doctor.machine import missing_extra
from pipeline.doctor.needs import SUFFIXES, URL, Missing, encoders, missing
from pipeline.errors import PipelineError, listing
from pipeline.models.weights.zoo import CLIP_KINDS
from pipeline.params.base import EncoderParams
from pipeline.params.sections import Params

PHOTO_CLIP = "photo_clip"  # kind, name and model; in the extra `photos`
HUB = "https://huggingface.co"
PATIENCE_S = 3


def check_params(
    params: Params, *, cache_dir: Path, worlds_dir: Path, offline: bool
) -> Iterator[Finding]:
    """What the params ask for.

    Args:
        params: all of them.
        cache_dir: the cache folder.
        worlds_dir: where drawn worlds are made, a folder each.
        offline: try no network.
    """
    sections = params.model_dump(mode="json")
    yield from _extras(params, sections)
    absent = missing(sections, cache_dir)
    data = [item for item in absent if item.kind == "data"]
    yield from _data(data, [worlds_dir / name for name in params.worlds])
    weights = [item for item in absent if item.kind == "weights" and not _in_package(item)]
    yield from _weights(weights)
    yield from _network(weights, list(encoders(sections)), offline=offline)


def _in_package(item: Missing) -> bool:
    """Whether installed packages have the weights."""
    return item.name == PHOTO_CLIP and missing_extra("photos") is None


def _extras(params: Params, sections: dict[str, Any]) -> Iterator[Finding]:
    roots = [str(source.root) for source in params.index.values()]
    asked = {
        "demo": bool(params.worlds),
        "photos": any(encoder.model == PHOTO_CLIP for encoder in encoders(sections)),
        "onnx": params.mask.source == "onnx",
        "corruptions": any(bench.corruption for bench in params.benches.values()),
        "remote": any(URL in root for root in roots),
        "ray": os.environ.get("PIPELINE_EXECUTOR") == "ray",
    }
    for extra in (name for name, is_asked in asked.items() if is_asked):
        if command := missing_extra(extra):
            yield Finding(f"extra {extra}", "fail", "asked for and not installed", command)
        else:
            yield Finding(f"extra {extra}", "ok", "installed")


def _data(absent: Sequence[Missing], worlds: Sequence[Path]) -> Iterator[Finding]:
    """Folders of images and benchmarks; those of a drawn world are made by a stage."""
    drawn = [item.name for item in absent if _is_below(Path(item.name), worlds)]
    others = [item.name for item in absent if item.name not in drawn]
    if drawn:
        yield Finding("data", "ok", f"{listing(drawn)}: drawn by the stage `world`")
    for name in others:
        fix = "put the data there, or give another root (index, benches, plus, audits)"
        yield Finding("data", "fail", f"{name}: no such folder", fix)
    if not absent:
        yield Finding("data", "ok", "all folders are there")


def _is_below(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _weights(absent: Sequence[Missing]) -> Iterator[Finding]:
    for item in absent:
        if item.entry is None:
            yield Finding("weights", "fail", f"{item.name}: no such file", "correct the path")
        elif item.entry.kind in CLIP_KINDS:
            text = f"{item.name} ({item.entry.describe_size()}): downloaded when first used"
            yield Finding("weights", "warn", text, _fetch(item))
        else:
            text = f"{item.name} ({item.entry.describe_size()}): not in the cache"
            yield Finding("weights", "fail", text, _fetch(item))
    if not absent:
        yield Finding("weights", "ok", "all that are named are there")


def _fetch(item: Missing) -> str:
    return f"pipeline weights fetch {item.name}; without a network: pipeline weights add"


def _network(
    absent: Sequence[Missing], used: Sequence[EncoderParams], *, offline: bool
) -> Iterator[Finding]:
    """Whether the hubs of what is missing, or may be, answer."""
    hosts = {_host(item.entry.url) for item in absent if item.entry is not None}
    hosts |= {_hub() for encoder in used if _is_of_hub(encoder)}
    if not hosts:
        yield Finding("network", "ok", "not needed")
        return
    if offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Finding("network", "ok", f"not tried; {', '.join(sorted(hosts))} may be needed")
        return
    for host in sorted(hosts):
        problem = _problem(host)
        fix = "`pipeline weights add NAME FILE`, or the preset folder-offline"
        if problem is None:
            yield Finding("network", "ok", f"{host} answers")
        else:
            yield Finding("network", "warn", f"{host}: {problem}", fix)


def _is_of_hub(encoder: EncoderParams) -> bool:
    """Whether open_clip looks a model up at the hub: any that has no files here."""
    model, tag = encoder.published_as()
    return not (model == PHOTO_CLIP or Path(model).suffix in SUFFIXES or not tag)


def _hub() -> str:
    return os.environ.get("HF_ENDPOINT", HUB).rstrip("/")


def _host(url: str) -> str:
    parts = urlparse(url)
    return f"{parts.scheme}://{parts.netloc}"


def _problem(host: str) -> str | None:
    """Why a host does not answer, in one try; any answer will do."""
    try:
        request = urllib.request.Request(host, method="HEAD")
        urllib.request.urlopen(request, timeout=PATIENCE_S).close()
    except urllib.error.HTTPError as answer:
        answer.close()
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None


def params_finding(path: Path, error: PipelineError | None) -> Finding:
    """Whether the params file can be read."""
    if error is None:
        return Finding("params", "ok", f"{path}: valid")
    if not path.exists():
        fix = "pipeline init --preset folder"
        return Finding("params", "warn", f"{path}: no such file", fix)
    return Finding("params", "fail", str(error).replace("\n", "; "), "correct the file")
