"""Patch features of a frozen encoder, that of CLIP, of another image tower, or DINO's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.models.clip.patches import load_patch_encoder

if TYPE_CHECKING:
    from pipeline.engine.runtime import Runtime
    from pipeline.methods.masks import FeatureParams


class FeatureEncoder:
    """The encoder that a mask source names, with its facet and precision.

    Args:
        params: the source's.
        runtime: device and precision.
        field: where the encoder stands in the params, for messages.

    Attributes:
        patch_size: side of a patch in pixels.
        settings: all that the features depend on besides the image; representable in JSON.
    """

    def __init__(
        self, params: FeatureParams, runtime: Runtime, *, field: str = "mask.encoder"
    ) -> None:
        self._encoder = load_patch_encoder(params.encoder, runtime, field=field)
        self._facet = params.facet
        if params.precision == "bfloat16":
            runtime = replace(runtime, amp_dtype=torch.bfloat16)
        self._runtime = runtime
        self.patch_size: int = self._encoder.patch_size
        self.settings: dict[str, Any] = {
            "encoder": self._encoder.fingerprint(),
            "facet": params.facet,
            "precision": str(runtime.amp_dtype),
        }

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> features (B, C, h, w), float32, on the CPU.

        The images count as padded at the right and bottom to whole patches.
        """
        with self._runtime.autocast():
            features = self._encoder.patch_features(
                images.to(self._runtime.device), facet=self._facet
            )
        return features.float().cpu()
