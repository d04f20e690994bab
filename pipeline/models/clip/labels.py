"""Text embeddings by label id, background included."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.models.clip.encoder import ClipEncoder
from pipeline.models.clip.text import (
    background_embedding,
    category_embeddings,
    check_distinct,
    texts_of,
)

if TYPE_CHECKING:
    from pipeline.vocabulary.categories import Names


def label_embeddings(encoder: ClipEncoder, names: Names, templates: Sequence[str]) -> Tensor:
    """Unit embeddings (1 + K, C) by label id: the background's first, then the categories'.

    Raises:
        PipelineError: as `check_distinct` and `text_embeddings`.
    """
    listed = list(chain(*texts_of(names.categories, names.texts)))
    check_distinct(encoder, background=names.background, categories=listed)
    return torch.cat(
        [
            background_embedding(encoder, names.background, templates).unsqueeze(0),
            category_embeddings(encoder, names.categories, templates, names.texts),
        ]
    )
