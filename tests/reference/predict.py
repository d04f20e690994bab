"""ZUTIS: label maps and instances from given proposals and embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from pipeline.formats.predictions import Instance
from pipeline.models.zutis.postprocess import (
    instance_predictions,
    semantic_logits,
    semantic_prediction,
)

from .checks import Parts, Result, close, equal, failure, first_is_clear
from .vectors import Vectors

FIRST_IMAGE_ID = 100
# "hard_t2_thr06": suppression, then what departs from the common temperature and threshold.
SETTING = re.compile(
    r"(?P<kind>[A-Za-z]+)(?:_t(?P<temperature>\d+(?:\.\d+)?))?(?:_thr(?P<threshold>\d*\.?\d+))?"
)


def predict(vectors: Vectors) -> Parts:
    """Semantic prediction, and instances under each setting."""
    yield "semantic", partial(_semantic, vectors)
    for setting in vectors.record["instance"]:
        yield f"instance.{setting}", partial(_instances, vectors, setting)


def _semantic(vectors: Vectors) -> Iterator[Result]:
    io = vectors.io
    tokens, text = io["patch_tokens"], io["text_embeddings"]
    logits = semantic_logits(tokens, text)
    if "semantic_logits_lowres" in io:
        name = f"{vectors.name}/semantic_logits_lowres"
        yield close(name, logits, io["semantic_logits_lowres"], bound=5e-6)
    sizes = {"semantic_argmax_lowres": None, "semantic_argmax": _target_size(vectors)}
    for name, size in sizes.items():
        if name in io:
            yield equal(
                f"{vectors.name}/{name}",
                semantic_prediction(tokens, text, size),
                io[name],
                decided=first_is_clear(semantic_logits(tokens, text, size)),
            )


def _instances(vectors: Vectors, setting: str) -> Iterator[Result]:
    name = f"{vectors.name}/instance.{setting}"
    ours = _predict_instances(vectors, setting)
    published = vectors.record["instance"][setting]
    stored = f"masks.{setting}"  # may be left out where there is no instance
    masks = np.zeros(0, bool)
    if published or stored in vectors.io:
        masks = vectors.io[stored].numpy().astype(bool)
    if not len(ours) == len(published) == len(masks):
        found = f"{len(ours)} instances, published {len(published)} with {len(masks)} masks"
        yield failure(f"{name}.labels", found)
        return
    pairs = _pair(ours, published, masks)
    yield equal(
        f"{name}.labels",
        [(_image_id(image, theirs), instance.label_id) for image, instance, theirs, _ in pairs],
        [(theirs["image_id"], theirs["category_id"]) for _, _, theirs, _ in pairs],
    )
    yield equal(
        f"{vectors.name}/masks.{setting}",
        np.array([instance.mask for _, instance, _, _ in pairs]),
        np.array([mask for _, _, _, mask in pairs]),
    )
    yield close(
        f"{name}.scores",
        [instance.score for _, instance, _, _ in pairs],
        [theirs["score"] for _, _, theirs, _ in pairs],
        relative=1e-5,
    )
    yield equal(
        f"{name}.boxes",
        [[*i.bbox_xyxy, i.mask.sum(), *_size(i.mask.shape, theirs)] for _, i, theirs, _ in pairs],
        [[*p["bbox"], p["area"], *p.get("image_size", [])] for _, _, p, _ in pairs],
    )


def _predict_instances(vectors: Vectors, setting: str) -> list[tuple[int, Instance]]:
    """Our instances of all images, each with the number of its image."""
    settings = vectors.record["settings"]
    kind, _, resolution = setting.rpartition(".")
    parsed = SETTING.fullmatch(kind)
    if parsed is None or resolution not in ("full", "lowres"):
        raise ValueError(f"the setting {setting!r} is not understood")
    temperature, threshold = parsed["temperature"], parsed["threshold"]
    options: dict[str, Any] = {
        "temperature": float(temperature or settings["temperature"]),
        "threshold": _decimal(threshold) if threshold else settings["threshold"],
        "suppression": parsed["kind"].lower(),
        "max_overlap": settings["nms_threshold"],
        "sigma": settings["sigma"],
        "min_score": settings["score_threshold"],
    }
    size = _target_size(vectors) if resolution == "full" else None
    io = vectors.io
    text = io["text_embeddings"]
    proposals = io["mask_proposals"]
    if proposals.ndim == 5:
        proposals = proposals[:, -1]
    return [
        (image, instance)
        for image, (probs, tokens) in enumerate(zip(proposals, io["patch_tokens"], strict=True))
        for instance in instance_predictions(probs, tokens, text, size, **options)
    ]


def _pair(
    ours: list[tuple[int, Instance]], published: list[dict[str, Any]], masks: NDArray[Any]
) -> list[tuple[int, Instance, dict[str, Any], NDArray[Any]]]:
    """Our instances beside the most similar published ones; the order says nothing."""
    costs = np.zeros((len(ours), len(published)))
    for row, (image, instance) in enumerate(ours):
        for column, theirs in enumerate(published):
            mask = masks[theirs["mask_index"]]
            same_shape = mask.shape == instance.mask.shape
            costs[row, column] = (
                1e6 * (_image_id(image, theirs) != theirs["image_id"])
                + 1e5 * (instance.label_id != theirs["category_id"])
                + (np.count_nonzero(mask != instance.mask) if same_shape else mask.size)
                + abs(instance.score - theirs["score"])
            )
    rows, columns = linear_sum_assignment(costs)
    return [
        (*ours[row], published[column], masks[published[column]["mask_index"]])
        for row, column in zip(rows, columns, strict=True)
    ]


def _image_id(image: int, theirs: dict[str, Any]) -> int:
    """The published id of our image; 0 everywhere if the caller gave no ids."""
    return FIRST_IMAGE_ID + image if theirs["image_id"] else 0


def _size(shape: tuple[int, ...], theirs: dict[str, Any]) -> tuple[int, ...]:
    return shape if "image_size" in theirs else ()


def _target_size(vectors: Vectors) -> tuple[int, int]:
    height, width = vectors.record["settings"]["target_size"]
    return height, width


def _decimal(digits: str) -> float:
    """0.6 from "06" or "0.6"."""
    return float(digits if "." in digits else f"{digits[0]}.{digits[1:] or 0}")
