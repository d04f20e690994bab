"""The package as it is installed: what the wheel holds, and that it works elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pipeline.workspace.making import shipped_files
from pipeline.workspace.pages import pages
from tests.paths import ROOT

pytest.importorskip("build")
pytest.importorskip("setuptools")
WORKSPACE_FILES = "pipeline/workspace/files"
DOCS = "pipeline/workspace/docs"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, so that both are complete."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, env=without_repository())
    (found,) = out.glob("zutis_pipeline-*.whl")
    return found


def without_repository() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_it_holds_all_code_and_data_and_what_a_new_workspace_needs(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "pipeline").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    docs = {f"{DOCS}/{path.name}" for path in pages().values()}
    assert f"{DOCS}/photos.md" in docs
    assert names == package | docs | {f"{WORKSPACE_FILES}/{name}" for name in shipped_files()}


def test_its_description_is_fit_for_the_index(wheel: Path) -> None:
    pytest.importorskip("twine")
    files = [str(path) for path in wheel.parent.iterdir()]
    assert len(files) == 2
    command = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_it_makes_a_workspace_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = (
        "import pipeline, sys; from pipeline.cli import main; print(pipeline.__file__); "
        "sys.argv = ['pipeline', 'new', 'ws', '--demo', '--no-init']; main()"
    )
    env = without_repository() | {"PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(tmp_path / "installed"))
    for name, path in shipped_files().items():
        if name != "dvc.yaml":
            assert (tmp_path / "ws" / name).read_bytes() == path.read_bytes(), name


def test_it_prints_the_documentation(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import sys; from pipeline.cli import main; sys.argv[0] = 'pipeline'; main()"
    env = without_repository() | {"PYTHONPATH": str(tmp_path)}

    def said(*words: str) -> str:
        command = [sys.executable, "-c", code, "docs", *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    assert said("docs/photos.md") == (ROOT / "docs/photos.md").read_text(encoding="utf-8")
    assert str(tmp_path / DOCS / "photos.md") in said().splitlines()
    assert "'photo' is no page; did you mean photos" in said("photo")
