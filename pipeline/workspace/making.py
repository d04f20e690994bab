"""A new workspace: dvc.yaml, params, and the few files that stages expect."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from string import Template
from typing import Any

from ruamel.yaml import YAML

from pipeline import __version__
from pipeline.errors import PipelineError, listing
from pipeline.files import given_path, write_bytes
from pipeline.presets import filled_preset

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
PATHS_FILE = HERE.parent / "paths.yaml"
VERSION_FILE = "pipeline.version"
DAG = "dvc.yaml"
DEMO, DEMO_MODELS = "demo", "models/demo"
CODE = "pipeline/"
DATA = "data/"
LAID_OUT = ("models", "reports")  # folders that git keeps by pieces, see .gitignore
KEPT = ".gitkeep"
FIRST_COMMIT = "A workspace, by pipeline new"
HEAD = """\
The DAG, as `pipeline new` writes it. `worlds`, `index`, `rounds`, `benches`, `plus` and `audits` of
params.yaml make stages an entry. Every stage depends on the version of the package, {version_file};
after an upgrade of the package: pipeline new . --upgrade
"""


def make_workspace(
    folder: Path,
    *,
    preset: str,
    images: Path | None = None,
    categories: list[str] | None = None,
    force: bool = False,
) -> list[Path]:
    """Write a workspace whose stages run from the installed package.

    Args:
        folder: made if it is missing.
        preset: name of a preset.
        images: folder of unlabelled images, for presets of own photos.
        categories: names, for presets of own photos.
        force: overwrite files that are there, but for those below data/.

    Returns:
        What was written, relative to `folder`.

    Raises:
        PipelineError: as `filled_preset`, or files are there that would be overwritten.
    """
    images = given_path(images).absolute() if images else None
    params = filled_preset(preset, images=images, categories=categories)
    files = {
        name: data
        for name, data in _files(preset, params)
        if not (name.startswith(DATA) and (folder / name).exists())
    }
    found = [name for name in files if (folder / name).exists()]
    if found and not force:
        raise PipelineError(
            f"{folder}: has {listing(found)} already; --force overwrites, "
            "--upgrade renews dvc.yaml alone"
        )
    _write(folder, files)
    return [Path(name) for name in files]


def upgrade_workspace(folder: Path) -> list[Path]:
    """Bring dvc.yaml and the version file of a workspace to the installed version.

    Raises:
        PipelineError: the folder is no workspace that `pipeline new` made.
    """
    if not (folder / VERSION_FILE).is_file():
        raise PipelineError(
            f"{folder}: has no {VERSION_FILE}, so `pipeline new` did not make it; without "
            "--upgrade it makes a workspace"
        )
    with_demo = (folder / DEMO_MODELS).is_dir()
    files = {
        name: data
        for name, data in _generated(with_demo=with_demo)
        if name in (DAG, VERSION_FILE) or not (folder / name).exists()
    }
    _write(folder, files)
    return [Path(name) for name in files]


def refuse_other_version(folder: Path) -> None:
    """Stop a stage that DVC runs in a workspace of another version.

    Raises:
        PipelineError: with what to do.
    """
    path = folder / VERSION_FILE
    if not path.is_file():
        return
    found = path.read_text(encoding="utf-8").strip()
    if found != __version__:
        raise PipelineError(
            f"{path}: this workspace is of version {found}, installed is {__version__}: run "
            "`pipeline new . --upgrade` here, then `dvc repro`"
        )


def start_dvc(folder: Path) -> list[str]:
    """Initialise git and DVC in a workspace that has neither.

    A repository that is made gets a first commit, without which DVC knows no experiments.

    Returns:
        What was done, or what is to be done by hand, a line each.

    Raises:
        PipelineError: git or DVC refuses, with what it said.
    """
    has_git = shutil.which("git") is not None
    is_new = has_git and not _is_tracked(folder)
    if is_new:
        _call(folder, "git", "init", "--quiet")
    notes = [] if (folder / ".dvc").is_dir() else [_start_dvc_alone(folder, has_git=has_git)]
    if is_new:
        _call(folder, "git", "add", "--all")
        _call(folder, "git", *_identity(folder), "commit", "--quiet", "-m", FIRST_COMMIT)
        return [*notes, "git initialised, with a first commit"]
    if has_git:
        return [*notes, "git: this folder is in a repository; nothing is committed"]
    return [*notes, "no git here, so DVC works without it: no history, no experiments"]


def _start_dvc_alone(folder: Path, *, has_git: bool) -> str:
    options = ["--no-scm"] if not has_git else [] if (folder / ".git").exists() else ["--subdir"]
    dvc = (sys.executable, "-m", "dvc")
    _call(folder, *dvc, "init", "--quiet", *options)
    _call(folder, *dvc, "config", "core.analytics", "false")
    return "DVC initialised, its analytics off"


def _identity(folder: Path) -> list[str]:
    """Options of git that name an author where the user has named none."""
    command = ["git", "config", "user.email"]
    known = subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0
    return [] if known else ["-c", "user.name=pipeline", "-c", "user.email=pipeline@localhost"]


def shipped_files() -> dict[str, Path]:
    """Files of `files.txt` by their place in a workspace: from the package, or the repository."""
    packaged = HERE / "files"
    root = packaged if packaged.is_dir() else REPOSITORY
    lines = (HERE / "files.txt").read_text(encoding="utf-8").splitlines()
    found = [
        path
        for pattern in lines
        if pattern and not pattern.startswith("#")
        for path in sorted(root.glob(pattern))
        if path.is_file()
    ]
    return {path.relative_to(root).as_posix(): path for path in found}


def workspace_dag(*, with_demo: bool) -> str:
    """The repository's dvc.yaml for a workspace: paths written out, a version for code.

    Args:
        with_demo: stages depend on the demo's networks.
    """
    named = YAML(typ="safe", pure=True).load(PATHS_FILE.read_text(encoding="utf-8"))["paths"]
    text = shipped_files()[DAG].read_text(encoding="utf-8")
    text = re.sub(r"\$\{paths\.(\w+)\}", lambda match: str(named[match[1]]), text)
    yaml = YAML()
    yaml.width = 100
    yaml.indent(mapping=2, sequence=4, offset=2)
    content = yaml.load(text)
    content.pop("vars")
    for stage in content["stages"].values():
        _depend_on_version(stage.get("do", stage)["deps"], with_demo=with_demo)
    content.yaml_set_start_comment(HEAD.format(version_file=VERSION_FILE))
    buffer = StringIO()
    yaml.dump(content, buffer)
    return buffer.getvalue()


def _depend_on_version(deps: Any, *, with_demo: bool) -> None:
    left_out = [
        number
        for number, dep in enumerate(deps)
        if dep.startswith(CODE) or (dep == DEMO_MODELS and not with_demo)
    ]
    for number in reversed(left_out):
        del deps[number]
    deps.append(VERSION_FILE)


def _files(preset: str, params: str) -> Iterator[tuple[str, bytes]]:
    """Path in the workspace and content of all that is written."""
    template = Template((HERE / "README.template.md").read_text(encoding="utf-8"))
    readme = template.substitute(version=__version__, preset=preset, version_file=VERSION_FILE)
    yield "params.yaml", params.encode()
    yield "README.md", readme.encode()
    yield from _generated(with_demo=preset == DEMO)


def _generated(*, with_demo: bool) -> Iterator[tuple[str, bytes]]:
    """What no setting of the user decides."""
    dag = workspace_dag(with_demo=with_demo)
    shipped = shipped_files()
    yield DAG, dag.encode()
    yield VERSION_FILE, f"{__version__}\n".encode()
    for name, path in shipped.items():
        if name != DAG and (with_demo or not name.startswith(f"{DEMO_MODELS}/")):
            yield name, path.read_bytes()
    for name in _expected_folders(dag, shipped):
        yield f"{name}/{KEPT}", b""


def _expected_folders(dag: str, shipped: dict[str, Path]) -> list[str]:
    """Folders that stages read though none may write there: DVC wants them to exist."""
    stages = YAML(typ="safe", pure=True).load(dag)["stages"]
    bodies = [stage.get("do", stage) for stage in stages.values()]
    always = [stage for stage in stages.values() if "do" not in stage]
    written = [out for stage in always for out in stage.get("outs", [])]
    read = {dep for body in bodies for dep in body["deps"]} - {*shipped, DEMO_MODELS}
    return sorted(
        dep
        for dep in read
        if dep.startswith(tuple(f"{folder}/" for folder in LAID_OUT))
        and "${" not in dep
        and not any(Path(out).is_relative_to(dep) for out in written)
    )


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        write_bytes(folder / name, data)


def _is_tracked(folder: Path) -> bool:
    """Whether a git repository holds the folder."""
    command = ["git", "rev-parse", "--is-inside-work-tree"]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0


def _call(folder: Path, *command: str) -> None:
    """Run a command there.

    Raises:
        PipelineError: it fails, with what it said.
    """
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise PipelineError(f"{folder}: `{' '.join(command)}` failed: {said}")
