"""CLIP's text side: token ids, template ensembles, plain names; and its image embedding."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.clip import text_embeddings
from pipeline.vocabulary.prompts import NAME_ONLY, PROMPTS_85

from .checks import Parts, Result, close, equal
from .networks import clip_encoder
from .vectors import Vectors

EMBEDDING_BOUND = 5e-6
FEATURE_RELATIVE = 1e-5


def clip_text(vectors: Vectors) -> Parts:
    """Every tensor; the network is loaded once."""
    yield "text", partial(_clip_text, vectors)


@torch.inference_mode()
def _clip_text(vectors: Vectors) -> Iterator[Result]:
    record, io = vectors.record, vectors.io
    encoder = clip_encoder(record["clip"], _whole_vocabulary(vectors))
    names, plain = record["categories"], record["plain_categories"]
    yield equal(f"{vectors.name}/n_templates", len(PROMPTS_85), record["n_templates"])
    prompts = [template.format(name) for name in names for template in PROMPTS_85]
    ids = {
        "token_ids": encoder.tokenize(prompts).unflatten(0, (len(names), -1)),
        "plain_category_token_ids": encoder.tokenize(plain),
    }
    for key, value in ids.items():
        if key in io:
            yield equal(f"{vectors.name}/{key}", value, io[key])
    unit = {
        "ensemble_embeddings": text_embeddings(encoder, names, PROMPTS_85),
        "plain_category_embeddings": text_embeddings(encoder, plain, NAME_ONLY),
    }
    for key, value in unit.items():
        if key in io:
            yield close(f"{vectors.name}/{key}", value, io[key], bound=EMBEDDING_BOUND)
    raw = {
        "single_prompt_embeddings_raw": encoder.encode_texts(names),
        "plain_category_features_raw": encoder.encode_texts(plain),
        "first_category_template_features_raw": encoder.encode_texts(prompts[: len(PROMPTS_85)]),
    }
    for key, value in raw.items():
        if key in io:
            yield close(f"{vectors.name}/{key}", value, io[key], relative=FEATURE_RELATIVE)
    key = "clip_image_features_raw"
    if key in io:
        images = io["clip_image"].float()
        features = encoder.clip.encode_image(images)
        yield close(f"{vectors.name}/{key}", features, io[key], relative=FEATURE_RELATIVE)
        yield close(
            f"{vectors.name}/clip_image_embeddings",
            encoder.encode_images(images * encoder.std + encoder.mean),
            F.normalize(io[key], dim=-1),
            bound=EMBEDDING_BOUND,
        )


def _whole_vocabulary(vectors: Vectors) -> dict[str, Tensor]:
    """The weights with the token embedding, stored as row sums of two small tables, written out."""
    state = vectors.weights()
    if "token_embedding.A" in state:
        first, second = state.pop("token_embedding.A"), state.pop("token_embedding.B")
        rows = torch.arange(vectors.record["clip"]["vocab_size"])
        table = first[rows % len(first)] + second[rows // len(first)]
        state["token_embedding.weight"] = table
    return state
