"""Capsules: the squash, its inverse, and the reshape between feature maps and capsules.  Eqs. 4 and 6, section 4.1."""

import torch
from jaxtyping import Float
from torch import Tensor

from capsnb.checks import require_floats

_LONGEST = 1 - 1e-6  # unsquash diverges at length 1: longer capsules are read as this long


def squash(z: Float[Tensor, "*axes dim"]) -> Float[Tensor, "*axes dim"]:
    """Map each capsule's length n to n²/(1 + n²) in [0, 1), direction kept.  Eq. 4.

    Finite, with finite gradients, for zero and for huge capsules.  Raises ValueError for integers.
    """
    require_floats(z=z)
    scale = z.detach().abs().amax(-1, keepdim=True).clamp(min=1)  # keeps the squares from overflowing; cancels out
    scaled = z / scale
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled * (length / (scale**-2 + length.square()))


def unsquash(x: Float[Tensor, "*axes dim"]) -> Float[Tensor, "*axes dim"]:
    """Map each capsule's length n in [0, 1) back to sqrt(n/(1 - n)), direction kept.  Eq. 6, the inverse of eq. 4.

    Lengths above 1 - 1e-6 are read as 1 - 1e-6 (the map diverges at 1), lengths below 1e-12 as 1e-12 (its slope
    diverges at 0), so values and gradients are always finite.  Raises ValueError for integers.
    """
    require_floats(x=x)
    scale = x.detach().abs().amax(-1, keepdim=True).clamp(min=1)  # as in squash
    scaled = x / scale
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    inside = (length * scale).clamp(1e-12, _LONGEST)
    return scaled / length.clamp(min=1e-12) * torch.where(length > 0, (inside / (1 - inside)).sqrt(), 0)


def to_capsules(features: Float[Tensor, "B channels height width"], dim: int) -> Float[Tensor, "B I dim"]:
    """Group the channels of every position into capsules of ``dim`` numbers: 128 x 6 x 6 -> 576 of 8.  Section 4.1."""
    batch, channels, height, width = features.shape
    if channels % dim:
        raise ValueError(f"{channels} channels do not divide into capsules of {dim}; choose a divisor of {channels}")
    grouped = features.reshape(batch, channels // dim, dim, height, width).permute(0, 3, 4, 1, 2)
    return grouped.reshape(batch, height * width * (channels // dim), dim)


def from_capsules(capsules: Float[Tensor, "B I dim"], shape: tuple[int, int, int]) -> Float[Tensor, "B C H W"]:
    """Put capsules back into a feature map of ``shape`` = (channels, height, width); undoes ``to_capsules``."""
    channels, height, width = shape
    batch, count, dim = capsules.shape
    if count * dim != channels * height * width:
        raise ValueError(f"{count} capsules of {dim} do not fill a feature map of shape {shape}")
    grouped = capsules.reshape(batch, height, width, channels // dim, dim).permute(0, 3, 4, 1, 2)
    return grouped.reshape(batch, channels, height, width)
