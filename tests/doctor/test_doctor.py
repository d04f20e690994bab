"""What a check-up finds, and what it says to do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.doctor.machine import check_machine
from pipeline.doctor.params import check_params, params_finding
from pipeline.doctor.workspace import check_workspace
from pipeline.errors import PipelineError
from pipeline.params.reading import parse_params


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
    assert (mask.state, mask.fix.split(";")[0]) == ("fail", "pipeline weights fetch selfmask_nq20")
    assert findings["weights clip_vit_b_16"].state == "warn"
    assert findings[f"data {tmp_path}/gone"].state == "fail"
    assert findings[f"data {tmp_path}/worlds/w/i"].state == "ok"


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


def test_a_hub_that_does_not_answer_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        hub = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", hub)
        encoder = {"encoder": {"model": "ViT-B-16-SigLIP", "pretrained": "webli"}}
        sections = {"embed": encoder, "pseudo_label": encoder, "train": encoder}
        findings = found({**sections, "mask": {"source": "cut", **encoder}}, tmp_path)
        assert all(item.state != "fail" for item in findings.values())
        online = check_params(
            parse_params(
                {
                    "categories": ["cat"],
                    "index": {"mine": {"root": str(tmp_path)}},
                    **sections,
                    "mask": {"source": "cut", **encoder},
                }
            ),
            cache_dir=tmp_path,
            worlds_dir=tmp_path,
            offline=False,
        )
        states = {item.text.split(": ")[0]: item.state for item in online}
    assert states[hub] == "warn"


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
