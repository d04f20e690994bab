"""What a params file asks for: data, weights, extras, and the hubs that have what is missing."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from pipeline.doctor.finding import Finding
from pipeline.doctor.machine import EXTRAS, installed, is_installed
from pipeline.doctor.needs import URL, Missing, encoders, missing
from pipeline.doctor.network import Network, hub
from pipeline.errors import PipelineError, install_command, listing
from pipeline.models.clip.hub import has_foreign_tokenizer
from pipeline.models.weights.zoo import PublishedWeights
from pipeline.params.base import EncoderParams
from pipeline.params.sections import Params
from pipeline.vocabulary.categories import join_names

PHOTO_CLIP = "photo_clip"  # kind, name and model; in the extra `photos`
PHOTO_WEIGHTS, ONNXRUNTIME = EXTRAS["photos"]
OFFLINE_PRESET = "folder-offline"
STORES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}  # packages by scheme


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
    network = Network(offline=offline)
    yield from _weights(weights, network, _without_hub(params))
    yield from _network(weights, list(encoders(sections)), network)


def idle_stages(params: Params) -> list[str]:
    """Stages of every DAG that these params leave without work."""
    idle = {"bank": params.bank is None, "compare": not params.plus}
    return [stage for stage, is_idle in idle.items() if is_idle]


def _in_package(item: Missing) -> bool:
    """Whether installed packages have the weights."""
    return item.name == PHOTO_CLIP and installed(PHOTO_WEIGHTS) is not None


def _extras(params: Params, sections: dict[str, Any]) -> Iterator[Finding]:
    for extra, packages in _asked(params, sections).items():
        if absent := [package for package in packages if installed(package) is None]:
            text = f"asked for and not installed: {', '.join(absent)}"
            yield Finding(f"extra {extra}", "fail", text, install_command(extra))
        else:
            yield Finding(f"extra {extra}", "ok", "installed")


def _asked(params: Params, sections: dict[str, Any]) -> dict[str, Collection[str]]:
    """Packages of extras that a run imports, by extra; those without any are left out."""
    schemes = {str(source.root).partition(URL) for source in params.index.values()}
    stores = {scheme for scheme, separator, _ in schemes if separator}
    has_photo_clip = any(encoder.model == PHOTO_CLIP for encoder in encoders(sections))
    photos = [PHOTO_WEIGHTS] * has_photo_clip + [ONNXRUNTIME] * (params.mask.source == "onnx")
    remote = [*EXTRAS["remote"][:2], *(STORES[scheme] for scheme in stores & STORES.keys())]
    corrupted = any(bench.corruption for bench in params.benches.values())
    asked: dict[str, Collection[str]] = {
        "demo": EXTRAS["demo"] if params.worlds else (),
        "photos": photos,
        "corruptions": EXTRAS["corruptions"] if corrupted else (),
        "remote": remote if stores else (),
        "ray": EXTRAS["ray"] if os.environ.get("PIPELINE_EXECUTOR") == "ray" else (),
    }
    return {extra: packages for extra, packages in asked.items() if packages}


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


def _weights(
    absent: Sequence[Missing], network: Network, instead: Sequence[str]
) -> Iterator[Finding]:
    """Weights that are not here; those that a stage downloads fail where the hub does not answer.

    Args:
        absent: the weights.
        network: whom they come from.
        instead: commands that do without a hub.
    """
    for item in absent:
        problem = item.host and network.problem(item.host)
        if item.host is None:
            yield Finding("weights", "fail", f"{item.name}: no such file", "correct the path")
        elif problem:
            text = f"{_sized(item)}: not here, and {item.host} is out of reach ({problem})"
            yield Finding("weights", "fail", text, _by_hand(item, instead))
        elif item.is_fetched:
            text = f"{_sized(item)}: the first stage that needs it downloads it"
            yield Finding("weights", "warn", text, _fetch(item))
        else:
            yield Finding("weights", "fail", f"{_sized(item)}: not in the cache", _fetch(item))
    if not absent:
        yield Finding("weights", "ok", "all that are named are there")


def _sized(item: Missing) -> str:
    if item.entry is None:
        return item.name
    entry = item.entry
    size = entry.describe_hub_size() if item.is_fetched else entry.describe_size()
    return f"{item.name} ({size})"


def _fetch(item: Missing) -> str:
    """What gets weights from a host that may answer."""
    if item.entry is None:
        return "nothing, if there is a network"
    if not item.is_fetched:
        return f"`pipeline weights fetch {item.name}`; without a network: {_add(item.entry)}"
    size = item.entry.describe_size()
    return f"nothing, or now: `pipeline weights fetch {item.name}` ({size})"


def _by_hand(item: Missing, instead: Sequence[str]) -> str:
    """What gets weights without a network."""
    own = (
        _add(item.entry)
        if item.entry
        else "encoder.pretrained: {tag: TAG, file: PATH}, with a file from elsewhere"
    )
    others = f"; or do without: {' && '.join(instead)}" if instead and item.is_fetched else ""
    return f"{own}{others}"


def _add(entry: PublishedWeights) -> str:
    return f"`pipeline weights add {entry.name} FILE`, the file being that of {entry.page}"


def _without_hub(params: Params) -> list[str]:
    """Commands that bring params of own photos to the preset that needs no hub; else none."""
    roots = [source.root for source in params.index.values()]
    if params.worlds or params.benches or params.plus or len(roots) != 1 or URL in str(roots[0]):
        return []
    preset = f"pipeline init --preset {OFFLINE_PRESET} --force --images {quote(str(roots[0]))}"
    names = params.category_names
    listed = names if isinstance(names, str) else join_names(names)
    install = [] if is_installed("photos") else [install_command("photos")]
    return [*install, f"{preset} --categories {quote(listed)}"]


def _network(
    absent: Sequence[Missing], used: Sequence[EncoderParams], network: Network
) -> Iterator[Finding]:
    """Whether the hosts answer whose weights are missing, or whose tokenizers may be.

    A host that does not, and of which weights are missing, is named with these.
    """
    of_weights = {item.host for item in absent if item.host}
    hosts = of_weights | {hub() for encoder in used if has_foreign_tokenizer(encoder.model)}
    problems = {host: network.problem(host) for host in sorted(hosts)}
    silent = [host for host, problem in problems.items() if problem and host not in of_weights]
    answering = [host for host, problem in problems.items() if problem is None]
    if not hosts:
        yield Finding("network", "ok", "not needed")
    elif answering and not network.is_tried:
        yield Finding("network", "ok", f"not tried; {', '.join(answering)} may be needed")
    elif answering:
        yield Finding("network", "ok", f"{', '.join(answering)}: answers")
    for host in silent:
        text = f"{host}: {problems[host]}; a tokenizer that was not downloaded before is missed"
        yield Finding("network", "warn", text)


def params_finding(path: Path, error: PipelineError | None) -> Finding:
    """Whether the params file can be read."""
    if error is None:
        return Finding("params", "ok", f"{path}: valid")
    if not path.exists():
        fix = "pipeline init --preset folder"
        return Finding("params", "warn", f"{path}: no such file", fix)
    return Finding("params", "fail", str(error).replace("\n", "; "), "correct the file")
