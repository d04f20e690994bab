"""CLIP by open_clip; only the demo's pre-training imports that library as well."""

from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer

from pipeline.models.clip.encoder import ClipEncoder
from pipeline.models.clip.features import pad_to_multiple, require_plain_vit
from pipeline.models.clip.loading import OPENAI_SCALARS, build_clip, load_clip, to_open_clip_layout
from pipeline.models.clip.text import background_embedding, label_embeddings, text_embeddings
from pipeline.models.clip.tokenizer import VOCABULARY_SPECIALS

__all__ = [
    "OPENAI_SCALARS",
    "VOCABULARY_SPECIALS",
    "ClipEncoder",
    "ModifiedResNet",
    "VisionTransformer",
    "background_embedding",
    "build_clip",
    "label_embeddings",
    "load_clip",
    "pad_to_multiple",
    "require_plain_vit",
    "text_embeddings",
    "to_open_clip_layout",
]
