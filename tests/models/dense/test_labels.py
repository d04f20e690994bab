"""Labels, confidence and probabilities of pixels."""

from __future__ import annotations

import pytest
import torch

from pipeline.models.dense.labels import label_and_confidence, probability


@pytest.mark.parametrize("scale", [None, 1.0, 20.0])
@pytest.mark.parametrize("max_elements", [1, 10**6])
@pytest.mark.parametrize("through", [[], [(20, 5)]])
def test_the_probability_of_the_winner_is_its_confidence(
    scale: float | None, max_elements: int, through: list[tuple[int, int]]
) -> None:
    scores = torch.rand(2, 5, 3, 4)
    asked = {"scale": scale, "through": through}
    labels, confidence = label_and_confidence(scores, (9, 7), **asked)
    each = [
        probability(scores, number, (9, 7), max_elements=max_elements, **asked)
        for number in range(5)
    ]
    maps = torch.stack(each, dim=1)
    torch.testing.assert_close(maps.gather(1, labels[:, None])[:, 0], confidence)
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, 9, 7))


def test_a_single_label_is_certain() -> None:
    assert (probability(torch.rand(1, 1, 2, 2), 0, (3, 3), scale=100.0) == 1).all()
