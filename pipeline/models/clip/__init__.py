"""CLIP by open_clip; only the demo's pre-training imports that library as well."""

from pipeline.models.clip.encoder import ClipEncoder
from pipeline.models.clip.features import pad_to_multiple
from pipeline.models.clip.loading import (
    OPENAI_SCALARS,
    build_clip,
    clip_config,
    load_clip,
    to_open_clip_layout,
)
from pipeline.models.clip.open_clip_towers import ClipVit
from pipeline.models.clip.stitching import Windows
from pipeline.models.clip.text import (
    background_embedding,
    category_embeddings,
    check_distinct,
    text_embeddings,
)
from pipeline.models.clip.tokenizer import VOCABULARY_SPECIALS
from pipeline.models.clip.tower import DenseAttention, DenseOptions, DenseTower
from pipeline.models.clip.towers import dense_tower

__all__ = [
    "OPENAI_SCALARS",
    "VOCABULARY_SPECIALS",
    "ClipEncoder",
    "ClipVit",
    "DenseAttention",
    "DenseOptions",
    "DenseTower",
    "Windows",
    "background_embedding",
    "build_clip",
    "category_embeddings",
    "check_distinct",
    "clip_config",
    "dense_tower",
    "load_clip",
    "pad_to_multiple",
    "text_embeddings",
    "to_open_clip_layout",
]
