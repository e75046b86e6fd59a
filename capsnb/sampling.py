"""Poses to generate from: complete domain, restricted domain, fitted domain.  Section 4.2, Fig. 2."""

import torch
from jaxtyping import Float
from torch import Tensor

from capsnb.capsules import squash
from capsnb.checks import require_choice

DOMAINS = ("complete", "restricted", "fitted")


def sample_poses(
    count: int, poses: "Poses", *, domain: str = "complete", rng: torch.Generator
) -> Float[Tensor, "count J d"]:
    """``count`` squashed poses of every capsule.

    "complete": a standard Gaussian, squashed (Fig. 2 a, c). "restricted": the same, turned onto the half of the sphere
    around the capsule's mean training pose (our reading of Fig. 2 b, d). "fitted": a Gaussian with the mean and
    covariance of the capsule's training poses, cut to length below 1 (ours). Raises ValueError for another domain.
    """
    require_choice(domain, DOMAINS, "domain")
    noise = torch.randn(count, *poses.mean.shape, generator=rng)
    if domain == "complete":
        return squash(noise)
    if domain == "restricted":
        return squash(restrict(noise, poses.mean))
    drawn = poses.mean + torch.einsum("jde,bje->bjd", poses.root, noise)
    return drawn / torch.linalg.vector_norm(drawn, dim=2, keepdim=True).clamp(min=1 - 1e-3) * (1 - 1e-3)


def restrict(pose: Float[Tensor, "B J d"], mean: Float[Tensor, "J d"]) -> Float[Tensor, "B J d"]:
    """Turn every pose x that points away from its capsule's mean pose into -x."""
    away = (pose * mean).sum(-1, keepdim=True) < 0
    return torch.where(away, -pose, pose)


class Poses(torch.nn.Module):
    """Mean and covariance of every capsule's poses over the training images it wins, and the share that it wins."""

    def __init__(self, capsules: int, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(capsules, dim))
        self.register_buffer("covariance", torch.zeros(capsules, dim, dim))
        self.register_buffer("share", torch.zeros(capsules))

    @property
    def root(self) -> Float[Tensor, "J d d"]:
        """A square root of every covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp(min=0).sqrt().unsqueeze(1)

    def fit(self, capsules: Float[Tensor, "B J d"]) -> None:
        """Set the statistics from encoded images; a capsule that wins none keeps zeros."""
        winner = torch.linalg.vector_norm(capsules, dim=2).argmax(1)
        for j in range(capsules.shape[1]):
            mine = capsules[winner == j, j]
            self.share[j] = len(mine) / len(capsules)
            if len(mine) > 1:
                self.mean[j], self.covariance[j] = mine.mean(0), mine.T.cov()


def one_at_a_time(poses: Float[Tensor, "B J d"]) -> Float[Tensor, "B J J d"]:
    """For every pose the whole layer in which that capsule alone is on: [b, j] holds ``poses[b, j]`` at j, else 0."""
    return torch.diag_embed(poses.transpose(1, 2)).permute(0, 2, 3, 1)
