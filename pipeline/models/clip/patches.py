"""An encoder for features of patches: DINO by the names of its models, else a CLIP."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pipeline.models.clip.encoder import ClipEncoder
from pipeline.models.clip.loading import load_clip
from pipeline.models.layers.dino import DINO_MODELS, DinoEncoder, load_dino

if TYPE_CHECKING:
    from pipeline.engine.runtime import Runtime
    from pipeline.params.base import EncoderParams


def load_patch_encoder(
    encoder: EncoderParams, runtime: Runtime, *, field: str
) -> ClipEncoder | DinoEncoder:
    """What gives features of patches.

    Raises:
        PipelineError: it cannot be loaded; the message names the field.
    """
    load = partial(load_dino if encoder.model in DINO_MODELS else load_clip, field=field)
    return load(encoder, runtime.device, cache_dir=runtime.cache_dir)
