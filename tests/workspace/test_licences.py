"""`pipeline licences`: what a run is made of, and what stops a commercial one."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import PipelineError
from pipeline.models.weights.zoo import manifest
from pipeline.params.reading import parse_params
from pipeline.presets import list_presets, preset_text
from pipeline.workspace.licences import FONTS, Component, components
from tests.paths import ROOT

WORLDS = Path("data")
OWN = {"categories": ["cat"], "index": {"photos": {"root": "photos"}}}


def parts(params: dict[str, Any] | None) -> dict[str, Component]:
    """What a run with these params uses, packages aside."""
    found = components(params and parse_params(params), worlds=WORLDS)
    return {part.name: part for part in found if part.used and part.kind != "code"}


def encoder(model: str, pretrained: Any) -> dict[str, Any]:
    return {"encoder": {"model": model, "pretrained": pretrained}}


def everywhere(model: str, pretrained: Any) -> dict[str, Any]:
    sections = dict.fromkeys(("embed", "pseudo_label", "train"), encoder(model, pretrained))
    return {**OWN, **sections, "mask": {"source": "spectral", **encoder(model, pretrained)}}


def refused(folder: Path, params: dict[str, Any] | str, *options: str) -> str:
    """What `pipeline licences --commercial` ends with."""
    path = folder / "params.yaml"
    path.write_text(params if isinstance(params, str) else json.dumps(params))
    command = ["--params", str(path), "licences", "--commercial", *options]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == (done.exception is not None)
    assert done.exception is None or isinstance(done.exception, PipelineError)
    return str(done.exception or "")


def test_the_demo_is_free_to_sell(tmp_path: Path) -> None:
    assert not refused(tmp_path, preset_text("demo"))


def test_own_photos_are_for_their_owner_to_clear(tmp_path: Path) -> None:
    text = preset_text("folder")
    assert "index.photos: unknown (you know whose it is)" in refused(tmp_path, text)
    assert not refused(tmp_path, text, "--accept", "index.photos")
    assert "'photos' is no part of this run" in refused(tmp_path, text, "--accept", "photos")


@pytest.mark.parametrize(
    ("model", "pretrained", "name", "licence", "commercial"),
    [
        ("ViT-B-16-quickgelu", "openai", "clip_vit_b_16", "MIT", "yes"),
        ("ViT-B-16", "dfn2b", "dfn2b_vit_b_16", "LicenseRef-apple-amlr", "no"),
        ("open_clip:MobileCLIP2-S0/dfndr2b", "", "mobileclip2_s0", "LicenseRef-apple-amlr", "no"),
        ("MobileCLIP2-S0", {"tag": "dfndr2b", "file": "x.pt"}, "mobileclip2_s0", None, "no"),
        ("ViT-B-16", "laion2b_s34b_b88k", "ViT-B-16/laion2b_s34b_b88k", "unknown", "unknown"),
        ("ViT-B-16", "mine.safetensors", "ViT-B-16/mine.safetensors", "unknown", "unknown"),
        ("ViT-B-16", "clip_vit_b_16", "clip_vit_b_16", "MIT", "yes"),
        ("photo_clip", "photo_clip", "photo_clip", "Apache-2.0", "yes"),
    ],
)
def test_an_encoder_is_found_however_it_is_written(
    model: str, pretrained: Any, name: str, licence: str | None, commercial: str
) -> None:
    found = parts(everywhere(model, pretrained))
    assert [part for part in found if part != "index.photos"] == [name]
    assert found[name].commercial == commercial
    assert licence is None or found[name].licence == licence


def test_weights_of_masks_and_backbones_count() -> None:
    params = {**everywhere("photo_clip", "photo_clip"), "mask": {"source": "selfmask"}}
    plus = {"student": "denseclip_plus", **encoder("photo_clip", "photo_clip")}
    assert {*parts({**params, "train": plus})} == {
        *("photo_clip", "selfmask_nq20", "resnet101_v1c", "index.photos")
    }
    onnx = {"source": "onnx", "weights": "saliency.onnx"}
    assert parts({**params, "mask": onnx})["saliency.onnx"].licence == "unknown"
    dino = {"source": "cut", **encoder("dino_vits8", "")}
    assert parts({**params, "mask": dino})["dino_vits8"].licence == "Apache-2.0"


def test_benchmarks_for_research_stop_it_with_the_reason(tmp_path: Path) -> None:
    cub = {"format": "cub", "root": "data/raw/CUB_200_2011"}
    params = {**everywhere("photo_clip", "photo_clip"), "benches": {"birds": cub}}
    message = refused(tmp_path, params, "--accept", "index.photos")
    assert "1 of" in message
    assert "benches.birds: forbidden by LicenseRef-research-only (CUB-200-2011: non-com" in message


def test_what_is_drawn_is_ours_and_what_only_looks_so_is_not() -> None:
    bench = {"format": "voc", "root": "data/demo/voc"}
    drawn = {**OWN, "worlds": {"demo": {}}, "benches": {"voc": bench}}
    assert parts(drawn)["benches.voc"].commercial == "yes"
    assert parts({**drawn, "worlds": {"other": {}}})["benches.voc"].commercial == "unknown"
    assert {*FONTS} <= {*parts(drawn)}
    assert not {*FONTS} & {*parts(OWN)}


@pytest.mark.parametrize("preset", [name for name, _ in list_presets()])
def test_every_preset_can_be_judged(tmp_path: Path, preset: str) -> None:
    assert bool(refused(tmp_path, preset_text(preset))) == (preset != "demo")


def test_without_params_all_published_weights_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["licences", "--json"], catch_exceptions=False)
    listed = json.loads(done.stdout)
    assert {*manifest()} <= {part["name"] for part in listed if part["kind"] == "weights"}
    assert all(part["used"] for part in listed)
    assert {part["name"] for part in listed if part["commercial"] == "no"} == {
        name for name, entry in manifest().items() if "apple" in entry.licence
    }
    error = CliRunner().invoke(app, ["licences", "--commercial"]).exception
    assert "mobileclip2_s0: forbidden by LicenseRef-apple-amlr (Apple: research only)" in str(error)


def test_weights_and_data_come_first_and_plain_packages_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    name = "a_source_of_photos_whose_name_is_longer_than_any_column"
    photos = {name: {"root": "photos"}}
    path.write_text(json.dumps({**everywhere("photo_clip", "photo_clip"), "index": photos}))
    shown = CliRunner().invoke(app, ["--params", str(path), "licences"]).stdout
    titles = re.findall(r"^(\w+).* \(\d+\)$", shown, flags=re.MULTILINE)
    assert titles == ["Weights", "Data", "Code"]
    data = shown[shown.index("Data of this run") :].splitlines()
    assert data[1].index("licence") == data[2].index("unknown") > len(name)
    assert "more allow commercial use: --packages lists them" in shown
    assert "\nnumpy " not in shown
    every = CliRunner().invoke(app, ["--params", str(path), "licences", "--packages"]).stdout
    assert "\nnumpy " in every


def test_terms_of_a_vendors_own_are_no_plain_yes() -> None:
    page = (ROOT / "docs/licences.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| (LicenseRef-[^|]+) \| ([^|]+) \|", page, flags=re.MULTILINE)
    assert {verdict for licence, verdict in rows if "NVIDIA" in licence} == {"own terms"}


def test_params_that_are_named_must_be_there(tmp_path: Path) -> None:
    command = ["--params", str(tmp_path / "other.yaml"), "licences"]
    assert "no such file" in str(CliRunner().invoke(app, command).exception)


def test_the_page_has_the_weights_the_fonts_and_the_packages_that_we_name() -> None:
    page = (ROOT / "docs/licences.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|", page, flags=re.MULTILINE))
    assert {name: rows.get(name) for name in manifest()} == {
        name: entry.licence for name, entry in manifest().items()
    }
    assert {name: rows.get(name) for name in FONTS} == {
        name: licence for name, (licence, _) in FONTS.items()
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    assert named <= {*rows}
