"""DenseCLIP+ with text, as one function of images; see `pipeline.methods.students.StudentGraph`.

Letters: B images, K categories, C text space, H W pixels, h w cells of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.formats.onnx_graph import SEMANTIC_OUTPUTS
from pipeline.models.plus.heads import PSPNet
from pipeline.models.plus.network import PlusNetwork


class PlusGraph(nn.Module):
    """The network of some names.

    Args:
        network: in evaluation mode.
        text: (1 + K, C) unit rows by label id, the background's first.
        scores: images and text -> logits (B, 1 + K, h, w), by this network.

    Raises:
        PipelineError: the head has no form as a graph.
    """

    outputs: Mapping[str, tuple[str, ...]] = SEMANTIC_OUTPUTS
    settings: tuple[str, ...] = ()
    text: Tensor

    def __init__(
        self, network: PlusNetwork, text: Tensor, scores: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        if isinstance(network.head, PSPNet):
            raise PipelineError(
                "head: pspnet: has no form in ONNX, which lacks an operator for means over parts "
                "of a map; train another head"
            )
        self.network = network
        self.register_buffer("text", text, persistent=False)
        self._scores = scores
        self.mean: list[float] = network.mean.flatten().tolist()
        self.std: list[float] = network.std.flatten().tolist()
        self.takes_text = network.classifier is None
        self.smallest: int = network.backbone.strides[-1]
        self.eval()

    def forward(self, images: Tensor, text: Tensor | None) -> Tensor:
        """What `pipeline.formats.onnx_graph` says of images (B, 3, H, W) in [0, 1].

        Args:
            images: of one size, no side below `smallest`.
            text: (1 + K, C) in place of the own.
        """
        return self._scores(images, self.text if text is None else text)
