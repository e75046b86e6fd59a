"""Tiny models solved exactly: Z, the likelihood, its gradient, and draws, on the product of unit balls.  Eqs. 8 to 18.

Densities are relative to the uniform one: a log-likelihood is in nats above the density that is the same everywhere.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from capsnb.checks import require_choice, require_shape
from capsnb.energy import free_energy
from capsnb.routing import route_steps

Couplings = Callable[[Tensor, Tensor], Tensor]  # from x [B, I, e] and W to couplings [B, I, J]


class Points(NamedTuple):
    """Where an integral over the product of unit balls is summed; the weights add up to 1."""

    x: Float[Tensor, "N I e"]
    weight: Float[Tensor, "N"]


def disc_points(lower: int, degree: int) -> Points:
    """Points for ``lower`` capsules of two numbers: Gauss points of the squared radius times equal angles on each disc.

    Exact for polynomials of at most ``degree`` in every capsule.  With constant couplings the product of J experts has
    degree 2J; with routed couplings a higher degree comes closer.  Raises ValueError for lower < 1 or degree < 0.
    """
    if lower < 1 or degree < 0:
        raise ValueError(f"expected lower >= 1 and degree >= 0, got {lower} and {degree}")
    squared, weight = _gauss(degree // 4 + 1)
    angle = torch.arange(degree + 1, dtype=torch.float64) * (2 * torch.pi / (degree + 1))
    disc = squared.sqrt()[:, None, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    choice = torch.cartesian_prod(*lower * [torch.arange(disc[..., 0].numel())]).view(-1, lower)
    weights = weight.repeat_interleave(degree + 1) / (degree + 1)
    return Points(disc.flatten(0, 1)[choice], weights[choice].prod(1))


def _gauss(count: int) -> tuple[Tensor, Tensor]:
    """Gauss points of the interval from 0 to 1, and weights that add up to 1, by eigenvectors (Golub and Welsch)."""
    k = torch.arange(1, count, dtype=torch.float64)
    beside = (k / (4 * k.square() - 1).sqrt()).diag(1)
    place, vectors = torch.linalg.eigh(beside + beside.T)
    return (1 + place) / 2, vectors[0].square()


def uniform_in_balls(
    count: int, lower: int, dim: int, *, rng: torch.Generator, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "count lower dim"]:
    """Independent draws, every capsule uniform in the unit ball, on the device of ``rng``."""
    direction = torch.randn(count, lower, dim, generator=rng, dtype=dtype, device=rng.device)
    length = torch.rand(count, lower, 1, generator=rng, dtype=dtype, device=rng.device) ** (1 / dim)
    return length * normalize(direction, dim=2)


def uniform_points(count: int, lower: int, dim: int, *, rng: torch.Generator) -> Points:
    """Equally weighted uniform draws, for capsules of any size: the error falls as one over the root of ``count``."""
    x = uniform_in_balls(count, lower, dim, rng=rng)
    return Points(x, x.new_full((count,), 1 / count))


def constant(coupling: Float[Tensor, "I J"]) -> Couplings:
    """The same couplings for every x."""
    return lambda x, W: coupling.expand(len(x), -1, -1)


def routed(*, rounds: int = 3, over: str = "upper") -> Couplings:
    """Couplings found by routing at every x: functions of x and W, with derivatives.  Eq. 3."""
    return lambda x, W: route_steps(x, W, rounds=rounds, over=over)[-1].coupling


def held(couplings: Couplings) -> Couplings:
    """The same couplings, constants to every derivative."""
    return lambda x, W: couplings(x, W).detach()


def log_z(W: Float[Tensor, "I J d e"], couplings: Couplings, points: Points) -> Float[Tensor, ""]:
    """log(Z/volume): log of the mean of exp(-F) over the product of balls, couplings found at every point.  Eq. 8."""
    F = free_energy(points.x, W, couplings(points.x, W))
    return torch.logsumexp(points.weight.log() - F, dim=0)


def log_z_of_one_expert(W: Float[Tensor, "I 1 d e"], coupling: Float[Tensor, "I 1"]) -> Float[Tensor, ""]:
    """log(Z/volume) of a single upper capsule with constant couplings: log(1 + sum of squares of c_i W_i/(e + 2)).

    ‖z‖² is quadratic in x, and uniform in a ball every coordinate has mean 0 and variance 1/(e + 2).
    """
    return ((coupling[..., None, None] * W).square().sum() / (W.shape[3] + 2)).log1p()


def log_likelihood(
    x: Float[Tensor, "B I e"], W: Float[Tensor, "I J d e"], couplings: Couplings, points: Points
) -> Float[Tensor, "B"]:
    """log P(x) in nats above the uniform density, Z included.  Eqs. 10 and 14."""
    return -free_energy(x, W, couplings(x, W)) - log_z(W, couplings, points)


def frozen_log_likelihood(
    x: Float[Tensor, "B I e"], W: Float[Tensor, "I J d e"], couplings: Couplings, points: Points
) -> Float[Tensor, "B"]:
    """What eq. 18 climbs as it is printed: log P of every x under a model that has *its* couplings everywhere.

    Every x has its own Z, so this is not the logarithm of one density.
    """
    own = couplings(x, W).detach()
    everywhere = points.x.repeat(len(x), 1, 1), W, own.repeat_interleave(len(points.x), dim=0)
    log_terms = points.weight.log() - free_energy(*everywhere).view(len(x), -1)
    return -free_energy(x, W, own) - torch.logsumexp(log_terms, dim=1)


GRADIENTS = {
    "frozen": frozen_log_likelihood,
    "re-routed": lambda x, W, couplings, points: log_likelihood(x, W, held(couplings), points),
    "differentiated": log_likelihood,
}


def gradient(
    x: Float[Tensor, "B I e"], W: Float[Tensor, "I J d e"], couplings: Couplings, points: Points, *, treat: str
) -> Float[Tensor, "I J d e"]:
    """The derivative of the mean log-likelihood of ``x`` with respect to W, the model term integrated.  Eq. 18.

    ``treat`` says what happens to the couplings: "frozen", those of each x in both terms (eq. 18 as printed);
    "re-routed", found anew at every point but constants to the derivative; "differentiated" as well, which is the true
    gradient.  Raises ValueError for another name.
    """
    require_choice(treat, GRADIENTS, "treat")
    W = W.detach().requires_grad_()
    return torch.autograd.grad(GRADIENTS[treat](x, W, couplings, points).mean(), W)[0]


def draw(
    count: int, W: Float[Tensor, "I J d e"], couplings: Couplings, *, rng: torch.Generator
) -> Float[Tensor, "count I e"]:
    """Independent draws from P(x), eq. 10, by rejection from the uniform density.

    No z_j is longer than the sum over i of the largest stretch of W_ij, for couplings up to 1.  The share of uniform
    draws that is kept falls steeply with the number of experts and their size: for tiny models only.
    """
    stretch = torch.linalg.matrix_norm(W.detach(), ord=2).sum(0)
    highest, kept = stretch.square().log1p().sum(), []
    while sum(map(len, kept)) < count:
        x = uniform_in_balls(_PROPOSALS, W.shape[0], W.shape[3], rng=rng, dtype=W.dtype)
        log_share = -free_energy(x, W, couplings(x, W)).detach() - highest
        kept.append(x[torch.rand(len(x), generator=rng, dtype=x.dtype, device=x.device).log() < log_share])
    return torch.cat(kept)[:count]


_PROPOSALS = 20_000  # uniform draws judged at once


class Moved(NamedTuple):
    """Where Markov chains are, and which share of their proposals was accepted."""

    x: Float[Tensor, "B I e"]
    accepted: float


def hmc(
    x: Float[Tensor, "B I e"],
    F: Callable[[Tensor], Tensor],
    *,
    steps: int,
    step_size: float,
    leapfrog: int = 3,
    rng: torch.Generator,
) -> Moved:
    """Hamiltonian Monte Carlo in the product of unit balls: ``steps`` transitions of B chains.  Neal2011.

    ``F`` maps [B, I, e] to the free energy [B], with a derivative; exp(-F) inside the balls is left invariant.  A
    capsule that meets its sphere is reflected, which keeps volume and can be run backwards, so that the acceptance
    needs no correction (Afshar2015).  With ``leapfrog`` = 1 this is Langevin dynamics with Metropolis's correction.
    Raises ValueError if an x lies outside.
    """
    require_shape(x, (None, None, None), "x", "[B, I, e]")
    if (torch.linalg.vector_norm(x, dim=2) > 1 + _ROUNDING).any():
        raise ValueError("a capsule of x is longer than 1; start the chains inside the unit balls")
    accepted = 0.0
    for _ in range(steps):
        momentum = torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)
        proposal, gain = _propose(x, momentum, F, step_size, leapfrog)
        accept = torch.rand(len(x), generator=rng, dtype=x.dtype, device=x.device).log() < gain
        x = torch.where(accept[:, None, None], proposal, x)
        accepted += accept.double().mean().item() / steps
    return Moved(x, accepted)


_ROUNDING = 1e-6  # by which a capsule on its sphere may seem longer than 1


def _propose(x: Tensor, momentum: Tensor, F, step_size: float, leapfrog: int) -> tuple[Tensor, Tensor]:
    """The end of a leapfrog trajectory, and the log of its density with momentum over that of its start."""
    value, slope = _value_and_slope(x, F)
    start = value + momentum.square().sum((1, 2)) / 2
    momentum = momentum - step_size / 2 * slope
    for done in range(leapfrog):
        x, momentum = _drift(x, momentum, step_size)
        value, slope = _value_and_slope(x, F)
        momentum = momentum - (step_size if done < leapfrog - 1 else step_size / 2) * slope
    return x, start - value - momentum.square().sum((1, 2)) / 2


def _value_and_slope(x: Tensor, F) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    value = F(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def _drift(x: Tensor, velocity: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """Place and velocity of every capsule after ``time`` straight on, reflected by the unit sphere."""
    speed, heading = torch.linalg.vector_norm(velocity, dim=2, keepdim=True), normalize(velocity, dim=2)
    outward, gap = (x * heading).sum(2, keepdim=True), (1 - x.square().sum(2, keepdim=True)).clamp(min=0)
    until_sphere = (outward.square() + gap).sqrt() - outward
    left = speed * time - until_sphere
    place, turned = _reflected(normalize(x + until_sphere * heading, dim=2), heading, left)
    return torch.where(left > 0, place, x + time * velocity), torch.where(left > 0, speed * turned, velocity)


def _reflected(hit: Tensor, heading: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
    """Place and direction after a way of length ``path`` that starts with the reflection at ``hit``.

    Such a way is made of chords of one length in one plane. Each turns the whole picture by the same angle, so all of
    them are one rotation, however many there are.
    """
    slant = (hit * heading).sum(2, keepdim=True).clamp(_GRAZING, 1)  # cosine of the angle with the normal
    along = normalize(heading - slant * hit, dim=2)
    chords = (path / (2 * slant)).floor()
    angle = 2 * chords * slant.asin()
    place, along = angle.cos() * hit + angle.sin() * along, angle.cos() * along - angle.sin() * hit
    turned = (1 - slant.square()).sqrt() * along - slant * place
    return place + (path - 2 * slant * chords) * turned, turned


_GRAZING = 1e-6  # a capsule that meets its sphere at a smaller slant is taken to meet it at this one
