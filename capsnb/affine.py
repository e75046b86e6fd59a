"""Affine maps of images: the linear part from what it does, and images seen through such a map."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def linear_maps(
    angle: Float[Tensor, "B"], shear: Float[Tensor, "B"], across: Float[Tensor, "B"], down: Float[Tensor, "B"]
) -> Float[Tensor, "B 2 2"]:
    """R(angle) [[across, shear], [0, down]] on columns (x, y), y downwards: stretch and slant, then turn.

    ``angle`` in radians, clockwise as an image shows it. The determinant is ``across * down``.
    """
    cos, sin = angle.cos(), angle.sin()
    top = torch.stack([cos * across, cos * shear - sin * down], dim=1)
    bottom = torch.stack([sin * across, sin * shear + cos * down], dim=1)
    return torch.stack([top, bottom], dim=1)


def look_through(images: Float[Tensor, "B 1 h w"], maps: Float[Tensor, "B 2 3"]) -> Float[Tensor, "B 1 h w"]:
    """Images whose pixel at p is the one that ``images`` has at maps @ (p, 1), interpolated bilinearly.

    Both places count from the middle of the picture, in halves of its width and height. Zeros come in from outside.
    """
    grid = F.affine_grid(maps.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
