"""Capsules on S^m x R^n x (0, 1): a direction, n numbers of any size, and an activation.  Section 4.2.

The space is the paper's suggestion; it gives no energy for it, so this one is ours. The first m + 1 numbers of z_j are
s_j, squashed as ever: their direction is the point on S^m, their squashed length the activation, so eqs. 4, 5, 12 and
13 stay as they are. The other n are t_j; they drive a Gaussian r_j in R^n:

    E(x, h, r) = - sum over j of [ log(‖s_j‖²) h_j + r_j · t_j - ‖r_j - offset‖² / (2 variance) ]

Given x, r_j is normal with mean offset + variance t_j. Integrated out, it leaves

    F(x) = - sum over j of [ log(1 + ‖s_j‖²) + offset · t_j + variance ‖t_j‖² / 2 ]

whose second term is odd in x: with an offset P(x) and P(-x) differ. Couplings are constants, as in ``capsnb.energy``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from capsnb.capsules import squash
from capsnb.checks import require_choice
from capsnb.model import CapsuleEncoder
from capsnb.routing import forward_map, reverse_map
from capsnb.sampling import Poses, restrict
from capsnb.settings import EncoderSettings

DOMAINS = ("prior", "complete", "restricted", "fitted")
_SMALLEST = 1e-30  # a squared length below is read as this, so that its logarithm is finite


@dataclass(frozen=True)
class Space:
    """How the d numbers of a capsule are shared out, and the Gaussian of those that are not squashed."""

    sphere: int = 8  # m + 1: how many of them give the direction; all d are the paper's ordinary capsule
    offset: float = 1.0  # mean of the first Euclidean number before any image is seen (the others' is 0); ours
    variance: float = 0.01  # of every Euclidean number, for any image; ours, so that both parts get weights alike


def split(z: Float[Tensor, "*axes d"], space: Space) -> tuple[Float[Tensor, "*axes a"], Float[Tensor, "*axes n"]]:
    """The sphere's numbers s and the Euclidean ones t (or r)."""
    return z[..., : space.sphere], z[..., space.sphere :]


def offset_like(t: Float[Tensor, "*axes n"], space: Space) -> Float[Tensor, "*axes n"]:
    """The mean of r before any image is seen: ``space.offset`` along the first axis of R^n."""
    return torch.zeros_like(t).index_fill_(-1, torch.arange(min(1, t.shape[-1]), device=t.device), space.offset)


def state(z: Float[Tensor, "*axes d"], space: Space) -> Float[Tensor, "*axes d"]:
    """A capsule's state: squash(s) (direction times activation) and the mean of r given x, offset + variance t."""
    s, t = split(z, space)
    return torch.cat([squash(s), offset_like(t, space) + space.variance * t], dim=-1)


def states_of(z: Float[Tensor, "B J d"], space: Space) -> Float[Tensor, "B J d"]:
    """The ``state`` of every capsule that is on; zeros for one that is off, whose z is 0."""
    return state(z, space) * (z.abs().amax(2, keepdim=True) > 0)


def energy(
    z: Float[Tensor, "B J d"], h: Float[Tensor, "B J"], r: Float[Tensor, "B J n"], space: Space
) -> Float[Tensor, "B"]:
    """E(x, h, r), where ``z`` is what x gives by eq. 3, ``h`` the binary states and ``r`` the Euclidean parts."""
    s, t = split(z, space)
    on = s.square().sum(2).clamp(min=_SMALLEST).log() * h
    away = (r - offset_like(r, space)).square().sum(2) / (2 * space.variance)
    return -(on + (r * t).sum(2) - away).sum(1)


def free_energy_of(z: Float[Tensor, "B J d"], space: Space) -> Float[Tensor, "B"]:
    """F(x): minus the log of exp(-E), summed over h and integrated over r against its own normalised Gaussian."""
    s, t = split(z, space)
    euclidean = (offset_like(t, space) * t).sum(2) + space.variance / 2 * t.square().sum(2)
    return -(s.square().sum(2).log1p() + euclidean).sum(1)


def contrastive_divergence(
    x: Float[Tensor, "B I e"], W: Float[Tensor, "I J d e"], coupling: Float[Tensor, "B I J"], space: Space
) -> Float[Tensor, ""]:
    """Free energy of the data less that of Algorithm 1's model phase, which sends back ``state`` instead of squash(z).

    Its derivative with respect to W is data term minus model term, couplings and model phase held constant.
    """
    coupling = coupling.detach()
    z = forward_map(x, W, coupling)
    with torch.no_grad():
        x_model = squash(reverse_map(state(z, space), W, coupling))
    return (free_energy_of(z, space) - free_energy_of(forward_map(x_model, W, coupling), space)).mean()


def explanation(
    x: Float[Tensor, "B I e"], W: Float[Tensor, "I J d e"], space: Space
) -> Float[Tensor, "B J"]:
    """The cosine between x and the model phase of each upper capsule alone, as ``capsnb.sparsity.explanation``."""
    flat, cosines = x.flatten(1), []
    for matrix in W.permute(1, 0, 3, 2).flatten(1, 2).unbind(0):
        back = squash((state(flat @ matrix, space) @ matrix.T).view_as(x)).flatten(1)
        cosines.append(F.cosine_similarity(back, flat, dim=1))
    return torch.stack(cosines, dim=1)


class ProductEncoder(CapsuleEncoder):
    """Stage 2 for such capsules: the paper's, with the energy of this module in the place of eq. 7."""

    def __init__(self, lower: int, lower_dim: int, settings: EncoderSettings, space: Space):
        if not 1 <= space.sphere <= settings.dim or settings.sparsity is None or settings.views:
            raise ValueError(f"sphere is {space.sphere}; give 1 to {settings.dim}, and sparsity settings without views")
        super().__init__(lower, lower_dim, settings)
        self.space = space

    @torch.no_grad()
    def couplings(self, x: Float[Tensor, "B I e"]) -> Float[Tensor, "B I J"]:
        """Couplings by agreement, over the capsules that explain x best with their states."""
        return super().couplings(x, explanation(x, self.W, self.space))

    @torch.no_grad()
    def preactivations(self, x: Float[Tensor, "B I e"]) -> Float[Tensor, "B J d"]:
        """z_j = (s_j, t_j) of the capsules that are on; zeros for the others.  Eq. 3."""
        return forward_map(x, self.W, self.couplings(x))

    def encode(self, x: Float[Tensor, "B I e"]) -> Float[Tensor, "B J d"]:
        """The states of the upper capsules."""
        return states_of(self.preactivations(x), self.space)

    def forward(self, x: Float[Tensor, "B I e"]) -> Float[Tensor, ""]:
        """The contrastive divergence of a batch."""
        return contrastive_divergence(x, self.W, self.couplings(x), self.space)


def with_activation(states: Float[Tensor, "*axes d"], space: Space) -> Float[Tensor, "*axes d_plus_1"]:
    """States with their activation as one more number: what the read-out of stage 3 sees."""
    return torch.cat([states, torch.linalg.vector_norm(split(states, space)[0], dim=-1, keepdim=True)], dim=-1)


def sample_states(
    count: int, poses: Poses, space: Space, *, domain: str, rng: torch.Generator
) -> Float[Tensor, "count J d"]:
    """``count`` states of every capsule; ``poses`` are fitted to the training states.

    "prior": a uniform direction, and r from the energy's own Gaussian. "complete": the same, but r around its mean in
    training, with one deviation for all numbers of all capsules. "restricted": that, turned onto the half of the sphere
    around the mean direction. "fitted": a Gaussian with mean and covariance of the training states, the sphere's part
    put back on the sphere. The activation is 1.  Raises ValueError for another domain.
    """
    require_choice(domain, DOMAINS, "domain")
    noise = torch.randn(count, *poses.mean.shape, generator=rng)
    (s, r), (mean_s, mean_r) = split(noise, space), split(poses.mean, space)
    if domain == "fitted":
        values, vectors = torch.linalg.eigh(poses.covariance)
        noise = noise * values.clamp(min=0).sqrt()
        s, r = split(poses.mean + torch.einsum("jde,bje->bjd", vectors, noise), space)
    elif domain == "prior":
        r = offset_like(r, space) + space.variance**0.5 * r
    else:
        r = mean_r + euclidean_deviation(poses, space) * r
    s = F.normalize(s, dim=2)
    return torch.cat([restrict(s, mean_s) if domain == "restricted" else s, r], dim=2)


def euclidean_deviation(poses: Poses, space: Space) -> Float[Tensor, ""]:
    """The root mean square deviation of the Euclidean numbers from their capsule's mean; 0 where there are none."""
    variances = split(poses.covariance.diagonal(dim1=1, dim2=2), space)[1]
    weighted = (poses.share.unsqueeze(1) * variances).sum() / max(variances.shape[1], 1)
    return (weighted / poses.share.sum().clamp(min=1e-12)).sqrt()
