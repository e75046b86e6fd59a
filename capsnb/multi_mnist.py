"""MultiMNIST: two digits of different classes, one over the other, made from MNIST as they are needed.  Sabour2017."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from capsnb.checks import require_images
from capsnb.classifier import shift_at_random

SHIFT = 4  # pixels by which a digit is moved at most, each way
SIZE = 28 + 2 * SHIFT


class Pairs(NamedTuple):
    """Images of two digits, each of the two alone where it lies in the image, and their classes."""

    images: Float[Tensor, "B 1 36 36"]
    digits: Float[Tensor, "B 2 1 36 36"]
    labels: Int[Tensor, "B 2"]


def draw_pairs(
    images: Float[Tensor, "N 1 28 28"], labels: Int[Tensor, "N"], count: int, *, rng: torch.Generator
) -> Pairs:
    """``count`` pairs: any image, one of another class, each moved at random, their sum clipped at 1.

    All 36 x 36, in [0, 1]. Raises ValueError for images outside [0, 1] or of another shape, or all of one class.
    """
    require_images(images)
    rows = draw_rows(labels, count, rng=rng)
    alone = F.pad(images[rows.flatten()], [SHIFT] * 4)
    digits = shift_at_random(alone, SHIFT, rng=rng).unflatten(0, (count, 2))
    return Pairs(digits.sum(1).clamp(max=1), digits, labels[rows])


def draw_rows(labels: Int[Tensor, "N"], count: int, *, rng: torch.Generator) -> Int[Tensor, "count 2"]:
    """The numbers of two images of different classes: the first any, the second any that is not of its class.

    Raises ValueError if there is only one class.
    """
    classes, of, sizes = labels.unique(return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"the labels have {len(classes)} class, expected at least 2; take more images")
    first = torch.randint(len(labels), (count,), generator=rng)
    size, end = sizes[of[first]], sizes.cumsum(0)[of[first]]
    # A place among the images of other classes, sorted by class; those behind the class left out move back by its size.
    place = (torch.rand(count, generator=rng, dtype=torch.float64) * (len(labels) - size)).long()
    second = of.argsort(stable=True)[torch.where(place < end - size, place, place + size)]
    return torch.stack([first, second], dim=1)
