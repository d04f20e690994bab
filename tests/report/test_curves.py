"""Training curves on the page."""

from __future__ import annotations

import re

from tests.report.helpers import section


def test_curves_have_axes_and_loss_comes_first(page: str) -> None:
    training = section(page, "training")
    assert re.findall(r"<h3>(.*?)</h3>", training) == ["train/loss", "train/learning_rate"]
    assert ">step</text>" in training
    assert ">loss</text>" in training
    assert "10 at step 10, 2 at step 50" in training
