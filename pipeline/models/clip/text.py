"""Text embeddings of categories and background.

Letters: C joint embedding, K categories, P prompts a category.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.clip.encoder import ClipEncoder


@torch.no_grad()
def text_embeddings(encoder: ClipEncoder, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Unit text embeddings (K, C), float32, one a name.

    Each of the P prompts of a name is encoded and normalised; their mean is normalised again
    (ZUTIS section 4.1, DenseCLIP section 4).

    Args:
        names: K category names.
        templates: P format strings with one `{}`.

    Raises:
        PipelineError: a name is not in the encoder's closed list, or has a word outside its
            vocabulary.
    """
    names = encoder.known_names(names)
    encoder.tokenize(names)  # an unknown word is reported as the name that has it, not as a prompt
    prompts = [template.format(name) for name in names for template in templates]
    features = F.normalize(encoder.encode_texts(prompts), dim=-1)
    return F.normalize(features.unflatten(0, (len(names), len(templates))).mean(dim=1), dim=-1)


def background_embedding(
    encoder: ClipEncoder, names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """One unit embedding (C,) for several names of the background: mean over all, normalised."""
    return F.normalize(text_embeddings(encoder, names, templates).mean(dim=0), dim=-1)


def label_embeddings(
    encoder: ClipEncoder,
    *,
    background: Sequence[str],
    categories: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """Unit embeddings (1 + K, C) by label id: the background's first, then the categories'."""
    return torch.cat(
        [
            background_embedding(encoder, background, templates).unsqueeze(0),
            text_embeddings(encoder, categories, templates),
        ]
    )
