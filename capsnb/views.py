"""Seeing the same thing again: an image and its nearest like, each a little deformed.

Nothing here knows a label. That what is seen twice in a row is the same thing is the trace rule of Foldiak 1991; that
an image and its nearest neighbours belong to one group is the assumption of Van Gansbeke 2020.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from capsnb.affine import linear_maps, look_through
from capsnb.quality import nearest_neighbours
from capsnb.settings import ViewsSettings


class Views:
    """Groups of views of ``images``: rows [B * count, I, e] for the numbers of B images, one group after another.

    The first view of a group shows the image itself, every other one the image or one of its neighbours, drawn evenly;
    all are deformed. What is drawn comes from torch's global generator, which training seeds anew for every update.
    """

    def __init__(self, images: Float[Tensor, "N 1 28 28"], encode: Callable[[Tensor], Tensor], settings: ViewsSettings):
        self.images, self.encode, self.settings = images, encode, settings
        self.near = neighbours(images, settings.neighbours)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Int[Tensor, "B"]) -> Float[Tensor, "BV I e"]:
        rng = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        choice = torch.randint(self.near.shape[1], (len(rows), self.settings.count), generator=rng)
        choice[:, 0] = 0
        shown = self.near[rows].gather(1, choice).flatten()
        return self.encode(deform(self.images[shown], self.settings, rng=rng))


def neighbours(images: Float[Tensor, "N 1 28 28"], count: int) -> Int[Tensor, "N n"]:
    """For every image its own number, then those of its ``count`` nearest by the angle between images of half the size.

    Fewer where there are not so many images.
    """
    halved = F.normalize(F.avg_pool2d(images, 2).flatten(1), dim=1)
    near = nearest_neighbours(halved, halved, count=min(count + 1, len(images)))[1].cpu()
    near[:, 0] = torch.arange(len(images))  # itself, except where several images are equal
    return near


def deform(
    images: Float[Tensor, "B 1 h w"], settings: ViewsSettings, *, rng: torch.Generator
) -> Float[Tensor, "B 1 h w"]:
    """Every image under an affine map of its own, drawn evenly within the limits of the settings; zeros come in."""

    def within(limit: float) -> Tensor:
        return limit * (2 * torch.rand(len(images), generator=rng) - 1)

    angle, shear = math.radians(1) * within(settings.rotation), within(settings.shear)
    across, down = 1 + within(settings.scale), 1 + within(settings.scale)
    move = [within(settings.shift) * 2 / images.shape[axis] for axis in (3, 2)]
    linear = linear_maps(angle, shear, across, down)
    return look_through(images, torch.cat([linear, torch.stack(move, dim=1)[..., None]], dim=2))
