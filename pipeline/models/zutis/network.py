"""The ZUTIS network: semantic and instance segmentation from one CLIP encoder.

Letters: B batch, L decoder layers, Q queries, D width of the encoder's map, C text space, H W
pixels; h w is the token grid after upsampling, twice the patch grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.clip import dense_tower
from pipeline.models.clip.tokens import PositionResize
from pipeline.models.layers.decoder import Memory, TransformerDecoder, sine_codes
from pipeline.models.layers.perceptron import Perceptron
from pipeline.models.weights.imagenet import IMAGENET_MEAN, IMAGENET_STD

TokenNorm = Literal["map", "token", "none"]
LAYER_NORM_EPS = 1e-5  # torch's


class ZutisOutput(NamedTuple):
    """What the network says about a batch, float32 under autocast too.

    Attributes:
        mask_logits: (B, L, Q, h, w) mask proposals of every decoder layer, before the sigmoid.
        patch_tokens: (B, h, w, C) dense embeddings of unit norm in text space.
    """

    mask_logits: Tensor
    patch_tokens: Tensor

    @property
    def mask_probs(self) -> Tensor:
        """(B, L, Q, h, w) mask proposals in [0, 1]."""
        return self.mask_logits.sigmoid()


class Zutis(nn.Module):
    """Zero-shot unsupervised transfer instance segmenter (ZUTIS paper, section 3).

    The defaults are those of the published code, whose weights need them. Weights trained with
    another `mean`, `std`, `position_resize` or `token_norm` need theirs.

    The tokens are the map that the encoder pools, and the projection to text space is its head, see
    `DenseTower`. Encoders other than CLIP's ViT stay in evaluation mode in training.

    Args:
        encoder: image tower of a model of open_clip; a CLIP vision transformer has the key layout
            of OpenAI and open_clip.
        decoder: transformer decoder of width D.
        ffn1: perceptron D -> D that turns tokens into the decoder's memory and mask features.
        ffn2: perceptron D -> D on the decoded queries.
        query_embed: (Q, D) initial values of the learned queries.
        stop_gradient: keep the mask losses away from the encoder, as published.
        query_norm: scale the decoded queries to unit norm, as published.
        mean: of the channels R, G, B in [0, 1], taken off the input. The code takes ImageNet's,
            though CLIP was trained with its own; the paper does not say.
        std: their standard deviation, likewise.
        position_resize: see `resize_positions`; "scale" is the code's. Of CLIP's ViT alone: others
            fit their positions to the grid.
        token_norm: see `project`; "map" is the code's.

    Raises:
        PipelineError: `encoder` has no map.
        ValueError: `query_embed` does not have the width of the encoder's map.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: TransformerDecoder,
        ffn1: Perceptron,
        ffn2: Perceptron,
        query_embed: Tensor,
        *,
        stop_gradient: bool = True,
        query_norm: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        position_resize: PositionResize = "scale",
        token_norm: TokenNorm = "map",
    ) -> None:
        super().__init__()
        self.tower = dense_tower(encoder)
        width = self.tower.width
        if query_embed.ndim != 2 or query_embed.shape[1] != width:
            raise ValueError(f"query_embed is {tuple(query_embed.shape)}, expected (Q, {width})")
        self.query_embed = nn.Parameter(query_embed)
        self.encoder = encoder
        self.ffn1 = ffn1
        self.ffn2 = ffn2
        self.decoder = decoder
        self.stop_gradient = stop_gradient
        self.query_norm = query_norm
        self.position_resize: PositionResize = position_resize
        self.token_norm: TokenNorm = token_norm
        # Not saved: official checkpoints do not have them.
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> ZutisOutput:
        """Segment RGB images (B, 3, H, W) with values in [0, 1]."""
        return self.forward_normalised(self.normalise(images))

    def normalise(self, images: Tensor) -> Tensor:
        """Shift and scale RGB in [0, 1] by the network's mean and standard deviation."""
        return (images - self.mean) / self.std

    def forward_normalised(self, images: Tensor) -> ZutisOutput:
        """Segment images (B, 3, H, W) that went through `normalise`.

        Tokens are upsampled as published, but after the first linear map of them, not before: the
        order changes nothing but the cost. Pixels beyond a multiple of the patch size are ignored;
        the output covers the whole image nevertheless, as published.

        Raises:
            PipelineError: the images are smaller than a patch.
        """
        maps = self.tower.feature_map(images, position_resize=self.position_resize)
        tokens = maps.permute(0, 2, 3, 1).float()
        mask_tokens = tokens.detach() if self.stop_gradient else tokens
        return ZutisOutput(self.propose_masks(mask_tokens), self.embed_tokens(tokens))

    def propose_masks(self, tokens: Tensor) -> Tensor:
        """Mask logits (B, L, Q, h, w) from the encoder's tokens (B, h/2, w/2, D), float32."""
        hidden = _twice_as_large(self.ffn1.layers[0](tokens).float())
        batch, height, width = hidden.shape[:3]
        memory = Memory.of(
            self.ffn1.features(hidden.flatten(1, 2), after=0),
            self.ffn1.last,
            positions=sine_codes(height, width, tokens.shape[-1], device=tokens.device),
        )
        queries = self.query_embed.expand(batch, -1, -1)
        queries = self.ffn2(self.decoder(queries, memory))
        with torch.autocast(tokens.device.type, enabled=False):
            queries = queries.float()
            if self.query_norm:
                queries = F.normalize(queries, dim=-1)
            logits = memory.dot(queries.flatten(1, 2))
        return logits.reshape(*queries.shape[:3], height, width)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Unit-norm tokens (B, h, w, C) in text space from the encoder's (B, h/2, w/2, D)."""
        with torch.autocast(tokens.device.type, enabled=False):
            projected = self.tower.project(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return self.normalise_tokens(_twice_as_large(projected))

    def normalise_tokens(self, projected: Tensor) -> Tensor:
        """Unit-norm tokens from tokens (B, h, w, C), both in text space, float32.

        Before the norm comes a layer norm without affine part, by `token_norm`:

        - "map" (the published code): one mean and variance over the whole (h, w, C) block of an
          image. A token depends on all others through it, and on the image size.
        - "token": over the C features of each token.
        - "none": no layer norm, as in equation 4 of the paper and in CLIP. Algorithm 1 has one
          and does not say over what.
        """
        if self.token_norm != "none" and torch.onnx.is_in_onnx_export():
            projected = _norm_in_graph(projected, (1, 2, 3) if self.token_norm == "map" else (3,))
        elif self.token_norm != "none":
            spanned = projected.shape[1:] if self.token_norm == "map" else projected.shape[-1:]
            projected = F.layer_norm(projected, spanned)
        return projected / (projected.norm(dim=-1, keepdim=True) + 1e-7)

    def extra_repr(self) -> str:
        """The architecture in one line, for messages."""
        return (
            f"{self.tower.describe()}, {len(self.query_embed)} queries, "
            f"{len(self.decoder.layers)} decoder layers"
        )

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all parts, but for an encoder that is trained in evaluation mode."""
        super().train(mode)
        self.encoder.train(mode and not self.tower.stays_in_eval)
        return self


def _norm_in_graph(projected: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Layer norm of tokens (B, h, w, C) over some axes, for a graph in which h and w may change."""
    centred = projected - projected.mean(axes, keepdim=True)
    variance = (centred * centred).mean(axes, keepdim=True)
    return centred / (variance + LAYER_NORM_EPS).sqrt()


def _twice_as_large(tokens: Tensor) -> Tensor:
    """Token maps (B, h, w, C) upsampled to (B, 2h, 2w, C), in float32 as they come.

    Published before the first linear map; it commutes with one, whose output is smaller.
    """
    maps = F.interpolate(
        tokens.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear", align_corners=False
    )
    return maps.permute(0, 2, 3, 1)
