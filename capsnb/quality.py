"""How close samples come to real images, both given as features [images, numbers]: distances, shares, neighbours.

Every measure depends on how many images it is taken from, so all of them are returned, and quoted, with that number.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capsnb.checks import require_finite, require_floats

CONFIDENT = 0.9  # probability of the likeliest class above which the classifier counts as sure
_PART = 1000  # rows of a matrix of distances held at once


def frechet_distance(real: Float[Tensor, "N F"], fake: Float[Tensor, "M F"]) -> float:
    """The squared Fréchet distance of two Gaussians with the means and covariances of the features: FID.  Heusel2017.

    |m - m'|² + tr(C + C' - 2 (C C')^½). Raises ValueError for fewer than two images of a kind.
    """
    _require_features(real, fake, least=2)
    (mean, root), (other_mean, other_root) = _moments(real), _moments(fake)
    # With C = R Rᵀ and C' = R' R'ᵀ the trace of (C C')^½ is the sum of the singular values of Rᵀ R'.
    overlap = torch.linalg.svdvals(root.T @ other_root).sum()
    variances = root.square().sum() + other_root.square().sum()
    return ((mean - other_mean).square().sum() + variances - 2 * overlap).item()


def kernel_distance(
    real: Float[Tensor, "N F"],
    fake: Float[Tensor, "M F"],
    *,
    subsets: int = 100,
    size: int = 1000,
    rng: torch.Generator,
) -> tuple[float, float]:
    """The squared maximum mean discrepancy under the kernel (x·y/F + 1)³: KID.  Binkowski2018.

    Returns the mean of ``subsets`` unbiased estimates, each from ``size`` images of both kinds, and their deviation.
    Raises ValueError if there are fewer images than that.
    """
    _require_features(real, fake, least=size)
    estimates = []
    for _ in range(subsets):
        x, y = (some[torch.randperm(len(some), generator=rng)[:size]].double() for some in (real, fake))
        within = (_without_diagonal(_cubic(x, x)) + _without_diagonal(_cubic(y, y))) / (size * (size - 1))
        estimates.append(within - 2 * _cubic(x, y).mean())
    found = torch.stack(estimates)
    return found.mean().item(), found.std(correction=0).item()


def precision_recall(
    real: Float[Tensor, "N F"], fake: Float[Tensor, "M F"], *, neighbours: int = 3
) -> tuple[float, float]:
    """The share of fakes among the real ones, and of real ones among the fakes.  Kynkaanniemi2019.

    A point is among others if it lies in a ball about one of them that just reaches that one's k-th neighbour of its
    own kind; ``neighbours`` is k. Raises ValueError if there are not more images than that.
    """
    _require_features(real, fake, least=neighbours + 1)
    precision, _ = ball_counts(fake, real, ball_radii(real, neighbours))
    recall, _ = ball_counts(real, fake, ball_radii(fake, neighbours))
    return tuple((count > 0).double().mean().item() for count in (precision, recall))


def density_coverage(
    real: Float[Tensor, "N F"], fake: Float[Tensor, "M F"], *, neighbours: int = 5
) -> tuple[float, float]:
    """How many real balls a fake lies in, over k, and the share of real balls with a fake in them.  Naeem2020.

    The balls are those of ``precision_recall``; ``neighbours`` is k. Density can exceed 1. Raises ValueError likewise.
    """
    _require_features(real, fake, least=neighbours + 1)
    balls_of_fake, fakes_in_ball = ball_counts(fake, real, ball_radii(real, neighbours))
    return (balls_of_fake.double().mean() / neighbours).item(), (fakes_in_ball > 0).double().mean().item()


def ball_radii(points: Float[Tensor, "N F"], neighbours: int) -> Float[Tensor, "N"]:
    """The distance of every point to its ``neighbours``-th nearest other one."""
    points, nearest = points.double(), neighbours + 1  # every point is the nearest to itself
    parts = (torch.cdist(part, points).topk(nearest, dim=1, largest=False).values for part in points.split(_PART))
    return torch.cat([distances[:, -1] for distances in parts])


def ball_counts(
    points: Float[Tensor, "M F"], centres: Float[Tensor, "N F"], radius: Float[Tensor, "N"]
) -> tuple[Int[Tensor, "M"], Int[Tensor, "N"]]:
    """In how many balls every point lies, and how many points lie in every ball, its surface included."""
    by_point, by_ball = [], torch.zeros(len(centres), dtype=torch.long)
    for part in points.double().split(_PART):
        inside = torch.cdist(part, centres.double()) <= radius
        by_point.append(inside.sum(1))
        by_ball += inside.sum(0)
    return torch.cat(by_point), by_ball


def nearest_neighbours(
    points: Float[Tensor, "M F"], reference: Float[Tensor, "N F"], *, count: int = 1
) -> tuple[Float[Tensor, "M count"], Int[Tensor, "M count"]]:
    """Distances to the ``count`` nearest rows of ``reference``, nearest first, and the numbers of these rows."""
    _require_features(points, reference, least=1)
    found = [torch.cdist(part, reference).topk(count, dim=1, largest=False) for part in points.split(_PART)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def class_measures(probability: Float[Tensor, "M classes"]) -> dict:
    """What a classifier makes of samples: the share it is sure of, the share of every class, and two entropies in nats.

    ``class_entropy`` is that of the classes' shares (log 10 when ten classes are balanced), ``sample_entropy`` the mean
    of that of every sample's own probabilities (0 when each is clearly one class).
    """
    likeliest, found = probability.max(1)
    share = torch.bincount(found, minlength=probability.shape[1]).double() / len(found)
    return {
        "confident": (likeliest > CONFIDENT).double().mean().item(),
        "class_share": share.tolist(),
        "class_entropy": torch.special.entr(share).sum().item(),
        "sample_entropy": torch.special.entr(probability).sum(1).mean().item(),
    }


def compare(real: Float[Tensor, "N F"], fake: Float[Tensor, "M F"], *, rng: torch.Generator) -> dict:
    """All distances and shares of this module, and from how many images of each kind they are taken."""
    size = min(1000, len(real), len(fake))
    kid, kid_deviation = kernel_distance(real, fake, size=size, rng=rng)
    precision, recall = precision_recall(real, fake)
    density, coverage = density_coverage(real, fake)
    return {
        "real": len(real),
        "samples": len(fake),
        "fid": frechet_distance(real, fake),
        "kid": kid,
        "kid_deviation": kid_deviation,
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
    }


def _moments(features: Tensor) -> tuple[Float[Tensor, "F"], Float[Tensor, "F n"]]:
    """The mean of the features and a matrix R with R Rᵀ their covariance, in double precision."""
    centred = features.double() - (mean := features.double().mean(0))
    return mean, torch.linalg.qr(centred / (len(features) - 1) ** 0.5, mode="r").R.T


def _cubic(x: Tensor, y: Tensor) -> Float[Tensor, "N M"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _without_diagonal(kernel: Float[Tensor, "N N"]) -> Float[Tensor, ""]:
    return kernel.sum() - kernel.trace()


def _require_features(*features: Tensor, least: int) -> None:
    for some in features:
        require_floats(features=some)
        require_finite(features=some)
        if len(some) < least:
            raise ValueError(f"{len(some)} images, expected at least {least}; give more, or ask for smaller subsets")
