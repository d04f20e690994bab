"""ZUTIS with text, as one function of images; see `pipeline.methods.students.StudentGraph`.

Letters: B images, Q queries, K categories, C text space, H W pixels, h w token grid.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.formats.onnx_graph import OBJECT_OUTPUTS, TEMPERATURE, THRESHOLD
from pipeline.models.clip.towers import check_in_graph
from pipeline.models.zutis.network import Zutis
from pipeline.models.zutis.postprocess import EPSILON, semantic_logits


class ZutisGraph(nn.Module):
    """The network of some names.

    Args:
        network: in evaluation mode.
        text: (1 + K, C) unit rows by label id, the background's first.

    Raises:
        PipelineError: the encoder has no form as a graph.
    """

    outputs: Mapping[str, tuple[str, ...]] = OBJECT_OUTPUTS
    settings: tuple[str, ...] = (THRESHOLD, TEMPERATURE)
    takes_text: bool = True
    text: Tensor

    def __init__(self, network: Zutis, text: Tensor) -> None:
        super().__init__()
        check_in_graph(network.tower)
        self.network = network
        self.register_buffer("text", text, persistent=False)
        self.mean: list[float] = network.mean.flatten().tolist()
        self.std: list[float] = network.std.flatten().tolist()
        self.smallest: int = network.tower.patch_size
        self.eval()

    def forward(
        self, images: Tensor, text: Tensor | None, threshold: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `pipeline.formats.onnx_graph` says of images (B, 3, H, W) in [0, 1].

        Args:
            images: of one size.
            text: (1 + K, C) in place of the own.
            threshold: scalar.
            temperature: scalar.
        """
        text = self.text if text is None else text
        output = self.network(images)
        proposals = output.mask_logits[:, -1].sigmoid()
        similarities, confidence = compare_proposals(
            proposals, output.patch_tokens, text, threshold=threshold
        )
        best = similarities.max(dim=-1).values
        return (
            semantic_logits(output.patch_tokens, text),
            proposals,
            similarities,
            confidence * (temperature * best).sigmoid(),
        )


def compare_proposals(
    proposals: Tensor, patch_tokens: Tensor, text: Tensor, *, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """What lies inside each proposal, on the token grid.

    Args:
        proposals: (B, Q, h, w) in [0, 1].
        patch_tokens: (B, h, w, C) of unit norm.
        text: (1 + K, C) of unit norm.
        threshold: scalar, above which a token is inside.

    Returns:
        Cosine (B, Q, 1 + K) of the mean token inside with each name, all 0 where there is none, and
        the mean probability (B, Q) inside.
    """
    probs = proposals.flatten(2)
    inside = (probs > threshold).to(probs.dtype)
    area = inside.sum(2) + EPSILON
    embeddings = inside @ patch_tokens.flatten(1, 2) / area[..., None]
    embeddings = embeddings / (torch.linalg.vector_norm(embeddings, dim=2, keepdim=True) + EPSILON)
    return embeddings @ text.T, (probs * inside).sum(2) / area
