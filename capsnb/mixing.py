"""Mixing by dynamic routing, the model phase of Algorithm 1, and the contrastive divergence it feeds."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from capsnb.capsules import squash
from capsnb.energy import free_energy_of
from capsnb.routing import forward_map, reverse_map


class Mixed(NamedTuple):
    """The model phase: what Algorithm 1 writes with a tilde."""

    x: Float[Tensor, "B I e"]
    z: Float[Tensor, "B J d"]


def mix(
    x: Float[Tensor, "B I e"], W: Float[Tensor, "I J d e"], coupling: Float[Tensor, "B I J"]
) -> Mixed:
    """One step of mixing: route forward, squash, route in reverse, squash, route forward.  Algorithm 1."""
    capsules = squash(forward_map(x, W, coupling))
    x_model = squash(reverse_map(capsules, W, coupling))
    return Mixed(x_model, forward_map(x_model, W, coupling))


def contrastive_divergence(
    x: Float[Tensor, "B I e"], W: Float[Tensor, "I J d e"], coupling: Float[Tensor, "B I J"]
) -> Float[Tensor, ""]:
    """A scalar whose derivative with respect to W is minus Algorithm 1's update (data term minus model term).

    It is the free energy of the data less that of the mixed model phase, both batch means, couplings and model phase
    held constant: the derivative of the free energy is minus the first term of eq. 18.
    """
    coupling = coupling.detach()
    z = forward_map(x, W, coupling)
    with torch.no_grad():
        x_model = squash(reverse_map(squash(z), W, coupling))
    return (free_energy_of(z) - free_energy_of(forward_map(x_model, W, coupling))).mean()
