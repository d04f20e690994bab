"""A perceptron of several layers."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class Perceptron(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        *dims: widths from input to output, at least three.
    """

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(dims))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., dims[0]) to (..., dims[-1])."""
        return self.last(self.features(self.layers[0](inputs), after=0))

    @property
    def last(self) -> nn.Linear:
        """The last layer."""
        layer = self.layers[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def features(self, hidden: Tensor, *, after: int) -> Tensor:
        """What the last layer sees, (..., dims[-2]), from the output of layer `after`."""
        for layer in self.layers[after + 1 : -1]:
            hidden = layer(hidden.relu())
        return hidden.relu()
