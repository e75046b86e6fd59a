"""EM routing of matrix capsules: an upper capsule's pose is the mean of the votes assigned to it.  Hinton2018.

Axes: lower capsules i, upper capsules j, the H = 16 numbers h of a pose (a 4 x 4 matrix, row by row). Upper capsules of
J types stand at each of P positions p; I lower capsules vote there. The N lower capsules of an image are ordered by
row, column and type. All functions here are pure; the network is in capsnb.baselines.matrix_capsules.
"""

from math import pi
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from capsnb.checks import require_shape

MATRIX = 4, 4
POSE = 16
_LEAST_VARIANCE = 1e-6  # of votes that agree fully, as those of a single lower capsule do; ours
_LEAST_DATA = 1e-8  # of a lower capsule, spread evenly: where none is assigned the pose is the mean vote; ours


class Round(NamedTuple):
    """What one iteration ends with: assignments of lower to upper capsules, and distances of votes from the poses."""

    assignments: Float[Tensor, "B P I J"]
    distances: Float[Tensor, "B P I J"]


class Routed(NamedTuple):
    """Poses and activations of the upper capsules, the activations' logits, and every round if they were asked for."""

    poses: Float[Tensor, "B P J H"]
    activations: Float[Tensor, "B P J"]
    logits: Float[Tensor, "B P J"]
    history: tuple[Round, ...]


class Gaussians(NamedTuple):
    """What the M-step says of every upper capsule: where its votes lie, how far from there, and whether it is there."""

    mean: Float[Tensor, "B P J H"]
    variance: Float[Tensor, "B P J H"]
    squares: Float[Tensor, "B P J I H"]  # of the votes' differences from the mean
    logit: Float[Tensor, "B P J"]  # its sigmoid is the activation


def em_routing(
    votes: Float[Tensor, "B P I J H"],
    activations: Float[Tensor, "B N"],
    beta_u: Float[Tensor, "J"],
    beta_a: Float[Tensor, "J"],
    *,
    children: Int[Tensor, "P I"] | None = None,
    rounds: int = 3,
    final_lambda: float = 0.01,
    cost_scale: float = 1.0,
    history: bool = False,
) -> Routed:
    """Fit a Gaussian to the votes for every upper capsule, and share every lower capsule among those that explain it.

    ``children`` numbers the lower capsules that vote at every position; without it there is one position and all vote.
    Each lower capsule is shared among all upper capsules that see it, at all positions. ``beta_u``, ``beta_a``: the
    price of coding a number of a vote, and that of not being there, in nats; ``cost_scale`` multiplies the first.
    ``history`` gives every round, without gradient. Votes must lie within 1e12. Raises ValueError for votes of another
    shape than the rest has, and for rounds < 1.  Hinton2018, procedure 1 (the slides write beta_u as beta_v).
    """
    if children is None:
        children = torch.arange(activations.shape[1], device=votes.device).unsqueeze(0)
    shape = len(activations), *children.shape, len(beta_u), None
    require_shape(votes, shape, "votes", "[batch, positions, lower, upper, numbers]")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, expected at least 1")
    votes = votes.transpose(2, 3).contiguous()
    present = activations[:, children].unsqueeze(2)
    parents = torch.bincount(children.flatten(), minlength=activations.shape[1])[children] * votes.shape[2]
    shares, steps = (1 / parents.to(votes)).unsqueeze(1).expand(votes.shape[:4]), []
    for done in range(rounds):
        temperature = inverse_temperature(done, final_lambda)
        found = m_step(shares * present, votes, beta_u, beta_a, temperature, cost_scale)
        if history or done + 1 < rounds:
            shares = e_step(found, children, activations.shape[1])
        if history:
            distances = found.squares.detach().sum(-1).sqrt()
            steps.append(Round(shares.detach().transpose(2, 3), distances.transpose(2, 3)))
    return Routed(found.mean, found.logit.sigmoid(), found.logit, tuple(steps))


def inverse_temperature(done: int, final_lambda: float) -> float:
    """Lambda of the round after ``done`` others: it rises slowly towards ``final_lambda``, as the authors had it."""
    return final_lambda * (1 - 0.95 ** (done + 1))


def m_step(
    data: Float[Tensor, "B P J I"],
    votes: Float[Tensor, "B P J I H"],
    beta_u: Float[Tensor, "J"],
    beta_a: Float[Tensor, "J"],
    temperature: float,
    cost_scale: float,
) -> Gaussians:
    """Mean and variance of the votes for every upper capsule, each counted as far as its ``data`` say.  Hinton2018."""
    total = data.sum(-1)
    weights = ((data + _LEAST_DATA / data.shape[-1]) / (total + _LEAST_DATA).unsqueeze(-1)).unsqueeze(-2)
    mean = weights @ votes
    squares = (votes - mean).square()
    variance = (weights @ squares).squeeze(-2).clamp_min(_LEAST_VARIANCE)
    cost = cost_scale * total * (beta_u * votes.shape[-1] + variance.log().sum(-1) / 2)
    return Gaussians(mean.squeeze(-2), variance, squares, temperature * (beta_a - cost))


def e_step(found: Gaussians, children: Int[Tensor, "P I"], count: int) -> Float[Tensor, "B P J I"]:
    """How much of every lower capsule each upper capsule explains, in logarithms until the end.  Hinton2018."""
    exponent = (found.squares @ (0.5 / found.variance).unsqueeze(-1)).squeeze(-1)
    log_p = -exponent - (2 * pi * found.variance).log().sum(-1, keepdim=True) / 2
    return share_out(F.logsigmoid(found.logit).unsqueeze(-1) + log_p, children, count)


def share_out(
    logits: Float[Tensor, "B P J I"], children: Int[Tensor, "P I"], count: int
) -> Float[Tensor, "B P J I"]:
    """A softmax, for each of ``count`` lower capsules, over the upper capsules of all types and positions seeing it.

    First over the types at a position, then over positions: huge logits have shares that sum to 1 all the same.
    """
    places, index = logits.logsumexp(2).flatten(1), children.flatten()
    none = places.new_full((len(places), count), -torch.inf)
    most = none.scatter_reduce(1, index.expand_as(places), places.detach(), "amax")[:, index]
    weights = (places - most).exp()
    sums = torch.zeros_like(none).index_add(1, index, weights)[:, index]
    return logits.softmax(2) * (weights / sums).unflatten(1, children.shape).unsqueeze(2)


def receptive_fields(across: int, kernel: int, stride: int, types: int) -> Int[Tensor, "P I"]:
    """The numbers of the lower capsules, ``types`` at each of ``across`` squared positions, that each position sees."""
    numbers = torch.arange(across * across * types).view(across, across, types)
    windows = numbers.unfold(0, kernel, stride).unfold(1, kernel, stride)  # row, column, type, down, right
    return windows.permute(0, 1, 3, 4, 2).flatten(2).flatten(0, 1)


def pose_votes(
    poses: Float[Tensor, "B P I H"], W: Float[Tensor, "I J rows columns"]
) -> Float[Tensor, "B P I J H"]:
    """The matrix product of every lower capsule's pose and its W for every type of upper capsule."""
    products = torch.einsum("bpixy,ijyz->bpjixz", poses.unflatten(-1, MATRIX), W)
    return products.flatten(-2).transpose(2, 3)  # the order in which routing reads it


def coordinates(across: int, types: int) -> Float[Tensor, "N H"]:
    """What coordinate addition adds to votes: row and column, in [0, 1], to the last column's first two numbers."""
    centres = (torch.arange(across) + 0.5) / across
    added = torch.zeros(across, across, types, *MATRIX)
    added[..., 0, -1] = centres.view(-1, 1, 1)
    added[..., 1, -1] = centres.view(-1, 1)
    return added.view(-1, POSE)
