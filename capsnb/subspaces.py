"""K-subspaces (Bradley 2000) on groups of views: clusters of groups that lie near one linear subspace each.

A capsule that alone takes every coupling sends back what lies in the subspace that the rows of its W span. Without the
squash, the subspace that sends back most of the squared length of its images is their principal one: closed form.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from sklearn.cluster import KMeans
from torch import Tensor


class Clusters(NamedTuple):
    """A clustering: an orthonormal basis for every cluster, and the mean share of squared length that it explains."""

    bases: Float[Tensor, "K d D"]
    explained: float


def k_subspaces(
    groups: Float[Tensor, "N V D"], *, clusters: int, dim: int, tries: int, sweeps: int, seed: int
) -> Clusters:
    """The best of ``tries`` clusterings of groups of unit vectors into subspaces of ``dim`` dimensions.

    Each begins with k-means of the groups' means and sweeps: fit every cluster's principal subspace, then give every
    group to the subspace that explains most of it. A cluster that is left with fewer vectors than ``dim`` is dropped
    from the choice of that try: its subspace explains nothing. Raises ValueError for more clusters than groups.
    """
    if clusters > len(groups):
        raise ValueError(f"{len(groups)} groups cannot fill {clusters} clusters; give at least {clusters}")
    return max((_one_try(groups, clusters, dim, sweeps, seed + i) for i in range(tries)), key=lambda c: c.explained)


def _one_try(groups: Tensor, clusters: int, dim: int, sweeps: int, seed: int) -> Clusters:
    means = groups.mean(1).cpu().numpy()
    winner = torch.as_tensor(KMeans(clusters, n_init=1, random_state=seed).fit(means[:5000]).predict(means))
    winner = winner.long().to(groups.device)
    for _ in range(sweeps):
        bases = torch.stack([_principal(groups[winner == k].flatten(0, 1), dim) for k in range(clusters)])
        explained = explained_by(groups, bases)
        winner = explained.argmax(1)
    return Clusters(bases, explained.amax(1).mean().item())


def _principal(vectors: Float[Tensor, "n D"], dim: int) -> Float[Tensor, "d D"]:
    """An orthonormal basis of the subspace nearest to ``vectors``; zeros if there are fewer than its dimensions."""
    if len(vectors) < dim:
        return vectors.new_zeros(dim, vectors.shape[1])
    gram = (vectors.T @ vectors).cpu()  # where one small decomposition after the other is fastest
    return torch.linalg.eigh(gram).eigenvectors[:, -dim:].T.to(vectors)


def explained_by(groups: Float[Tensor, "N V D"], bases: Float[Tensor, "K d D"]) -> Float[Tensor, "N K"]:
    """The mean squared length of a group's vectors within each subspace."""
    return torch.stack([(groups @ basis.T).square().sum(2).mean(1) for basis in bases], dim=1)


def principal_directions(vectors: Float[Tensor, "n D"], count: int) -> Float[Tensor, "D count"]:
    """Nearly the orthonormal directions that keep most of the squared length of ``vectors`` (Halko 2011).

    Drawn from torch's global generator.
    """
    return torch.svd_lowrank(vectors, q=min(count, *vectors.shape))[2]
