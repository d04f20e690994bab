"""The notebook of the first ten minutes runs, and is committed without what it printed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

NOTEBOOK = ROOT / "docs/start.ipynb"
PATIENCE_S = 600


def test_it_is_committed_without_outputs() -> None:
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_it_runs_from_a_new_workspace_to_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    beside_python = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join([beside_python, os.environ["PATH"]]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=PATIENCE_S, kernel_name="python3").execute()
    (workspace,) = tmp_path.glob("*/demo")
    metrics = json.loads((workspace / "reports/metrics/voc.json").read_text())
    assert 0 <= metrics["miou"] <= 100
    predictions = json.loads((workspace / "predictions/predictions.json").read_text())
    assert len(predictions["images"]) == 8
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "(96, 96)" in printed
    assert "git initialised, with a first commit" in printed
    assert "score@voc" in printed
    assert "error:" not in printed
