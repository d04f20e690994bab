"""What of a prediction is output: no names that only compete, no objects of low scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.formats.labels import BACKGROUND
from pipeline.formats.predictions import Segmentation
from pipeline.params.base import PredictionSettings
from pipeline.vocabulary.categories import plain_name


def others_beside(categories: Sequence[str], settings: PredictionSettings) -> list[str]:
    """Names of `others` that compete with some categories: those that are none of these.

    None do where no pixel may be background, which is what theirs become.
    """
    if not settings.background:
        return []
    asked = {plain_name(name) for name in categories}
    return [name for name in settings.others if plain_name(name) not in asked]


def kept(
    found: Segmentation, categories: Sequence[str], settings: PredictionSettings
) -> Segmentation:
    """The prediction without pixels and objects of others, and without objects of low scores.

    Args:
        found: label ids beyond those of the categories are of others.
        categories: K names by label id from 1.
        settings: `others`, `min_score` and `min_scores`; where none is set, nothing changes.
    """
    if not (settings.others or settings.min_score or settings.min_scores):
        return found
    labels = np.where(found.semantic > len(categories), BACKGROUND, found.semantic)
    lowest = _lowest_scores(categories, settings)
    return Segmentation(
        labels.astype(found.semantic.dtype),
        [
            item
            for item in found.instances
            if item.label_id <= len(categories) and item.score >= lowest[item.label_id - 1]
        ],
    )


def kept_protocol(settings: PredictionSettings) -> dict[str, Any]:
    """What is left out, in the words of a protocol; nothing where nothing is."""
    scores = settings.min_scores if settings.instances else {}
    lines = {
        "others": ", ".join(settings.others) if settings.background else "",
        "min_score": settings.min_score if settings.instances else None,
        "min_scores": ", ".join(f"{name} {score:g}" for name, score in scores.items()),
    }
    return {name: value for name, value in lines.items() if value}


def _lowest_scores(categories: Sequence[str], settings: PredictionSettings) -> list[float]:
    """The score that an object of each category has at least."""
    own = {plain_name(name): score for name, score in settings.min_scores.items()}
    return [own.get(plain_name(name), settings.min_score or 0.0) for name in categories]
