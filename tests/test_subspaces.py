"""K-subspaces: what is explained, what is found, which try is kept."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from capsnb.subspaces import explained_by, k_subspaces, principal_directions

OPTIONS = {"tries": 3, "sweeps": 7, "seed": 0}


@pytest.fixture
def planted(rng):
    """211 groups of 3 unit vectors in 11 dimensions, each group in one of 5 planes, and which."""
    planes = torch.linalg.qr(torch.randn(5, 11, 2, generator=rng))[0].mT
    truth = torch.arange(211) % 5
    weights = torch.tensor([2.0, 0.5]) + 0.5 * torch.randn(211, 3, 2, generator=rng)
    vectors = torch.einsum("nvd,nde->nve", weights, planes[truth]) + 0.02 * torch.randn(211, 3, 11, generator=rng)
    return F.normalize(vectors, dim=2), planes, truth


def test_what_a_subspace_explains_is_the_squared_length_of_the_projection(double):
    groups, bases = double(7, 3, 11), torch.linalg.qr(double(5, 11, 2))[0].mT
    found = explained_by(groups, bases)
    for n in range(7):
        for k in range(5):
            projected = [bases[k].numpy().T @ bases[k].numpy() @ vector for vector in groups[n].numpy()]
            assert_close(found[n, k].item(), np.mean([np.sum(p**2) for p in projected]))


def test_planted_planes_are_found_again(planted):
    groups, planes, truth = planted
    clusters = k_subspaces(groups, clusters=5, dim=2, **OPTIONS)
    assert clusters.explained > 0.99
    assert_close(clusters.bases @ clusters.bases.mT, torch.eye(2).expand(5, 2, 2), rtol=0, atol=1e-5)
    winner = explained_by(groups, clusters.bases).argmax(1)
    for k in range(5):
        assert len(set(truth[winner == k].tolist())) == 1
    cosines = torch.linalg.svdvals(clusters.bases[winner[:5]] @ planes.mT)
    assert cosines.min() > 0.99


def test_the_try_that_explains_most_is_kept(rng):
    groups = F.normalize(torch.randn(211, 3, 11, generator=rng), dim=2)
    alone = [k_subspaces(groups, clusters=5, dim=2, tries=1, sweeps=1, seed=seed).explained for seed in range(7)]
    best = k_subspaces(groups, clusters=5, dim=2, tries=7, sweeps=1, seed=0).explained
    assert best == max(alone) > min(alone)


def test_the_groups_decide_together(rng):
    """One view of each group lies in the other group's plane; the other two outvote it."""
    groups = 0.01 * torch.randn(200, 3, 5, generator=rng)
    groups[:100, :2, 0] = groups[100:, :2, 1] = groups[:100, 2, 1] = groups[100:, 2, 0] = 1.0
    bases = torch.eye(5)[:2, None]
    assert explained_by(F.normalize(groups, dim=2), bases).argmax(1).tolist() == [0] * 100 + [1] * 100


def test_a_cluster_with_too_few_vectors_explains_nothing():
    groups = torch.eye(7)[torch.arange(60) % 2][:, None]
    clusters = k_subspaces(groups, clusters=5, dim=2, **OPTIONS)
    assert clusters.bases.isfinite().all() and clusters.explained == pytest.approx(1.0)


def test_more_clusters_than_groups_are_refused():
    with pytest.raises(ValueError, match="3 groups cannot fill 5 clusters; give at least 5"):
        k_subspaces(torch.eye(3)[:, None], clusters=5, dim=2, **OPTIONS)


def test_principal_directions_are_nearly_those_of_the_singular_value_decomposition(rng):
    vectors = torch.randn(101, 13, generator=rng) * torch.logspace(1, -3, 13)
    torch.manual_seed(0)
    found = principal_directions(vectors, 5)
    exact = torch.linalg.svd(vectors, full_matrices=False).Vh[:5]
    assert_close(found.T @ found, torch.eye(5), rtol=0, atol=1e-5)
    assert torch.linalg.svdvals(exact @ found).min() > 0.99
