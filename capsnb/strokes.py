"""Measurements of handwriting: area, stroke width, slant, height, width and holes of every image.

Images are light strokes on a dark ground, in [0, 1]; lengths are in pixels. An image without ink measures 0.
"""

import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from capsnb.checks import require_images

_FINER = 4  # stroke widths are measured on a grid this much finer, for strokes of 2 or 3 pixels


def area(images: Float[Tensor, "B 1 28 28"]) -> Float[Tensor, "B"]:
    """The sum of the ink: how many white pixels it would fill."""
    require_images(images)
    return images.sum((1, 2, 3))


def stroke_width(images: Float[Tensor, "B 1 28 28"]) -> Float[Tensor, "B"]:
    """Four times the mean distance of ink (at least half white) from the edge of its stroke.

    This is the width of a straight stroke much longer than wide. Ends and corners count as narrower: a stroke five
    times as long as wide measures about a tenth less, a disc two thirds of its diameter.
    """
    require_images(images)
    finer = F.interpolate(images, scale_factor=_FINER, mode="bilinear", align_corners=False)[:, 0] >= 0.5
    padded = F.pad(finer, (1, 1, 1, 1)).cpu().numpy()
    means = [(ndimage.distance_transform_edt(ink)[ink].mean() - 0.5) if ink.any() else 0.0 for ink in padded]
    return 4 / _FINER * torch.as_tensor(means).to(images)  # the edge is half a pixel before the first dark pixel


def slant(images: Float[Tensor, "B 1 28 28"]) -> Float[Tensor, "B"]:
    """The angle in degrees by which the writing is sheared, from its second moments; positive leans to the right."""
    require_images(images)
    _, _, upright, shear = _moments(images)
    return torch.atan2(-shear, upright).rad2deg() + 0.0  # turns -0 into 0


def height(images: Float[Tensor, "B 1 28 28"]) -> Float[Tensor, "B"]:
    """The height of an evenly filled box whose ink would be spread up and down as much."""
    require_images(images)
    ink, _, upright, _ = _moments(images)
    return torch.where(ink > 0, (12 * upright + 1).sqrt(), 0)


def width(images: Float[Tensor, "B 1 28 28"]) -> Float[Tensor, "B"]:
    """The width of an evenly filled box whose ink would be spread sideways as much."""
    require_images(images)
    ink, sideways, _, _ = _moments(images)
    return torch.where(ink > 0, (12 * sideways + 1).sqrt(), 0)


def holes(images: Float[Tensor, "B 1 28 28"]) -> Float[Tensor, "B"]:
    """How many dark regions the ink (at least half white) closes in: 1 for a 0, 2 for an 8."""
    require_images(images)
    ground = F.pad(images[:, 0] < 0.5, (1, 1, 1, 1), value=True).cpu().numpy()
    return torch.tensor([ndimage.label(image)[1] - 1 for image in ground]).to(images)


MEASUREMENTS = {
    "area": area,
    "stroke_width": stroke_width,
    "slant": slant,
    "height": height,
    "width": width,
    "holes": holes,
}


def _moments(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ink of every image, and its central second moments per ink: xx, yy, xy (x to the right, y down)."""
    weights = images[:, 0].flatten(1)
    ink = weights.sum(1)
    weights = weights / ink.clamp(min=1e-12).unsqueeze(1)
    places = torch.arange(28).to(images)
    y, x = (grid.flatten() for grid in torch.meshgrid(places, places, indexing="ij"))
    x, y = x - (weights @ x).unsqueeze(1), y - (weights @ y).unsqueeze(1)
    return ink, *((weights * product).sum(1) for product in (x * x, y * y, x * y))
