"""Spectral clustering and voting on hand-made and degenerate features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import eigh

from pipeline.models.masks.spectral import (
    feature_affinity,
    spectral_clusters,
    spectral_embedding,
    spectral_mask,
    vote,
)


def blob_features(height: int, width: int, *, seed: int = 0) -> torch.Tensor:
    """(8, height, width) with one object in the middle, the rest background, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(2, 8, generator=generator)
    inside = torch.zeros(height, width, dtype=torch.long)
    inside[height // 4 : -(height // 4), width // 4 : -(width // 4)] = 1
    noise = torch.randn(8, height, width, generator=generator)
    return directions[inside].permute(2, 0, 1) + 0.1 * noise


def test_candidates_that_are_all_empty_elect_the_first() -> None:
    assert vote(np.zeros((3, 4, 5), bool)) == 0


def test_no_candidates_is_an_error() -> None:
    with pytest.raises(ValueError, match="no candidate masks"):
        vote(np.zeros((0, 4, 5), bool))


def test_votes_on_one_pixel() -> None:
    assert vote(np.array([[[False]], [[True]]])) == 1


@pytest.mark.parametrize("k", [2, 3, 4])
def test_clustering_at_several_k_at_once_changes_nothing(k: int) -> None:
    features = blob_features(9, 12)
    together = spectral_clusters(features, [2, 3, 4])
    np.testing.assert_array_equal(together[k - 2], spectral_clusters(features, [k])[0])


@pytest.mark.parametrize("k", [2, 3, 4])
def test_eigenvectors_solve_the_generalised_problem(k: int) -> None:
    features = blob_features(9, 12)
    vectors = spectral_embedding(features, k + 1)
    affinity = feature_affinity(features)
    degrees = np.diag(affinity.sum(axis=1))
    values = eigh(degrees - affinity, degrees, eigvals_only=True, subset_by_index=(0, k))
    np.testing.assert_allclose(
        (degrees - affinity) @ vectors, degrees @ vectors * values, atol=1e-9
    )
    np.testing.assert_allclose(vectors.T @ degrees @ vectors, np.eye(k + 1), atol=1e-10)


def test_large_maps_take_another_solver_with_the_same_vectors() -> None:
    features = blob_features(12, 14)
    dense = spectral_embedding(features, 2)
    iterative = spectral_embedding(features, 2, max_dense=20)
    np.testing.assert_allclose(np.abs(iterative), np.abs(dense), atol=1e-8)
    np.testing.assert_array_equal(iterative, spectral_embedding(features, 2, max_dense=20))
    affinity = feature_affinity(features)
    degrees = np.diag(affinity.sum(axis=1))
    textbook = eigh(degrees - affinity, degrees, eigvals_only=True, subset_by_index=(0, 1))
    quotients = np.diag(iterative.T @ (degrees - affinity) @ iterative)
    np.testing.assert_allclose(quotients, textbook, atol=1e-8)


def test_the_object_wins_on_a_non_square_image() -> None:
    mask = spectral_mask([blob_features(8, 12)], size=(64, 96))
    truth = np.zeros((64, 96), bool)
    truth[16:48, 24:72] = True
    assert mask.shape == truth.shape
    assert mask.dtype == bool
    assert (mask & truth).sum() / (mask | truth).sum() > 0.8


def test_several_maps_of_different_size_vote_together() -> None:
    maps = [blob_features(8, 8, seed=1), blob_features(12, 12, seed=2)]
    mask = spectral_mask(maps, size=(48, 48))
    truth = np.zeros((48, 48), bool)
    truth[12:36, 12:36] = True
    assert (mask & truth).sum() / (mask | truth).sum() > 0.8


def test_padding_is_cropped() -> None:
    features = blob_features(8, 12)
    whole = spectral_mask([features], size=(64, 96))
    cropped = spectral_mask([features], size=(61, 93), padded_size=(64, 96))
    np.testing.assert_array_equal(cropped, whole[:61, :93])


def test_equal_input_gives_equal_masks() -> None:
    features = torch.randn(6, 9, 7, generator=torch.Generator().manual_seed(3))
    first, second = (spectral_mask([features], size=(36, 28)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (6, 4)])
def test_features_without_any_contrast_give_some_mask(size: tuple[int, int]) -> None:
    mask = spectral_mask([torch.ones(4, *size)], size=(size[0] * 8, size[1] * 8))
    assert mask.shape == (size[0] * 8, size[1] * 8)


def test_more_clusters_than_positions_are_cut_to_them() -> None:
    features = torch.eye(4).reshape(4, 2, 2)
    [labels] = spectral_clusters(features, [9])
    assert labels.shape == (2, 2)
    assert labels.max() <= 3
    assert labels[0, 0] == 0


@pytest.mark.parametrize(("maps", "clusters"), [([], [2]), ([torch.ones(1, 2, 2)], [])])
def test_nothing_to_cluster_is_an_error(maps: list[torch.Tensor], clusters: list[int]) -> None:
    with pytest.raises(ValueError, match="feature maps"):
        spectral_mask(maps, size=(8, 8), clusters=clusters)


def test_positions_without_features_are_a_cluster_of_their_own() -> None:
    """As after a ReLU: their cosine with all others, and with themselves, is 0."""
    features = torch.zeros(2, 4, 4)
    features[0, :2], features[1, 2:] = 1.0, 1.0
    features[:, 0, 0] = 0.0
    affinity = feature_affinity(features)
    assert affinity[0, 0] == 1
    assert affinity[0, 1:].sum() == 0
    assert np.isfinite(spectral_embedding(features, 3)).all()
