"""A new workspace: its DAG is the repository's, its files are what stages expect."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML
from typer.testing import CliRunner

from pipeline import __version__
from pipeline.cli import app
from pipeline.errors import PipelineError
from pipeline.presets import preset_text
from pipeline.workspace.making import (
    VERSION_FILE,
    make_workspace,
    shipped_files,
    start_dvc,
    upgrade_workspace,
)
from tests.paths import ROOT

# DVC's own use of a library's older interface.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")
GIT = shutil.which("git") is None
DEMO_MODELS = "models/demo"


@dataclass(frozen=True)
class Stage:
    """A stage as DVC reads it.

    Attributes:
        cmd: its command.
        params: keys of params.yaml.
        outs: outputs, metrics among them.
        deps: files and folders that it reads, without those of the code.
        code: what stands for the code.
    """

    cmd: str
    params: list[str]
    outs: list[str]
    deps: set[str]
    code: set[str]


def read_stages(folder: Path) -> dict[str, Stage]:
    """The DAG of a folder by stage."""
    with Repo.init(str(folder), no_scm=True, force=True) as repo:
        return {stage.name: _stage(stage) for stage in repo.index.stages}


def _stage(stage: Any) -> Stage:
    paths = {dep.def_path for dep in stage.deps if dep.def_path != "params.yaml"}
    code = {path for path in paths if path == VERSION_FILE or path.startswith("pipeline/")}
    return Stage(
        cmd=stage.cmd,
        params=[key for dep in stage.params for key in dep.params],
        outs=[out.def_path for out in stage.outs],
        deps=paths - code,
        code=code,
    )


def repository(folder: Path, preset: str) -> Path:
    """A folder with the repository's DAG and a preset."""
    (folder / "pipeline").mkdir(parents=True)
    shutil.copy(ROOT / "dvc.yaml", folder)
    shutil.copy(ROOT / "pipeline/paths.yaml", folder / "pipeline")
    (folder / "params.yaml").write_text(preset_text(preset))
    return folder


def entries(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("preset", ["demo", "folder", "zutis-imagenet-s", "denseclip-plus-voc"])
def test_its_stages_are_those_of_the_repository_but_for_the_code(
    tmp_path: Path, preset: str
) -> None:
    make_workspace(tmp_path / "new", preset=preset)
    made, expected = (
        read_stages(folder)
        for folder in (tmp_path / "new", repository(tmp_path / "repository", preset))
    )
    assert list(made) == list(expected)
    dropped = set() if preset == "demo" else {DEMO_MODELS}
    for name, stage in made.items():
        assert stage.code == {VERSION_FILE}, name
        assert stage.cmd == expected[name].cmd
        assert stage.cmd.startswith("pipeline ")
        assert stage.params == expected[name].params, name
        assert stage.outs == expected[name].outs, name
        assert stage.deps == expected[name].deps - dropped, name


@pytest.mark.parametrize("preset", ["demo", "folder"])
def test_what_no_stage_writes_is_there_before_the_first_run(tmp_path: Path, preset: str) -> None:
    make_workspace(tmp_path, preset=preset)
    stages = read_stages(tmp_path).values()
    outs = [Path(out) for stage in stages for out in stage.outs]
    params = YAML(typ="safe", pure=True).load(preset_text(preset))
    own = {entry["root"] for entry in params["index"].values()}
    for dep in {dep for stage in stages for dep in stage.deps} - own:
        is_made = any(out.is_relative_to(dep) or Path(dep).is_relative_to(out) for out in outs)
        assert is_made or (tmp_path / dep).exists(), dep
    git_keeps = subprocess.run(
        ["git", "init", "-q", "."], cwd=tmp_path, check=False, capture_output=True
    )
    if git_keeps.returncode == 0:
        command = ["git", "ls-files", "--others", "--exclude-standard"]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        kept = {line for line in done.stdout.splitlines() if not line.startswith(".dvc/")}
        assert kept == {
            path for path in entries(tmp_path) if not path.startswith((".dvc/", ".git/"))
        }


def test_the_demos_networks_come_with_the_demo_alone(tmp_path: Path) -> None:
    make_workspace(tmp_path / "demo", preset="demo")
    make_workspace(tmp_path / "own", preset="folder")
    weights = f"{DEMO_MODELS}/tiny_clip.safetensors"
    assert (tmp_path / "demo" / weights).read_bytes() == (ROOT / weights).read_bytes()
    assert not (tmp_path / "own" / DEMO_MODELS).exists()


def test_own_photos_are_found_from_within_the_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my photos").mkdir()
    monkeypatch.chdir(tmp_path)
    make_workspace(
        Path("new"), preset="folder", images=Path("my photos"), categories=["cat", "red car"]
    )
    params = YAML(typ="safe", pure=True).load((tmp_path / "new/params.yaml").read_text())
    assert params["index"]["photos"]["root"] == str(tmp_path / "my photos")
    assert params["categories"] == ["cat", "red car"]


def test_nothing_is_overwritten_without_force_and_data_never(tmp_path: Path) -> None:
    make_workspace(tmp_path, preset="folder")
    (tmp_path / "params.yaml").write_text("mine")
    (tmp_path / "data/raw/README.md").write_text("mine")
    with pytest.raises(PipelineError, match=r"has params\.yaml, .* more already; --force overw"):
        make_workspace(tmp_path, preset="demo")
    assert (tmp_path / "params.yaml").read_text() == "mine"
    make_workspace(tmp_path, preset="demo", force=True)
    assert (tmp_path / "params.yaml").read_text() == preset_text("demo")
    assert (tmp_path / "data/raw/README.md").read_text() == "mine"


def test_an_upgrade_renews_dag_and_version_alone(tmp_path: Path) -> None:
    make_workspace(tmp_path, preset="demo")
    before = {path: (tmp_path / path).read_bytes() for path in entries(tmp_path)}
    (tmp_path / VERSION_FILE).write_text("0.0.1\n")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "params.yaml").write_text("mine")
    (tmp_path / "models/rounds/.gitkeep").unlink()
    upgrade_workspace(tmp_path)
    after = {path: (tmp_path / path).read_bytes() for path in entries(tmp_path)}
    assert after.pop("params.yaml") == b"mine"
    del before["params.yaml"]
    assert after == before


def test_an_upgrade_of_what_is_no_workspace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=f"has no {VERSION_FILE}, so `pipeline new` did not"):
        upgrade_workspace(tmp_path)
    assert not entries(tmp_path)


def test_dvc_runs_no_stage_of_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_workspace(tmp_path, preset="demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "any")
    command = ["licences"]
    assert CliRunner().invoke(app, command).exit_code == 0
    Path(VERSION_FILE).write_text("0.0.1\n")
    error = CliRunner().invoke(app, command).exception
    assert isinstance(error, PipelineError)
    assert f"of version 0.0.1, installed is {__version__}: run `pipeline new . --up" in str(error)
    monkeypatch.delenv("DVC_STAGE")
    assert CliRunner().invoke(app, command).exit_code == 0


# -- git and DVC -----------------------------------------------------------------------------------


def git(folder: Path, *args: str) -> str:
    command = ["git", *args]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a folder with a file; git knows no user."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    for name in [name for name in os.environ if name.startswith(("GIT_AUTHOR", "GIT_COMMITTER"))]:
        monkeypatch.delenv(name)

    def make(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "params.yaml").write_text("k: 1\n")
        return folder

    return make


@pytest.mark.skipif(GIT, reason="needs git")
def test_git_has_a_first_commit_of_everything(nobody: Callable[[str], Path]) -> None:
    folder = nobody("new")
    notes = start_dvc(folder)
    assert notes == ["DVC initialised, its analytics off", "git initialised, with a first commit"]
    assert "params.yaml" in git(folder, "ls-files")
    assert not git(folder, "status", "--porcelain")
    with Repo(str(folder)) as repo:
        assert repo.config["core"]["analytics"] is False
    assert start_dvc(folder) == ["git: this folder is in a repository; nothing is committed"]


@pytest.mark.skipif(GIT, reason="needs git")
def test_a_repository_around_it_is_used_and_left_alone(nobody: Callable[[str], Path]) -> None:
    folder = nobody("outer/new")
    git(folder.parent, "init", "-q")
    start_dvc(folder)
    assert not (folder / ".git").exists()
    with Repo(str(folder)) as repo:
        assert Path(repo.root_dir) == folder
        assert Path(repo.scm.root_dir) == folder.parent


def test_without_git_dvc_does_without(
    nobody: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = nobody("new")
    monkeypatch.setenv("PATH", str(folder))
    assert "no git here" in start_dvc(folder)[-1]
    assert not (folder / ".git").exists()
    with Repo(str(folder)) as repo:
        assert repo.config["core"]["no_scm"] is True


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--demo", "--preset", "folder"], "--demo is `--preset demo`, not folder"),
        (["--upgrade", "--demo"], "--upgrade keeps the params; give it alone"),
        (["--preset", "foldr"], "'foldr' is unknown; did you mean 'folder'"),
        (["--demo", "--categories", "cat"], "--images and --categories belong to the presets"),
        (["--images", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_mistakes_leave_no_folder(tmp_path: Path, options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["new", str(tmp_path / "new"), *options])
    assert isinstance(done.exception, PipelineError)
    assert message in str(done.exception)
    assert not (tmp_path / "new").exists()


def test_the_default_is_the_preset_of_own_photos(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["new", str(tmp_path), "--no-init"], catch_exceptions=False)
    assert done.exit_code == 0
    assert (tmp_path / "params.yaml").read_text() == preset_text("folder")
    assert "git init && dvc init" in done.output
    assert done.output.index("pipeline doctor") < done.output.index("dvc repro")
    assert not (tmp_path / ".git").exists()


def test_every_shipped_file_is_tracked_by_git() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository's history")
    tracked = set(git(ROOT, "ls-files").splitlines())
    assert {*shipped_files()} <= tracked
    assert {"dvc.yaml", ".gitignore", "reports/published.yaml"} <= {*shipped_files()}
