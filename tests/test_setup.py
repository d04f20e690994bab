"""What `make` installs: the lock fits pyproject.toml, on every platform and from every index."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pipeline
from tests.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINES = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
LOCK = dict(line.split("==") for line in LINES if not line.startswith("#"))
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [
    Requirement(text)
    for text in [
        *PROJECT["dependencies"],
        *(text for extra in ("demo", "corruptions", "ray", "dev") for text in EXTRAS[extra]),
    ]
]


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_the_lock_holds_a_version_that_is_allowed(requirement: Requirement) -> None:
    if requirement.name != PROJECT["name"]:
        assert requirement.specifier.contains(LOCK[canonicalize_name(requirement.name)])


def test_every_dependency_has_a_lower_bound() -> None:
    """Without one, a resolver answers a conflict with a release of years ago."""
    texts = [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]
    unbound = [
        text
        for text in texts
        if Requirement(text).name != PROJECT["name"]
        and ">=" not in str(Requirement(text).specifier)
    ]
    assert not unbound


def test_the_lock_holds_names_and_versions_only() -> None:
    for line in LINES:
        assert re.fullmatch(r"#.*|[a-z0-9-]+==[\w.]+", line), line
    assert not [name for name in LOCK if re.match("nvidia|cuda|triton|zutis", name)]
    assert list(LOCK) == sorted(LOCK)


def test_a_lock_is_made_from_a_report_of_pip(tmp_path: Path) -> None:
    names = ["Jinja2", "ruamel.yaml", "zutis-pipeline", "nvidia-cublas", "triton", "setuptools"]
    packages = ",".join(f'{{"metadata": {{"name": "{name}", "version": "1.2"}}}}' for name in names)
    report = tmp_path / "report.json"
    report.write_text(f'{{"install": [{packages}]}}')
    command = [sys.executable, ROOT / ".ci" / "lock.py", report]
    made = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert made.splitlines()[1:] == ["jinja2==1.2", "ruamel-yaml==1.2"]


def test_the_citation_names_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {pipeline.__version__}\n" in citation
