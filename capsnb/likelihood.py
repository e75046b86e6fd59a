"""Annealed importance sampling: log Z of models that are too large for ``capsnb.exact``.  Neal2001.

Chains start at draws from a base density whose Z is known and are led to the model's through densities in between;
what every step changes is kept as a weight. The mean weight estimates Z over the base's Z without bias, whether or not
the chains mix; how much the weights differ says how far to trust it. Led from the model to the base, draws from the
model estimate the inverse, so that the two directions enclose log Z on average (Grosse2015).

Capsule models: the base is the uniform density on the product of unit balls, so log Z, and every log density, is in
nats relative to it. RBMs: the base is an RBM without weights (Salakhutdinov2008); there, probabilities of images.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from capsnb.baselines import rbm as rbms
from capsnb.baselines.rbm import RBM
from capsnb.energy import free_energy
from capsnb.exact import hmc
from capsnb.model import CapsuleEncoder

FreeEnergy = Callable[[Tensor], Tensor]  # from x [B, I, e] to F [B]
_TARGET = 0.4  # share of proposals the pilots aim at; low, for routing makes F rough, and then short steps gain little
_LONGEST = 1.0  # step size; no two places in a ball are further apart than 2
_HASTE = 0.5  # change of the logarithm of the step size for every unit of acceptance off the target


class Annealed(NamedTuple):
    """Where the chains end, and the logarithms of their weights."""

    state: Float[Tensor, "K ..."]
    log_weight: Float[Tensor, "K"]


class Estimate(NamedTuple):
    """The log of a mean weight, its standard error (delta method), both in nats, and the effective sample size.

    With few effective samples the value tends to be too low, and the error too small.
    """

    value: float
    error: float
    effective: float


def log_mean(log_weight: Float[Tensor, "K"]) -> Estimate:
    """The log of the mean of K weights.  Raises ValueError for fewer than 2, which have no error."""
    if len(log_weight) < 2:
        raise ValueError(f"{len(log_weight)} weights have no standard error; take at least 2 chains")
    chains, share = len(log_weight), log_weight.double().softmax(0)
    value = log_weight.double().logsumexp(0) - math.log(chains)
    error = (share - 1 / chains).square().sum().mul(chains / (chains - 1)).sqrt()  # of the mean, over the mean
    return Estimate(value.item(), error.item(), 1 / share.square().sum().item())


def anneal(
    state: Float[Tensor, "K ..."],
    temperatures: Sequence[float],
    log_ratio: Callable[[Tensor, float, float], Tensor],
    move: Callable[[Tensor, float], Tensor],
) -> Annealed:
    """Lead K chains through inverse ``temperatures``, from draws of the first density to the last.  Neal2001.

    ``log_ratio(state, a, b)`` is the log of the unnormalised density at b over that at a, [K]; ``move(state, b)`` a
    transition that leaves the density at b as it is. The mean weight estimates Z of the last density over Z of the
    first, without bias as long as every ``move`` is settled before the chains start.
    """
    log_weight = torch.zeros(len(state), dtype=torch.float64, device=state.device)
    for before, now in zip(temperatures, temperatures[1:]):
        log_weight = log_weight + log_ratio(state, before, now)
        state = move(state, now)
    return Annealed(state, log_weight)


def anneal_capsules(
    F: FreeEnergy,
    x: Float[Tensor, "K I e"],
    temperatures: Sequence[float],
    *,
    step_sizes: Sequence[float],
    leapfrog: int = 1,
    rng: torch.Generator,
) -> Annealed:
    """``anneal`` through the densities exp(-βF) on the product of unit balls, for β in ``temperatures``.

    From 0 to 1, with uniform ``x``, the mean weight estimates Z/volume. Every move is one transition of Hamiltonian
    Monte Carlo, its step size the one that ``step_sizes`` has for that temperature (see ``tune``).
    """
    size = dict(zip(temperatures, step_sizes, strict=True))

    def move(x, beta):
        return hmc(x, lambda x: beta * F(x), steps=1, step_size=size[beta], leapfrog=leapfrog, rng=rng).x

    return anneal(x, temperatures, lambda x, a, b: (a - b) * F(x).detach(), move)


def tune(
    F: FreeEnergy,
    x: Float[Tensor, "K I e"],
    temperatures: Sequence[float],
    *,
    leapfrog: int = 1,
    rng: torch.Generator,
) -> list[float]:
    """Step sizes for ``anneal_capsules``, one a temperature, from pilot chains that are led the same way and forgotten.

    After every transition the step grows or shrinks as more or fewer than 0.4 of the proposals were accepted. Chains
    that adapted their own steps would bias the estimate a little; those that take the steps of others do not.
    """
    size, sizes = _LONGEST / 2, []
    for beta in temperatures:
        x, accepted = hmc(x, lambda x: beta * F(x), steps=1, step_size=size, leapfrog=leapfrog, rng=rng)  # noqa: B023
        sizes.append(size)
        size = min(size * math.exp(_HASTE * (accepted - _TARGET)), _LONGEST)
    return sizes


def rerouted(encoder: CapsuleEncoder) -> FreeEnergy:
    """F of a trained encoder with the couplings that it finds at every x, competition included.

    Couplings are then a function c(x), and exp(-F) is one well-defined density, though it jumps where a coupling does.
    Its derivative takes them for constants: as a force any function of the position will do, for the acceptance of
    Hamiltonian Monte Carlo looks at F itself. With one capsule j on, F(x) is -log(1 + ‖z_j‖²) of the one that wins x.
    """
    W = encoder.W.detach()
    return lambda x: free_energy(x, W, encoder.couplings(x))


def log_z_of_each_expert(W: Float[Tensor, "I J d e"]) -> Float[Tensor, "J"]:
    """log(Z/volume) of every upper capsule as if it alone were on, coupled to everything with weight 1: exact.

    As ``exact.log_z_of_one_expert``.
    """
    return (W.square().sum((0, 2, 3)) / (W.shape[3] + 2)).log1p()


@torch.no_grad()
def frozen_log_likelihood(encoder: CapsuleEncoder, x: Float[Tensor, "B I e"]) -> Float[Tensor, "B"] | None:
    """log P(x) under the model that has the couplings of x everywhere: exact, in nats above the uniform density.

    It is known where one capsule takes every coupling, and None elsewhere. Every winner has a Z of its own, so this is
    not the logarithm of one density; it is what eq. 18 as printed climbs.
    """
    coupling = torch.cat([encoder.couplings(part)[:, 0] for part in x.split(_PART)])
    winner = coupling.argmax(1)
    if not torch.equal(coupling, one_hot(winner, coupling.shape[1]).to(coupling)):
        return None
    F = torch.cat([rerouted(encoder)(part) for part in x.split(_PART)])
    return -F - log_z_of_each_expert(encoder.W)[winner]


_PART = 250  # rows of x at once, to bound memory


def anneal_rbm(
    rbm: RBM, base: RBM, v: Float[Tensor, "K V"], temperatures: Sequence[float], *, rng: torch.Generator
) -> Annealed:
    """``anneal`` through the RBMs ``between`` two, in Gibbs steps.  Salakhutdinov2008.

    From 0 to 1, with ``v`` drawn from ``base``, the mean weight estimates Z of ``rbm`` over Z of ``base``. Their
    base-rate RBM is ``new_rbm(images, H, deviation=0)``; draws and log Z of it: ``independent_pixels``.
    """

    def log_ratio(v, a, b):
        return rbms.free_energy(between(base, rbm, a), v) - rbms.free_energy(between(base, rbm, b), v)

    return anneal(v, temperatures, log_ratio, lambda v, beta: rbms.gibbs_step(between(base, rbm, beta), v, rng=rng))


def independent_pixels(
    base: RBM, count: int, *, rng: torch.Generator
) -> tuple[Float[Tensor, "count V"], Float[Tensor, ""]]:
    """Draws and log Z of an RBM without weights, exact.  Raises ValueError if it has weights."""
    if base.w.any():
        raise ValueError("this RBM has weights, so its Z is unknown; make one with new_rbm(..., deviation=0)")
    v = torch.bernoulli(base.b.sigmoid().expand(count, -1), generator=rng)
    return v, softplus(base.b).sum() + softplus(base.c).sum()


def between(base: RBM, rbm: RBM, beta: float) -> RBM:
    """The RBM whose energy is (1 - β) times that of ``base`` plus β times that of ``rbm``."""
    return RBM(*(torch.lerp(first, second, beta) for first, second in zip(base, rbm)))


def ladder(steps: int, *, power: float = 1.0) -> list[float]:
    """Inverse temperatures from 0 to 1 in ``steps`` steps, equal ones, or with a power above 1 shorter towards 1."""
    return (1 - (1 - np.linspace(0, 1, steps + 1)) ** power).tolist()
