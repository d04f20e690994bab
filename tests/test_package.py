"""What `import pipeline` gives, and which rooms the package has."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest

import pipeline
from pipeline.inference.segmenter import Segmenter
from tests.paths import ROOT


def test_the_segmenter_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, pipeline; assert 'torch' not in sys.modules\n"
        "from pipeline import Segmenter; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert pipeline.Segmenter is Segmenter


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
