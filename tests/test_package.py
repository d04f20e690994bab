"""What `import pipeline` gives."""

from __future__ import annotations

import subprocess
import sys

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
