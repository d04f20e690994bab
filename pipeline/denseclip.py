"""DenseCLIP with the settings of section `pseudo_label`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipeline.data.prompts import templates
from pipeline.models.clip import ClipEncoder, label_embeddings
from pipeline.models.denseclip import DenseClip
from pipeline.params import PseudoLabelParams


def build_denseclip(
    encoder: ClipEncoder,
    *,
    categories: Sequence[str],
    background: Sequence[str],
    params: PseudoLabelParams,
) -> DenseClip:
    """DenseCLIP for a category list; label id 0 is the background."""
    text = embed_labels(encoder, categories=categories, background=background, params=params)
    return denseclip_for(encoder, text, params)


def embed_labels(
    encoder: ClipEncoder,
    *,
    categories: Sequence[str],
    background: Sequence[str],
    params: PseudoLabelParams,
) -> Tensor:
    """Unit text embeddings (1 + K, C) by label id, the background's first."""
    return label_embeddings(
        encoder,
        background=background,
        categories=categories,
        templates=templates(params.templates),
    )


def denseclip_for(encoder: ClipEncoder, text: Tensor, params: PseudoLabelParams) -> DenseClip:
    """DenseCLIP that tells the rows (K, C) of `text` apart."""
    return DenseClip(
        encoder,
        text,
        normalisation=params.normalisation,
        published_activation=params.published_activation,
        dense_attention=params.dense_attention,
        prompt_denoising=params.prompt_denoising,
        key_smoothing=params.key_smoothing,
        key_affinity=params.key_affinity,
        position_resize=params.position_resize,
        logit_scale=params.logit_scale,
    ).eval()
