"""What `import pipeline` gives, and which rooms the package has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pipeline
from pipeline.errors import install_command
from pipeline.inference.segmenter import Segmenter
from tests.paths import ROOT


def test_the_segmenter_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, pipeline; assert 'torch' not in sys.modules\n"
        "from pipeline import Segmenter; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert pipeline.Segmenter is Segmenter


@pytest.mark.parametrize(("chosen", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP elsewhere")
def test_threads_wait_without_spinning_unless_asked_to(chosen: str | None, expected: str) -> None:
    """Whatever starts a command: what OpenMP says of itself when torch loads it."""
    names = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": chosen} if chosen else {})
    command = [sys.executable, "-c", "import pipeline.engine.runtime"]
    done = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    assert re.findall(r"OMP_WAIT_POLICY\s*=\s*'(\w+)'", done.stderr)[:1] == [expected]


def test_what_installs_packages_is_that_of_a_clone_or_of_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert install_command() == "pip install -c requirements.lock -e '.'"
    assert install_command("demo") == "pip install -c requirements.lock -e '.[demo]'"
    monkeypatch.setattr("pipeline.errors.__file__", str(tmp_path / "pipeline/errors.py"))
    assert install_command() == "pip install 'zutis-pipeline'"
    assert install_command("demo") == "pip install 'zutis-pipeline[demo]'"


def test_other_names_are_unknown() -> None:
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'Segmentor'"):
        pipeline.Segmentor  # noqa: B018


def test_contributing_lists_the_rooms_as_the_contract_does() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (`[^|]+`) \|", text, flags=re.MULTILINE)
    assert [re.findall(r"[\w.]+", row) for row in table] == [
        re.findall(r"[\w.]+", layer) for layer in layers
    ]
