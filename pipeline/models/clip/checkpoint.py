"""The CLIP of a student's checkpoint, with the text that it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.models.clip.encoder import ClipEncoder
from pipeline.models.clip.labels import label_embeddings
from pipeline.models.clip.loading import load_clip
from pipeline.models.weights.checkpoint import CONFIG_NAME, CheckpointConfig
from pipeline.vocabulary.prompts import TEMPLATE_SETS

if TYPE_CHECKING:
    from pipeline.engine.runtime import Runtime
    from pipeline.vocabulary.categories import Names


def checkpoint_clip(
    folder: Path, config: CheckpointConfig, names: Names, runtime: Runtime
) -> tuple[ClipEncoder, Tensor]:
    """The encoder of a checkpoint, and unit embeddings (1 + K, C) of names by label id.

    Raises:
        PipelineError: the encoder cannot be loaded, or does not know a name.
    """
    clip = _load(folder, config, runtime)
    return clip, label_embeddings(clip, names, TEMPLATE_SETS[config.templates])


def frozen_clip(
    folder: Path, config: CheckpointConfig, runtime: Runtime
) -> Callable[[], ClipEncoder]:
    """Gives the encoder of a checkpoint as it was before training, loaded when first asked for."""
    return cache(partial(_load, folder, config, runtime))


def _load(folder: Path, config: CheckpointConfig, runtime: Runtime) -> ClipEncoder:
    return load_clip(
        config.encoder,
        runtime.device,
        cache_dir=runtime.cache_dir,
        field=f"{folder / CONFIG_NAME}: encoder",
    )
