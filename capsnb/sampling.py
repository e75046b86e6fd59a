"""Poses to generate from: complete domain, restricted domain, fitted domain.  Section 4.2, Fig. 2."""

import warnings

import torch
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.nn import functional as F

from capsnb.capsules import squash
from capsnb.checks import require_choice

DOMAINS = ("complete", "restricted", "fitted")
COMPONENTS = 10  # Gaussians in the mixture fitted to a capsule's directions


def sample_poses(
    count: int, poses: "Poses", *, domain: str = "complete", rng: torch.Generator
) -> Float[Tensor, "count J d"]:
    """``count`` squashed poses of every capsule.

    "complete": a standard Gaussian, squashed (Fig. 2 a, c). "restricted": the same, turned onto the half of the sphere
    around the capsule's mean training pose (our reading of Fig. 2 b, d). "fitted": directions from the mixture of
    Gaussians fitted to those of the capsule's training poses, at their mean length (ours; one that never won gives
    zeros). Raises ValueError for another domain.
    """
    require_choice(domain, DOMAINS, "domain")
    noise = torch.randn(count, *poses.mean.shape, generator=rng)
    if domain == "complete":
        return squash(noise)
    if domain == "restricted":
        return squash(restrict(noise, poses.mean))
    return poses.draw(noise, rng=rng)


def sample_layers(count: int, poses: "Poses", *, domain: str, rng: torch.Generator) -> Float[Tensor, "count J d"]:
    """``count`` layers with one capsule on: drawn by the share of training images it won, with a pose of ``domain``."""
    drawn = sample_poses(count, poses, domain=domain, rng=rng)
    on = torch.multinomial(poses.share, count, replacement=True, generator=rng)
    return drawn * F.one_hot(on, len(poses.share)).unsqueeze(2)


def restrict(pose: Float[Tensor, "B J d"], mean: Float[Tensor, "J d"]) -> Float[Tensor, "B J d"]:
    """Turn every pose x that points away from its capsule's mean pose into -x."""
    away = (pose * mean).sum(-1, keepdim=True) < 0
    return torch.where(away, -pose, pose)


class Poses(torch.nn.Module):
    """What is known of every capsule's poses over the training images it wins.

    The share of images that it wins; the mean and the covariance of its poses; their mean length, and a mixture of
    Gaussians of their directions: ``weights``, ``centres`` and square roots of the covariances.
    """

    bounded = True  # squashed capsules are shorter than 1
    reach = 0.25  # how far Sabour 2017 moves one number, to see what it does

    def __init__(self, capsules: int, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(capsules, dim))
        self.register_buffer("covariance", torch.zeros(capsules, dim, dim))
        self.register_buffer("share", torch.zeros(capsules))
        self.register_buffer("length", torch.zeros(capsules))
        self.register_buffer("weights", torch.full((capsules, COMPONENTS), 1 / COMPONENTS))
        self.register_buffer("centres", torch.zeros(capsules, COMPONENTS, dim))
        self.register_buffer("roots", torch.zeros(capsules, COMPONENTS, dim, dim))

    @property
    def spread(self) -> Float[Tensor, "J d"]:
        """The standard deviation of every number."""
        return self.covariance.diagonal(dim1=1, dim2=2).sqrt()

    def draw(self, noise: Float[Tensor, "B J d"], *, rng: torch.Generator) -> Float[Tensor, "B J d"]:
        """Poses from the fitted mixtures, with the components drawn here and the rest made of standard ``noise``."""
        component = torch.multinomial(self.weights, len(noise), replacement=True, generator=rng).T  # [B, J]
        each = self.centres + torch.einsum("jkde,bje->bjkd", self.roots, noise)
        drawn = torch.take_along_dim(each, component[..., None, None], dim=2).squeeze(2)
        return F.normalize(drawn, dim=2) * self.length.unsqueeze(1)

    def fit(self, capsules: Float[Tensor, "B J d"]) -> None:
        """Set everything from encoded images; a capsule that wins none keeps zeros."""
        winner = torch.linalg.vector_norm(capsules, dim=2).argmax(1)
        for j in range(capsules.shape[1]):
            mine = capsules[winner == j, j]
            self.share[j] = len(mine) / len(capsules)
            if len(mine) > 1:
                self.mean[j], self.covariance[j] = mine.mean(0), mine.T.cov()
                self.length[j] = torch.linalg.vector_norm(mine, dim=1).mean()
                self._fit_mixture(j, F.normalize(mine, dim=1))

    def _fit_mixture(self, j: int, directions: Float[Tensor, "n d"]) -> None:
        count, dim = directions.shape
        components = max(1, min(COMPONENTS, count // (4 * dim)))  # fewer where there are few poses to fit them to
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture = GaussianMixture(components, reg_covar=1e-5, max_iter=50, random_state=0).fit(directions.numpy())
        self.weights[j] = 0
        self.weights[j, :components] = torch.as_tensor(mixture.weights_)
        self.centres[j, :components] = torch.as_tensor(mixture.means_)
        self.roots[j, :components] = torch.linalg.cholesky(torch.as_tensor(mixture.covariances_)).to(self.roots)


def one_at_a_time(poses: Float[Tensor, "B J d"]) -> Float[Tensor, "B J J d"]:
    """For every pose the whole layer in which that capsule alone is on: [b, j] holds ``poses[b, j]`` at j, else 0."""
    return torch.diag_embed(poses.transpose(1, 2)).permute(0, 2, 3, 1)
