"""The energy of expert capsules, its marginal, the firing probabilities and the gradient.  Section 3, eqs. 7 to 18.

``coupling`` is a constant everywhere here: eq. 18 takes no derivative of it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from capsnb.routing import forward_map

_SMALLEST = 1e-30  # a squared length below is read as this, so that its logarithm is finite


def energy(
    x: Float[Tensor, "B I e"], h: Float[Tensor, "B J"], W: Float[Tensor, "I J d e"], coupling: Float[Tensor, "B I J"]
) -> Float[Tensor, "B"]:
    """E(x, h) = - sum over j of log(‖z_j‖²) h_j, for binary states ``h`` of the upper capsules.  Eq. 7."""
    return -(_log_squared_length(forward_map(x, W, coupling)) * h).sum(1)


def free_energy(
    x: Float[Tensor, "B I e"], W: Float[Tensor, "I J d e"], coupling: Float[Tensor, "B I J"]
) -> Float[Tensor, "B"]:
    """F(x) = - sum over j of log(1 + ‖z_j‖²): minus the log of eq. 10 without 1/Z."""
    return free_energy_of(forward_map(x, W, coupling))


def free_energy_of(z: Float[Tensor, "B J d"]) -> Float[Tensor, "B"]:
    """``free_energy`` where ``z``, the upper capsules before the squash, is known already."""
    return -z.square().sum(2).log1p().sum(1)


def firing_probability(z: Float[Tensor, "*axes dim"]) -> Float[Tensor, "*axes"]:
    """P(h_j = 1 given x) = ‖z_j‖²/(1 + ‖z_j‖²) = sigmoid(log ‖z_j‖²).  Eq. 12."""
    return _log_squared_length(z).sigmoid()


def eq18_term(
    x: Float[Tensor, "B I e"], W: Float[Tensor, "I J d e"], coupling: Float[Tensor, "B I J"]
) -> Float[Tensor, "I J d e"]:
    """2 c_ij z_j x_iᵀ / (1 + ‖z_j‖²), the first term of eq. 18, averaged over the batch."""
    z = forward_map(x, W, coupling)
    weight = 2 * z / (1 + z.square().sum(2, keepdim=True)) / len(x)
    upper = zip(weight.unbind(1), coupling.unbind(2))
    return torch.stack([torch.einsum("bd,bie->ide", w, c.unsqueeze(2) * x) for w, c in upper], dim=1)


def _log_squared_length(z: Tensor) -> Tensor:
    return z.square().sum(-1).clamp(min=_SMALLEST).log()
