"""ZUTIS: losses, their gradients, and the matches they rest on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.models.zutis.losses import mask_loss, semantic_loss
from pipeline.models.zutis.matching import mask_costs, match

from .checks import Parts, Result, close, equal, failure, none_differs
from .vectors import Tensors, Vectors

LOSS_RELATIVE = 1e-5
TIED_COSTS = 1e-6
LOSSES = ("ce_loss", "mask_loss", "loss")
Pair = tuple[int, int]  # image, decoder layer


def criterion(vectors: Vectors) -> Parts:
    """Losses, gradients, costs and matches of each case."""
    for part in vectors.parts():
        yield part, partial(_criterion_part, vectors, part)


def _criterion_part(vectors: Vectors, part: str) -> Iterator[Result]:
    name, io, record = (
        f"{vectors.name}/{part}",
        vectors.io.part(part),
        vectors.record["cases"][part],
    )
    instance_masks = [io[f"instance_masks.{i}"].bool() for i in range(len(io["mask_proposals"]))]
    yield equal(
        f"{name}/instances_per_image",
        [len(masks) for masks in instance_masks],
        record["instances_per_image"],
    )
    ignore_index = vectors.record["ignore_index"]
    yield from _losses(name, io, record, masks=instance_masks, ignore_index=ignore_index)
    yield from _matches(name, io, record, masks=instance_masks)


def _losses(
    name: str, io: Tensors, record: dict[str, Any], *, masks: list[Tensor], ignore_index: int
) -> Iterator[Result]:
    proposals = io["mask_proposals"].clone().requires_grad_()
    tokens = io["patch_tokens"].clone().requires_grad_()
    weights = record["weights"]
    ce_loss = semantic_loss(
        tokens, io["text_embeddings"], io["semantic_masks"].long(), ignore_index=ignore_index
    )
    masks_loss = mask_loss(_with_layers(proposals), masks, **_mask_weights(record))
    total = weights["weight_ce_loss"] * ce_loss + weights["weight_mask_loss"] * masks_loss
    total.backward()
    for key, value in zip(LOSSES, (ce_loss, masks_loss, total), strict=True):
        yield close(f"{name}/{key}", value, record[key], relative=LOSS_RELATIVE)
    for key, tensor in (("mask_proposals", proposals), ("patch_tokens", tokens)):
        if f"grad.{key}" in io and tensor.grad is not None:
            yield close(f"{name}/grad.{key}", tensor.grad, io[f"grad.{key}"])


def _matches(
    name: str, io: Tensors, record: dict[str, Any], *, masks: list[Tensor]
) -> Iterator[Result]:
    proposals = _with_layers(io["mask_proposals"])
    costs: dict[Pair, Tensor] = {}
    pairs: dict[Pair, tuple[list[int], list[int]]] = {}
    for image, image_masks in enumerate(masks):
        if not image_masks.any():
            continue
        image_costs = mask_costs(proposals[image], image_masks, **_mask_weights(record))
        instances, queries = match(image_costs)
        for layer, layer_costs in enumerate(image_costs):
            costs[image, layer] = layer_costs
            pairs[image, layer] = instances[layer].tolist(), queries[layer].tolist()
    for (image, layer), values in costs.items():
        if f"cost.{image}.{layer}" in io:
            expected = io[f"cost.{image}.{layer}"]
            yield close(f"{name}/cost.{image}.{layer}", values, expected, relative=LOSS_RELATIVE)
    published = {(entry["image"], entry["layer"]): entry for entry in record["matches"]}
    yield _same_matches(f"{name}/matches", pairs, published, costs=costs)
    shared = sorted(pairs.keys() & published.keys())
    yield close(
        f"{name}/matched_cost_sum",
        [_matched_sum(costs[key], *pairs[key]) for key in shared],
        [published[key]["matched_cost_sum"] for key in shared],
        relative=LOSS_RELATIVE,
    )
    if pairs:
        last = max(pairs)
        returned = {key: record[f"returned_{key}"] for key in ("instance_indices", "query_indices")}
        label = f"{name}/returned_indices"
        yield _same_matches(label, {last: pairs[last]}, {last: returned}, costs=costs)


def _same_matches(
    name: str,
    ours: dict[Pair, tuple[list[int], list[int]]],
    published: dict[Pair, dict[str, Any]],
    *,
    costs: dict[Pair, Tensor],
) -> Result:
    """Equal pairs everywhere; other pairs of the same total cost are a tie and count as equal."""
    if ours.keys() != published.keys():
        return failure(name, f"matched {sorted(ours)}, published {sorted(published)}")
    wrong = [
        f"image {key[0]} layer {key[1]}"
        for key, entry in published.items()
        if not _same_pairs(costs[key], ours[key], _indices(entry))
    ]
    return none_differs(name, wrong)


def _indices(entry: dict[str, Any]) -> tuple[list[int], list[int]]:
    return entry["instance_indices"], entry["query_indices"]


def _same_pairs(
    costs: Tensor, ours: tuple[list[int], list[int]], published: tuple[list[int], list[int]]
) -> bool:
    if sorted(zip(*ours, strict=True)) == sorted(zip(*published, strict=False)):
        return True
    instances, queries = published
    valid = (
        len(set(instances)) == len(set(queries)) == len(instances) == len(queries) == len(ours[0])
        and max(instances) < costs.shape[0]
        and max(queries) < costs.shape[1]
    )
    if not valid:
        return False
    best = _matched_sum(costs, *ours)
    return abs(_matched_sum(costs, instances, queries) - best) <= TIED_COSTS * abs(best)


def _matched_sum(costs: Tensor, instances: list[int], queries: list[int]) -> float:
    return float(costs[torch.tensor(instances), torch.tensor(queries)].sum())


def _mask_weights(record: dict[str, Any]) -> dict[str, Any]:
    weights = record["weights"]
    return {"dice_weight": weights["weight_dice_loss"], "bce_weight": weights["weight_bce_loss"]}


def _with_layers(proposals: Tensor) -> Tensor:
    """(B, L, Q, h, w); published without L if there is one layer."""
    return proposals if proposals.ndim == 5 else proposals[:, None]
