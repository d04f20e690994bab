"""Text embeddings of categories and background.

Letters: C joint embedding, K categories, P prompts a category.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.models.clip.encoder import ClipEncoder
from pipeline.models.clip.names import NAMES_FIELD

SHOWN_LETTERS = 60


@torch.no_grad()
def text_embeddings(
    encoder: ClipEncoder,
    names: Sequence[str],
    templates: Sequence[str],
    *,
    field: str = NAMES_FIELD,
) -> Tensor:
    """Unit text embeddings (K, C), float32, one a name.

    Each of the P prompts of a name is encoded and normalised; their mean is normalised again
    (ZUTIS section 4.1, DenseCLIP section 4).

    Args:
        names: K category names.
        templates: P format strings with one `{}`.
        field: where the names come from, for messages.

    Raises:
        PipelineError: a name is not in the encoder's closed list, has a word outside its
            vocabulary, or is too long for it.
    """
    names = encoder.known_names(names, field=field)
    _check_lengths(encoder, names, templates, field)
    encoder.tokenize(names)  # an unknown word is reported as the name that has it, not as a prompt
    prompts = [template.format(name) for name in names for template in templates]
    features = F.normalize(encoder.encode_texts(prompts), dim=-1)
    return F.normalize(features.unflatten(0, (len(names), len(templates))).mean(dim=1), dim=-1)


def category_embeddings(
    encoder: ClipEncoder,
    categories: Sequence[str],
    templates: Sequence[str],
    texts: Mapping[str, Sequence[str]],
) -> Tensor:
    """Unit embeddings (K, C) of categories: of several texts their mean, normalised.

    Args:
        encoder: the CLIP.
        categories: K names.
        templates: P format strings with one `{}`.
        texts: what stands for a category, where that is not its name.

    Raises:
        PipelineError: as `text_embeddings`.
    """
    own = texts_of(categories, texts)
    rows = text_embeddings(encoder, list(chain(*own)), templates, field="categories")
    if not texts:
        return rows
    parts = rows.split([len(words) for words in own])
    return torch.stack(
        [part[0] if len(part) == 1 else F.normalize(part.mean(dim=0), dim=-1) for part in parts]
    )


def texts_of(categories: Sequence[str], texts: Mapping[str, Sequence[str]]) -> list[Sequence[str]]:
    """What stands for each category."""
    return [texts.get(name, [name]) for name in categories]


def background_embedding(
    encoder: ClipEncoder, names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """One unit embedding (C,) for several names of the background: mean over all, normalised."""
    embeddings = text_embeddings(encoder, names, templates, field="background")
    return F.normalize(embeddings.mean(dim=0), dim=-1)


def check_distinct(
    encoder: ClipEncoder, *, background: Sequence[str], categories: Sequence[str]
) -> None:
    """Refuse names that the encoder cannot tell apart, for only one of them would get images.

    Raises:
        PipelineError: two names, or a name and nothing, have the same tokens; or a name is not in
            the encoder's closed list.
    """
    first_use = {tuple(encoder.tokenizer.ids("")): ("", "")}
    for field, names in (("background", background), ("categories", categories)):
        for name, known in zip(names, encoder.known_names(names, field=field), strict=True):
            tokens = tuple(encoder.tokenizer.ids(known))
            if tokens not in first_use:
                first_use[tokens] = name, field
                continue
            other, other_field = first_use[tokens]
            if not other:
                raise PipelineError(f"{field}: {name!r} is empty to the encoder; remove it")
            place = "" if other_field == field else f" ({other_field})"
            raise PipelineError(
                f"{field}: {other!r}{place} and {name!r} are the same to the encoder; remove one"
            )


def _check_lengths(
    encoder: ClipEncoder, names: Sequence[str], templates: Sequence[str], field: str
) -> None:
    """Refuse a name of which the text tower would not see the end."""

    def num_tokens(text: str) -> int:
        return len(encoder.tokenizer.ids(text))

    longest = max(templates, key=lambda template: num_tokens(template.format("x")))
    limit = encoder.tokenizer.context_length
    for name in names:
        if (length := num_tokens(longest.format(name))) > limit:
            shown = name if len(name) <= SHOWN_LETTERS else f"{name[:SHOWN_LETTERS]}..."
            raise PipelineError(
                f"{field}: {shown!r} takes {length} tokens in its longest prompt; the encoder "
                f"reads {limit}. Shorten it"
            )
