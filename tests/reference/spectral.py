"""Spectral clustering, and the vote over candidate masks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipeline.models.masks.spectral import (
    feature_affinity,
    spectral_clusters,
    spectral_embedding,
    vote,
)

from .checks import Parts, Result, close, equal
from .vectors import Vectors

EIGENVALUE_BOUND = 1e-6


def spectral_voting(vectors: Vectors) -> Parts:
    """Every voting setting and every number of clusters."""
    for setting in vectors.record.get("voting", {}):
        yield f"voting/{setting}", partial(_voting, vectors, setting)
    for setting in vectors.record.get("spectral", {}):
        yield f"spectral/{setting}", partial(_clustering, vectors, setting)


def _voting(vectors: Vectors, setting: str) -> Iterator[Result]:
    name, record = f"{vectors.name}/{setting}", vectors.record["voting"][setting]
    own = f"{setting}.candidates"
    candidates = vectors.io[own if own in vectors.io else "candidates"].numpy().astype(bool)
    drop_long = record["remove_long_masks"]
    admitted = np.arange(len(candidates))
    if record["remove_small_large_masks"]:
        admitted = np.flatnonzero(~_is_small_or_large(candidates))
    winner = int(admitted[vote(candidates[admitted], drop_long=drop_long)])
    kept = admitted[_kept(candidates[admitted], drop_long)].tolist()
    yield equal(f"{name}/kept_original_indices", kept, record["kept_original_indices"])
    yield equal(f"{name}/best_original_index", winner, record["best_original_index"])
    yield equal(
        f"{name}/best_index_among_kept", kept.index(winner), record["best_index_among_kept"]
    )
    yield equal(f"{name}/best_mask", candidates[winner], vectors.io[f"{setting}.best_mask"])


def _is_small_or_large(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(N,) whether a mask is below 5 % of the image, or its box (max - min) above 95 %.

    The published code can leave such masks out, which no stage does.
    """
    image_area = masks.shape[1] * masks.shape[2]
    box_areas = [
        np.prod([np.ptp(places) if len(places) else 0 for places in mask.nonzero()])
        for mask in masks
    ]
    return (masks.sum(axis=(1, 2)) < 0.05 * image_area) | (np.array(box_areas) > 0.95 * image_area)


def _kept(candidates: NDArray[np.bool_], drop_long: bool) -> list[int]:
    """Which candidates vote: those of which three copies outvote a mask that surely does."""
    height, width = candidates.shape[1:]
    probe = np.zeros((height, width), bool)
    probe[height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
    kept = [
        index
        for index, mask in enumerate(candidates)
        if vote(np.stack([probe, mask, mask, mask]), drop_long=drop_long) != 0
    ]
    return kept or list(range(len(candidates)))


def _clustering(vectors: Vectors, setting: str) -> Iterator[Result]:
    name, io = f"{vectors.name}/spectral.{setting}", vectors.io.part(f"spectral.{setting}")
    features = io["features"][0]
    k = int(re.sub(r"\D", "", setting))
    [labels] = spectral_clusters(features, [k])
    yield equal(f"{name}.labels_canonical", labels, io["labels_canonical"])
    yield equal(f"{name}.one_hot", labels == np.arange(k)[:, None, None], io["one_hot"])
    affinity = feature_affinity(features)
    degrees = affinity.sum(axis=1)
    if "adjacency" in io:
        yield close(f"{name}.adjacency", affinity, io["adjacency"], bound=5e-6)
    if "degrees" in io:
        yield close(f"{name}.degrees", degrees, io["degrees"], relative=1e-5)
    published = vectors.record["spectral"][setting]["smallest_generalised_eigenvalues"]
    basis = spectral_embedding(features, len(published))
    laplacian = np.diag(degrees) - affinity
    # Of generalised eigenvectors, the Rayleigh quotients are the eigenvalues.
    quotients = np.diag(basis.T @ laplacian @ basis) / (basis**2 * degrees[:, None]).sum(axis=0)
    yield close(
        f"{name}.smallest_generalised_eigenvalues", quotients, published, bound=EIGENVALUE_BOUND
    )
